package main

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/approvals/slack"
	"github.com/countersign-dev/countersign/store"
)

// reach is what an orchestrator's token can do with a route.
type reach int

const (
	_        reach = iota
	ownSteps       // acts for the caller's own steps; what names another's is not found, or a step of its own of that name
	public         // the same for everyone, and nothing of an entry
	forbidden
	browser // a person's login, or signed by Slack: a token changes nothing
)

// routes are all routes of serve and record. A new one belongs here, with a
// thought about what an orchestrator must not reach through it.
var routes = map[string]map[string]reach{
	"serve": {
		"POST /steps/{step}/credential":         ownSteps,
		"DELETE /steps/{step}/credential":       ownSteps,
		"POST /steps/{step}/result":             ownSteps,
		"GET /requests/{id}":                    ownSteps,
		"DELETE /requests/{id}":                 ownSteps,
		"GET /scopes":                           ownSteps,
		"POST /introspect":                      forbidden,
		"GET /.well-known/openid-configuration": public,
		"GET /.well-known/jwks.json":            public,
		"GET /openapi.yaml":                     public,
		"GET /healthz":                          public,
		"GET /readyz":                           public,
	},
	"record": {
		"POST /append":     forbidden,
		"GET /open":        forbidden,
		"GET /follow":      forbidden,
		"GET /consistency": forbidden,
		"GET /history":     forbidden,

		"GET /history/{index:[0-9]+}":       forbidden,
		"GET /history/steps/{run}/{step}":   forbidden,
		"GET /history/people/{person}":      forbidden,
		"GET /history/credentials/{intent}": forbidden,
		"GET /history/static/{file}":        forbidden,
		"GET /history/export":               forbidden,
		"HEAD /history/export":              forbidden,
		"GET /history/export/{id}":          forbidden,
		"GET /history/export/{id}/file":     forbidden,
		"GET /holds":                        forbidden,
		"POST /holds":                       forbidden,
		"DELETE /holds/{id}":                forbidden,
		"GET /revocations":                  forbidden,
		"POST /revocations":                 forbidden,
		"GET /revocations/{id}":             forbidden,
		"DELETE /revocations/{id}":          forbidden,
		"POST /revocations/{id}/lift":       forbidden,
		"GET /revocations/static/{file}":    forbidden,

		"GET /tile/entries/*":        forbidden,
		"GET /checkpoint":            public,
		"GET /tile/{level:[0-9]+}/*": public,
		"GET /healthz":               public,
		"GET /readyz":                public,

		"GET /approvals":                 forbidden,
		"GET /approvals/{id}":            forbidden,
		"GET /approvals/events":          forbidden,
		"GET /approvals/static/{file}":   forbidden,
		"POST /approvals/{id}/challenge": forbidden,
		"POST /approvals/{id}/decision":  forbidden,
		"GET /passkeys":                  forbidden,
		"POST /passkeys":                 forbidden,
		"POST /passkeys/options":         forbidden,
		"POST /passkeys/{id}/activate":   forbidden,
		"POST /passkeys/{id}/revoke":     forbidden,
		"DELETE /passkeys/{id}":          forbidden,
		"GET /slack/link":                forbidden,
		"POST /slack/link":               forbidden,
		"GET /login":                     browser,
		"GET /login/callback":            browser,
		"GET /login/style.css":           browser,
		"GET /login/cli":                 browser,
		"POST /login/cli":                browser,
		"POST /login/cli/token":          browser,
		"POST /logout":                   browser,
		"POST /slack/interactions":       browser,
	},
}

// plainHouse is broker and recorder as serve and record wire them, in one
// process, without Vault and without sockets.
type plainHouse struct {
	t        *testing.T
	people   *people
	machines *machines
	tokens   map[string]string // of orchestrators and the resource server, by name
}

func newPlainHouse(t *testing.T) *plainHouse {
	dir := t.TempDir()
	// One file of tokens for both, so that the recorder knows the orchestrators:
	// where it does not, they are nobody.
	server, err := auth.CreateToken(filepath.Join(dir, "tokens"), auth.Token{Role: auth.ResourceServer, Name: "orders"}, time.Now())
	must(t, err)
	files, err := openDevFiles(dir)
	must(t, err)
	h := &plainHouse{t: t, tokens: map[string]string{"orders": server}}
	for _, list := range [][]devCaller{files.ready.Orchestrators, files.ready.Approvers, files.ready.Reviewers, files.ready.Responders} {
		for _, o := range list {
			h.tokens[o.Name] = o.Token
		}
	}
	h.tokens["broker"], err = auth.CreateToken(filepath.Join(dir, "tokens"), auth.Token{Role: auth.Writer, Name: "broker"}, time.Now())
	must(t, err)
	set, err := devScopes(dir, "", nil)
	must(t, err)
	o := files.people(zap.NewNop())
	o.approval, err = devApproval(dir, "http://localhost:1", set)
	must(t, err)
	o.approval.provider = nil // dev's own, and no route of record
	o.approval.slack = &slack.Config{Token: "xoxb-1", SigningSecret: "secret", Team: "T1", Channel: "C1", APIURL: "http://127.0.0.1:1/"}
	h.people, err = openPeople(t.Context(), o)
	must(t, err)
	t.Cleanup(h.people.close)
	h.machines, err = openDevBroker(t.Context(), files, h.people, &ready{API: "http://broker.example", Recorder: "http://recorder.example"}, devVault{}, nil, set, nil, zap.NewNop())
	must(t, err)
	t.Cleanup(h.machines.close)
	eventually(t, "the broker is ready", func() bool {
		status, _ := h.call("serve", "", "GET", "/readyz", "")
		return status == 200
	})
	return h
}

func (h *plainHouse) handler(process string) http.Handler {
	if process == "serve" {
		return h.machines.handler
	}
	return h.people.handler
}

func (h *plainHouse) call(process, who, method, target, body string) (int, string) {
	r := httptest.NewRequestWithContext(h.t.Context(), method, target, strings.NewReader(body))
	if who != "" {
		r.Header.Set("Authorization", "Bearer "+h.tokens[who])
	}
	if strings.Contains(body, "=") {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	w := httptest.NewRecorder()
	h.handler(process).ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

// leaves are all entries of the ledger.
func (h *plainHouse) leaves() (all [][]byte) {
	h.t.Helper()
	for s, err := range h.people.ledger.Entries(h.t.Context(), 0, h.people.ledger.Size()) {
		must(h.t, err)
		all = append(all, s.Leaf)
	}
	return all
}

// held is a credential that an orchestrator holds.
type held struct {
	Request    string `json:"request"`
	Credential struct {
		Token string `json:"token"`
	} `json:"credential"`
}

// active asks as a resource server whether a credential is live.
func (h *plainHouse) active(c held) bool {
	h.t.Helper()
	status, body := h.call("serve", "orders", "POST", "/introspect", "token="+c.Credential.Token)
	var answer struct {
		Active bool `json:"active"`
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil || status != 200 {
		h.t.Fatalf("introspect: %d %s", status, body)
	}
	return answer.Active
}

func TestEveryRouteIsClassifiedByWhatAnOrchestratorReaches(t *testing.T) {
	h := newPlainHouse(t)
	for process, want := range routes {
		found := h.routes(process)
		for _, route := range found {
			if want[route] == 0 {
				t.Errorf("%s: %s is new: say in routes what an orchestrator reaches through it", process, route)
			}
		}
		for route := range want {
			if !slices.Contains(found, route) {
				t.Errorf("%s: %s is gone", process, route)
			}
		}
	}
}

func (h *plainHouse) routes(process string) (list []string) {
	h.t.Helper()
	must(h.t, chi.Walk(h.handler(process).(chi.Routes), func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		list = append(list, method+" "+route)
		return nil
	}))
	return list
}

func TestNoRouteLetsAnOrchestratorReachTheLedgerOrAnothersSteps(t *testing.T) {
	h := newPlainHouse(t)
	holds := map[string]held{}
	for _, who := range []string{"demo", "other"} {
		status, body := h.call("serve", who, "POST", "/steps/step-of-"+who+"/credential", `{"run":"run-of-`+who+`","scope":"identity:step","reason":"a reason of `+who+`"}`)
		var c held
		if err := json.Unmarshal([]byte(body), &c); err != nil || status != 201 {
			t.Fatalf("%d %s", status, body)
		}
		holds[who] = c
		if !h.active(c) {
			t.Fatalf("the credential of %s is not live: %s", who, body)
		}
	}
	eventually(t, "the issuances are published", func() bool {
		status, _ := h.call("record", "", "GET", "/tile/0/000.p/2", "")
		return status == 200
	})
	forged := `{"v":1,"id":"` + store.NewID() + `","type":"credential.revoked","writer_time":"2026-01-02T15:04:05Z","request":"` + holds["other"].Request + `","details":{}}`
	fill := func(route, victim string) (target string) {
		path := strings.NewReplacer("{step}", "step-of-"+victim, "{id}", holds[victim].Request, "{level:[0-9]+}", "0", "{index:[0-9]+}", "0", "*", "000.p/2").Replace(route)
		if path == "/steps/step-of-"+victim+"/credential" {
			path += "?run=run-of-" + victim
		}
		return path
	}
	for caller, victim := range map[string]string{"demo": "other", "other": "demo"} {
		for process, known := range routes {
			for _, route := range h.routes(process) {
				method, pattern, _ := strings.Cut(route, " ")
				try := func(t *testing.T, method string) {
					before := h.leaves()
					body := ""
					switch {
					case route == "POST /append":
						body = forged
					case route == "POST /introspect":
						body = "token=" + holds[victim].Credential.Token + "&use=mine"
					case method == "POST":
						body = `{"run":"run-of-` + victim + `","scope":"identity:step"}`
						if strings.HasSuffix(pattern, "/result") {
							body = `{"run":"run-of-` + victim + `","outcome":"failed"}`
						}
					}
					status, said := h.call(process, caller, method, fill(pattern, victim), body)
					_, anonymous := h.call(process, "", method, fill(pattern, victim), body)
					switch known[route] {
					case forbidden:
						if status != 403 || method != "HEAD" && !strings.Contains(said, "problems/role-forbidden") {
							t.Errorf("%d %s", status, said)
						}
					case public:
						for range 3 { // a checkpoint may be published in between
							if said == anonymous {
								break
							}
							status, said = h.call(process, caller, method, fill(pattern, victim), body)
							_, anonymous = h.call(process, "", method, fill(pattern, victim), body)
						}
						if status != 200 || said != anonymous {
							t.Errorf("%d, and not the same as for anyone: %s", status, said)
						}
					case browser:
						if want, _ := h.call(process, "", method, fill(pattern, victim), body); status != want && status != 401 {
							t.Errorf("%d with the token, %d without", status, want)
						}
					case ownSteps:
						if strings.Contains(pattern, "{id}") && (status != 404 || method != "HEAD" && !strings.Contains(said, "problems/not-found")) {
							t.Errorf("another's request: %d %s", status, said)
						}
						if status >= 500 {
							t.Errorf("%d %s", status, said)
						}
					default:
						t.Fatal("not classified")
					}

					after := h.leaves()
					for i, leaf := range before {
						if !bytes.Equal(after[i], leaf) {
							t.Fatalf("entry %d was %s and is %s", i, leaf, after[i])
						}
						e, err := store.ParseLeaf(leaf)
						must(t, err)
						if bytes.Contains([]byte(said), leaf) || strings.Contains(said, e.ID) {
							t.Errorf("the answer shows entry %d: %s", i, said)
						}
					}
					if strings.Contains(said, "reason of "+victim) || strings.Contains(said, "orchestrator/"+victim+"/") {
						t.Errorf("the answer speaks of %s: %s", victim, said)
					}
					for i, leaf := range after[len(before):] {
						e, err := store.ParseLeaf(leaf)
						must(t, err)
						// What was refused earlier may be on record a moment later, several as one.
						if e.Request == holds[victim].Request || e.Type != store.AccessRefused && (known[route] != ownSteps || e.Orchestrator != caller) {
							t.Errorf("it put entry %d on record: %s", len(before)+i, leaf)
						}
					}
					if !h.active(holds[victim]) {
						t.Errorf("it ended the credential of %s", victim)
					}
				}
				t.Run(caller+" at "+process+" "+route, func(t *testing.T) { try(t, method) })
				if method == "GET" { // which answers HEAD too
					t.Run(caller+" at "+process+" HEAD "+pattern, func(t *testing.T) { try(t, "HEAD") })
				}
			}
		}
	}
	// Nothing but what is routed answers.
	for process, known := range routes {
		paths := map[string]bool{"/": true, "/entries": true, "/history/export": true, "/ledger.db": true, "/debug/pprof/": true, "/metrics": true}
		for route := range known {
			_, pattern, _ := strings.Cut(route, " ")
			paths[pattern] = true
		}
		for pattern := range paths {
			for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"} {
				if known[method+" "+pattern] != 0 || method == "HEAD" && known["GET "+pattern] != 0 {
					continue
				}
				if status, said := h.call(process, "demo", method, fill(pattern, "other"), "{}"); status != 404 && status != 405 && status != 403 { // 403: the path is an {id} of a route that is forbidden
					t.Errorf("%s: %s %s answers %d %s", process, method, pattern, status, said)
				}
			}
		}
	}
}
