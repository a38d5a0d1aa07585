package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	switchTokens = 5000
	switchRoles  = 200
)

// stopEverything measures how long after POST /revocations {"all":true} Vault, and
// PostgreSQL where there is one, refuse all that was live. The recorder's own
// list of what is left is not believed: Vault and PostgreSQL are asked.
func (d *dev) stopEverything(ctx context.Context, t *table, dsn string) error {
	took, err := d.stopped(ctx, "vault:demo-read", switchTokens, d.accessors)
	if err != nil {
		return err
	}
	t.rows = append(t.rows, []string{fmt.Sprintf("stop everything, %d Vault tokens", switchTokens), "countersign", "1", ms(took), "", fmt.Sprintf("%.0f", switchTokens/took.Seconds())})
	t.floor(fmt.Sprintf("%d live tokens refused by Vault", switchTokens), "at most 10 s", fmt.Sprintf("%.1f s", took.Seconds()), took <= 10*time.Second)
	if dsn == "" {
		return nil
	}
	u, err := url.Parse(dsn)
	if err != nil {
		return err
	}
	password, _ := u.User.Password()
	db := target{u.Hostname(), u.Port(), u.User.Username(), password, strings.TrimPrefix(u.Path, "/")}
	took, err = d.stopped(ctx, "orders-db:read", switchRoles, func() (int, error) {
		// Roles that Vault made for us; PostgreSQL refuses who is not there.
		out, err := db.command(ctx, "psql", "-XAtq", "-c", "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'v-%'").Output()
		if err != nil {
			return 0, fmt.Errorf("psql: %w", err)
		}
		return strconv.Atoi(strings.TrimSpace(string(out)))
	})
	if err != nil {
		return err
	}
	t.rows = append(t.rows, []string{fmt.Sprintf("stop everything, %d database roles", switchRoles), "countersign", "1", ms(took), "", fmt.Sprintf("%.0f", switchRoles/took.Seconds())})
	return nil
}

// accessors is how many tokens Vault has.
func (d *dev) accessors() (int, error) {
	answer, err := d.vault(0, "LIST", "auth/token/accessors", nil)
	if err != nil {
		return 0, err
	}
	var list struct{ Data struct{ Keys []string } }
	err = json.Unmarshal(answer, &list)
	return len(list.Data.Keys), err
}

// stopped issues n credentials of scope, stops everything, and returns how long
// it took until live, which counts those that are taken, is where it was before.
// Then it lifts the freeze.
func (d *dev) stopped(ctx context.Context, scope string, n int, live func() (int, error)) (time.Duration, error) {
	fmt.Fprintf(os.Stderr, "measuring stop everything, %d of %s\n", n, scope)
	before, err := live()
	if err != nil {
		return 0, err
	}
	var wg sync.WaitGroup
	failed := make([]error, 16)
	secrets := make([]string, n)
	for w := range failed {
		wg.Go(func() {
			for i := w; i < n && failed[w] == nil && ctx.Err() == nil; i += len(failed) {
				var answer []byte
				answer, failed[w] = d.call(w, "POST", fmt.Sprintf("%s/steps/step-%d/credential", d.API, i), "Authorization", "Bearer "+d.Orchestrators[0].Token,
					map[string]string{"run": "switch-" + strings.ReplaceAll(scope, ":", "-"), "scope": scope, "ttl": "15m"})
				var got struct{ Credential struct{ Token string } }
				if failed[w] == nil {
					failed[w] = json.Unmarshal(answer, &got)
				}
				secrets[i] = got.Credential.Token
			}
		})
	}
	wg.Wait()
	for _, err := range failed {
		if err != nil {
			return 0, err
		}
	}
	if now, err := live(); err != nil || now < before+n {
		return 0, fmt.Errorf("%d of %d are live (%w)", now-before, n, err)
	}
	began := time.Now()
	answer, err := d.call(0, "POST", d.Recorder+"/revocations", "Authorization", "Bearer "+d.Responders[0].Token, map[string]any{"all": true, "reason": "bench"})
	if err != nil {
		return 0, err
	}
	var freeze struct{ ID string }
	if err := json.Unmarshal(answer, &freeze); err != nil {
		return 0, err
	}
	var took time.Duration
	for {
		now, err := live()
		if err != nil {
			return 0, err
		}
		if took = time.Since(began); now <= before {
			break
		}
		if took > 2*time.Minute {
			return 0, fmt.Errorf("%d are live %s after the call", now-before, took)
		}
		time.Sleep(200 * time.Millisecond) // a look at 5,000 accessors costs Vault as much as many revocations
	}
	// The tokens themselves are refused.
	for i := 0; i < n; i += max(1, n/100) {
		if secrets[i] == "" {
			continue // not a Vault token
		}
		req, err := http.NewRequestWithContext(ctx, "GET", d.Vault.Addr+"/v1/secret/data/demo", bytes.NewReader(nil))
		if err != nil {
			return 0, err
		}
		req.Header.Set("X-Vault-Token", secrets[i])
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, err
		}
		res.Body.Close()
		if res.StatusCode != http.StatusForbidden {
			return 0, fmt.Errorf("a token is answered with %s", res.Status)
		}
	}
	return took, d.lift(freeze.ID)
}

// lift lifts a freeze, once it is on record that all was revoked, by another
// responder than the one who set it.
func (d *dev) lift(freeze string) error {
	for range 600 {
		answer, err := d.call(0, "GET", d.Recorder+"/revocations/"+freeze, "Authorization", "Bearer "+d.Responders[0].Token, nil)
		if err != nil {
			return err
		}
		var left struct{ Pending, Minting int }
		if err := json.Unmarshal(answer, &left); err != nil {
			return err
		}
		if left.Pending+left.Minting == 0 {
			_, err := d.call(0, "DELETE", d.Recorder+"/revocations/"+freeze+"?reason=bench", "Authorization", "Bearer "+d.Responders[1].Token, nil)
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
	return fmt.Errorf("a minute later it is not on record that all was revoked")
}
