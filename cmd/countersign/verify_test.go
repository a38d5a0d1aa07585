package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/evidence"
	"github.com/countersign-dev/countersign/store/ledger"
)

// bundles writes a log of a few entries, and two bundles of it, one after the
// other. It returns their paths and that of the log's key.
func bundles(t *testing.T) (first, second, pub string) {
	t.Helper()
	dir := t.TempDir()
	skey, vkey, err := note.GenerateKey(rand.Reader, "verify.example/log")
	must(t, err)
	pub = filepath.Join(dir, "log.pub")
	must(t, os.WriteFile(pub, []byte(vkey+"\n"), 0o600))
	signer, err := note.NewSigner(skey)
	must(t, err)
	l, err := ledger.Open(t.Context(), ledger.Options{Dir: filepath.Join(dir, "ledger"), Signer: signer, Verifier: vkey, PrivacyKey: make(store.PrivacyKey, 32), RecheckEvery: -1, PublishEvery: 5 * time.Millisecond})
	must(t, err)
	defer l.Close()
	put := func(typ store.Type, details any) int64 {
		s := &store.Submission{Entry: store.Entry{V: store.Version, ID: store.NewID(), Type: typ, WriterTime: store.At(time.Now()), Agent: "spiffe://verify.example/recorder"}}
		s.SetDetails(details)
		s.Seal(store.SealedReason, "because")
		line, err := s.Marshal()
		must(t, err)
		a, err := l.Append(t.Context(), ledger.Author{Name: "recorder", Recorder: true}, [][]byte{line})
		must(t, err)
		return a.Entries[0].Index
	}
	export := func(name string) string {
		to := put(store.WriterAdded, store.WriterDetails{Name: name, Method: "token"}) + 1
		index := put(store.ExportCreated, store.ExportDetails{Format: "bundle", To: to, Filters: map[string]string{}})
		path := filepath.Join(dir, name)
		f, err := os.Create(path)
		must(t, err)
		must(t, evidence.Export(t.Context(), l, f, evidence.ExportOptions{To: to, Index: index, Filters: map[string]string{}, Wait: 10 * time.Second, Dir: dir}))
		must(t, f.Close())
		return path
	}
	return export("first.zip"), export("second.zip"), pub
}

func TestVerifyChecksABundleWithoutNetworkOrConfiguration(t *testing.T) {
	first, second, pub := bundles(t)
	whole, err := os.ReadFile(second)
	must(t, err)
	cut := filepath.Join(t.TempDir(), "cut.zip")
	must(t, os.WriteFile(cut, whole[:len(whole)-10], 0o600))
	plain := filepath.Join(t.TempDir(), "bundle") // known by how it begins
	must(t, os.WriteFile(plain, whole, 0o600))
	_, key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	w, err := torchwood.NewCosignatureSigner("witness.example", key)
	must(t, err)
	jwks := filepath.Join(t.TempDir(), "jwks.json")
	must(t, os.WriteFile(jwks, []byte("{}"), 0o600))
	other, err := generateLogKey("verify.example/log")
	must(t, err)
	otherKey, err := logVerifierKey(other)
	must(t, err)
	for _, c := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"a bundle", []string{second, "--key", pub}, 0, "complete: entries 0 to 2, "},
		{"a bundle under another name", []string{plain, "--key", pub}, 0, "verified: verify.example/log"},
		{"what is not checked", []string{second, "--key", pub}, 0, "not checked: that nobody was shown another log"},
		{"after an earlier bundle", []string{second, "--key", pub, "--since", first}, 0, "continues the earlier checkpoint of size 2"},
		{"before a later bundle", []string{first, "--key", pub, "--since", second}, exitProblem, "problem: rollback"},
		{"both heads as evidence", []string{first, "--key", pub, "--since", second}, exitProblem, "evidence: the earlier signed checkpoint:\n\nverify.example/log\n4\n"},
		{"a zip cut short", []string{cut, "--key", pub}, exitProblem, "problem: member"},
		{"another key", []string{second, "--key", otherKey}, exitProblem, "problem: checkpoint"},
		{"a witness that did not cosign", []string{second, "--key", pub, "--witness", w.Verifier().String()}, exitProblem, "problem: witness"},
		{"no key", []string{second}, exitUnchecked, ""},
		{"no file", []string{second + ".none.zip", "--key", pub}, exitUnchecked, ""},
		{"no earlier file", []string{second, "--key", pub, "--since", second + ".none"}, exitUnchecked, ""},
		{"a witness key that is none", []string{second, "--key", pub, "--witness", "a+b+c"}, exitUnchecked, ""},
		{"a provider without keys", []string{second, "--key", pub, "--provider", "https://id.example=" + jwks}, exitUnchecked, ""},
		{"a provider without file", []string{second, "--key", pub, "--provider", "https://id.example"}, exitUnchecked, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := countersign(t, append([]string{"verify"}, c.args...)...)
			cmd.Dir = t.TempDir()
			out, _ := cmd.Output()
			if code := cmd.ProcessState.ExitCode(); code != c.code || !strings.Contains(string(out), c.want) {
				t.Errorf("exit status %d, want %d and %q: %s", code, c.code, c.want, out)
			}
		})
	}
}
