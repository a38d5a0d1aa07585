package scopes

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
)

func TestThePolicySeesTheWholeAsk(t *testing.T) {
	// Each line is one field of the input; all must hold.
	s := demoSet(t, `package countersign

deny contains "seen" if {
	input.agent == "spiffe://demo/orchestrator/demo/run/run-1/step/step-1"
	input.orchestrator == "demo"
	input.run == "run-1"
	input.step == "step-1"
	input.scope == "pki:service"
	input.target == "pki://demo.internal/billing"
	input.sensitivity == "low"
	input.engine == "pki"
	input.params.service == "billing"
	input.subject == {"id": "user:u-1", "proved": true}
	input.ttl_seconds == 120
	input.delivery == "wrapped"
	input.time == "2026-03-02T12:00:00Z"
	time.weekday(time.parse_rfc3339_ns(input.time)) == "Monday"
	time.clock([time.parse_rfc3339_ns(input.time), "Europe/Berlin"])[0] == 13
}
`)
	a := ask("pki:service")
	a.Params, a.Subject, a.SubjectProved, a.TTL, a.Delivery = map[string]any{"service": "billing"}, "user:u-1", true, "2m", "wrapped"
	v := decide(t, s, a)
	if v.Outcome != store.Deny || !slices.Equal(v.Reasons, []string{"seen"}) || v.Err != nil {
		t.Errorf("got %s %q %v", v.Outcome, v.Reasons, v.Err)
	}
	if v.Grant.Path != "pki/issue/service" {
		t.Error("a denial does not tell what was asked for")
	}
}

func TestThePolicyMayDenyDemandApprovalAndShortenButNeverWiden(t *testing.T) {
	s := demoSet(t, `package countersign

deny contains "no weekends" if input.run == "weekend"
deny contains "and no nights" if input.run == "weekend"
approval contains "nobody stands behind it" if input.run == "alone"
shorten contains {"ttl": "2m", "reason": "a new run"} if startswith(input.run, "short")
shorten contains {"ttl": "1m", "reason": "a very new run"} if input.run == "short-2"
shorten contains {"ttl": "1h", "reason": "no effect"} if input.run == "short-2"
`)
	for _, c := range []struct {
		run, scope string
		outcome    store.Outcome
		reasons    []string
		ttl        time.Duration
	}{
		{"run-1", "vault:demo-read", store.Allow, []string{}, 5 * time.Minute},
		{"weekend", "vault:demo-read", store.Deny, []string{"and no nights", "no weekends"}, 5 * time.Minute},
		{"weekend", "vault:demo-admin", store.Deny, []string{"and no nights", "no weekends"}, 5 * time.Minute},
		{"alone", "vault:demo-read", store.NeedsApproval, []string{"needs approval", "nobody stands behind it"}, 5 * time.Minute},
		{"alone", "vault:demo-admin", store.NeedsApproval, []string{"needs approval", "nobody stands behind it"}, 5 * time.Minute},
		{"short-1", "vault:demo-read", store.Allow, []string{"a new run"}, 2 * time.Minute},
		{"short-2", "vault:demo-read", store.Allow, []string{"a very new run", "a new run"}, time.Minute},
		{"short-1", "vault:demo-admin", store.NeedsApproval, []string{"needs approval", "a new run"}, 2 * time.Minute},
	} {
		a := ask(c.scope)
		a.Run, a.Reason = c.run, "OPS-1"
		v := decide(t, s, a)
		if v.Outcome != c.outcome || !slices.Equal(v.Reasons, c.reasons) || time.Duration(v.Grant.TTL) != c.ttl {
			t.Errorf("%s %s: got %s %q %s", c.run, c.scope, v.Outcome, v.Reasons, time.Duration(v.Grant.TTL))
		}
	}
	// The shorter TTL reaches what Vault is asked for.
	a := ask("pki:service")
	a.Run = "short-1"
	if v := decide(t, s, a); v.Grant.Data["ttl"] != "120s" {
		t.Errorf("the certificate would live %s", v.Grant.Data["ttl"])
	}
}

func TestAPolicyThatFailsDenies(t *testing.T) {
	for name, rule := range map[string]string{
		"a denial that is a number":    `deny contains x if x := count(input.run)`,
		"a denial that is empty":       `deny contains trim(input.run, input.run)`,
		"a denial of two lines":        `deny contains sprintf("%s\nx", [input.run])`,
		"a denial too long":            `deny contains concat("", [input.run | numbers.range(1, 300)[_]; true])` + "\n" + `deny contains concat("", [x | some i in numbers.range(1, 300); x := sprintf("%d", [i])])`,
		"too many denials":             `deny contains sprintf("%d", [i]) if some i in numbers.range(1, 17)`,
		"a demand that is an object":   `approval contains {"why": input.run}`,
		"a shortening without reason":  `shorten contains {"ttl": "1m"}`,
		"a shortening with more":       `shorten contains {"ttl": "1m", "reason": "x", "max": input.run}`,
		"a shortening that is text":    `shorten contains "1m"`,
		"a shortening to a number":     `shorten contains {"ttl": count(input.run), "reason": "x"}`,
		"a shortening to zero":         `shorten contains {"ttl": "0s", "reason": "x"}`,
		"a shortening below zero":      `shorten contains {"ttl": "-1m", "reason": "x"}`,
		"a shortening to nonsense":     `shorten contains {"ttl": input.run, "reason": "x"}`,
		"a function that fails":        `deny contains "x" if time.parse_rfc3339_ns(input.run) > 0`,
		"two rules that do not agree":  "f(x) := 1 if x == input.run\nf(x) := 2 if x == input.run\ndeny contains \"x\" if f(input.run) == 3",
		"a computation without an end": `deny contains "x" if { some a in numbers.range(1, 3000); some b in numbers.range(1, 3000); a * b == 0 - count(input.run) }`,
	} {
		t.Run(name, func(t *testing.T) {
			if name == "a denial too long" {
				_, rule, _ = strings.Cut(rule, "\n")
			}
			v := decide(t, demoSet(t, "package countersign\n\n"+rule+"\n"), ask("vault:demo-read"))
			if v.Outcome != store.Deny || !errors.Is(v.Err, ErrPolicy) || !slices.Equal(v.Reasons, []string{"the policy could not be evaluated"}) {
				t.Errorf("got %s %q %v", v.Outcome, v.Reasons, v.Err)
			}
		})
	}
}

func TestACallerWhoLeavesIsNotDenied(t *testing.T) {
	s := demoSet(t, "package countersign\ndeny contains \"x\" if input.run == \"x\"\n")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if v, err := s.Decide(ctx, ask("vault:demo-read")); !errors.Is(err, context.Canceled) {
		t.Errorf("got %+v, %v", v, err)
	}
}

func TestAPolicyWithAMistakeDoesNotLoad(t *testing.T) {
	var b strings.Builder
	for _, c := range []struct{ name, policy string }{
		{"empty", ""},
		{"not Rego", "deny everything"},
		{"old Rego", "package countersign\n\ndeny[msg] { msg := \"x\" }\n"},
		{"another package", "package main\n\ndeny contains \"x\" if input.run == \"x\"\n"},
		{"a package below", "package countersign.rules\n\ndeny contains \"x\" if input.run == \"x\"\n"},
		{"says nothing", "package countersign\n\ndenied contains \"x\" if input.run == \"x\"\n"},
		{"deny as a value", "package countersign\n\ndeny := true if input.run == \"x\"\n"},
		{"deny with a default", "package countersign\n\ndefault deny := false\n\ndeny if input.run == \"x\"\n"},
		{"deny as an object", "package countersign\n\ndeny.why contains \"x\" if input.run == \"x\"\n"},
		{"shorten as a value", "package countersign\n\nshorten := \"1m\"\n"},
		{"a misspelt field", "package countersign\n\ndeny contains \"x\" if input.orchestrater == \"x\"\n"},
		{"a misspelt field within", "package countersign\n\ndeny contains \"x\" if not input.subject.prooved\n"},
		{"the network", "package countersign\n\ndeny contains \"x\" if http.send({\"method\": \"get\", \"url\": \"http://localhost\"}).status_code == 200\n"},
		{"the resolver", "package countersign\n\ndeny contains \"x\" if count(net.lookup_ip_addr(\"localhost\")) > 0\n"},
		{"the environment", "package countersign\n\ndeny contains opa.runtime().env.HOME if true\n"},
		{"the clock", "package countersign\n\ndeny contains \"x\" if time.now_ns() > 0\n"},
		{"chance", "package countersign\n\ndeny contains \"x\" if rand.intn(\"a\", 2) == 1\n"},
		{"an unused variable", "package countersign\n\ndeny contains \"x\" if { y := input.run }\n"},
		{"an unknown function", "package countersign\n\ndeny contains \"x\" if allowed(input.run)\n"},
		{"a loop", "package countersign\n\ndeny contains \"x\" if a\n\na if b\n\nb if a\n"},
		{"data that is not there", "package countersign\n\ndeny contains \"x\" if data.seen[input.run]\n"},
		{"a misspelt rule", "package countersign\n\nnight if input.run == \"x\"\n\ndeny contains \"x\" if data.countersign.nigth\n"},
		{"too large", "package countersign\n\ndeny contains \"x\" if input.run == \"x\"\n" + strings.Repeat("#\n", maxFile/2)},
	} {
		_, err := Parse("demo.yaml", Demo(nil), "policy.rego", []byte(c.policy))
		if err == nil {
			t.Errorf("%s: it loads", c.name)
		}
		fmt.Fprintf(&b, "# %s\n%v\n\n", c.name, err)
	}
	golden(t, "policy-errors.txt", b.String())
}

func TestManyAsksAreDecidedAtOnce(t *testing.T) {
	s := demoSet(t, "package countersign\n\ndeny contains sprintf(\"run %s\", [input.run]) if input.run != \"\"\n")
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			a := ask("vault:demo-read")
			a.Run = fmt.Sprintf("run-%d", i)
			for range 50 {
				v, err := s.Decide(context.Background(), a)
				if err != nil || !slices.Equal(v.Reasons, []string{"run " + a.Run}) {
					t.Errorf("%s is told %+v, %v", a.Run, v, err)
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkDecide(b *testing.B) {
	for name, policy := range map[string]string{
		"catalogue": "",
		"policy": `package countersign

night if {
	[hour, _, _] := time.clock(time.parse_rfc3339_ns(input.time))
	hour < 6
}

deny contains "no secrets at night" if { night; input.sensitivity != "low" }
deny contains "unknown subject" if { input.sensitivity == "critical"; not input.subject.proved }
approval contains "a new run" if startswith(input.run, "new-")
shorten contains {"ttl": "1m", "reason": "not proved"} if { not input.subject.proved; input.ttl_seconds > 60 }
`} {
		b.Run(name, func(b *testing.B) {
			s := demoSet(b, policy)
			a := ask("orders-db:read")
			b.ReportAllocs()
			for b.Loop() {
				if _, err := s.Decide(context.Background(), a); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
