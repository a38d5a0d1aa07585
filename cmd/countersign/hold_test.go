package main

import (
	"bytes"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/respond"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

func TestRetentionIsRefusedWhereItMakesNoSense(t *testing.T) {
	for text, want := range map[string]string{
		"retention: {low: 720h, sensitive: 8760h, critical: 87600h, default: 720h}": "",
		"retention: {}":                 "",
		"retention: {low: 59m}":         "retention.low: 59m0s is too short",
		"retention: {low: -1h}":         "too short",
		"retention: {high: 720h}":       "retention.high: want low, sensitive, critical or default",
		"retention: {low: a month}":     "invalid duration",
		"retention: {low: 1h, low: 2h}": "retention.yaml:1",
	} {
		var c struct {
			Retention retentionConfig `yaml:"retention"`
		}
		err := parseConfig("retention.yaml", []byte(text), &c)
		if err == nil {
			err = c.Retention.check()
		}
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestAHoldIsPlacedListedAndLiftedFromTheCommandLine(t *testing.T) {
	dir := t.TempDir()
	files, err := openDevFiles(dir)
	must(t, err)
	o := files.people(zap.NewNop())
	l, err := ledger.Open(t.Context(), o.ledger)
	must(t, err)
	defer l.Close()
	kept := retentionConfig{"low": time.Hour, "default": 2 * time.Hour}
	inForce, err := devScopes(dir, "", nil)
	must(t, err)
	set := inForce.Current()
	keeper, err := kept.open(t.Context(), l, o.trustDomain, dir, set, zap.NewNop())
	must(t, err)
	defer keeper.Close()
	last, err := l.Loaded(t.Context(), recorderName)
	must(t, err)
	if last == nil || time.Duration(last.Retention["low"]) != time.Hour || time.Duration(last.Retention[""]) != 2*time.Hour || last.Digest != set.Digest() {
		t.Fatalf("on record: %+v", last)
	}

	file := filepath.Join(t.TempDir(), "tokens")
	token, err := auth.CreateToken(file, auth.Token{Role: auth.Responder, Name: "ada"}, time.Now())
	must(t, err)
	tokens, err := auth.OpenTokens(file, nil)
	must(t, err)
	r := chi.NewRouter()
	respond.New(respond.Config{Ledger: l, Guard: &auth.Guard{Tokens: tokens}, Name: recorderName, TrustDomain: o.trustDomain, PrivacyKey: o.ledger.PrivacyKey}).Routes(r)
	server := httptest.NewServer(r)
	defer server.Close()
	t.Setenv("COUNTERSIGN_RECORDER", server.URL)
	t.Setenv("COUNTERSIGN_TOKEN", token)
	hold := func(args ...string) (string, error) {
		var out bytes.Buffer
		c := holdCommand()
		c.SetArgs(args)
		c.SetOut(&out)
		c.SilenceErrors, c.SilenceUsage = true, true
		err := c.ExecuteContext(t.Context())
		return out.String(), err
	}
	if out, err := hold("list"); err != nil || out != "nothing is held\n" {
		t.Fatalf("%q %v", out, err)
	}
	if out, err := hold("place", "--run", "run-42", "--reason", "OPS-1"); err != nil || !strings.HasSuffix(out, " is in force: run run-42\n") {
		t.Fatalf("%q %v", out, err)
	}
	out, err := hold("place", "--from", "2026-01-01T00:00:00Z", "--to", "2026-04-01T00:00:00Z", "--reason", "audit", "-o", "json")
	var h client.Hold
	if err != nil || json.Unmarshal([]byte(out), &h) != nil || h.State != client.HoldInForce || h.PlacedBy != "user:ada" {
		t.Fatalf("%q %v", out, err)
	}
	if out, err := hold("lift", h.ID, "--reason", "over"); err != nil || !strings.Contains(out, "is lifted: 2026-01-01T00:00:00Z to 2026-04-01T00:00:00Z") {
		t.Fatalf("%q %v", out, err)
	}
	if out, err := hold("list"); err != nil || strings.Count(out, "\n") != 3 || !strings.Contains(out, "run run-42") || !strings.Contains(out, "lifted") {
		t.Fatalf("%q %v", out, err)
	}
	for _, args := range [][]string{
		{"place", "--reason", "r"}, {"place", "--run", "r", "--from", "2026-01-01T00:00:00Z", "--reason", "r"},
		{"place", "--from", "yesterday", "--reason", "r"}, {"place", "--run", "r"}, {"lift", h.ID}, {"lift"}, {"lift", store.NewID(), "--reason", "r"},
	} {
		if out, err := hold(args...); err == nil {
			t.Errorf("%v: %s", args, out)
		}
	}
	t.Setenv("COUNTERSIGN_TOKEN", "cs_responder_x")
	if _, err := hold("list"); err == nil || !strings.Contains(err.Error(), "COUNTERSIGN_TOKEN") {
		t.Errorf("a token of nobody: %v", err)
	}
}
