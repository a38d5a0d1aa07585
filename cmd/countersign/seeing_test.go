package main

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	otlptrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"
)

// scrape reads the metrics at addr, and returns them as they are, too.
func scrape(t *testing.T, addr string) (map[string]*dto.MetricFamily, string) {
	t.Helper()
	res, err := http.Get("http://" + addr + "/metrics")
	must(t, err)
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	must(t, err)
	p := expfmt.NewTextParser(model.LegacyValidation)
	families, err := p.TextToMetricFamilies(bytes.NewReader(b))
	must(t, err)
	return families, string(b)
}

// sample is the sum of a metric's values (of a histogram: how many), over all
// whose labels are among those given as name=value.
func sample(f *dto.MetricFamily, labels ...string) (sum float64) {
	for _, m := range f.GetMetric() {
		have := map[string]bool{}
		for _, l := range m.GetLabel() {
			have[l.GetName()+"="+l.GetValue()] = true
		}
		if slices.ContainsFunc(labels, func(l string) bool { return !have[l] }) {
			continue
		}
		sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
	}
	return sum
}

// described is a registry that keeps what is registered.
type described struct {
	*prometheus.Registry
	descs []*prometheus.Desc
}

func (d *described) MustRegister(cs ...prometheus.Collector) {
	for _, c := range cs {
		ch := make(chan *prometheus.Desc)
		go func() { c.Describe(ch); close(ch) }()
		for desc := range ch {
			d.descs = append(d.descs, desc)
		}
	}
	d.Registry.MustRegister(cs...)
}

var descText = regexp.MustCompile(`^Desc\{fqName: "([^"]*)", help: "((?:[^"\\]|\\.)*)", .*variableLabels: \{([^}]*)\}\}$`)

// metric is one that a process tells.
type metric struct{ name, help, labels string }

// ourMetrics are the metrics of each side, sorted by name, but for those of the
// libraries about Go and the process.
func ourMetrics(t *testing.T) (both, machines, people []metric) {
	list := func(register func(*metrics)) (own []metric) {
		d := &described{Registry: prometheus.NewRegistry()}
		register(newMetrics(d))
		for _, desc := range d.descs {
			m := descText.FindStringSubmatch(desc.String())
			if m == nil {
				t.Fatalf("not understood: %s", desc)
			}
			if strings.HasPrefix(m[1], "countersign_") {
				own = append(own, metric{m[1], m[2], strings.ReplaceAll(m[3], ",", ", ")})
			}
		}
		slices.SortFunc(own, func(a, b metric) int { return strings.Compare(a.name, b.name) })
		return own
	}
	both = list(func(*metrics) {})
	without := func(l []metric) []metric {
		return slices.DeleteFunc(l, func(m metric) bool { return slices.Contains(both, m) })
	}
	machines = without(list(func(m *metrics) { newMachineMetrics(m) }))
	people = without(list(func(m *metrics) { newPeopleMetrics(m) }))
	return both, machines, people
}

func TestTheReferenceOfMetricsIsWhatTheCodeSays(t *testing.T) {
	const file = "../../docs/metrics.md"
	both, machines, people := ourMetrics(t)
	var b strings.Builder
	b.WriteString(`# Metrics

Made from the code by ` + "`go generate ./cmd/countersign`" + `. How to have them served: [operations.md](operations.md#seeing-what-it-does). Alert rules and a dashboard over them: [monitoring/](monitoring/).

No label holds what a caller chose: no run, step, person, request, reason or token. Scopes are named as in the catalogue in force; any other is ` + "`other`" + `. A histogram (` + "`_seconds`, `commit_entries`" + `) has ` + "`_bucket`, `_sum` and `_count`" + `. Beside these there are the ` + "`go_*` and `process_*`" + ` of the Prometheus library.
`)
	table := func(title string, list []metric) {
		fmt.Fprintf(&b, "\n## %s\n\n| metric | labels | meaning |\n|---|---|---|\n", title)
		for _, m := range list {
			fmt.Fprintf(&b, "| `%s` | %s | %s |\n", m.name, m.labels, m.help)
		}
	}
	table("Both sides", both)
	table("The broker and its gateways (`countersign serve`)", machines)
	table("The recorder (`countersign record`)", people)
	if *update {
		must(t, os.WriteFile(file, []byte(b.String()), 0o644))
	}
	got, err := os.ReadFile(file)
	must(t, err)
	if string(got) != b.String() {
		t.Error("docs/metrics.md is not what the code says: run `go generate ./cmd/countersign`")
	}
}

// TestEveryMetricMovesInARealFlowAndTellsNoSecret runs both sides in one process
// with a Vault, has steps ask, people decide and an agent use the access path,
// and then looks at each metric and at the log.
func TestEveryMetricMovesInARealFlowAndTellsNoSecret(t *testing.T) {
	dir, addr := t.TempDir(), freeAddr(t)
	r := startDev(t, dir, "--metrics", addr)
	ci := r.Orchestrators[0].Token
	secrets := []string{"planted-reason", "planted-subject", "planted-run", "planted-step", "planted-token", "planted-query", "planted-path"}
	ask := func(step, scope string) (int, held) {
		t.Helper()
		status, body := r.call(ci, "POST", r.API+"/steps/"+step+"/credential",
			`{"run":"planted-run","scope":"`+scope+`","reason":"planted-reason","subject":"planted-subject"}`)
		var c held
		must(t, json.Unmarshal([]byte(body), &c))
		if c.Credential.Token != "" {
			secrets = append(secrets, c.Credential.Token)
		}
		return status, c
	}
	want := func(got, want int) {
		t.Helper()
		if got != want {
			t.Fatalf("status %d, want %d", got, want)
		}
	}
	// Nothing has a value that it would have without this flow.
	before, _ := scrape(t, addr)

	status, _ := ask("planted-step", "identity:step")
	want(status, 201)
	status, _ = ask("planted-step", "vault:demo-read")
	want(status, 201)
	status, _ = ask("planted-step", "planted-token")
	want(status, 422)
	status, _ = ask("planted-step", "vault:demo-write")
	want(status, 202)
	_, body := r.call(r.Approvers[0].Token, "GET", r.Recorder+"/approvals", "")
	id := regexp.MustCompile(`apr_[0-9a-f]+`).FindString(body)
	mid, _ := scrape(t, addr)
	if n := sample(mid["countersign_pending_requests"]); n != 1 {
		t.Errorf("%v requests are pending at the broker, want 1", n)
	}
	if n := sample(mid["countersign_ledger_requests"], "state=pending"); n != 1 {
		t.Errorf("%v requests are pending on record, want 1", n)
	}
	status, body = r.call(r.Approvers[0].Token, "POST", r.Recorder+"/approvals/"+id+"/decision", `{"decision":"approve","reason":"planted-reason"}`)
	if status != 200 {
		t.Fatalf("decision: %d %s", status, body)
	}
	status, _ = ask("planted-step", "vault:demo-write")
	want(status, 201)
	status, c := ask("planted-use", "http:demo")
	want(status, 201)
	status, _ = r.call(c.Credential.Token, "GET", r.Gateway.HTTP+"/", "")
	want(status, 200)
	status, _ = r.call(c.Credential.Token, "GET", r.Gateway.HTTP+"/planted-path?q=planted-query", "")
	want(status, 403)
	status, _ = r.call("planted-token", "GET", r.Gateway.HTTP+"/", "")
	want(status, 401)
	status, _ = r.call(ci, "DELETE", r.API+"/steps/planted-step/credential?run=planted-run", "")
	want(status, 200)
	status, _ = r.call("planted-token", "GET", r.Recorder+"/history", "")
	want(status, 401)

	after, text := scrape(t, addr)
	for _, m := range []struct {
		name   string
		labels []string
		least  float64 // by how much it has grown, of a gauge what it is
	}{
		{"countersign_build_info", nil, 1},
		{"countersign_http_requests_total", []string{"listener=api", "method=POST", "route=/steps/{step}/credential", "code=201"}, 4},
		{"countersign_http_requests_total", []string{"listener=recorder", "route=/history", "code=401"}, 1},
		{"countersign_http_request_seconds", []string{"listener=api", "route=/steps/{step}/credential"}, 6},
		{"countersign_problems_total", []string{"listener=api", "problem=unknown-scope"}, 1},
		{"countersign_problems_total", []string{"listener=recorder", "problem=unauthenticated"}, 1},
		{"countersign_credential_requests_total", []string{"scope=vault:demo-read", "outcome=issued"}, 1},
		{"countersign_credential_requests_total", []string{"scope=vault:demo-write", "outcome=pending"}, 1},
		{"countersign_credential_requests_total", []string{"scope=other", "outcome=unknown-scope"}, 1},
		{"countersign_mint_seconds", []string{"engine=identity", "result=ok"}, 1},
		{"countersign_mint_seconds", []string{"engine=token", "result=ok"}, 2},
		{"countersign_mint_seconds", []string{"engine=kv", "result=ok"}, 1},
		{"countersign_revoke_seconds", []string{"result=ok"}, 2},
		{"countersign_append_seconds", []string{"result=ok"}, 9},
		{"countersign_vault_request_seconds", []string{"operation=auth/token/create", "code=200"}, 3},
		{"countersign_gateway_uses_total", []string{"protocol=http", "result=ok"}, 1},
		{"countersign_gateway_record_seconds", []string{"protocol=http"}, 1},
		{"countersign_gateway_refusals_total", []string{"protocol=http", "why=guard"}, 1},
		{"countersign_gateway_refusals_total", []string{"protocol=http", "why=unauthenticated"}, 1},
		{"countersign_gateway_sessions", []string{"protocol=http"}, 1},
		{"countersign_live_credentials", []string{"scope=http:demo"}, 1},
		{"countersign_follows_recorder", nil, 1},
		{"countersign_seen_entries", nil, 10},
		{"countersign_vault_login", nil, 1},
		{"countersign_entries_total", []string{"type=credential.issued"}, 4},
		{"countersign_entries_total", []string{"type=approval.decided"}, 1},
		{"countersign_entries_total", []string{"type=access.refused"}, 2},
		{"countersign_commit_seconds", []string{"result=ok"}, 9},
		{"countersign_commit_entries", nil, 9},
		{"countersign_approval_seconds", []string{"status=approved"}, 1},
		{"countersign_ledger_up", nil, 1},
		{"countersign_ledger_entries", nil, 10},
		{"countersign_published_entries", nil, 1},
		{"countersign_ledger_requests", []string{"state=live"}, 1},
		{"countersign_ledger_disk_free_bytes", nil, 1},
		{"countersign_ledger_disk_bytes", nil, 1},
		{"go_goroutines", nil, 1},
		{"process_start_time_seconds", nil, 1},
	} {
		got := sample(after[m.name], m.labels...)
		if after[m.name].GetType() != dto.MetricType_GAUGE {
			got -= sample(before[m.name], m.labels...)
		}
		if got < m.least {
			t.Errorf("%s%v is %v, want %v or more", m.name, m.labels, got, m.least)
		}
	}
	// Those that a house in order has at zero, or has not, are documented too; all
	// else must be there. TestWhatIsBehindIsMeasured has these.
	absent := []string{"countersign_witness_entries", "countersign_witness_disputes", "countersign_outbox_waiting", "countersign_siem_behind_entries"}
	both, machines, people := ourMetrics(t)
	for _, m := range slices.Concat(both, machines, people) {
		if after[m.name] == nil && !slices.Contains(absent, m.name) {
			t.Errorf("%s is documented, and not told", m.name)
		}
	}
	log, err := os.ReadFile(filepath.Join(dir, "dev.log"))
	must(t, err)
	for _, x := range slices.Concat(r.Orchestrators, r.Approvers, r.Reviewers) {
		secrets = append(secrets, x.Token)
	}
	secrets = append(secrets, r.Vault.Token)
	for _, s := range secrets {
		if strings.Contains(text, s) {
			t.Errorf("the metrics tell %q", s)
		}
		// Names of steps and runs are no secrets, and serve to find things in a log.
		if s != "planted-step" && s != "planted-run" && bytes.Contains(log, []byte(s)) {
			t.Errorf("the log tells %q", s)
		}
	}
}

// otlpCollector takes OTLP over HTTP.
type otlpCollector struct {
	*httptest.Server
	mu    sync.Mutex
	spans []*tracev1.Span
	of    map[*tracev1.Span]string // service.name
	raw   bytes.Buffer
	auth  string
}

func newCollector(t *testing.T) *otlpCollector {
	c := &otlpCollector{of: map[*tracev1.Span]string{}}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		var x otlptrace.ExportTraceServiceRequest
		if err != nil || r.URL.Path != "/v1/traces" || proto.Unmarshal(b, &x) != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.raw.Write(b)
		c.auth = r.Header.Get("X-Collector-Token")
		for _, rs := range x.ResourceSpans {
			service := ""
			for _, a := range rs.Resource.Attributes {
				if a.Key == "service.name" {
					service = a.Value.GetStringValue()
				}
			}
			for _, ss := range rs.ScopeSpans {
				for _, s := range ss.Spans {
					c.spans, c.of[s] = append(c.spans, s), service
				}
			}
		}
		w.Header().Set("Content-Type", "application/x-protobuf")
	}))
	t.Cleanup(c.Close)
	return c
}

// trace returns the spans of a trace by ID.
func (c *otlpCollector) trace(id string) map[string]*tracev1.Span {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := map[string]*tracev1.Span{}
	for _, s := range c.spans {
		if fmt.Sprintf("%x", s.TraceId) == id {
			out[fmt.Sprintf("%x", s.SpanId)] = s
		}
	}
	return out
}

func TestOneCallIsOneTraceOverBrokerVaultAndRecorder(t *testing.T) {
	otlp := newCollector(t)
	p := newPairWith(t, func(p *pair) (serve, record string) {
		p.write("otlp-headers", "X-Collector-Token: planted-header\n")
		both := fmt.Sprintf("tracing: {otlp_endpoint: %q, headers_file: %q}\n", otlp.URL, p.file("otlp-headers"))
		return both, both
	})
	const trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	req, err := http.NewRequestWithContext(t.Context(), "POST", p.url+"/steps/planted-step/credential",
		strings.NewReader(`{"run":"planted-run","scope":"vault:demo-read","reason":"planted-reason","subject":"planted-subject"}`))
	must(t, err)
	req.Header.Set("Authorization", "Bearer "+p.caller)
	req.Header.Set("Traceparent", "00-"+trace+"-"+parent+"-01")
	req.Header.Set("Tracestate", "planted=state")
	req.Header.Set("Baggage", "planted=baggage")
	res, err := p.http.Do(req)
	must(t, err)
	b, err := io.ReadAll(res.Body)
	must(t, err)
	res.Body.Close()
	var c held
	must(t, json.Unmarshal(b, &c))
	if res.StatusCode != 201 {
		t.Fatalf("%d %s", res.StatusCode, b)
	}
	// Another call, of a trace of its own, that ends badly.
	if status, _ := p.ask("no:such"); status != 422 {
		t.Fatalf("status %d", status)
	}
	// What was begun is sent before they end.
	for _, x := range []struct {
		cmd  *exec.Cmd
		done <-chan struct{}
	}{{p.broker, p.served}, {p.recorder, p.recorded}} {
		must(t, x.cmd.Process.Signal(os.Interrupt))
		<-x.done
	}
	spans := otlp.trace(trace)
	names := map[string]int{}
	services := map[string]bool{}
	for _, s := range spans {
		names[s.Name]++
		services[otlp.of[s]] = true
		up := fmt.Sprintf("%x", s.ParentSpanId)
		if spans[up] == nil && up != parent {
			t.Errorf("span %s hangs on nothing that was sent", s.Name)
		}
		if s.TraceState != "" {
			t.Errorf("span %s carries a tracestate", s.Name)
		}
	}
	t.Log(names)
	for name, n := range map[string]int{
		"POST /steps/{step}/credential": 1, "append": 2, "recorder /append": 2, "POST /append": 2,
		"mint": 1, "vault auth/token/create": 1, "activate": 1, "vault auth/token/renew-accessor": 1,
	} {
		if names[name] != n {
			t.Errorf("%d spans %q, want %d; all: %v", names[name], name, n, names)
		}
	}
	if got := slices.Sorted(maps.Keys(services)); !slices.Equal(got, []string{"countersign-record", "countersign-serve"}) {
		t.Errorf("the trace is of %v", got)
	}
	if otlp.auth != "planted-header" {
		t.Error("the collector was not sent the header of headers_file")
	}
	for _, s := range spans {
		attributes := map[string]string{}
		for _, a := range s.Attributes {
			attributes[a.Key] = a.Value.GetStringValue()
		}
		switch s.Name {
		case "POST /steps/{step}/credential":
			if attributes["countersign.scope"] != "vault:demo-read" || attributes["countersign.outcome"] != "issued" || attributes["countersign.request_id"] != res.Header.Get("X-Request-Id") {
				t.Errorf("the call's span says %v", attributes)
			}
		case "mint":
			if attributes["countersign.engine"] != "token" || attributes["countersign.request"] != c.Request {
				t.Errorf("the mint's span says %v", attributes)
			}
		}
	}
	serveLog, err := os.ReadFile(p.file("serve.log"))
	must(t, err)
	recordLog, err := os.ReadFile(p.file("record.log"))
	must(t, err)
	vaultToken, err := os.ReadFile(p.file("vault-token"))
	must(t, err)
	for _, secret := range []string{"planted-reason", "planted-subject", "planted-header", "planted=", c.Credential.Token, p.caller, p.reviewer, strings.TrimSpace(string(vaultToken))} {
		if secret == "" {
			t.Fatal("a planted secret is empty")
		}
		for what, text := range map[string][]byte{"the spans": otlp.raw.Bytes(), "the broker's log": serveLog, "the recorder's log": recordLog} {
			if bytes.Contains(text, []byte(secret)) {
				t.Errorf("%s tell %q", what, secret)
			}
		}
	}
	for _, name := range []string{"planted-step", "planted-run"} {
		if bytes.Contains(otlp.raw.Bytes(), []byte(name)) {
			t.Errorf("the spans tell %q", name)
		}
	}
}

func TestProcessesOnTheirOwnTellWhatIsTheirs(t *testing.T) {
	serve, record := freeAddr(t), freeAddr(t)
	p := newPairWith(t, func(*pair) (string, string) {
		return fmt.Sprintf("metrics_addr: %q\n", serve), fmt.Sprintf("metrics_addr: %q\n", record)
	})
	if status, body := p.ask("vault:demo-read"); status != 201 {
		t.Fatalf("%d %s", status, body)
	}
	eventually(t, "the broker has followed its own issuance", func() bool {
		got, _ := scrape(t, serve)
		return sample(got["countersign_live_credentials"], "scope=vault:demo-read") == 1
	})
	broker, _ := scrape(t, serve)
	recorder, _ := scrape(t, record)
	for name, in := range map[string]map[string]*dto.MetricFamily{"countersign_vault_login": broker, "countersign_follows_recorder": broker, "countersign_ledger_up": recorder} {
		if sample(in[name]) != 1 {
			t.Errorf("%s is %v, want 1", name, sample(in[name]))
		}
	}
	if broker["countersign_ledger_up"] != nil || recorder["countersign_vault_login"] != nil {
		t.Error("one side tells of the other's")
	}
	// Without its recorder a broker issues nothing, and says so.
	must(t, p.recorder.Process.Signal(os.Interrupt))
	<-p.recorded
	if status, _ := p.ask("identity:step"); status != 503 {
		t.Errorf("status %d without a recorder", status)
	}
	eventually(t, "the broker says that it does not follow", func() bool {
		got, _ := scrape(t, serve)
		return sample(got["countersign_follows_recorder"]) == 0 &&
			sample(got["countersign_credential_requests_total"], "outcome=ledger-unavailable") == 1 && sample(got["countersign_append_seconds"], "result=failed") > 0
	})
}

// TestWhatIsBehindIsMeasured has a recorder whose SIEM and webhook are away, whose
// witness comes to know another version of its log, and that stops everything.
func TestWhatIsBehindIsMeasured(t *testing.T) {
	serve, record := freeAddr(t), freeAddr(t)
	var up atomic.Bool
	away := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !up.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	t.Cleanup(away.Close)
	p := newPairWith(t, func(p *pair) (string, string) {
		_, log, err := readLogKey(p.file("log.key"))
		must(t, err)
		w := &witnessed{pair: p, log: log}
		w.witness = p.cli("key", "generate", "witness", "--name", "witness.example/w1", "--out", p.file("witness.key"))
		w.runWitness()
		p.write("webhook-secret", "whsec_"+base64.StdEncoding.EncodeToString(make([]byte, 32)))
		return fmt.Sprintf("metrics_addr: %q\n", serve), fmt.Sprintf(`metrics_addr: %q
witnesses: {servers: [{url: %q, key: %q, ca: %q}], withhold: true, quorum: 1}
siem: [{name: lake, http: {url: %q}}]
approval:
  base_url: http://localhost:1
  catalogue: %q
  oidc: {issuer: "http://localhost:1", client_id: recorder}
  webhooks: [{name: pager, url: %q, secret_files: [%q]}]
`, record, w.url, w.witness, p.file("ca.pem"), away.URL, p.file("catalogue.yaml"), away.URL, p.file("webhook-secret"))
	})
	becomes := func(addr, name string, ok func(float64) bool, labels ...string) {
		t.Helper()
		eventually(t, name+" moves", func() bool {
			got, _ := scrape(t, addr)
			return got[name] != nil && ok(sample(got[name], labels...))
		})
	}
	none := func(n float64) bool { return n == 0 }
	some := func(n float64) bool { return n > 0 }
	one := func(n float64) bool { return n == 1 }

	becomes(record, "countersign_outbox_waiting", none)
	becomes(record, "countersign_witness_disputes", none, "witness=witness.example/w1")
	becomes(record, "countersign_witness_entries", some, "witness=witness.example/w1")
	status, body := p.call(p.caller, "POST", p.url+"/steps/s1/credential", `{"run":"r1","scope":"vault:demo-write","reason":"OPS-1"}`)
	if status != 202 {
		t.Fatalf("%d %s", status, body)
	}
	becomes(record, "countersign_outbox_waiting", some)
	becomes(record, "countersign_siem_behind_entries", some, "destination=lake")
	up.Store(true)
	becomes(record, "countersign_siem_behind_entries", none, "destination=lake")
	becomes(record, "countersign_outbox_waiting", none)
	becomes(serve, "countersign_follow_lag_seconds", some)

	if status, body := p.call(p.reviewer, "GET", p.recorderURL+"/history/export?format=csv", ""); status != 200 {
		t.Fatalf("%d %s", status, body)
	}
	becomes(record, "countersign_exports", one, "state=ready")
	responder := p.cli("token", "create", "--file", p.file("recorder-tokens"), "--role", "responder", "--name", "responder-a")
	if status, body := p.call(responder, "POST", p.recorderURL+"/revocations", `{"all":true,"reason":"a drill"}`); status != 202 {
		t.Fatalf("%d %s", status, body)
	}
	becomes(record, "countersign_freezes", one)
	becomes(serve, "countersign_followed_freezes", one)

	// A log of the same name and key that begins anew: what the witness signed is
	// not in it, so nothing of it is published.
	must(t, p.recorder.Process.Signal(os.Interrupt))
	<-p.recorded
	conf, err := os.ReadFile(p.file("record.yaml"))
	must(t, err)
	p.write("record.yaml", strings.Replace(string(conf), p.file("ledger"), p.file("another-ledger"), 1))
	p.recorder, p.recorded = p.start(p.recorderURL, "record", "--config", p.file("record.yaml"))
	becomes(record, "countersign_witness_disputes", one, "witness=witness.example/w1")
	becomes(record, "countersign_unpublished_seconds", some)
}

// promtool runs promtool on files under docs/monitoring.
func promtool(t *testing.T, args ...string) {
	t.Helper()
	path, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is not here (Debian: apt-get install prometheus): THE ALERT RULES WERE NOT CHECKED BY IT")
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Dir = "../../docs/monitoring"
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func TestTheAlertRulesAreGoodAndFireWhenTheyShould(t *testing.T) {
	promtool(t, "check", "rules", "alerts.yaml")
	promtool(t, "test", "rules", "alerts_test.yaml")
	rules, err := os.ReadFile("../../docs/monitoring/alerts.yaml")
	must(t, err)
	tests, err := os.ReadFile("../../docs/monitoring/alerts_test.yaml")
	must(t, err)
	for _, m := range regexp.MustCompile(`(?m)alert: (\w+)`).FindAllStringSubmatch(string(rules), -1) {
		if !regexp.MustCompile(`alertname: ` + m[1] + `\n\s+exp_alerts:\n\s+- `).Match(tests) {
			t.Errorf("no test has %s fire", m[1])
		}
	}
}

var metricNames = regexp.MustCompile(`\bcountersign_[a-z_]+`)

func TestRulesAndDashboardNameMetricsThatThereAre(t *testing.T) {
	both, machines, people := ourMetrics(t)
	known := map[string]bool{}
	for _, m := range slices.Concat(both, machines, people) {
		known[m.name] = true
		for _, of := range []string{"_bucket", "_sum", "_count"} {
			known[m.name+of] = strings.HasSuffix(m.name, "_seconds") || m.name == "countersign_commit_entries"
		}
	}
	b, err := os.ReadFile("../../docs/monitoring/dashboard.json")
	must(t, err)
	var dashboard struct {
		UID    string `json:"uid"`
		Title  string `json:"title"`
		Panels []struct {
			Title   string `json:"title"`
			Type    string `json:"type"`
			Targets []struct {
				Expr string `json:"expr"`
			} `json:"targets"`
			GridPos struct {
				X int `json:"x"`
				Y int `json:"y"`
				W int `json:"w"`
				H int `json:"h"`
			} `json:"gridPos"`
		} `json:"panels"`
	}
	must(t, json.Unmarshal(b, &dashboard))
	if dashboard.UID == "" || len(dashboard.Panels) < 10 {
		t.Errorf("a dashboard %q of %d panels", dashboard.Title, len(dashboard.Panels))
	}
	rules, err := os.ReadFile("../../docs/monitoring/alerts.yaml")
	must(t, err)
	said := map[string]string{"alerts.yaml": string(rules)}
	for _, p := range dashboard.Panels {
		if p.Type == "row" {
			continue
		}
		if len(p.Targets) == 0 || p.GridPos.W == 0 || p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("panel %q shows nothing, or has no place", p.Title)
		}
		for i, target := range p.Targets {
			said[fmt.Sprintf("panel %q, %d", p.Title, i)] = target.Expr
		}
	}
	// promtool reads the dashboard's expressions as rules do.
	var parsed strings.Builder
	parsed.WriteString("groups:\n  - name: dashboard\n    rules:\n")
	i := 0
	for where, text := range said {
		for _, name := range metricNames.FindAllString(text, -1) {
			if !known[name] {
				t.Errorf("%s: there is no metric %s", where, name)
			}
		}
		if where != "alerts.yaml" {
			i++
			text = strings.NewReplacer("$__rate_interval", "5m", `$instance`, ".*").Replace(text)
			fmt.Fprintf(&parsed, "      - {record: panel_%d, expr: %q}\n", i, text)
		}
	}
	file := filepath.Join(t.TempDir(), "dashboard-rules.yaml")
	must(t, os.WriteFile(file, []byte(parsed.String()), 0o600))
	promtool(t, "check", "rules", "--lint=none", file)
}

func TestATracingSectionThatWouldSendSecretsInTheClearIsRefused(t *testing.T) {
	half, two := 0.5, 2.0
	for name, c := range map[string]*tracingConfig{
		"good":      {Endpoint: "https://collector.example.com/v1/traces", Sample: &half},
		"loopback":  {Endpoint: "http://127.0.0.1:4318"},
		"clear":     {Endpoint: "http://collector.example.com:4318"},
		"no URL":    {},
		"userinfo":  {Endpoint: "https://user:secret@collector.example.com"},
		"too often": {Endpoint: "https://collector.example.com", Sample: &two},
	} {
		if err := c.check(); (err == nil) != (name == "good" || name == "loopback") {
			t.Errorf("%s: %v", name, err)
		}
	}
	file := filepath.Join(t.TempDir(), "headers")
	for text, ok := range map[string]bool{"A: b\nC-D: e: f": true, "A b": false, "A:": false, ": b": false, "A b: c": false} {
		must(t, os.WriteFile(file, []byte(text), 0o600))
		got, err := readHeaders(file)
		if (err == nil) != ok || ok && (got["A"] != "b" || got["C-D"] != "e: f") {
			t.Errorf("%q: %v %v", text, got, err)
		}
	}
}

// A collector's token is in a header of the house's choice, which net/http would
// carry to wherever a redirect leads.
func TestSpansAndTheCollectorsTokenFollowNoRedirect(t *testing.T) {
	var taken atomic.Int64
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { taken.Add(1) }))
	defer elsewhere.Close()
	var asked atomic.Int64
	collector := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
	}))
	defer collector.Close()
	file := filepath.Join(t.TempDir(), "headers")
	must(t, os.WriteFile(file, []byte("X-Team: planted"), 0o600))
	tr, err := (&tracingConfig{Endpoint: collector.URL, Headers: file}).open(t.Context(), "serve", "b", zap.NewNop())
	must(t, err)
	_, end := tr.span(t.Context(), "x")
	end(nil)
	tr.close()
	if asked.Load() == 0 || taken.Load() != 0 {
		t.Errorf("the collector was asked %d times, and where it leads to %d times", asked.Load(), taken.Load())
	}
}

func TestWhatACallerChoosesStandsInNoSpan(t *testing.T) {
	spans := tracetest.NewInMemoryExporter()
	tr := newTracing("serve", "b", 1, sdktrace.WithSyncer(spans))
	next := watched(newPlainHouse(t).handler("serve"), "api", nil, tr)
	for _, method := range []string{"PLANTED", "GET"} {
		for _, target := range []string{"/planted", "/requests/planted?planted"} {
			r := httptest.NewRequestWithContext(t.Context(), method, target, nil)
			r.Header.Set("Tracestate", "planted=1")
			r.Header.Set("User-Agent", "planted")
			r.Header.Set("X-Request-Id", strings.Repeat("planted ", 1000))
			next.ServeHTTP(httptest.NewRecorder(), r)
		}
	}
	got := spans.GetSpans()
	if len(got) != 4 {
		t.Errorf("%d spans", len(got))
	}
	for _, s := range got {
		if text := strings.ToLower(fmt.Sprint(s.Name, s.Attributes, s.Status, s.SpanContext.TraceState())); strings.Contains(text, "planted") {
			t.Errorf("a span holds what the caller chose: %s", text)
		}
	}
}

func TestWhatACallerChoosesBecomesNoLabel(t *testing.T) {
	m := newMetrics(prometheus.NewRegistry())
	h := newPlainHouse(t)
	next := watched(h.handler("serve"), "api", m, nil)
	for _, target := range []string{"/planted", "/requests/planted", "/steps/planted/credential", "/scopes?planted"} {
		for _, method := range []string{"GET", "PLANTED", "PATCH"} {
			next.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), method, target, nil))
		}
	}
	families, err := m.registry.Gather()
	must(t, err)
	n := 0
	for _, f := range families {
		if strings.Contains(strings.ToLower(f.String()), "planted") {
			t.Errorf("a label holds what the caller chose: %s", f)
		}
		if f.GetName() == "countersign_http_requests_total" {
			n = int(sample(f))
		}
	}
	if n != 12 {
		t.Errorf("%d calls were counted, of 12", n)
	}
}

// The clock of a leaf is read without parsing all of it.
func TestALeafsTimeIsRead(t *testing.T) {
	at, ok := stamped([]byte(`{"v":1,"id":"0","type":"step.requested","time":"2026-01-02T03:04:05.678901Z","writer":"x"}`))
	if !ok || !at.Equal(time.Date(2026, 1, 2, 3, 4, 5, 678901000, time.UTC)) {
		t.Errorf("%v %v", at, ok)
	}
	if _, ok := stamped([]byte(`{"v":1}`)); ok {
		t.Error("a leaf without a time has one")
	}
}
