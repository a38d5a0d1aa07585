package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/store"
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

// devPeople are the callers of dev by the outer contract.
func devPeople(key store.PrivacyKey) (r ready) {
	callers := func(role string, names ...string) (list []devCaller) {
		for _, name := range names {
			list = append(list, devCaller{Name: name, Token: devToken(key, role, name)})
		}
		return list
	}
	r.Orchestrators = callers("orchestrator", "demo", "other")
	r.Approvers = callers("approver", "approver-a", "approver-b", "approver-c")
	r.Approvers[0].Groups = []string{"dba"}
	r.Approvers[1].Groups = []string{"dba", "sre"}
	r.Approvers[2].Groups = []string{"sre"}
	r.Reviewers = callers("reviewer", "reviewer-a")
	r.Responders = callers("responder", "responder-a", "responder-b")
	return r
}

// devToken derives a token from dev's privacy key, so that tokens outlive a
// restart.
func devToken(key store.PrivacyKey, role, name string) string {
	_, mac, _ := strings.Cut(key.Digest("dev-token", role, name), ":")
	return "cs_dev_" + mac
}

// write puts r in place by rename, so that whoever waits for the file reads it
// whole.
func (r *ready) write(path string) error {
	b, err := json.Marshal(r, jsontext.WithIndent("  "))
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".ready-*") // created with mode 0600
	if err != nil {
		return fmt.Errorf("ready file: %w", err)
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(append(b, '\n'))
	if err = errors.Join(err, tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
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

// keep returns the content of a secret's file, made with generate the first
// time.
func keep(path string, generate func() (string, error)) (string, error) {
	text, err := readSecret(path)
	if !errors.Is(err, os.ErrNotExist) {
		return text, err
	}
	if text, err = generate(); err != nil {
		return "", err
	}
	return text, writeSecret(path, []byte(text+"\n"))
}
