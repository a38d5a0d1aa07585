package main

import (
	"context"
	"path/filepath"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store/ledger"
	"github.com/countersign-dev/countersign/store/siem"
)

// openSIEM begins to push the record where c says; see siem.Open. dir is the
// recorder's own. It returns nil where c names no destination.
func openSIEM(ctx context.Context, c siem.Config, dir, origin string, l *ledger.Ledger, log *zap.Logger) (*siem.Pusher, error) {
	if len(c) == 0 {
		return nil, nil
	}
	return siem.Open(ctx, c, l, siem.Options{
		Dir: filepath.Join(dir, "siem"), Product: siem.Product{Version: readBuild().Version, Log: origin}, Log: log,
	})
}
