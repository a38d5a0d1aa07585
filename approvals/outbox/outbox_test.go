package outbox

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/approvals"
	"github.com/countersign-dev/countersign/store"
)

// room is a source whose requests the test sets.
type room struct {
	mu     sync.Mutex
	list   map[string]approvals.Request
	keys   []approvals.Passkey
	events chan approvals.Event
	listed int // how often the list was read to its end
}

func newRoom() *room {
	return &room{list: map[string]approvals.Request{}, events: make(chan approvals.Event, 100)}
}

// set changes a request without an event.
func (r *room) set(id string, s store.Status) approvals.Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	x := r.list[id]
	x.ID, x.Status = id, s
	if x.Asked.IsZero() {
		x.Asked = time.Now()
	}
	r.list[id] = x
	return x
}

func (r *room) tell(kind, id string, s store.Status) {
	x := r.set(id, s)
	r.events <- approvals.Event{Kind: kind, Approval: id, Request: &x}
}

func (r *room) Get(_ context.Context, id string) (*approvals.Request, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	x, ok := r.list[id]
	if !ok {
		return nil, approvals.ErrNotFound
	}
	return &x, nil
}

func (r *room) Passkeys(context.Context, *approvals.Person) ([]approvals.Passkey, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.keys), nil
}

// key sets the one passkey, with an event where tell is set.
func (r *room) key(k approvals.Passkey, tell bool) {
	r.mu.Lock()
	r.keys = []approvals.Passkey{k}
	r.mu.Unlock()
	if tell {
		r.events <- approvals.Event{Kind: approvals.EventPasskey, Passkey: &k}
	}
}

// List gives a page of one, so that paging is always gone through.
func (r *room) List(_ context.Context, f approvals.Filter) (page []approvals.Request, next string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var open []string
	for id, x := range r.list {
		if x.Status == store.StatusPending && id > f.Before {
			open = append(open, id)
		}
	}
	slices.Sort(open)
	if len(open) == 0 {
		r.listed++
		return nil, "", nil
	}
	return []approvals.Request{r.list[open[0]]}, open[0], nil
}

func (r *room) Subscribe() (<-chan approvals.Event, func()) { return r.events, func() {} }

// screen is a destination that remembers what it shows.
type screen struct {
	name   string
	mu     sync.Mutex
	shown  map[string]string // approval to version
	sent   []Delivery
	at     []time.Time
	answer func(d Delivery, n int) error
}

func (s *screen) Name() string { return s.name }

func (s *screen) Send(_ context.Context, d Delivery) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sent, s.at = append(s.sent, d), append(s.at, time.Now())
	if s.answer != nil {
		if err := s.answer(d, len(s.sent)); err != nil {
			return "", err
		}
	}
	if s.shown == nil {
		s.shown = map[string]string{}
	}
	var id string
	if d.Passkey != nil {
		id = d.Passkey.ID
	} else {
		id = d.Request.ID
	}
	s.shown[id] = d.Version
	return "place-" + id, nil
}

func (s *screen) shows(id string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.shown[id]
}

func (s *screen) deliveries() []Delivery {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.sent)
}

func open(t *testing.T, file string, r *room, senders ...Sender) *Outbox {
	t.Helper()
	r.mu.Lock()
	before := r.listed
	r.mu.Unlock()
	o, err := Open(t.Context(), Config{File: file, Source: r, Senders: senders,
		MinWait: 5 * time.Millisecond, MaxWait: 40 * time.Millisecond, Settle: 20 * time.Millisecond, Timeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Close() })
	eventually(t, "the list is read", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return r.listed > before })
	return o
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatal("never: " + what)
}

func TestEachStateIsShownAndTheRowRemembersWhere(t *testing.T) {
	r, s := newRoom(), &screen{name: "a"}
	o := open(t, filepath.Join(t.TempDir(), "outbox.db"), r, s)
	r.tell(approvals.EventRequested, "apr_1", store.StatusPending)
	eventually(t, "asked", func() bool { return s.shows("apr_1") == "pending_approval/0" })
	r.tell(approvals.EventApproved, "apr_1", store.StatusApproved)
	eventually(t, "approved", func() bool { return s.shows("apr_1") == "approved/0" })
	sent := s.deliveries()
	if sent[0].Place != "" || sent[0].Doubt != nil || sent[len(sent)-1].Place != "place-apr_1" {
		t.Fatalf("deliveries %+v", sent)
	}
	eventually(t, "nothing waits", func() bool { n, err := o.Waiting(t.Context(), "a"); return err == nil && n == 0 })
}

func TestWhatHappenedWhileNobodyFollowedIsToldAtTheStart(t *testing.T) {
	file, r, s := filepath.Join(t.TempDir(), "outbox.db"), newRoom(), &screen{name: "a"}
	o := open(t, file, r, s)
	r.tell(approvals.EventRequested, "apr_old", store.StatusPending)
	eventually(t, "asked", func() bool { return s.shows("apr_old") != "" })
	o.Close()
	r.set("apr_old", store.StatusExpired) // no event: the process was away
	r.set("apr_new", store.StatusPending)
	r.set("apr_new2", store.StatusPending)
	open(t, file, r, s)
	eventually(t, "expired", func() bool { return s.shows("apr_old") == "expired/0" })
	eventually(t, "asked", func() bool { return s.shows("apr_new") != "" && s.shows("apr_new2") != "" })
	for _, d := range s.deliveries() {
		if d.Request.ID == "apr_new" && (d.Doubt == nil || time.Now().Before(d.Doubt.Settled)) {
			t.Fatalf("somebody may have been told of apr_new before: %+v", d)
		}
	}
}

func TestALostFileLosesNothingPending(t *testing.T) {
	dir, r, s := t.TempDir(), newRoom(), &screen{name: "a"}
	o := open(t, filepath.Join(dir, "1.db"), r, s)
	r.tell(approvals.EventRequested, "apr_1", store.StatusPending)
	eventually(t, "asked", func() bool { return s.shows("apr_1") != "" })
	o.Close()
	open(t, filepath.Join(dir, "2.db"), r, s)
	eventually(t, "looked for", func() bool {
		d := s.deliveries()
		return len(d) == 2 && d[1].Doubt != nil && d[1].Place == ""
	})
}

func TestLostEventsAreReadAgain(t *testing.T) {
	r, s := newRoom(), &screen{name: "a"}
	open(t, filepath.Join(t.TempDir(), "outbox.db"), r, s)
	r.tell(approvals.EventRequested, "apr_1", store.StatusPending)
	eventually(t, "asked", func() bool { return s.shows("apr_1") != "" })
	r.set("apr_1", store.StatusDenied)
	r.events <- approvals.Event{Kind: approvals.EventResync}
	eventually(t, "denied", func() bool { return s.shows("apr_1") == "denied/0" })
}

func TestADestinationThatIsDownDelaysNoOther(t *testing.T) {
	r, down, up := newRoom(), &screen{name: "down"}, &screen{name: "up"}
	broken := true // guarded by down.mu
	down.answer = func(Delivery, int) error {
		if broken {
			return errors.New("connection cut")
		}
		return nil
	}
	o := open(t, filepath.Join(t.TempDir(), "outbox.db"), r, down, up)
	r.tell(approvals.EventRequested, "apr_1", store.StatusPending)
	r.tell(approvals.EventDenied, "apr_1", store.StatusDenied)
	eventually(t, "denied", func() bool { return up.shows("apr_1") == "denied/0" })
	eventually(t, "several attempts", func() bool { return len(down.deliveries()) > 3 })
	if n, err := o.Waiting(t.Context(), "down"); err != nil || n != 1 {
		t.Fatalf("%d wait, %v", n, err)
	}
	down.mu.Lock()
	broken = false
	down.mu.Unlock()
	eventually(t, "told in the end", func() bool { return down.shows("apr_1") == "denied/0" })
	// After an attempt without an answer the next one is told of the doubt.
	if d := down.deliveries(); d[0].Doubt != nil || d[1].Doubt == nil {
		t.Fatalf("deliveries %+v", d[:2])
	}
}

func TestACertainFailureLeavesNoDoubtAndRetryAfterIsHonoured(t *testing.T) {
	r, s := newRoom(), &screen{name: "a"}
	const after = 300 * time.Millisecond
	s.answer = func(_ Delivery, n int) error {
		if n == 1 {
			return &Failure{Err: errors.New("slow down"), After: after, Down: true}
		}
		return nil
	}
	open(t, filepath.Join(t.TempDir(), "outbox.db"), r, s)
	r.tell(approvals.EventRequested, "apr_1", store.StatusPending)
	eventually(t, "told", func() bool { return s.shows("apr_1") != "" })
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.at[1].Sub(s.at[0]); d < after || len(s.sent) != 2 || s.sent[1].Doubt != nil {
		t.Fatalf("second attempt after %v, %+v", d, s.sent)
	}
}

func TestAMessageThatIsGoneIsToldAnew(t *testing.T) {
	r, s := newRoom(), &screen{name: "a"}
	s.answer = func(d Delivery, _ int) error {
		if d.Place != "" && d.Request.Status == store.StatusApproved {
			return ErrGone
		}
		return nil
	}
	open(t, filepath.Join(t.TempDir(), "outbox.db"), r, s)
	r.tell(approvals.EventRequested, "apr_1", store.StatusPending)
	eventually(t, "asked", func() bool { return s.shows("apr_1") != "" })
	r.tell(approvals.EventApproved, "apr_1", store.StatusApproved)
	eventually(t, "told anew", func() bool { return s.shows("apr_1") == "approved/0" })
	if d := s.deliveries(); d[len(d)-1].Place != "" || d[len(d)-1].Doubt == nil {
		t.Fatalf("deliveries %+v", d)
	}
}

func TestTellingIsGivenUpOnlyLongAfterTheRequestIsOver(t *testing.T) {
	r, s := newRoom(), &screen{name: "a", answer: func(Delivery, int) error { return errors.New("down") }}
	var mu sync.Mutex
	var ahead time.Duration
	o, err := Open(t.Context(), Config{File: filepath.Join(t.TempDir(), "outbox.db"), Source: r, Senders: []Sender{s}, MinWait: time.Millisecond, MaxWait: time.Millisecond, Settle: time.Millisecond,
		Now: func() time.Time { mu.Lock(); defer mu.Unlock(); return time.Now().Add(ahead) }})
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	waiting := func(want int) func() bool {
		return func() bool { n, err := o.Waiting(t.Context(), "a"); return err == nil && n == want }
	}
	r.tell(approvals.EventRequested, "apr_open", store.StatusPending)
	r.tell(approvals.EventDenied, "apr_over", store.StatusDenied)
	eventually(t, "both wait", waiting(2))
	mu.Lock()
	ahead = 6 * 24 * time.Hour
	mu.Unlock()
	if err := o.forget(t.Context()); err != nil || !waiting(2)() {
		t.Fatalf("given up after six days: %v", err)
	}
	mu.Lock()
	ahead = 8 * 24 * time.Hour
	mu.Unlock()
	if err := o.forget(t.Context()); err != nil || !waiting(1)() {
		t.Fatalf("not given up after eight days, or given up what is open: %v", err)
	}
}

func TestNothingIsSentInTheClear(t *testing.T) {
	for raw, ok := range map[string]bool{
		"https://hooks.example.com/x?y=1": true, "http://localhost:8080/": true, "http://127.0.0.1:1/": true, "http://[::1]:1/": true,
		"http://example.com/": false, "http://localhost.example.com/": false, "https://user:pw@example.com/": false, "ftp://localhost/": false,
		"": false, "https:///x": false, "https://example.com/#f": false, "http://10.0.0.1/": false,
	} {
		if err := CheckURL(raw); (err == nil) != ok {
			t.Errorf("%q: %v", raw, err)
		}
	}
}

func TestAPasskeyIsToldUntilItIsTakenAlsoAfterARestartAndOfEachStateOnce(t *testing.T) {
	file, r, s, other := filepath.Join(t.TempDir(), "outbox.db"), newRoom(), &screen{name: "a"}, &screen{name: "b"}
	down := true // guarded by s.mu
	s.answer = func(Delivery, int) error {
		if down {
			return &Failure{Err: errors.New("down"), Down: true}
		}
		return nil
	}
	k := approvals.Passkey{ID: "k1", Person: "user:ana", Enrolled: time.Now()}
	o := open(t, file, r, s, other)
	r.key(k, true)
	eventually(t, "tried", func() bool { return len(s.deliveries()) > 1 })
	eventually(t, "told the other", func() bool { return other.shows("k1") == "enrolled" })
	o.Close()
	s.mu.Lock()
	down = false
	s.mu.Unlock()
	o = open(t, file, r, s, other)
	eventually(t, "told after the restart", func() bool { return s.shows("k1") == "enrolled" })
	o.Close()
	k.Active, k.Activated = true, time.Now()
	r.key(k, false) // no event: the process was away
	o = open(t, file, r, s, other)
	eventually(t, "active", func() bool { return s.shows("k1") == "activated" && other.shows("k1") == "activated" })
	k.Revoked = time.Now()
	r.key(k, true)
	eventually(t, "revoked", func() bool { return s.shows("k1") == "revoked" && other.shows("k1") == "revoked" })
	eventually(t, "nothing waits", func() bool { n, err := o.Waiting(t.Context(), "a"); return err == nil && n == 0 })
	if n := len(other.deliveries()); n != 3 {
		t.Errorf("three states were told %d times", n)
	}
	for _, d := range s.deliveries() {
		if d.Place != "" {
			t.Errorf("a state of a passkey was to replace another: %+v", d)
		}
	}
}

func TestAPasskeyOfLongAgoIsNotToldAnew(t *testing.T) {
	r, s := newRoom(), &screen{name: "a"}
	r.key(approvals.Passkey{ID: "old", Person: "user:ana", Enrolled: time.Now().Add(-8 * 24 * time.Hour)}, false)
	open(t, filepath.Join(t.TempDir(), "outbox.db"), r, s)
	r.tell(approvals.EventRequested, "apr_1", store.StatusPending)
	eventually(t, "asked", func() bool { return s.shows("apr_1") != "" })
	if s.shows("old") != "" {
		t.Error("a passkey enrolled 8 days ago is told when a file is new")
	}
}

func TestNoTextOfARequestOrAPasskeyIsInTheFile(t *testing.T) {
	const planted = "PLANTED-TEXT"
	dir, r, s := t.TempDir(), newRoom(), &screen{name: "a"}
	r.list["apr_1"] = approvals.Request{ID: "apr_1", Status: store.StatusPending, Asked: time.Now(), Reason: planted, Decisions: []approvals.Decided{{Person: planted, Reason: planted}}}
	o := open(t, filepath.Join(dir, "outbox.db"), r, s)
	r.key(approvals.Passkey{ID: "k1", Person: planted, Label: planted, Enrolled: time.Now()}, true)
	eventually(t, "told", func() bool { return s.shows("apr_1") != "" && s.shows("k1") != "" })
	read := func() (all []byte) {
		files, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			b, err := os.ReadFile(filepath.Join(dir, f.Name()))
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, b...)
		}
		return all
	}
	during := read()
	o.Close()
	for _, b := range [][]byte{during, read()} {
		if !bytes.Contains(b, []byte("apr_1")) || bytes.Contains(b, []byte(planted)) {
			t.Fatalf("the rows are not in the files, or a text is: %d bytes", len(b))
		}
	}
}
