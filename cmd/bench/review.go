package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// review measures what a reviewer waits for, with the program itself: a
// recorder over the ledger, its pages, an export, and its verification.
func (m *million) review(ctx context.Context, t *table, binary string) (err error) {
	dir := m.options.Dir
	file := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, text string) { err = errors.Join(err, os.WriteFile(file(name), []byte(text), 0o600)) }
	write("log.key", m.key)
	write("privacy.key", "privacy-key-v1:"+base64.StdEncoding.EncodeToString(m.options.PrivacyKey))
	out, fault := exec.CommandContext(ctx, binary, "token", "create", "--file", file("tokens"), "--role", "reviewer", "--name", "reviewer").Output()
	addr := freeAddr()
	config := fmt.Sprintf("listen: {addr: %q}\ndir: %q\nlog_key: %q\nprivacy_key: %q\ntokens: %q\n", addr, dir, file("log.key"), file("privacy.key"), file("tokens"))
	if m.options.Postgres != "" {
		write("dsn", m.options.Postgres)
		config += fmt.Sprintf("postgres_file: %q\nkeys_file: %q\n", file("dsn"), m.options.KeysFile)
	}
	write("record.yaml", config)
	if err = errors.Join(err, fault); err != nil {
		return err
	}
	token := strings.TrimSpace(string(out))
	recorder := exec.Command(binary, "record", "--config", file("record.yaml"))
	start := time.Now()
	if err := recorder.Start(); err != nil {
		return err
	}
	defer func() {
		recorder.Process.Signal(syscall.SIGTERM)
		recorder.Wait()
	}()
	url := "http://" + addr
	if err := untilReady(ctx, url); err != nil {
		return err
	}
	ready := t.add("record, from its start to ready, 1,000,000 entries", m.engine, 1, []time.Duration{time.Since(start)}, 0)
	t.floor("recorder ready, "+m.engine, "at most 2 s", ms(ready.p50)+" ms", ready.p50 <= 2*time.Second)

	get := func(path, accept string) ([]byte, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+path, nil)
		if err != nil {
			return nil, err
		}
		req.Header.Set("Authorization", "Bearer "+token)
		req.Header.Set("Accept", accept)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return nil, err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err == nil && res.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s", path, res.Status)
		}
		return b, err
	}
	// The sets that counts come from are read once, in the background.
	for range 600 {
		b, err := get("/history?orchestrator=orchestrator-1", "text/html")
		if err != nil {
			return err
		}
		if !strings.Contains(string(b), "Counting") {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	var worst time.Duration
	for _, q := range []string{
		"", "from=" + time.Now().Add(-time.Minute).UTC().Format("2006-01-02T15:04:05Z"), "run=run-01500", "step=step-0060000", "request=req_0060000",
		"orchestrator=orchestrator-1", "scope=pki:service", "target=postgres://http:demo", "type=credential.revoked", "outcome=allow", "outcome=deny", "person=user:nobody",
		"orchestrator=orchestrator-1&scope=pki:service", "orchestrator=orchestrator-3&type=step.requested&outcome=allow",
	} {
		lat := make([]time.Duration, 21)
		for i := range lat {
			start := time.Now()
			if _, err := get("/history?"+q, "text/html"); err != nil {
				return err
			}
			lat[i] = time.Since(start)
		}
		name := "none"
		if q != "" {
			name, _, _ = strings.Cut(strings.ReplaceAll(q, "&", " "), "=")
			if n := strings.Count(q, "&"); n > 0 {
				name = fmt.Sprintf("%d filters", n+1)
			}
		}
		row := t.add("history page in HTML with charts: "+name, m.engine, 1, lat, 0)
		worst = max(worst, row.p50)
	}
	t.floor("history page in HTML, any filter, "+m.engine, "p50 at most 50 ms", ms(worst)+" ms", worst <= 50*time.Millisecond)

	// The most memory that the recorder has had from here on (proc(5), clear_refs).
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", recorder.Process.Pid), []byte("5"), 0); err != nil {
		return err
	}
	env := append(os.Environ(), "COUNTERSIGN_RECORDER="+url, "COUNTERSIGN_TOKEN="+token)
	bundle := file("review.zip")
	fmt.Fprintln(os.Stderr, "exporting, "+m.engine)
	took, _, err := timedCommand(ctx, env, binary, "export", "-o", bundle)
	if err != nil {
		return err
	}
	defer os.Remove(bundle)
	peak, err := memoryMiB(recorder.Process.Pid, "VmHWM:")
	if err != nil {
		return err
	}
	t.add("export of 1,000,000 entries, as a bundle", m.engine, 1, []time.Duration{took}, 0)
	t.floor("export, "+m.engine, "at most 30 s", ms(took)+" ms", took <= 30*time.Second)
	t.floor("memory of the recorder while it exports, "+m.engine, "at most 300 MiB", fmt.Sprintf("%d MiB", peak), peak <= 300)
	fmt.Fprintln(os.Stderr, "verifying, "+m.engine)
	took, said, err := timedCommand(ctx, os.Environ(), binary, "verify", bundle, "--key", m.options.Verifier)
	if err != nil {
		return fmt.Errorf("%w: %s", err, said)
	}
	t.add("verify that bundle offline", m.engine, 1, []time.Duration{took}, 0)
	t.floor("verify, "+m.engine, "at most 10 s", ms(took)+" ms", took <= 10*time.Second)
	return nil
}

// timedCommand runs the program and says how long it took and what it printed.
func timedCommand(ctx context.Context, env []string, binary string, args ...string) (time.Duration, string, error) {
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Env = env
	start := time.Now()
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("countersign %s: %w", args[0], err)
	}
	return time.Since(start), string(out), err
}
