package broker_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/countersign-dev/countersign/broker"
	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
)

func TestARetryThatVaultDoesNotTakeLeavesTheFirstCredential(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	a := ask(run1(), keyed("k-1"))
	first, err := b.Request(t.Context(), demoCaller, a)
	ok(t, err)
	first.Answered()
	b.iss.set(func(i *tracing) { i.revoke = func() error { return issuer.ErrVaultUnavailable } })
	_, err = b.Request(t.Context(), demoCaller, a)
	is(t, err, issuer.ErrVaultUnavailable)
	if !alive(t, first.Credential.Token) {
		t.Fatal("the first credential is dead")
	}
	w.wantTypes("step.requested", "credential.issuing", "credential.issued")
	b.iss.set(func(i *tracing) { i.revoke = nil })
	second, err := b.Request(t.Context(), demoCaller, a)
	ok(t, err)
	if !alive(t, second.Credential.Token) {
		t.Fatal("the second credential is dead")
	}
}

func TestARetryAfterTheStepWasEndedGetsNothingThoughVaultHasNotConfirmedTheEnd(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	run := run1()
	a := ask(run, keyed("k-1"))
	first, err := b.Request(t.Context(), demoCaller, a)
	ok(t, err)
	first.Answered()
	b.iss.set(func(i *tracing) { i.revoke = func() error { return issuer.ErrVaultUnavailable } })
	done, err := b.RevokeStep(t.Context(), demoCaller, "step-1", run)
	ok(t, err)
	if done.Pending != 1 {
		t.Fatalf("%+v", done)
	}
	_, err = b.Request(t.Context(), demoCaller, a)
	is(t, err, broker.ErrClosed)
	b.iss.set(func(i *tracing) { i.revoke = nil })
	w.until("ended", func() bool { return w.count(store.CredentialRevoked) == 1 })
	_, err = b.Request(t.Context(), demoCaller, a)
	is(t, err, broker.ErrClosed)
	if alive(t, first.Credential.Token) || children(t, run) != 0 {
		t.Fatal("alive")
	}
}

func TestARetryAfterTheStepWasEndedDuringItsMintGetsNothing(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	run := run1()
	a := ask(run, keyed("k-1"))
	b.iss.set(func(i *tracing) {
		i.mint = func() error {
			done, err := b.RevokeStep(context.Background(), demoCaller, "step-1", run)
			if err != nil || done.Pending != 1 {
				t.Errorf("ending the step: %+v, %v", done, err)
			}
			return nil
		}
	})
	_, err := b.Request(t.Context(), demoCaller, a)
	is(t, err, broker.ErrClosed)
	b.iss.set(func(i *tracing) { i.mint = nil })
	w.until("revoked", func() bool { return w.count(store.CredentialRevoked) == 1 && children(t, run) == 0 })
	if e := w.last(store.CredentialRevoked); *e.Cause != broker.CauseRequested {
		t.Errorf("cause %s", *e.Cause)
	}
	_, err = b.Request(t.Context(), demoCaller, a)
	is(t, err, broker.ErrClosed)
}

func TestARetryWhoseRecordIsLostHandsNothingOver(t *testing.T) {
	for _, kept := range []bool{false, true} {
		t.Run(fmt.Sprintf("kept %v", kept), func(t *testing.T) {
			w := newWorld(t)
			b := w.start("broker-1")
			run := run1()
			a := ask(run, keyed("k-1"))
			first, err := b.Request(t.Context(), demoCaller, a)
			ok(t, err)
			first.Answered()
			gone := func(subs []*store.Submission) error {
				if subs[0].Type == store.CredentialRevoked {
					return fmt.Errorf("%w: connection reset", store.ErrUnavailable)
				}
				return nil
			}
			b.rec.set(func(r *recorder) {
				if kept {
					r.after = gone
				} else {
					r.before = gone
				}
			})
			_, err = b.Request(t.Context(), demoCaller, a)
			is(t, err, store.ErrUnavailable)
			if n := children(t, run); n != 0 {
				t.Fatalf("%d tokens alive", n)
			}
			b.rec.set(func(r *recorder) { r.before, r.after = nil, nil })
			if kept {
				w.until("abandoned", func() bool { return w.count(store.CredentialAbandoned) == 1 })
				_, err = b.Request(t.Context(), demoCaller, a)
				is(t, err, broker.ErrClosed)
				return
			}
			second, err := b.Request(t.Context(), demoCaller, a)
			ok(t, err)
			if !alive(t, second.Credential.Token) || w.count(store.CredentialIssued) != 2 {
				t.Fatal("the retry after the failure gave nothing")
			}
		})
	}
}

func TestARevocationThatCannotBeRecordedIsDoneAndRecordedLater(t *testing.T) {
	w := newWorld(t)
	b := w.start("broker-1")
	run := run1()
	r, err := b.Request(t.Context(), demoCaller, ask(run))
	ok(t, err)
	b.rec.set(func(r *recorder) { r.before = func([]*store.Submission) error { return store.ErrUnavailable } })
	_, err = b.RevokeStep(t.Context(), demoCaller, "step-1", run)
	is(t, err, store.ErrUnavailable)
	if alive(t, r.Credential.Token) {
		t.Fatal("alive")
	}
	b.rec.set(func(r *recorder) { r.before = nil })
	w.until("recorded", func() bool { return w.count(store.CredentialRevoked) == 1 })
	if e := w.last(store.CredentialRevoked); *e.Cause != broker.CauseRequested {
		t.Fatalf("cause %s", *e.Cause)
	}
}
