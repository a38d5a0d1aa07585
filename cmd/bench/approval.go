package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// pending is how many approvals wait in the row of the inbox.
const pending = 10_000

// person makes one call at the recorder as one of dev's approvers.
func (d *dev) person(ctx context.Context, method, path, accept string, body any) ([]byte, error) {
	b, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, d.Recorder+path, bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+d.Approvers[0].Token)
	req.Header.Set("Accept", accept)
	if method == http.MethodPost {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %s: %.300s", method, path, res.Status, answer)
	}
	return answer, err
}

// ask asks for a scope that people decide, and returns the status of the answer
// and its body.
func (d *dev) askPeople(ctx context.Context, i int, wait time.Duration) (int, []byte, error) {
	body := fmt.Sprintf(`{"run":"bench-%d","scope":"vault:demo-write","reason":"measured"}`, i)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, fmt.Sprintf("%s/steps/step-%d/credential", d.API, i), strings.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Authorization", "Bearer "+d.Orchestrators[0].Token)
	if wait > 0 {
		req.Header.Set("Prefer", fmt.Sprintf("wait=%d", int(wait.Seconds())))
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	return res.StatusCode, answer, err
}

// pendingApproval is what a 202 says.
func pendingApproval(status int, answer []byte) (string, error) {
	var p struct {
		Approval struct{ ID string }
	}
	if err := json.Unmarshal(answer, &p); err != nil || status != http.StatusAccepted || p.Approval.ID == "" {
		return "", fmt.Errorf("want 202 and an approval, got %d: %.300s", status, answer)
	}
	return p.Approval.ID, nil
}

// approval measures from a person's decision to the answer of the orchestrator
// that waits for it. A denial is answered without minting.
func (d *dev) approval(ctx context.Context, t *table) error {
	answered := func(decision string, want int) func(context.Context, int, int) (time.Duration, error) {
		return func(ctx context.Context, _, i int) (time.Duration, error) {
			status, answer, err := d.askPeople(ctx, i, 0)
			if err != nil {
				return 0, err
			}
			id, err := pendingApproval(status, answer)
			if err != nil {
				return 0, err
			}
			done := make(chan error, 1)
			var at time.Time
			go func() {
				status, answer, err := d.askPeople(ctx, i, 30*time.Second)
				at = time.Now()
				if err == nil && status != want {
					err = fmt.Errorf("%s: want %d, got %d: %.300s", decision, want, status, answer)
				}
				done <- err
			}()
			time.Sleep(10 * time.Millisecond) // the caller is waiting by then
			t0 := time.Now()
			if _, err := d.person(ctx, http.MethodPost, "/approvals/"+id+"/decision", "application/json", map[string]string{"decision": decision, "reason": "measured"}); err != nil {
				return 0, err
			}
			if err := <-done; err != nil {
				return 0, err
			}
			return at.Sub(t0), nil
		}
	}
	const what = "decided to waiting orchestrator answered"
	f, err := t.timed(ctx, what, "countersign, denied", answered("deny", http.StatusForbidden))
	if err != nil {
		return err
	}
	if _, err := t.timed(ctx, what, "countersign, approved and minted", answered("approve", http.StatusCreated)); err != nil {
		return err
	}
	t.floor("decided to answered p50, without the minting", "at most 20 ms", ms(f.p50)+" ms", f.p50 <= 20*time.Millisecond)
	return d.inbox(ctx, t)
}

// inbox measures the inbox page, and the broker's memory, while many approvals
// wait.
func (d *dev) inbox(ctx context.Context, t *table) error {
	if err := d.askMany(ctx); err != nil {
		return err
	}
	f, err := t.measure(ctx, fmt.Sprintf("inbox page, %d pending", pending), "countersign", 1, func(ctx context.Context, _, _ int) error {
		_, err := d.person(ctx, http.MethodGet, "/approvals", "text/html", nil)
		return err
	})
	if err != nil {
		return err
	}
	t.floor("inbox page p50, 10,000 pending", "at most 100 ms", ms(f.p50)+" ms", f.p50 <= 100*time.Millisecond)

	// The broker as a process of its own: dev is a recorder and a provider too.
	p, broker, err := d.startPair(ctx, d.catalogue)
	if err != nil {
		return err
	}
	defer p.end()
	if err := p.askMany(ctx); err != nil {
		return err
	}
	rss, err := residentMiB(broker.Pid)
	if err != nil {
		return err
	}
	t.floor("memory of the broker, 10,000 pending", "at most 200 MiB", fmt.Sprintf("%d MiB", rss), rss <= 200)
	return nil
}

// askMany asks for what waits then.
func (d *dev) askMany(ctx context.Context) error {
	fmt.Fprintf(os.Stderr, "asking for %d approvals\n", pending)
	var wg sync.WaitGroup
	next, failed := make(chan int), make(chan error, 1)
	for range 16 {
		wg.Go(func() {
			for i := range next {
				status, answer, err := d.askPeople(ctx, i, 0)
				if err == nil {
					_, err = pendingApproval(status, answer)
				}
				if err != nil {
					select {
					case failed <- err:
					default:
					}
				}
			}
		})
	}
	for range pending {
		next <- int(serial.Add(1))
	}
	close(next)
	wg.Wait()
	select {
	case err := <-failed:
		return err
	default:
		return nil
	}
}

// residentMiB is the resident memory of a process (proc(5), VmRSS).
func residentMiB(pid int) (int, error) { return memoryMiB(pid, "VmRSS:") }

// memoryMiB is a line of what Linux tells of a process's memory (proc(5)).
func memoryMiB(pid int, line string) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), line)
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		return 0, fmt.Errorf("process %d tells no memory", pid)
	}
	kb, err := strconv.Atoi(fields[0])
	return kb / 1024, err
}
