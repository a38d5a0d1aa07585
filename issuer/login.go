package issuer

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/api/auth/approle"
	"go.uber.org/zap"
)

// Login is how the issuer authenticates to Vault: exactly one of a token, a
// token file, and AppRole.
type Login struct {
	Token     string   // as a rule a periodic, orphan token of the operator's
	TokenFile string   // the file it is in, read again at each login
	AppRole   *AppRole //
}

// AppRole is a login by role ID and secret ID.
type AppRole struct {
	Mount        string // "approle" by default
	RoleID       string
	SecretID     string
	SecretIDFile string // or the file it is in, read again at each login
}

// String says which kind of login l is, and nothing of its secret.
func (l Login) String() string {
	switch {
	case l.AppRole != nil:
		return "AppRole"
	case l.TokenFile != "":
		return "token file " + l.TokenFile
	case l.Token != "":
		return "token"
	}
	return "none"
}

// GoString is String, for %#v.
func (l Login) GoString() string { return l.String() }

// Format is String under every verb.
func (l Login) Format(f fmt.State, _ rune) { fmt.Fprint(f, l.String()) }

// String says nothing of the secret ID.
func (a *AppRole) String() string { return "AppRole" }

// GoString is String, for %#v.
func (a *AppRole) GoString() string { return a.String() }

// login logs in and returns what Vault says of the token. The client's own
// token is not used.
func (l Login) login(ctx context.Context, client *api.Client) (*api.Secret, error) {
	n := 0
	for _, set := range []bool{l.Token != "", l.TokenFile != "", l.AppRole != nil} {
		if set {
			n++
		}
	}
	if n != 1 {
		return nil, errors.New("login to Vault: give exactly one of token, token_file and approle")
	}
	if l.AppRole != nil {
		auth, err := approle.NewAppRoleAuth(l.AppRole.RoleID,
			&approle.SecretID{FromString: l.AppRole.SecretID, FromFile: l.AppRole.SecretIDFile},
			func(a *approle.AppRoleAuth) error {
				if l.AppRole.Mount == "" {
					return nil
				}
				return approle.WithMountPath(l.AppRole.Mount)(a)
			})
		if err != nil {
			return nil, fmt.Errorf("login to Vault by AppRole: %w", err)
		}
		s, err := auth.Login(ctx, client.WithRequestCallbacks(func(r *api.Request) { r.ClientToken = "" }))
		if err != nil {
			var re *api.ResponseError
			if errors.As(err, &re) && re.StatusCode == http.StatusBadRequest {
				return nil, &StageError{stageLogin, fmt.Errorf("%w: HTTP 400, as for a wrong role ID or secret ID", ErrVaultRefused)}
			}
			return nil, vaultError(stageLogin, err)
		}
		if s == nil || s.Auth == nil {
			return nil, &StageError{stageLogin, fmt.Errorf("%w: the AppRole login gave no token: is it mounted at auth/%s?", ErrVaultRefused, or(l.AppRole.Mount, "approle"))}
		}
		return s, nil
	}
	token := l.Token
	if l.TokenFile != "" {
		b, err := os.ReadFile(l.TokenFile)
		if err != nil {
			return nil, fmt.Errorf("login to Vault: %w", err)
		}
		token = strings.TrimSpace(string(b))
	}
	s, err := client.WithRequestCallbacks(func(r *api.Request) { r.ClientToken = token }).
		Logical().ReadWithContext(ctx, "auth/token/lookup-self")
	if err != nil {
		return nil, vaultError(stageLogin, err)
	}
	if s == nil {
		return nil, &StageError{stageLogin, fmt.Errorf("%w: auth/token/lookup-self answered nothing", ErrVaultRefused)}
	}
	ttl, err := s.TokenTTL()
	if err != nil {
		return nil, &StageError{stageLogin, fmt.Errorf("%w: auth/token/lookup-self gave no ttl", ErrVaultRefused)}
	}
	renewable, _ := s.TokenIsRenewable()
	return &api.Secret{Auth: &api.SecretAuth{ClientToken: token, Renewable: renewable, LeaseDuration: int(ttl / time.Second)}}, nil
}

func or(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

// keeper holds the login: it renews the token, and logs in anew when renewal
// comes to its end or Vault no longer knows the token.
type keeper struct {
	client *api.Client
	login  Login
	log    *zap.Logger
	nudge  chan struct{}
	held   atomic.Bool // the token is taken to be good
	cancel context.CancelFunc
	done   chan struct{}
}

func keepLogin(ctx context.Context, client *api.Client, login Login, log *zap.Logger) (*keeper, error) {
	s, err := login.login(ctx, client)
	if err != nil {
		return nil, err
	}
	client.SetToken(s.Auth.ClientToken)
	run, cancel := context.WithCancel(context.Background())
	k := &keeper{client: client, login: login, log: log, nudge: make(chan struct{}, 1), cancel: cancel, done: make(chan struct{})}
	k.held.Store(true)
	go k.run(run, s)
	return k, nil
}

func (k *keeper) stop() {
	k.cancel()
	<-k.done
}

// look has the token looked at soon. Many calls are one.
func (k *keeper) look() {
	select {
	case k.nudge <- struct{}{}:
	default:
	}
}

func (k *keeper) run(ctx context.Context, s *api.Secret) {
	defer close(k.done)
	for ctx.Err() == nil {
		k.hold(ctx, s)
		k.held.Store(false)
		for wait := time.Second; ctx.Err() == nil; wait = min(2*wait, 30*time.Second) {
			next, err := k.login.login(ctx, k.client)
			if err == nil {
				s = next
				k.client.SetToken(s.Auth.ClientToken)
				k.held.Store(true)
				k.log.Info("logged in to Vault again", zap.Stringer("login", k.login))
				break
			}
			k.log.Error("cannot log in to Vault; nothing is minted or revoked until it works",
				zap.Stringer("login", k.login), zap.Error(err), zap.Duration("next", wait))
			sleep(ctx, wait)
		}
	}
}

// hold renews the token of s until that ends, or until Vault refuses it.
func (k *keeper) hold(ctx context.Context, s *api.Secret) {
	var ended <-chan error
	if s.Auth.LeaseDuration > 0 { // a token without a TTL, such as root's, needs no renewal
		w, err := k.client.NewLifetimeWatcher(&api.LifetimeWatcherInput{Secret: s})
		if err != nil {
			k.log.Error("cannot renew the Vault login", zap.Error(err))
			sleep(ctx, time.Second)
			return
		}
		go w.Start()
		defer w.Stop()
		ended = w.DoneCh()
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-ended:
			// A static token that cannot be renewed is taken up again until it is
			// replaced; not in a tight loop.
			if k.login.AppRole == nil {
				sleep(ctx, time.Second)
			}
			return
		case <-k.nudge:
			_, err := k.client.Logical().ReadWithContext(ctx, "auth/token/lookup-self")
			var re *api.ResponseError
			if errors.As(err, &re) && re.StatusCode == http.StatusForbidden {
				k.log.Warn("Vault no longer accepts the login's token")
				return
			}
		}
	}
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
