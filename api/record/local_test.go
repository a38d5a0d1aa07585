package record_test

import (
	"context"
	"crypto/rand"
	"errors"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/api/record"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

func local(t *testing.T, skey, vkey string) record.Local {
	t.Helper()
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	l, err := ledger.Open(t.Context(), ledger.Options{Dir: t.TempDir(), Signer: signer, Verifier: vkey, PrivacyKey: make(store.PrivacyKey, 32), RecheckEvery: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return record.Local{Ledger: l, Name: "broker-1"}
}

func used(step string) *store.Submission {
	s := &store.Submission{Entry: store.Entry{V: store.Version, ID: store.NewID(), Type: store.AlertRaised,
		WriterTime: store.At(time.Now()), Agent: "spiffe://test.example/broker/broker-1", Step: step}}
	s.SetDetails(struct{}{})
	return s
}

// either is a service that answers from one ledger, then from another.
type either struct{ record.Local }

func TestAWriterInTheSameProcessVerifiesWhatTheRecorderSays(t *testing.T) {
	skey, vkey, err := note.GenerateKey(rand.Reader, "local.example/log")
	if err != nil {
		t.Fatal(err)
	}
	log, err := store.NewLogVerifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	service := &either{local(t, skey, vkey)}
	w, err := client.NewRecorder(client.RecorderConfig{Local: service, Log: log, Writer: "broker-1"})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()

	first := used("s-1")
	if _, err := w.Append(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	if first.Writer != "broker-1" || first.Time.IsZero() {
		t.Fatalf("not stamped: writer %q, time %s", first.Writer, first.Time)
	}
	decided := used("s-1")
	decided.Type = store.ApprovalDecided
	if _, err := w.Append(t.Context(), decided); err == nil {
		t.Fatal("a writer in the same process decided an approval")
	} else if _, ok := store.IsOrder(err, store.OrderForbidden); !ok {
		t.Fatal(err)
	}
	if _, err := service.Consistency(t.Context(), 1, 99); !errors.Is(err, client.ErrNoProof) {
		t.Fatalf("proof beyond the log: %v", err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	found := errors.New("found")
	request := &store.Submission{Entry: store.Entry{V: store.Version, ID: store.NewID(), Type: store.StepRequested, WriterTime: store.At(time.Now()),
		Agent: "spiffe://test.example/x", Orchestrator: "demo", Run: "r", Step: "s", Request: "req_1", Action: "identity:step",
		Decision: &store.Decision{Outcome: store.Deny, Reasons: []string{}}, Risk: &store.Risk{Sensitivity: "low"}}}
	request.SetDetails(store.RequestedDetails{Grant: store.Grant{Scope: "identity:step"}})
	go func() { _, _ = w.Append(ctx, request) }()
	if err := w.Follow(ctx, 0, func(a *store.Appended) error { return found }); !errors.Is(err, found) {
		t.Fatalf("follow: %v", err)
	}

	// The ledger is swapped for another under the same key.
	service.Local = local(t, skey, vkey)
	if _, err := w.Append(t.Context(), used("s-2")); !errors.Is(err, client.ErrHead) {
		t.Fatalf("a log that contradicts the last head was believed: %v", err)
	}
}
