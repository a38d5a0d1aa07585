package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// dev is a running `countersign dev`, as its ready file describes it.
type dev struct {
	API           string `json:"api"`
	Vault         struct{ Addr, Token string }
	Orchestrators []struct{ Name, Token string }

	postgres bool
	cmd      *exec.Cmd
	dir      string
	http     *http.Client
}

func startDev(ctx context.Context, binary, postgres string) (*dev, error) {
	dir, _, err := scratch()
	if err != nil {
		return nil, err
	}
	ready := filepath.Join(dir, "ready.json")
	args := []string{"dev", "--dir", filepath.Join(dir, "dev"), "--addr", "127.0.0.1:0", "--ready-file", ready}
	if postgres != "" {
		args = append(args, "--postgres", postgres)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(binary, args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	d := &dev{postgres: postgres != "", cmd: cmd, dir: dir, http: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 256}}}
	for range 600 {
		b, err := os.ReadFile(ready)
		if err == nil {
			return d, json.Unmarshal(b, d)
		}
		select {
		case <-ctx.Done():
			d.stop()
			return nil, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	b, _ := os.ReadFile(log.Name())
	d.stop()
	return nil, fmt.Errorf("countersign dev is not ready after a minute: %s", b)
}

func (d *dev) stop() {
	d.cmd.Process.Signal(syscall.SIGINT)
	d.cmd.Wait()
	os.RemoveAll(d.dir)
}

// post makes one call and reads the whole answer.
func (d *dev) post(ctx context.Context, method, url, header, token string, body any, want int) error {
	b, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(b))
	if err != nil {
		return err
	}
	req.Header.Set(header, token)
	req.Header.Set("Content-Type", "application/json")
	res, err := d.http.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode != want {
		return fmt.Errorf("%s %s: %s: %.300s", method, url, res.Status, answer)
	}
	return nil
}

// ask asks the broker for one credential of scope.
func (d *dev) ask(scope string) func(context.Context, int, int) error {
	return func(ctx context.Context, _, i int) error {
		return d.post(ctx, "POST", fmt.Sprintf("%s/steps/step-%d/credential", d.API, i), "Authorization", "Bearer "+d.Orchestrators[0].Token,
			map[string]string{"run": "bench", "scope": scope}, http.StatusCreated)
	}
}

func (d *dev) vault(ctx context.Context, method, path string, body, answer any) error {
	b, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, d.Vault.Addr+"/v1/"+path, bytes.NewReader(b))
	if err != nil {
		return err
	}
	req.Header.Set("X-Vault-Token", d.Vault.Token)
	res, err := d.http.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode/100 != 2 {
		b, _ := io.ReadAll(res.Body)
		return fmt.Errorf("vault %s: %s: %.300s", path, res.Status, b)
	}
	if answer == nil {
		_, err = io.Copy(io.Discard, res.Body)
		return err
	}
	return json.NewDecoder(res.Body).Decode(answer)
}

func (d *dev) identity(ctx context.Context, t *table) error {
	const what = "issue identity:step over HTTP"
	one, err := t.measure(ctx, what, "countersign", 1, d.ask("identity:step"))
	if err != nil {
		return err
	}
	many, err := t.measure(ctx, what, "countersign", 64, d.ask("identity:step"))
	if err != nil {
		return err
	}
	t.floor("identity p50 at 1", "at most 2 ms", ms(one.p50)+" ms", one.p50 <= 2*time.Millisecond)
	t.floor("identity rate at 64", "at least 3,000/s", fmt.Sprintf("%.0f/s", many.rate), many.rate >= 3000)
	return nil
}

// mintToken makes Vault's own calls of a token scope: create under the scope's
// role, then renew to the full time.
func (d *dev) mintToken(ctx context.Context, _, i int) error {
	var created struct {
		Auth struct{ Accessor string }
	}
	if err := d.vault(ctx, "POST", "auth/token/create/countersign-vault-demo-read", map[string]any{
		"ttl": "60s", "explicit_max_ttl": "15m", "renewable": true, "meta": map[string]string{"step": fmt.Sprint(i)},
	}, &created); err != nil {
		return err
	}
	return d.vault(ctx, "POST", "auth/token/renew-accessor", map[string]any{"accessor": created.Auth.Accessor, "increment": "15m"}, nil)
}

func (d *dev) token(ctx context.Context, t *table) error {
	const what = "issue a Vault token scope"
	figures := map[string]figure{}
	for _, c := range []int{1, 16} {
		for who, fn := range map[string]func(context.Context, int, int) error{"Vault, the same calls": d.mintToken, "countersign": d.ask("vault:demo-read")} {
			f, err := t.measure(ctx, what, who, c, fn)
			if err != nil {
				return err
			}
			figures[fmt.Sprint(who[:5], c)] = f
		}
	}
	over := figures["count1"].p50 - figures["Vault1"].p50
	t.floor("token p50 at 1, over Vault's", "at most 2.5 ms", ms(over)+" ms", over <= 2500*time.Microsecond)
	share := figures["count16"].rate / figures["Vault16"].rate
	t.floor("token rate at 16, of Vault's", "at least 50%", fmt.Sprintf("%.0f%%", 100*share), share >= 0.5)
	return nil
}

func (d *dev) database(ctx context.Context, t *table) error {
	if !d.postgres {
		return nil
	}
	const what = "issue a database scope"
	direct := func(ctx context.Context, _, _ int) error {
		return d.vault(ctx, "GET", "database/creds/orders-read", nil, nil)
	}
	figures := map[string]figure{}
	for _, c := range []int{1, 16} {
		for who, fn := range map[string]func(context.Context, int, int) error{"Vault's database/creds": direct, "countersign": d.ask("orders-db:read")} {
			f, err := t.measure(ctx, what, who, c, fn)
			if err != nil {
				return err
			}
			figures[fmt.Sprint(who[:5], c)] = f
		}
	}
	over := figures["count1"].p50 - figures["Vault1"].p50
	t.floor("database p50 at 1, over Vault's", "at most 4 ms", ms(over)+" ms", over <= 4*time.Millisecond)
	for _, c := range []int{1, 16} {
		share := figures[fmt.Sprint("count", c)].rate / figures[fmt.Sprint("Vault", c)].rate
		t.floor(fmt.Sprintf("database rate at %d, of Vault's", c), "at least 90%", fmt.Sprintf("%.0f%%", 100*share), share >= 0.9)
	}
	return nil
}
