package review

import (
	"runtime/debug"
	"testing"
)

func TestGarbageIsCollectedMoreOftenOnlyWhileAnExportIsWritten(t *testing.T) {
	percent := func() int {
		p := debug.SetGCPercent(-1)
		debug.SetGCPercent(p)
		return p
	}
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	first := collectOften()
	second := collectOften()
	if got := percent(); got != exportGC {
		t.Errorf("while two exports are written: %d %%", got)
	}
	first()
	if got := percent(); got != exportGC {
		t.Errorf("while the second is still written: %d %%", got)
	}
	second()
	if got := percent(); got != 400 {
		t.Errorf("after the last: %d %%, want what it was before", got)
	}
	for _, usual := range []int{50, -1} {
		debug.SetGCPercent(usual)
		end := collectOften()
		if got := percent(); got != usual {
			t.Errorf("where %d %% is usual: %d %% while an export is written", usual, got)
		}
		end()
		if got := percent(); got != usual {
			t.Errorf("where %d %% is usual: %d %% afterwards", usual, got)
		}
	}
}
