package review

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// stacks are those of all goroutines.
func stacks() string {
	b := make([]byte, 8<<20)
	return string(b[:runtime.Stack(b, true)])
}

func TestReadsWhoseReadersLeaveInTheMiddleLeaveNothingBehind(t *testing.T) {
	w := newWorld(t)
	for i := range 200 {
		w.path("run-1", fmt.Sprintf("step-%d", i))
	}
	client := &http.Client{Transport: &http.Transport{}}
	_, _ = w.get(auth.Reviewer, "application/json", "/history?limit=1") // what stays for good is there now
	paths := []string{"/history", "/history?run=run-1&type=credential.issued", "/history?format=csv", "/history/3", "/history/steps/run-1/step-7",
		"/tile/entries/000.p/200", "/tile/0/000.p/200", "/checkpoint"}
	var all sync.WaitGroup
	for n := range 8 {
		all.Go(func() {
			for i := range 60 {
				// Gone after nothing, a part, or the whole of what a read takes.
				ctx, leave := context.WithTimeout(t.Context(), time.Duration(i*i)*5*time.Microsecond)
				switch (i + n) % 4 {
				case 0:
					for _, err := range w.ledger.Export(ctx, 0, w.ledger.Size()) {
						if err != nil || i%8 == 0 {
							break
						}
					}
				case 1:
					_ = w.ledger.Follow(ctx, -1, func(*store.Appended) error {
						if i%8 == 1 {
							return errors.New("enough")
						}
						return nil
					})
				case 2:
					_, _ = w.ledger.History(ctx, ledger.Query{Run: "run-1", Type: "credential.issued"})
				default:
					req, _ := http.NewRequestWithContext(ctx, http.MethodGet, w.url+paths[i/4%len(paths)], nil)
					req.Header.Set("Authorization", "Bearer "+w.tokens[auth.Reviewer])
					req.Header.Set("Accept", []string{"text/html", "application/json"}[i%2])
					if res, err := client.Do(req); err == nil {
						var some [100]byte
						_, _ = res.Body.Read(some[:])
						res.Body.Close()
					}
				}
				leave()
			}
		})
	}
	all.Wait()
	var left string
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		client.CloseIdleConnections()
		left = ""
		for g := range strings.SplitSeq(stacks(), "\n\n") {
			if strings.Contains(g, "(*Rows)") || strings.Contains(g, "interruptOnDone") || strings.Contains(g, "api/review.(*Server)") {
				left += g + "\n\n"
			}
		}
		if left == "" {
			return
		}
	}
	t.Errorf("left behind:\n%s", left)
}
