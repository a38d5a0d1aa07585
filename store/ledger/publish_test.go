package ledger

import (
	"context"
	"strings"
	"testing"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

func TestAPublisherDecidesWhatIsPublished(t *testing.T) {
	f := newFixture(t)
	ended := make(chan struct{})
	f.o.Publish = func(ctx context.Context, _ *Ledger) {
		<-ctx.Done()
		close(ended)
	}
	l := f.open()
	ctx := context.Background()
	f.append(l, used("a"), used("b"))
	two := l.Head()
	f.append(l, used("c"))
	three := l.Head()
	if l.Published() != "" {
		t.Fatalf("published by itself: %q", l.Published())
	}
	if _, err := l.Tile(ctx, tlog.Tile{H: 8, L: 0, N: 0, W: 1}); err == nil {
		t.Fatal("a tile is served of what is not published")
	}

	// A further signature changes nothing of what the ledger serves.
	cosigned := two + "— witness.example/w1 " + strings.Repeat("A", 104) + "\n"
	if err := l.Publish(ctx, cosigned); err != nil {
		t.Fatal(err)
	}
	if l.Published() != cosigned {
		t.Fatalf("published %q", l.Published())
	}
	if _, err := l.Tile(ctx, tlog.Tile{H: 8, L: 0, N: 0, W: 2}); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Tile(ctx, tlog.Tile{H: 8, L: 0, N: 0, W: 3}); err == nil {
		t.Fatal("a tile is served beyond what is published")
	}
	if err := l.Publish(ctx, three); err != nil {
		t.Fatal(err)
	}

	forged := torchwood.Checkpoint{Origin: origin, Tree: tlog.Tree{N: 3, Hash: tlog.Hash{1}}}
	ahead := torchwood.Checkpoint{Origin: origin, Tree: tlog.Tree{N: 4}}
	for name, c := range map[string]torchwood.Checkpoint{"another tree": forged, "more than there is": ahead} {
		b, err := note.Sign(&note.Note{Text: c.String()}, f.o.Signer)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Publish(ctx, string(b)); err == nil {
			t.Errorf("%s was published", name)
		}
	}
	for name, note := range map[string]string{"fewer entries": two, "an unsigned one": strings.Split(three, "\n\n")[0] + "\n\n— x AAAAAAAA\n"} {
		if err := l.Publish(ctx, note); err == nil {
			t.Errorf("%s was published", name)
		}
	}
	if l.Published() != three {
		t.Fatalf("published %q", l.Published())
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Fatal("Close did not wait for the publisher")
	}
}

func TestTheRootOfEachSizeIsTheOneThatWasSigned(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	for range 20 {
		a := f.append(l, used("r"))
		c, err := f.verify.Checkpoint(a.Checkpoint)
		if err != nil {
			t.Fatal(err)
		}
		f.append(l, used("r"))
		root, err := l.Root(context.Background(), c.N)
		if err != nil || root != c.Hash {
			t.Fatalf("root of %d entries: %v, want %v: %v", c.N, root, c.Hash, err)
		}
	}
	if _, err := l.Root(context.Background(), l.Size()+1); err == nil {
		t.Fatal("a root of more than there is")
	}
}
