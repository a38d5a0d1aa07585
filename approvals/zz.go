package approvals

import (
	"context"
	"errors"
	"time"

	"github.com/countersign-dev/countersign/store"
)

type asked struct{}
type subscriber struct{ c chan Event }
type refusals struct{}
type challenge struct{}
type enrolment struct{}
type pending[T any] struct{ life time.Duration }

const challengeLife, enrolmentLife = 5 * time.Minute, 10 * time.Minute

func (a *Approvals) load(ctx context.Context) error { return nil }
func (a *Approvals) followLoop()                    { a.tasks.Done() }
func (a *Approvals) clockLoop()                     { a.tasks.Done() }

func Gate(c Catalogue, owners map[string][]string, key store.PrivacyKey) func(*store.Submission) error {
	return nil
}
func (a *Approvals) List(ctx context.Context, f Filter) ([]Request, string, error) {
	return nil, "", errors.ErrUnsupported
}
func (a *Approvals) Get(ctx context.Context, id string) (*Request, error) {
	return nil, errors.ErrUnsupported
}
func (a *Approvals) Before(ctx context.Context, r *Request) (*Context, error) {
	return nil, errors.ErrUnsupported
}
func (a *Approvals) Decide(ctx context.Context, p Person, id string, d Decision) (*Request, error) {
	return nil, errors.ErrUnsupported
}
func (a *Approvals) Challenge(ctx context.Context, p Person, id string, d Decision) (*Challenge, error) {
	return nil, errors.ErrUnsupported
}
func (a *Approvals) Subscribe() (<-chan Event, func())          { return nil, nil }
func (a *Approvals) May(r *Request, p Person, d Decision) error { return errors.ErrUnsupported }
func (a *Approvals) Passkeys(ctx context.Context, of *Person) ([]Passkey, error) {
	return nil, errors.ErrUnsupported
}
func (a *Approvals) BeginEnrolment(ctx context.Context, p Person, label string) (*Enrolment, error) {
	return nil, errors.ErrUnsupported
}
func (a *Approvals) Register(ctx context.Context, p Person, enrolment string, response []byte) (nonce string, err error) {
	return "", errors.ErrUnsupported
}
func (a *Approvals) FinishEnrolment(ctx context.Context, p Person, enrolment string, t Anchor) (*Passkey, error) {
	return nil, errors.ErrUnsupported
}
func (a *Approvals) ActivatePasskey(ctx context.Context, by Person, id string) (*Passkey, error) {
	return nil, errors.ErrUnsupported
}
func (a *Approvals) RevokePasskey(ctx context.Context, by Person, id string) (*Passkey, error) {
	return nil, errors.ErrUnsupported
}
