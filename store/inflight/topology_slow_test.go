//go:build slow

package inflight_test

import (
	"os"
	"path/filepath"
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

func TestAClusterHoldsWhatOneServerDoes(t *testing.T) {
	c := redistest.StartCluster(t, users(t, inflight.ACLRules(inflight.DefaultPrefix)+" "+inflight.ClusterACLRules)...)
	exercise(t, open(t, inflight.Options{Addrs: c.Addrs()[:1], Cluster: true, Username: "broker", Password: "pw"}))
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
}

func TestSentinelsNameTheMasterAlsoAfterOneWasKilled(t *testing.T) {
	s := redistest.StartSentinel(t, "watch", users(t, inflight.ACLRules(inflight.DefaultPrefix))...)
	o := inflight.Options{Addrs: s.Addrs(), SentinelMaster: "state", SentinelUsername: "watcher", SentinelPassword: "watch", Username: "broker", Password: "pw"}
	st := open(t, o)
	exercise(t, st)
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
	again, err := st.Since(t.Context())
	check(t, err)
	if !again.Equal(since) {
		t.Errorf("since %v before, %v after: the replica did not have it all", since, again)
	}
}
