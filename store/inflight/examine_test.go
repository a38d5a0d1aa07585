package inflight_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/redis/go-redis/v9"

	"github.com/countersign-dev/countersign/store/inflight"
	"github.com/countersign-dev/countersign/store/inflight/redistest"
)

// A user who has the documented rules is told that nothing is missing, and each
// command that they lack is named.
func TestExamineNamesEachCommandThatTheUserMayNotUse(t *testing.T) {
	rules := inflight.ACLRules(inflight.DefaultPrefix)
	srv := redistest.StartACL(t, "broker", "pw", rules)
	admin := redis.NewClient(&redis.Options{Addr: srv.Addr()})
	defer func() { _ = admin.Close() }()
	s := open(t, inflight.Options{Addrs: []string{srv.Addr()}, Credentials: broker})
	for _, command := range append([]string{""}, commandsOf(rules)...) {
		if slices.Contains([]string{"ping", "select"}, command) {
			continue // without them there is no connection
		}
		without := rules
		if command != "" {
			without = strings.Replace(rules+" ", " +"+command+" ", " ", 1)
		}
		args := []any{"ACL", "SETUSER", "broker", "reset", "on", ">pw"}
		for _, rule := range strings.Fields(without) {
			args = append(args, rule)
		}
		check(t, admin.Do(t.Context(), args...).Err())
		h, err := s.Examine(t.Context())
		if err != nil {
			t.Fatalf("without %q: %v", command, err)
		}
		var want []string
		if command != "" {
			want = []string{strings.ToUpper(command)}
		}
		if !slices.Equal(h.Refused, want) {
			t.Errorf("without %q: %v are refused", command, h.Refused)
		}
		if !h.Unknown {
			t.Error("a user without INFO is told of the server's memory")
		}
	}
}

func commandsOf(rules string) (list []string) {
	for _, r := range strings.Fields(rules) {
		if c, ok := strings.CutPrefix(r, "+"); ok && !strings.HasPrefix(c, "@") {
			list = append(list, c)
		}
	}
	return list
}
