package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/spf13/cobra"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/store/durable"
)

// loginWithin is how long the browser is waited for.
const loginWithin = 5 * time.Minute

func loginCommand() *cobra.Command {
	var recorder string
	var noBrowser bool
	cmd := &cobra.Command{
		Use:   "login",
		Short: "Log in as a person, with the browser",
		Long: `Log in at the recorder as a person. The browser opens the recorder's login; once
you have confirmed it there, this terminal acts as you for at most 8 hours. What
it gets is kept in login.json in the user's configuration directory, readable by
its owner alone. ` + "`countersign approvals`" + ` uses it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			recorder := orEnv(recorder, "COUNTERSIGN_RECORDER")
			if recorder == "" {
				return errors.New("no recorder named: set COUNTERSIGN_RECORDER, or add --recorder URL")
			}
			open := openBrowser
			if noBrowser {
				open = func(context.Context, string) error { return errors.New("not asked to") }
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), loginWithin)
			defer cancel()
			token, err := terminalLogin(ctx, recorder, func(page string) {
				if err := open(ctx, page); err != nil {
					fmt.Fprintf(cmd.ErrOrStderr(), "Open this page in a browser on this machine:\n\n  %s\n\n", page)
				}
			})
			if err != nil {
				return err
			}
			if err := keepLogin(recorder, token); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "logged in as %s until %s\n", token.Person, token.Expires.Local().Format(time.DateTime))
			return err
		},
	}
	cmd.Flags().StringVar(&recorder, "recorder", "", "the recorder's URL ($COUNTERSIGN_RECORDER)")
	cmd.Flags().BoolVar(&noBrowser, "no-browser", false, "print the page's address and open nothing")
	return cmd
}

// openBrowser opens a page with the desktop's own program.
func openBrowser(ctx context.Context, page string) error {
	name := "xdg-open"
	if runtime.GOOS == "darwin" {
		name = "open"
	}
	return exec.CommandContext(ctx, name, page).Run()
}

// terminalLogin logs in by the browser: a code comes back on a loopback address
// (RFC 8252, section 7.3), and is worth something only together with the
// verifier that never leaves this process (RFC 7636).
func terminalLogin(ctx context.Context, recorder string, show func(page string)) (*auth.TerminalToken, error) {
	base, err := url.Parse(recorder)
	if err != nil || base.Host == "" {
		return nil, fmt.Errorf("the recorder %q is no URL such as https://recorder.example.com", recorder)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer l.Close()
	verifier := rand.Text() + rand.Text() // 52 characters of base32, over 256 bits
	sum := sha256.Sum256([]byte(verifier))
	codes := make(chan string, 1)
	s := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		code := r.URL.Query().Get("code")
		if r.Method != http.MethodGet || r.URL.Path != "/callback" || code == "" {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		fmt.Fprintln(w, "You can close this page and go back to the terminal.")
		select {
		case codes <- code:
		default:
		}
	})}
	go func() { _ = s.Serve(l) }()
	defer s.Close()

	page := base.JoinPath("/login/cli")
	page.RawQuery = url.Values{
		"port":      {fmt.Sprint(l.Addr().(*net.TCPAddr).Port)},
		"challenge": {base64.RawURLEncoding.EncodeToString(sum[:])},
	}.Encode()
	show(page.String())
	select {
	case code := <-codes:
		return client.TerminalLogin(ctx, client.Config{URL: recorder}, code, verifier)
	case <-ctx.Done():
		return nil, fmt.Errorf("nobody logged in within %s: run it again", loginWithin)
	}
}

// logins are what `countersign login` kept, by the recorder's URL.
type logins map[string]auth.TerminalToken

func loginFile() (string, error) {
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "countersign", "login.json"), nil
}

func readLogins() (logins, string, error) {
	path, err := loginFile()
	if err != nil {
		return nil, "", err
	}
	all := logins{}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return all, path, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &all)
	}
	if err != nil {
		return nil, path, fmt.Errorf("%s cannot be read: remove it and log in again", path)
	}
	return all, path, nil
}

// keepLogin adds a login. A crash leaves the file as it was, or with it.
func keepLogin(recorder string, token *auth.TerminalToken) error {
	all, path, err := readLogins()
	if err != nil {
		return err
	}
	all[strings.TrimRight(recorder, "/")] = *token
	b, err := json.Marshal(all, json.Deterministic(true))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return durable.WriteFile(path, b)
}

// keptLogin is the token of an earlier login at recorder.
func keptLogin(recorder string, now time.Time) (string, error) {
	all, _, err := readLogins()
	if err != nil {
		return "", err
	}
	t, ok := all[strings.TrimRight(recorder, "/")]
	if !ok || !now.Before(t.Expires) {
		return "", errors.New("nobody is logged in there: run `countersign login`, or set COUNTERSIGN_TOKEN")
	}
	return t.Token, nil
}
