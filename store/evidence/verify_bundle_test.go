package evidence

import (
	"testing"
)

// bundleReport verifies a bundle.
func bundleReport(t testing.TB, path string, o Options) *Report {
	t.Helper()
	r, err := VerifyBundle(t.Context(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestAnUntouchedBundleVerifies(t *testing.T) {
	for name, v := range map[string]view{
		"of the whole log":            {},
		"of a window":                 {from: "5 requested", to: "b3 requested"},
		"of the middle of requests":   {from: "a3 issued", to: "5 issued"},
		"of an empty window":          {from: "5 requested", to: "5 requested"},
		"of one run":                  {filters: map[string]string{"run": "r-2"}},
		"of what one person decided":  {filters: map[string]string{"person": "p-alice", "type": "approval.decided"}},
		"of a filter without entries": {filters: map[string]string{"run": "none"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScribe(t).write()
			r := bundleReport(t, save(t, s.export(v).zip()), s.options())
			if !r.OK() || len(r.Notes) > 0 || len(r.Unchecked) > 0 {
				t.Fatalf("findings %v, notes %v, unchecked %v", r.Findings, r.Notes, r.Unchecked)
			}
			if v.filters == nil != r.Bundle.Complete || r.Anchored != 1 {
				t.Errorf("%+v", r)
			}
		})
	}
}
