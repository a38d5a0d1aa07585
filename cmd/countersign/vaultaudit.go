package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store/ledger"
	"github.com/countersign-dev/countersign/store/trust"
	"github.com/countersign-dev/countersign/store/vaultaudit"
)

// vaultAuditConfig says which of Vault's audit devices the recorder follows. Its
// own login may ask for audit hashes and for nothing else:
//
//	path "sys/audit-hash/file" { capabilities = ["update"] }
type vaultAuditConfig struct {
	File       string `yaml:"file"`        // what a file audit device writes; or listen
	Listen     string `yaml:"listen"`      // where a socket device comes to instead: 127.0.0.1:PORT, or unix:PATH
	Device     string `yaml:"device"`      // the device's path in Vault; file or socket by default
	Addr       string `yaml:"addr"`        // URL of Vault
	Namespace  string `yaml:"namespace"`   // of Vault Enterprise; none by default
	CA         string `yaml:"ca"`          // file, PEM; the system's by default
	Token      string `yaml:"token_file"`  // file of a token that may ask for audit hashes, read again for every call, so that an agent may renew it
	RolePrefix string `yaml:"role_prefix"` // of the token roles under which the brokers mint; countersign- by default
}

// auditDevice is what may be a device's path, so that no other path is asked.
var auditDevice = regexp.MustCompile(`\A[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*/?\z`)

func (c *vaultAuditConfig) check() error {
	if c == nil {
		return nil
	}
	if (c.File == "") == (c.Listen == "") {
		return errors.New("vault_audit: set either file or listen")
	}
	if err := due([][2]string{{"vault_audit.addr", c.Addr}, {"vault_audit.token_file", c.Token}}); err != nil {
		return err
	}
	if err := secureURL(c.Addr); err != nil {
		return fmt.Errorf("vault_audit.addr: %w", err)
	}
	if !auditDevice.MatchString(c.device()) {
		return fmt.Errorf("vault_audit.device: %q is no path of an audit device", c.Device)
	}
	// Whoever reaches it can feed it lines: Vault's socket device shows nothing by
	// which it could be known.
	if c.Listen != "" && !strings.HasPrefix(c.Listen, "unix:") && !loopback(c.Listen) {
		return fmt.Errorf("vault_audit.listen %s can be reached from elsewhere: listen on 127.0.0.1 or unix:PATH, with a tunnel in front where Vault is on another machine", c.Listen)
	}
	return nil
}

func (c *vaultAuditConfig) device() string {
	if c.File != "" {
		return cmp.Or(c.Device, "file")
	}
	return cmp.Or(c.Device, "socket")
}

// open begins to follow; nil where c is. dir is the recorder's own, origin the
// ledger's name, trustDomain that of its SPIFFE IDs.
func (c *vaultAuditConfig) open(l *ledger.Ledger, dir, origin, trustDomain string, log *zap.Logger) (*vaultaudit.Follower, error) {
	if c == nil {
		return nil, nil
	}
	hash, err := c.hasher(log)
	if err != nil {
		return nil, fmt.Errorf("vault_audit: %w", err)
	}
	o := vaultaudit.Options{
		Ledger: l, Writer: recorderName, Agent: "spiffe://" + trustDomain + "/recorder/" + recorderName, Log: origin,
		Hash: hash, RolePrefix: c.RolePrefix, Zap: log,
	}
	if c.File != "" {
		o.File, o.Cursor = c.File, filepath.Join(dir, "vault-audit.cursor")
	} else if o.Listener, err = c.listen(); err != nil {
		return nil, fmt.Errorf("vault_audit.listen: %w", err)
	}
	f, err := vaultaudit.Open(o)
	if err != nil {
		if o.Listener != nil {
			o.Listener.Close()
		}
		return nil, fmt.Errorf("vault_audit: %w", err)
	}
	return f, nil
}

func (c *vaultAuditConfig) listen() (net.Listener, error) {
	path, ok := strings.CutPrefix(c.Listen, "unix:")
	if !ok {
		return net.Listen("tcp", c.Listen)
	}
	// A socket that a killed recorder left behind.
	if info, err := os.Stat(path); err == nil && info.Mode()&os.ModeSocket != 0 {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	return net.Listen("unix", path)
}

// vaultClient is a client of the Vault at addr, without a token. Nothing is taken
// from the environment.
func vaultClient(addr, namespace, ca string, log *zap.Logger) (*api.Client, error) {
	t := &http.Transport{
		DialContext:         (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
		TLSHandshakeTimeout: 5 * time.Second,
		ForceAttemptHTTP2:   true, IdleConnTimeout: 90 * time.Second,
	}
	roots, err := trust.Open(trust.Files{CA: ca}, log)
	if err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	v, err := api.NewClient(&api.Config{Address: addr, Timeout: 10 * time.Second, MaxRetries: 0, HttpClient: &http.Client{
		Transport:     roots.Transport(t),
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}})
	if err != nil {
		return nil, fmt.Errorf("making the Vault client: %w", err)
	}
	h := http.Header{api.RequestHeaderName: {"true"}}
	if namespace != "" {
		h.Set(api.NamespaceHeaderName, namespace)
	}
	v.SetHeaders(h)
	v.SetWrappingLookupFunc(func(string, string) string { return "" })
	v.ClearToken()
	return v, nil
}

// hasher asks Vault for audit hashes.
func (c *vaultAuditConfig) hasher(log *zap.Logger) (func(context.Context, string) (string, error), error) {
	v, err := vaultClient(c.Addr, c.Namespace, c.CA, log)
	if err != nil {
		return nil, err
	}
	device := strings.Trim(c.device(), "/")
	return func(ctx context.Context, input string) (string, error) {
		token, err := readSecret(c.Token)
		if err != nil {
			return "", err
		}
		// Lines are judged one after the other: no other call uses the client.
		v.SetToken(token)
		return v.Sys().AuditHashWithContext(ctx, device, input)
	}, nil
}
