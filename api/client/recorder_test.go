package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/store"
)

var ctx = context.Background()

func TestWhatIsSubmittedIsOnRecordUnderTheWritersName(t *testing.T) {
	r := newRecorder(t)
	for name, c := range map[string]client.RecorderConfig{"over HTTP": {Config: client.Config{URL: r.serve(t)}}, "in process": {}} {
		c.Writer = "writer-1"
		w := r.writer(t, c)
		a, err := w.Append(ctx, alert("one"), alert("two"))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for i := range a.Entries {
			e, err := r.log.Check(a.Receipt(i))
			if err != nil || e.Writer != "writer-1" || e.Time.IsZero() {
				t.Fatalf("%s: %+v %v", name, e, err)
			}
		}
	}
	c := client.RecorderConfig{Writer: "another"}
	if _, err := r.writer(t, c).Append(ctx, alert("x")); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("stamped with another's name, and accepted: %v", err)
	}
}

func TestARefusalOfOrderReachesTheWriterWhole(t *testing.T) {
	r := newRecorder(t)
	w := r.writer(t, client.RecorderConfig{Config: client.Config{URL: r.serve(t)}})
	req, intent := request("req_1", "join")
	if _, err := w.Append(ctx, req, intent); err != nil {
		t.Fatal(err)
	}
	again, second := request("req_2", "join")
	_, err := w.Append(ctx, again, second)
	oe, ok := store.IsOrder(err, store.OrderJoined)
	if !ok || oe.Request == nil || oe.Request.ID != "req_1" || !oe.Request.Minting || oe.Request.Intent != intent.ID {
		t.Fatalf("%v %+v", err, oe)
	}
	forbidden := alert("x")
	forbidden.Type = store.FreezeSet
	if _, err := w.Append(ctx, forbidden); err == nil {
		t.Fatal("a writer set a freeze")
	} else if _, ok := store.IsOrder(err, store.OrderForbidden); !ok {
		t.Fatal(err)
	}
	same := alert("y")
	same.ID = req.ID
	if _, err := w.Append(ctx, same); !errors.Is(err, store.ErrConflict) {
		t.Fatal(err)
	}
	broken := alert("z")
	broken.ID = "7"
	if _, err := w.Append(ctx, broken); !errors.Is(err, store.ErrMalformed) {
		t.Fatal(err)
	}
	open, err := w.Open(ctx, "")
	if err != nil || len(open.Entries) != 2 {
		t.Fatalf("%+v %v", open, err)
	}
	if one, err := w.Open(ctx, "req_2"); err != nil || len(one.Entries) != 0 {
		t.Fatalf("%+v %v", one, err)
	}
}

// losing lets a call through and then loses its answer, some times.
type losing struct {
	next  http.RoundTripper
	times atomic.Int32
	how   func(*http.Response) (*http.Response, error)
}

func (l *losing) RoundTrip(q *http.Request) (*http.Response, error) {
	resp, err := l.next.RoundTrip(q)
	if err != nil || l.times.Add(-1) < 0 {
		return resp, err
	}
	return l.how(resp)
}

func TestALostAnswerIsAskedForAgainAndTheEntryIsTakenOnce(t *testing.T) {
	for name, how := range map[string]func(*http.Response) (*http.Response, error){
		"connection reset": func(r *http.Response) (*http.Response, error) { r.Body.Close(); return nil, errors.New("reset") },
		"cut off": func(r *http.Response) (*http.Response, error) {
			b, _ := io.ReadAll(r.Body)
			r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(b[:len(b)/2])), -1
			return r, nil
		},
		"gateway": func(r *http.Response) (*http.Response, error) {
			r.Body.Close()
			r.StatusCode, r.Body = 502, io.NopCloser(strings.NewReader("<html>"))
			r.Header = http.Header{"Content-Type": {"text/html"}}
			return r, nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRecorder(t)
			l := &losing{next: inProcess(r.handler), how: how}
			w := r.writer(t, client.RecorderConfig{Config: client.Config{Transport: l}})
			l.times.Store(2)
			if _, err := w.Append(ctx, alert("once")); err != nil {
				t.Fatal(err)
			}
			if n := r.ledger.Size(); n != 1 {
				t.Fatalf("%d entries", n)
			}
		})
	}
}

func TestARecorderThatIsGoneIsUnavailable(t *testing.T) {
	r := newRecorder(t)
	w := r.writer(t, client.RecorderConfig{Config: client.Config{URL: "http://127.0.0.1:1"}, Deadline: 100 * time.Millisecond})
	if _, err := w.Append(ctx, alert("x")); !errors.Is(err, store.ErrUnavailable) {
		t.Fatal(err)
	}
	r.ledger.Close()
	w = r.writer(t, client.RecorderConfig{Deadline: 100 * time.Millisecond})
	if _, err := w.Append(ctx, alert("x")); !errors.Is(err, store.ErrUnavailable) || errors.Is(err, client.ErrHead) {
		t.Fatal(err)
	}
}

// altering changes acknowledgements on their way.
type altering struct {
	next http.RoundTripper
	how  func(*client.Ack)
}

func (l altering) RoundTrip(q *http.Request) (*http.Response, error) {
	resp, err := l.next.RoundTrip(q)
	if err != nil || resp.StatusCode != 200 || q.URL.Path != "/append" {
		return resp, err
	}
	var a client.Ack
	if err := json.UnmarshalRead(resp.Body, &a); err != nil {
		return nil, err
	}
	l.how(&a)
	b, _ := json.Marshal(&a)
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(b)), int64(len(b))
	return resp, nil
}

func TestAFalseAcknowledgementIsRefused(t *testing.T) {
	for name, how := range map[string]func(*client.Ack){
		"other leaf": func(a *client.Ack) {
			a.Entries[0].Leaf = bytes.Replace(a.Entries[0].Leaf, []byte("one"), []byte("two"), 1)
		},
		"other index":       func(a *client.Ack) { a.Entries[0].Index++ },
		"negative index":    func(a *client.Ack) { a.Entries[0].Index = -1 },
		"other proof":       func(a *client.Ack) { a.Entries[0].Proof[0][3] ^= 1 },
		"other checkpoint":  func(a *client.Ack) { a.Checkpoint = strings.Replace(a.Checkpoint, "\n", "\n1", 1) },
		"no checkpoint":     func(a *client.Ack) { a.Checkpoint = "" },
		"fewer entries":     func(a *client.Ack) { a.Entries = a.Entries[:1] },
		"swapped entries":   func(a *client.Ack) { a.Entries[0], a.Entries[1] = a.Entries[1], a.Entries[0] },
		"one entry doubled": func(a *client.Ack) { a.Entries[1] = a.Entries[0] },
	} {
		r := newRecorder(t)
		if _, err := r.writer(t, client.RecorderConfig{}).Append(ctx, alert("first")); err != nil {
			t.Fatal(err)
		}
		w := r.writer(t, client.RecorderConfig{Config: client.Config{Transport: altering{inProcess(r.handler), how}}})
		if _, err := w.Append(ctx, alert("one"), alert("three")); !errors.Is(err, store.ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAnAcknowledgementMustContinueTheHeadThatWasSeen(t *testing.T) {
	for name, how := range map[string]func(*client.Ack){
		"other proof": func(a *client.Ack) { a.Consistency[0][3] ^= 1 },
		"short proof": func(a *client.Ack) { a.Consistency = a.Consistency[:1] },
	} {
		r := newRecorder(t)
		head := filepath.Join(t.TempDir(), "head")
		w := r.writer(t, client.RecorderConfig{HeadFile: head})
		if _, err := w.Append(ctx, alert("a"), alert("b"), alert("c")); err != nil {
			t.Fatal(err)
		}
		w.Close()
		w = r.writer(t, client.RecorderConfig{HeadFile: head, Config: client.Config{Transport: altering{inProcess(r.handler), how}}})
		if _, err := w.Append(ctx, alert("d")); !errors.Is(err, client.ErrHead) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func copyDir(t *testing.T, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

func TestAnOlderLedgerPutBackIsRefusedForGood(t *testing.T) {
	r := newRecorder(t)
	head := filepath.Join(t.TempDir(), "head")
	live, backup := filepath.Join(r.dir, "ledger"), filepath.Join(r.dir, "backup")
	w := r.writer(t, client.RecorderConfig{HeadFile: head})
	if _, err := w.Append(ctx, alert("a"), alert("b")); err != nil {
		t.Fatal(err)
	}
	r.ledger.Close()
	copyDir(t, live, backup)
	r.start(t, live)
	if _, err := w.Append(ctx, alert("c"), alert("d"), alert("e")); err != nil {
		t.Fatal(err)
	}
	r.ledger.Close()
	r.start(t, backup) // validly signed, its own head file put back with it

	if _, err := w.Append(ctx, alert("x")); !errors.Is(err, client.ErrHead) {
		t.Fatalf("the running client: %v", err)
	}
	if _, err := w.Open(ctx, ""); !errors.Is(err, client.ErrHead) {
		t.Fatalf("it went on: %v", err)
	}
	w.Close()
	for _, grow := range []int{0, 10} { // also once the older log has outgrown the head
		for range grow {
			if _, err := r.writer(t, client.RecorderConfig{}).Append(ctx, alert("y")); err != nil {
				t.Fatal(err)
			}
		}
		w := r.writer(t, client.RecorderConfig{HeadFile: head})
		if _, err := w.Append(ctx, alert("x")); !errors.Is(err, client.ErrHead) || !errors.Is(err, store.ErrUnavailable) {
			t.Fatalf("a client started anew, %d entries on: %v", grow, err)
		}
		if err := w.Follow(ctx, -1, func(*store.Appended) error { return nil }); !errors.Is(err, client.ErrHead) {
			t.Fatalf("following: %v", err)
		}
	}
}

func TestAnEmptiedLedgerIsRefused(t *testing.T) {
	r := newRecorder(t)
	w := r.writer(t, client.RecorderConfig{HeadFile: filepath.Join(t.TempDir(), "head")})
	if _, err := w.Append(ctx, alert("a")); err != nil {
		t.Fatal(err)
	}
	r.ledger.Close()
	r.start(t, filepath.Join(r.dir, "fresh"))
	if _, err := w.Open(ctx, ""); !errors.Is(err, client.ErrHead) {
		t.Fatal(err)
	}
}

func TestAHeadFileOfAnotherLogIsRefused(t *testing.T) {
	r := newRecorder(t)
	head := filepath.Join(t.TempDir(), "head")
	if err := os.WriteFile(head, []byte("log.example.org\n3\nAAAA\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := client.NewRecorder(client.RecorderConfig{Config: client.Config{URL: "http://x"}, Log: r.log, HeadFile: head}); err == nil {
		t.Fatal("accepted")
	}
}

func TestManyAtOnceAreAllVerifiedAgainstOneLog(t *testing.T) {
	r := newRecorder(t)
	head := filepath.Join(t.TempDir(), "head")
	var wg sync.WaitGroup
	for range 2 { // two writers, over one log
		w := r.writer(t, client.RecorderConfig{HeadFile: head + fmt.Sprint(time.Now().UnixNano())})
		for range 16 {
			wg.Go(func() {
				for range 20 {
					if _, err := w.Append(ctx, alert("x")); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
	}
	wg.Wait()
	if n := r.ledger.Size(); n != 640 {
		t.Fatalf("%d entries", n)
	}
}

func TestAFollowerSeesWhatComesInOrderAndLearnsOfALostConnection(t *testing.T) {
	r := newRecorder(t)
	url := r.serve(t)
	w := r.writer(t, client.RecorderConfig{Config: client.Config{URL: url}})
	for name, f := range map[string]*client.Recorder{"over HTTP": w, "in process": r.writer(t, client.RecorderConfig{})} {
		first, intent := request("req_a"+name[:2], "join a"+name)
		a, err := w.Append(ctx, alert("not a follower's"), first, intent)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(ctx)
		got := make(chan store.Proven, 10)
		ended := make(chan error, 1)
		follow := func(after int64) {
			ended <- f.Follow(ctx, after, func(a *store.Appended) error {
				for _, e := range a.Entries {
					got <- e
				}
				return nil
			})
		}
		go follow(a.Entries[0].Index)
		for i := 1; i <= 2; i++ {
			if e := <-got; e.Index != a.Entries[i].Index {
				t.Fatalf("%s: index %d, want %d", name, e.Index, a.Entries[i].Index)
			}
		}
		r.record.Drain() // the recorder ends the stream
		if err := <-ended; !errors.Is(err, store.ErrUnavailable) {
			t.Fatalf("%s: the stream's end was told as %v", name, err)
		}
		live := filepath.Join(r.dir, "ledger")
		r.ledger.Close()
		r.start(t, live)
		go follow(a.Entries[2].Index)
		second, intent2 := request("req_b"+name[:2], "join b"+name)
		b, err := w.Append(ctx, alert("nor this"), second, intent2)
		if err != nil {
			t.Fatal(err)
		}
		for i := 1; i <= 2; i++ {
			if e := <-got; e.Index != b.Entries[i].Index {
				t.Fatalf("%s: after the restart index %d, want %d", name, e.Index, b.Entries[i].Index)
			}
		}
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Fatalf("%s: %v", name, err)
		}
	}
	stop := errors.New("enough")
	if err := w.Follow(ctx, -1, func(*store.Appended) error { return stop }); err != stop {
		t.Fatal(err)
	}
}

func BenchmarkAppendInProcess(b *testing.B) {
	for _, n := range []int{1, 64} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			r := newRecorder(b)
			w := r.writer(b, client.RecorderConfig{HeadFile: filepath.Join(b.TempDir(), "head")})
			b.SetParallelism(n)
			if n == 1 {
				for b.Loop() {
					if _, err := w.Append(ctx, alert("x")); err != nil {
						b.Fatal(err)
					}
				}
				return
			}
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, err := w.Append(ctx, alert("x")); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}
