package review

import (
	"net/url"
	"testing"

	"filippo.io/torchwood"
)

func FuzzTilePath(f *testing.F) {
	for _, s := range []string{"/tile/0/000", "/tile/entries/000.p/3", "/tile/data/000", "/tile/0/x001/234.p/5", "/tile/63/000", "/tile/0/x999/x999/x999/x999/x999/x999/999"} {
		f.Add(s, int64(70000))
	}
	f.Fuzz(func(t *testing.T, path string, size int64) {
		tile, ok := parse(path)
		if !ok || size < 0 {
			return
		}
		if !within(tile, size) {
			return
		}
		level := max(tile.L, 0)
		if tile.L < -1 || tile.N < 0 || tile.W < 1 || tile.W > 256 || (tile.N*256+int64(tile.W))<<(8*level) > size {
			t.Fatalf("%s of a log of %d: %+v", path, size, tile)
		}
		if "/"+torchwood.TilePath(tile) != path && torchwood.TilePath(tile) != path {
			t.Fatalf("%s has two forms", path)
		}
	})
}

func FuzzQuery(f *testing.F) {
	f.Add("from=2026-01-01T00:00:00Z&run=a&limit=3")
	f.Add("type=credential.issued&outcome=allow&cursor=x")
	f.Add("limit=-1&limit=2")
	f.Add("from=2026-01-01&to=2026-01-02T10:00&before=17&format=csv&person=user:ada")
	f.Fuzz(func(t *testing.T, raw string) {
		v, err := url.ParseQuery(raw)
		if err != nil {
			return
		}
		if q, err := asked(v); err == nil && (q.Limit < 0 || q.Limit > MaxLimit || q.cursor < 0 || q.before < 0 || q.cursor > 0 && q.before > 0) {
			t.Fatalf("%+v", q)
		}
	})
}
