package main

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/torchwood"
	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/api/auth"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// witnessed is a recorder's options beside a witness that knows its log.
type witnessed struct {
	*pair
	o       *peopleOptions
	witness string // verifier key
	log     string // verifier key
	url     string // of the witness
}

func newWitnessed(t *testing.T) *witnessed {
	p := &pair{t: t, dir: t.TempDir()}
	p.certificates()
	w := &witnessed{pair: p}
	w.log = p.cli("key", "generate", "log", "--name", "pair.example/log", "--out", p.file("log.key"))
	w.witness = p.cli("key", "generate", "witness", "--name", "witness.example/w1", "--out", p.file("witness.key"))
	p.cli("key", "generate", "privacy", "--out", p.file("privacy.key"))
	p.reviewer = p.cli("token", "create", "--file", p.file("tokens"), "--role", "reviewer", "--name", "reviewer-a")
	w.runWitness()

	signer, vkey, err := readLogKey(p.file("log.key"))
	if err != nil {
		t.Fatal(err)
	}
	privacy, err := readPrivacyKey(p.file("privacy.key"))
	if err != nil {
		t.Fatal(err)
	}
	tokens, err := auth.OpenTokens(p.file("tokens"), nil)
	if err != nil {
		t.Fatal(err)
	}
	w.o = &peopleOptions{trustDomain: "pair.example", tokens: tokens, tokenFile: p.file("tokens"), public: true, log: zap.NewNop(),
		ledger: ledger.Options{Dir: p.file("ledger"), Signer: signer, Verifier: vkey, PrivacyKey: privacy, RecheckEvery: -1, PublishEvery: 10 * time.Millisecond}}
	return w
}

// runWitness runs `countersign witness` from its file until the test ends.
func (w *witnessed) runWitness() {
	addr := freeAddr(w.t)
	w.url = "https://" + addr
	w.write("witness.yaml", fmt.Sprintf("listen: {addr: %q, cert: %q, key: %q}\nkey: %q\ndir: %q\nlogs: [{key: %q}]\n",
		addr, w.file("server.pem"), w.file("server.key"), w.file("witness.key"), w.file("witness"), w.log))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	cmd := witnessCommand()
	cmd.SetArgs([]string{"--config", w.file("witness.yaml")})
	go func() { ended <- cmd.ExecuteContext(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			w.t.Error(err)
		}
	})
	eventually(w.t, "the witness answers", func() bool {
		res, err := w.http.Get(w.url + "/readyz")
		if err == nil {
			res.Body.Close()
		}
		return err == nil && res.StatusCode == http.StatusOK
	})
}

// configure reads the witnesses section as it would stand in a recorder's file.
func (w *witnessed) configure(text string) {
	w.t.Helper()
	var c witnessesConfig
	if err := parseConfig("record.yaml", []byte(text), &c); err != nil {
		w.t.Fatal(err)
	}
	if err := c.check(); err != nil {
		w.t.Fatal(err)
	}
	if err := os.MkdirAll(w.o.ledger.Dir, 0o700); err != nil {
		w.t.Fatal(err)
	}
	var err error
	if w.o.ledger.Publish, err = c.publish(w.o, w.o.ledger.Dir); err != nil {
		w.t.Fatal(err)
	}
}

func TestARecorderPublishesUnderItsWitnesssCosignatureAndVerifiesAsBefore(t *testing.T) {
	w := newWitnessed(t)
	w.configure(fmt.Sprintf("servers: [{url: %q, key: %q, ca: %q}]\nwithhold: true\nquorum: 1\n", w.url, w.witness, w.file("ca.pem")))
	p, err := openPeople(t.Context(), w.o)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	files := filepath.Join(w.dir, "kept")
	k, err := (&keepConfig{Files: []string{files}}).open(w.o.ledger.Dir, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	for range 300 {
		s := &store.Submission{Entry: store.Entry{V: store.Version, ID: store.NewID(), Type: store.AccessRefused, WriterTime: store.At(time.Now()),
			Agent: "spiffe://pair.example/recorder/recorder"}}
		s.SetDetails(store.RefusedDetails{Method: "GET", Route: "/x", Problem: "unauthenticated", Remote: "127.0.0.1"})
		if err := p.self.Record(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	srv := httptest.NewServer(p.handler)
	defer srv.Close()
	v, err := torchwood.NewCosignatureVerifier(w.witness)
	if err != nil {
		t.Fatal(err)
	}
	var head string
	eventually(t, "the whole log is published under a cosignature", func() bool {
		head = p.ledger.Published()
		n, _ := store.CheckpointSize(head)
		return n == p.ledger.Size()
	})
	if _, err := note.Open([]byte(head), note.VerifierList(v)); err != nil {
		t.Fatal(err)
	}
	// Whoever knows nothing of witnesses reads it all the same: tiles are served
	// under it, and the log verifies from the recorder.
	res, err := http.Get(srv.URL + "/tile/0/000")
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("%v %v", res, err)
	}
	res.Body.Close()
	w.write("since", head)
	cmd := countersign(t, "verify", srv.URL, "--key", w.log, "--since", w.file("since"))
	cmd.Env = append(os.Environ(), "COUNTERSIGN_TOKEN="+w.reviewer)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("verify: %v: %s", err, out)
	}

	// It is kept for safety as it is published, and can be used as --since.
	stop, err := k.start("pair.example/log", p.ledger, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the checkpoint is kept", func() bool {
		b, _ := os.ReadFile(files)
		return strings.HasSuffix(string(b), "\n"+head+"\n")
	})
	stop()
}

func TestAWitnesssKeyAndALogsKeyAreNotTakenForEachOther(t *testing.T) {
	dir := t.TempDir()
	skey, err := generateLogKey("a.example/log")
	if err != nil {
		t.Fatal(err)
	}
	wkey, err := generateWitnessKey("a.example/w")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"log": skey, "witness": wkey, "damaged": wkey[:len(wkey)-3] + "AA="} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if s, err := readWitnessKey(filepath.Join(dir, "witness")); err != nil || s.Name() != "a.example/w" {
		t.Fatal(err)
	}
	for _, name := range []string{"log", "damaged"} {
		if _, err := readWitnessKey(filepath.Join(dir, name)); err == nil {
			t.Errorf("%s is taken for a witness's key", name)
		} else if strings.Contains(err.Error(), wkey[len(wkey)-20:]) {
			t.Errorf("the key is in the error: %v", err)
		}
	}
	if _, _, err := readLogKey(filepath.Join(dir, "witness")); err == nil {
		t.Error("a witness's key is taken for a log's")
	}
	if _, err := generateWitnessKey("a b"); err == nil {
		t.Error("a name with a space")
	}
}

func TestAConfigurationOfWitnessesThatWouldNotHoldIsRefused(t *testing.T) {
	server := "servers: [{url: 'https://w.example', key: k}]\n"
	for text, want := range map[string]string{
		"servers: []": "at least one",
		"servers: [{url: 'http://w.example', key: k}]":  "https",
		"servers: [{url: 'https://w.example'}]":         "key is not set",
		server + "withhold: true":                       "quorum or policy",
		server + "withhold: true\nquorum: 1\npolicy: p": "quorum or policy",
		server + "withhold: true\nquorum: 2":            "2 of 1",
		server + "quorum: 1":                            "withhold",
		server + "withhold: true\nquorum: -1":           "-1 of 1",
	} {
		var c witnessesConfig
		if err := parseConfig("x", []byte(text), &c); err != nil {
			t.Fatal(err)
		}
		if err := c.check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	for text, want := range map[string]string{
		"{}":                       "files, slack or mail",
		"{files: [x], every: -1h}": "negative",
		"{slack: {channel: C1}}":   "token_file",
		"{slack: {token_file: x, channel: C1, api_url: 'http://slack.example/'}}": "https",
		"{mail: {addr: 'm:25', username: u}}":                                     "go together",
	} {
		var c keepConfig
		if err := parseConfig("x", []byte(text), &c); err != nil {
			t.Fatal(err)
		}
		if err := c.check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	for text, want := range map[string]string{
		"{listen: {addr: '127.0.0.1:1'}, key: k, dir: d}":                      "at least one log",
		"{listen: {addr: '127.0.0.1:1'}, key: k, dir: d, logs: [{origin: x}]}": "key is not set",
		"{listen: {addr: '127.0.0.1:1'}, dir: d, logs: [{key: x}]}":            "key is not set",
		"{listen: {addr: '127.0.0.1:1'}, key: k, logs: [{key: x}]}":            "dir is not set",
		"{listen: {addr: '192.0.2.1:1'}, key: k, dir: d, logs: [{key: x}]}":    "TLS",
	} {
		var c witnessConfig
		if err := parseConfig("x", []byte(text), &c); err != nil {
			t.Fatal(err)
		}
		if err := c.check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
}
