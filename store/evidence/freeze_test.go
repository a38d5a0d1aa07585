package evidence

import (
	"strings"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/ledger"
)

func (h *house) responder(t store.Type, who string, details any) *store.Submission {
	e := &store.Submission{Entry: store.Entry{V: store.Version, ID: h.id(), Type: t, WriterTime: store.At(h.now), Agent: "spiffe://evidence.example/recorder/recorder",
		Action: string(t), Person: store.Ptr(h.o.PrivacyKey.Pseudonym(who))}}
	e.SetDetails(details)
	e.Seal(store.SealedPerson, who)
	e.Seal(store.SealedReason, "OPS-1, said "+who)
	return e
}

func TestABundleHoldsTheFreezesThatItsWindowIsJudgedBy(t *testing.T) {
	h := newHouse(t)
	waits, stopped := h.tale("1", "r-1", "orders:write", store.NeedsApproval), h.tale("2", "r-2", "orders:read", store.Allow)
	h.append(false, waits.requested("why"), waits.asked("why"))
	freeze := h.responder(store.FreezeSet, "user:ana", store.FreezeDetails{All: true})
	at := h.append(true, freeze)
	begin := h.now.Add(time.Minute)
	h.now = begin.Add(time.Minute)
	lifted := h.append(true, h.responder(store.FreezeLifted, "user:ben", store.FreezeLiftedDetails{Freeze: freeze.ID}))
	intent := stopped.issuing()
	h.append(false, stopped.requested("again"), intent)
	h.append(false, stopped.issued(intent))
	end := h.now.Add(time.Minute)
	h.now = end.Add(time.Minute)
	later := h.responder(store.FreezeSet, "user:ben", store.FreezeDetails{Run: "r-2"})
	h.append(true, later)
	h.append(false, stopped.revoked(intent))

	window := ledger.Query{From: begin, To: end}
	raw := h.export(h.exported(window, nil))
	_, files, m := members(t, raw)
	if m.Window.From != lifted || !strings.Contains(string(files["context.jsonl"]), freeze.ID) || !strings.Contains(string(files["context.jsonl"]), later.ID) || at+1 >= lifted {
		t.Fatalf("the window begins at %d, its context is\n%s", m.Window.From, files["context.jsonl"])
	}
	h.verifies(raw)
	raw = h.export(h.exported(ledger.Query{}, nil))
	h.verifies(raw)
	_, files, _ = members(t, raw)
	for _, said := range []string{"stopped: everything", "OPS-1, said user:ana", "lifted the freeze " + freeze.ID, "OPS-1, said user:ben", "stopped: run r-2"} {
		if !strings.Contains(string(files["REPORT.html"]), said) {
			t.Errorf("the report does not say %q", said)
		}
	}
	h.verifies(h.export(h.exported(ledger.Query{Run: "r-2"}, map[string]string{"run": "r-2"})))
}
