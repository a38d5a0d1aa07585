package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/auth/oidcdev"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store/durable"
)

// ready is the ready file of `countersign dev`, as the outer contract has it.
type ready struct {
	API      string `json:"api"`
	Recorder string `json:"recorder"`
	Gateway  struct {
		HTTP     string `json:"http"`
		Postgres string `json:"postgres"`
		MCP      string `json:"mcp"`
	} `json:"gateway"`
	Vault struct {
		Addr  string `json:"addr"`
		Token string `json:"token"`
	} `json:"vault"`
	LogKey        string      `json:"log_key"`
	Orchestrators []devCaller `json:"orchestrators"`
	Approvers     []devCaller `json:"approvers"`
	Reviewers     []devCaller `json:"reviewers"`
	Responders    []devCaller `json:"responders"`
}

// devCaller is someone whose token `countersign dev` knows.
type devCaller struct {
	Name   string   `json:"name"`
	Groups []string `json:"groups,omitzero"`
	Token  string   `json:"token"`
}

// devCallers returns the callers of dev by the outer contract, with their
// tokens: those kept in dir, or fresh ones. Beside the token file, which holds
// hashes, dev keeps the tokens themselves, since a later start tells them again.
//
// A crash between the two files leaves a hash whose token nobody knows; the
// next start replaces it.
func devCallers(dir string) (r ready, err error) {
	path := filepath.Join(dir, "dev-tokens.json")
	kept := map[string]string{} // "role/name" to token
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, &kept)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return r, fmt.Errorf("%s: %w", path, err)
	}
	changed := false
	callers := func(role auth.Role, names ...string) (list []devCaller) {
		for _, name := range names {
			key := string(role) + "/" + name
			if kept[key] == "" && err == nil {
				changed = true
				file := filepath.Join(dir, "tokens")
				is := func(t *auth.Token) bool { return t.Role == role && t.Name == name }
				if _, err = auth.RevokeToken(file, is); err == nil {
					kept[key], err = auth.CreateToken(file, auth.Token{Role: role, Name: name, Groups: devGroups[name]}, time.Now())
				}
			}
			list = append(list, devCaller{Name: name, Groups: devGroups[name], Token: kept[key]})
		}
		return list
	}
	err = nil
	r.Orchestrators = callers(auth.Orchestrator, "demo", "other")
	r.Approvers = callers(auth.Approver, "approver-a", "approver-b", "approver-c")
	r.Reviewers = callers(auth.Reviewer, "reviewer-a")
	r.Responders = callers(auth.Responder, "responder-a", "responder-b")
	if err != nil || !changed {
		return r, err
	}
	if b, err = json.Marshal(kept, json.Deterministic(true), jsontext.WithIndent("  ")); err != nil {
		return r, err
	}
	return r, durable.WriteFile(path, append(b, '\n'))
}

// devGroups are the groups of dev's approvers.
var devGroups = map[string][]string{
	"approver-a": {"dba"},
	"approver-b": {"dba", "sre"},
	"approver-c": {"sre"},
}

// The groups by which dev's people are reviewers and responders.
const (
	devReviewers  = "reviewers"
	devResponders = "responders"
)

// devApproval is how dev's people log in and decide: at an OpenID provider that
// dev serves itself, where a click says who one is, and with the tokens of the
// ready file.
func devApproval(dir, recorder string, set *scopes.InForce) (*approvalOptions, error) {
	const client, under = "countersign", "/dev/oidc"
	key, err := devProviderKey(filepath.Join(dir, "provider.key"))
	if err != nil {
		return nil, err
	}
	var users []oidcdev.User
	for _, name := range slices.Sorted(maps.Keys(devGroups)) {
		users = append(users, oidcdev.User{Name: name, Groups: devGroups[name], Email: name + "@" + devTrustDomain})
	}
	users = append(users, oidcdev.User{Name: "reviewer-a", Groups: []string{devReviewers}},
		oidcdev.User{Name: "responder-a", Groups: []string{devResponders}}, oidcdev.User{Name: "responder-b", Groups: []string{devResponders}})
	provider, err := oidcdev.New(oidcdev.Options{
		Issuer: recorder + under, ClientID: client, RedirectURIs: []string{recorder + "/login/callback"}, Users: users, Key: key,
	})
	if err != nil {
		return nil, err
	}
	return &approvalOptions{
		baseURL: recorder, scopes: set, tokens: true, outbox: filepath.Join(dir, "outbox.db"),
		login: auth.PeopleConfig{
			Issuer: recorder + under, ClientID: client, BaseURL: recorder,
			Roles: map[auth.Role][]string{auth.Reviewer: {devReviewers}, auth.Responder: {devResponders}},
		},
		provider: func(next http.Handler) http.Handler {
			h := provider.Handler()
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if strings.HasPrefix(r.URL.Path, under+"/") {
					h.ServeHTTP(w, r)
					return
				}
				next.ServeHTTP(w, r)
			})
		},
	}, nil
}

// devProviderKey is the key of dev's OpenID provider, kept so that the
// enrolments it vouched for can still be checked after a restart.
func devProviderKey(path string) (crypto.Signer, error) {
	if err := keep(path, func() (string, error) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return "", err
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})), err
	}); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("%s holds no PEM key", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s holds no signing key", path)
	}
	return signer, nil
}

// write puts r in the file at path, so that whoever waits for the file reads it
// whole.
func (r *ready) write(path string) error {
	b, err := json.Marshal(r, jsontext.WithIndent("  "))
	if err != nil {
		return err
	}
	if err := durable.WriteFile(path, append(b, '\n')); err != nil {
		return fmt.Errorf("ready file: %w", err)
	}
	return nil
}

// lookup returns one value of the ready file by its path: "api",
// "gateway.http", "log_key", or a caller's token by name, "reviewers.reviewer-a".
func (r *ready) lookup(field string) (string, error) {
	values := map[string]string{
		"api": r.API, "recorder": r.Recorder, "log_key": r.LogKey,
		"gateway.http": r.Gateway.HTTP, "gateway.postgres": r.Gateway.Postgres, "gateway.mcp": r.Gateway.MCP,
		"vault.addr": r.Vault.Addr, "vault.token": r.Vault.Token,
	}
	for role, list := range map[string][]devCaller{
		"orchestrators": r.Orchestrators, "approvers": r.Approvers, "reviewers": r.Reviewers, "responders": r.Responders,
	} {
		for _, c := range list {
			values[role+"."+c.Name] = c.Token
		}
	}
	v, ok := values[field]
	if !ok {
		return "", fmt.Errorf("no field %q in the ready file; use one such as api, recorder, log_key, vault.addr or reviewers.reviewer-a", field)
	}
	return v, nil
}

// keep makes a secret's file with generate where there is none.
func keep(path string, generate func() (string, error)) error {
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	text, err := generate()
	if err != nil {
		return err
	}
	return writeSecret(path, []byte(text+"\n"))
}
