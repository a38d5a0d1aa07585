package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/problem"
	"github.com/countersign-dev/countersign/store"
)

// approvers are the people who decide.
var approvers = []string{"ann", "ben"}

// decision is what a person decided, and was told to be on record.
type decision struct{ approval, request, person, decision string }

// people decide what waits: each looks at what is pending and decides it.
type people struct {
	h         *house
	transport *http.Transport

	mu   sync.Mutex
	took []decision
}

func newPeople(h *house) *people {
	return &people{h: h, transport: &http.Transport{DialContext: h.net.nodes["people"].dial, ForceAttemptHTTP2: true}}
}

// decide decides as name until ctx ends. Who is not let in logs in again.
func (p *people) decide(ctx context.Context, name string) {
	for ctx.Err() == nil {
		token, err := p.logIn(ctx, name)
		if err == nil {
			err = p.session(ctx, name, token)
		}
		if err != nil {
			select {
			case <-time.After(500 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	}
}

// session decides until something fails.
func (p *people) session(ctx context.Context, name, token string) error {
	a, err := client.NewApprover(client.Config{URL: p.h.recorderURL(), Token: client.Token(token), Transport: p.transport})
	if err != nil {
		return err
	}
	for {
		err := func() error {
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			page, err := a.List(ctx, "pending", "")
			if err != nil {
				return err
			}
			for _, r := range page.Approvals {
				say := store.Approve
				if strings.HasSuffix(r.Step, "7") { // one in ten
					say = store.Refuse
				}
				_, err := a.Decide(ctx, r.ID, say, "in the drill")
				var refused *problem.Problem
				switch {
				case err == nil:
					p.mu.Lock()
					p.took = append(p.took, decision{r.ID, r.Request, name, string(say)})
					p.mu.Unlock()
				case errors.As(err, &refused) && refused.Status == http.StatusConflict: // the other was faster
				default:
					return err
				}
			}
			return nil
		}()
		if err != nil {
			return err
		}
		select {
		case <-time.After(300 * time.Millisecond):
		case <-ctx.Done():
			return nil
		}
	}
}

var formField = regexp.MustCompile(`name="([a-z_]+)" value="([^"]*)"`)

// logIn logs in as `countersign login` does, with a browser that clicks where the
// person would, and returns the terminal's token.
func (p *people) logIn(ctx context.Context, name string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	jar, err := cookiejar.New(nil)
	if err != nil {
		return "", err
	}
	var code string
	browser := &http.Client{Jar: jar, Transport: p.transport, CheckRedirect: func(r *http.Request, via []*http.Request) error {
		if r.URL.Path == "/callback" && r.URL.Hostname() == "127.0.0.1" { // where the terminal would listen
			code = r.URL.Query().Get("code")
			return http.ErrUseLastResponse
		}
		if len(via) > 10 {
			return errors.New("redirected in a circle")
		}
		return nil
	}}
	visit := func(method, to string, form url.Values) (string, *url.URL, error) {
		r, err := http.NewRequestWithContext(ctx, method, to, strings.NewReader(form.Encode()))
		if err != nil {
			return "", nil, err
		}
		r.Header.Set("Accept", "text/html")
		if form != nil {
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			r.Header.Set("Sec-Fetch-Site", "same-origin")
		}
		res, err := browser.Do(r)
		if err != nil {
			return "", nil, err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
		if err == nil && res.StatusCode >= 400 {
			err = fmt.Errorf("%s: %s: %.300s", res.Request.URL.Path, res.Status, b)
		}
		return string(b), res.Request.URL, err
	}
	submit := func(at *url.URL, page string, user string) (string, *url.URL, error) {
		form := url.Values{}
		for _, m := range formField.FindAllStringSubmatch(page, -1) {
			if m[1] != "user" {
				form.Set(m[1], m[2])
			}
		}
		if user != "" {
			form.Set("user", user)
		}
		to := *at
		to.RawQuery = ""
		return visit(http.MethodPost, to.String(), form)
	}
	verifier := rand.Text() + rand.Text()
	sum := sha256.Sum256([]byte(verifier))
	page, at, err := visit(http.MethodGet, p.h.recorderURL()+"/login/cli?port=40000&challenge="+base64.RawURLEncoding.EncodeToString(sum[:]), nil)
	if err == nil && strings.Contains(page, `value="`+name+`"`) { // the provider's login
		page, at, err = submit(at, page, name)
	}
	if err == nil && code == "" {
		_, _, err = submit(at, page, "")
	}
	if err != nil {
		return "", err
	}
	b, err := json.Marshal(map[string]string{"code": code, "verifier": verifier})
	if err != nil {
		return "", err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, p.h.recorderURL()+"/login/cli/token", bytes.NewReader(b))
	if err != nil {
		return "", err
	}
	r.Header.Set("Content-Type", "application/json")
	res, err := (&http.Client{Transport: p.transport}).Do(r)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	var token struct{ Token string }
	if err := json.NewDecoder(io.LimitReader(res.Body, 1<<16)).Decode(&token); err != nil || token.Token == "" {
		return "", fmt.Errorf("no token for %s: %s", name, res.Status)
	}
	return token.Token, nil
}
