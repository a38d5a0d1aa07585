package record

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign-dev/countersign/api/client"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

// Local is the recorder for a writer in the same process, as in `countersign
// dev`: what Server answers over HTTP, without HTTP. The writer is stamped as
// Name; its client verifies the answers all the same.
type Local struct {
	Ledger *ledger.Ledger
	Name   string
}

var _ client.Service = Local{}

// Append implements client.Service.
func (l Local) Append(ctx context.Context, lines [][]byte, seen int64) (*client.Ack, error) {
	a, err := l.Ledger.Append(ctx, ledger.Author{Name: l.Name}, lines)
	if err != nil {
		return nil, err
	}
	return acknowledge(ctx, l.Ledger, a, seen)
}

// Open implements client.Service.
func (l Local) Open(ctx context.Context, request string, seen int64) (*client.Ack, error) {
	a, err := l.Ledger.OpenSet(ctx, request)
	if err != nil {
		return nil, err
	}
	return acknowledge(ctx, l.Ledger, a, seen)
}

// Consistency implements client.Service.
func (l Local) Consistency(ctx context.Context, from, to int64) (tlog.TreeProof, error) {
	if n := l.Ledger.Size(); to > n {
		return nil, fmt.Errorf("%w: it has %d entries", client.ErrNoProof, n)
	}
	if from == to {
		return nil, nil
	}
	return l.Ledger.Consistency(ctx, from, to)
}

// Follow implements client.Service.
func (l Local) Follow(ctx context.Context, after int64, fn func(*client.Ack) error) error {
	// fn is told that the recorder is there as long as it is: there is no
	// connection that could be lost.
	news := make(chan *client.Ack)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		ended <- l.Ledger.Follow(ctx, after, func(a *store.Appended) error {
			select {
			case news <- &client.Ack{Appended: *a}:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}()
	tick := time.NewTicker(client.Heartbeat)
	defer tick.Stop()
	for {
		var ack *client.Ack
		select {
		case ack = <-news:
		case <-tick.C:
		case err := <-ended:
			return err
		}
		if err := fn(ack); err != nil {
			cancel()
			<-ended
			return err
		}
	}
}
