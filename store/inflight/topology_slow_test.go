//go:build slow

package inflight_test

import (
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/countersign-dev/countersign/store/inflight"
	"github.com/countersign-dev/countersign/store/inflight/redistest"
)

func users(t *testing.T, rules string) []string {
	file := filepath.Join(t.TempDir(), "users.acl")
	check(t, os.WriteFile(file, []byte("user default on nopass ~* &* +@all\nuser broker on >pw "+rules+"\n"), 0o600))
	return []string{"--aclfile", file}
}

// renewed is the user "broker", whose password changes.
type renewed struct {
	mu       sync.Mutex
	password string
}

func (r *renewed) current() (username, password string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return "broker", r.password
}

// renew gives the user another password on all nodes and cuts its connections:
// st must go on with the new one.
func (r *renewed) renew(t *testing.T, st *inflight.Store, nodes ...*redistest.Server) {
	t.Helper()
	for _, n := range nodes {
		admin := redis.NewClient(&redis.Options{Addr: n.Addr()})
		check(t, admin.Do(t.Context(), "ACL", "SETUSER", "broker", "resetpass", ">renewed").Err())
		check(t, admin.Do(t.Context(), "CLIENT", "KILL", "USER", "broker").Err())
		_ = admin.Close()
	}
	if err := st.Put(t.Context(), request("req_old", time.Now().Add(time.Minute))); err == nil {
		t.Error("the old password is taken")
	}
	r.mu.Lock()
	r.password = "renewed"
	r.mu.Unlock()
	for _, id := range []string{"req_0", "req_1", "req_2", "req_3", "req_4", "req_5"} {
		check(t, st.Put(t.Context(), request(id, time.Now().Add(time.Minute))))
	}
}

func TestAClusterHoldsWhatOneServerDoes(t *testing.T) {
	c := redistest.StartCluster(t, users(t, inflight.ACLRules(inflight.DefaultPrefix)+" "+inflight.ClusterACLRules)...)
	user := &renewed{password: "pw"}
	st := open(t, inflight.Options{Addrs: c.Addrs()[:1], Cluster: true, Credentials: user.current})
	exercise(t, st)
	for _, n := range c.Nodes {
		admin := redis.NewClient(&redis.Options{Addr: n.Addr()})
		log, err := admin.Do(t.Context(), "ACL", "LOG").Slice()
		check(t, err)
		if len(log) > 0 {
			t.Errorf("a node refused the broker: %v", log)
		}
		if keys := admin.DBSize(t.Context()).Val(); keys == 0 {
			t.Error("a node holds nothing")
		}
		_ = admin.Close()
	}
	user.renew(t, st, c.Nodes...)
}

func TestSentinelsNameTheMasterAlsoAfterOneWasKilled(t *testing.T) {
	s := redistest.StartSentinel(t, "watch", users(t, inflight.ACLRules(inflight.DefaultPrefix))...)
	user := &renewed{password: "pw"}
	o := inflight.Options{Addrs: s.Addrs(), SentinelMaster: "state", SentinelUsername: "watcher", SentinelPassword: "watch", Credentials: user.current}
	st := open(t, o)
	exercise(t, st)
	user.renew(t, st, s.Master, s.Replica)
	since, err := st.Since(t.Context())
	check(t, err)
	replica := redis.NewClient(&redis.Options{Addr: s.Replica.Addr()})
	defer func() { _ = replica.Close() }()
	for end := time.Now().Add(10 * time.Second); replica.Exists(t.Context(), "countersign:generation", "countersign:set:live:all").Val() == 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the replica has nothing")
		}
	}
	s.Master.Stop()
	began := time.Now()
	if _, err := st.Since(t.Context()); err == nil {
		t.Error("a killed master answers")
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if err := st.Put(t.Context(), request("req_after", time.Now().Add(time.Minute))); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the replica never took over")
		}
	}
	t.Logf("writes are taken again %v after the master was killed", time.Since(began).Round(time.Millisecond))
	// Another Sentinel may still name the one that was killed.
	again, err := st.Since(t.Context())
	for end := time.Now().Add(10 * time.Second); err != nil && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		again, err = st.Since(t.Context())
	}
	check(t, err)
	if !again.Equal(since) {
		t.Errorf("since %v before, %v after: the replica did not have it all", since, again)
	}
}
