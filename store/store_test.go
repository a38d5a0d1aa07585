package store

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// submitted is a valid submission as a writer sends it.
func submitted(t testing.TB) []byte {
	t.Helper()
	s := &Submission{Entry: *entryOf(CredentialUsed, "req_1", map[string]string{"a": "b"})}
	s.WriterTime = At(time.Unix(1_800_000_000, 0))
	s.Seal(SealedReason, "because")
	b, err := s.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseSubmission(b); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestASubmissionThatIsNotStrictlyOneIsRefused(t *testing.T) {
	good := string(submitted(t))
	for name, bad := range map[string]string{
		"nothing":                            "",
		"no object":                          "[]",
		"cut":                                good[:len(good)-1],
		"something after it":                 good + "{}",
		"an unknown member":                  strings.Replace(good, `{"v":1`, `{"v":1,"x":1`, 1),
		"a member twice":                     strings.Replace(good, `{"v":1`, `{"v":1,"v":1`, 1),
		"a member twice further in":          strings.Replace(good, `"a":"b"`, `"a":"b","a":"b"`, 1),
		"a member twice in another spelling": strings.Replace(good, `"a":"b"`, `"a":"b","\u0061":"b"`, 1),
		"a member in another case":           strings.Replace(good, `"run"`, `"RUN"`, 1),
		"another version":                    strings.Replace(good, `"v":1`, `"v":2`, 1),
		"an unknown type":                    strings.Replace(good, "credential.used", "credential.abused", 1),
		"the recorder's time":                strings.Replace(good, `"time":""`, `"time":"2026-11-23T12:00:00.000000Z"`, 1),
		"the recorder's writer":              strings.Replace(good, `"writer":""`, `"writer":"broker-1"`, 1),
		"no writer time":                     strings.Replace(good, "2027-01-15T08:00:00.000000Z", "", 1),
		"a time of another width":            strings.Replace(good, "2027-01-15T08:00:00.000000Z", "2027-01-15T08:00:00Z", 1),
		"a time of another zone":             strings.Replace(good, "08:00:00.000000Z", "08:00:00.0000+01:00", 1),
		"a time that is none":                strings.Replace(good, "2027-01-15T08", "2027-13-15T08", 1),
		"a time with a comma":                strings.Replace(good, "08:00:00.000000Z", "08:00:00,000000Z", 1),
		"a time that is a number":            strings.Replace(good, `"2027-01-15T08:00:00.000000Z"`, "1800000000", 1),
		"an id that is no UUIDv7":            strings.Replace(good, `"id":"`, `"id":"x`, 1),
		"a raw NUL":                          strings.Replace(good, "because", "bec\x00use", 1),
		"an escaped NUL":                     strings.Replace(good, `"a":"b"`, `"a":"\u0000"`, 1),
		"an escaped NUL after a backslash":   strings.Replace(good, `"a":"b"`, `"a":"\\\u0000"`, 1),
		"invalid UTF-8":                      strings.Replace(good, `"a":"b"`, "\"a\":\"\xff\"", 1),
		"half a surrogate":                   strings.Replace(good, `"a":"b"`, `"a":"\ud800"`, 1),
		"an orchestrator of dots":            strings.Replace(good, `"orchestrator":"demo"`, `"orchestrator":"../x"`, 1),
		"a request with a newline":           strings.Replace(good, `"request":"req_1"`, `"request":"req_1\n"`, 1),
		"no agent":                           strings.Replace(good, "spiffe://example.test/x", "", 1),
		"details that are a list":            strings.Replace(good, `{"a":"b"}`, `[]`, 1),
		"another text than committed to":     strings.Replace(good, "because", "becaused", 1),
		"nested too deep":                    strings.Replace(good, `"a":"b"`, `"a":`+strings.Repeat("[", maxDepth)+strings.Repeat("]", maxDepth), 1),
		"too long":                           strings.Replace(good, `"a":"b"`, `"a":"`+strings.Repeat("x", MaxSubmission)+`"`, 1),
	} {
		if bad == good {
			t.Fatalf("%s: the test changed nothing", name)
		}
		if _, err := ParseSubmission([]byte(bad)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ParseSubmission([]byte(strings.Replace(good, `"a":"b"`, `"a":"`+strings.Repeat(`[{\"`, maxDepth)+`"`, 1))); err != nil {
		t.Errorf("brackets in a text are no nesting: %v", err)
	}
	if _, err := ParseSubmission([]byte(strings.Replace(good, `"a":"b"`, `"a":"\\u0000"`, 1))); err != nil {
		t.Errorf("a backslash before u0000 is no NUL: %v", err)
	}
}

func TestLongTextsAreTakenWithAPolicyAlone(t *testing.T) {
	for typ, want := range map[Type]bool{PolicyLoaded: true, CredentialUsed: false, StepFinished: false} {
		s := &Submission{Entry: Entry{V: Version, ID: NewID(), Type: typ, WriterTime: At(time.Unix(1_800_000_000, 0)), Agent: "spiffe://example.test/x"}}
		s.SetDetails(struct{}{})
		s.Seal(SealedCatalogue, strings.Repeat("x", MaxEntry))
		b, err := s.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseSubmission(b); (err == nil) != want || err != nil && !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", typ, err)
		}
	}
}

func TestTheLeafIsTheSubmissionWithTimeAndWriterAndWithoutOpenings(t *testing.T) {
	s, err := ParseSubmission(submitted(t))
	if err != nil {
		t.Fatal(err)
	}
	now := At(time.Unix(1_800_000_001, 5))
	leaf, err := s.Stamp("broker-1", now)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(leaf, []byte("because")) || bytes.Contains(leaf, []byte("openings")) {
		t.Fatalf("the leaf holds an opening: %s", leaf)
	}
	e, err := ParseLeaf(leaf)
	if err != nil {
		t.Fatal(err)
	}
	if e.Writer != "broker-1" || !e.Time.Equal(now.Time) {
		t.Fatalf("stamped %q at %s", e.Writer, e.Time)
	}
	again, err := e.Marshal()
	if err != nil || !bytes.Equal(again, leaf) {
		t.Fatalf("%s\n%s", again, leaf)
	}
}

// testLog is a small log under a key of its own.
type testLog struct {
	t      *testing.T
	signer note.Signer
	v      *LogVerifier
	hashes []tlog.Hash
	leaves [][]byte
}

func newTestLog(t *testing.T) *testLog {
	skey, vkey, err := note.GenerateKey(rand.Reader, "log.example.test/store")
	if err != nil {
		t.Fatal(err)
	}
	l := &testLog{t: t}
	if l.signer, err = note.NewSigner(skey); err != nil {
		t.Fatal(err)
	}
	if l.v, err = NewLogVerifier(vkey); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *testLog) reader() tlog.HashReader {
	return tlog.HashReaderFunc(func(ix []int64) (out []tlog.Hash, err error) {
		for _, i := range ix {
			out = append(out, l.hashes[i])
		}
		return out, nil
	})
}

func (l *testLog) add(e *Entry) int64 {
	leaf, err := e.Marshal()
	if err != nil {
		l.t.Fatal(err)
	}
	n := int64(len(l.leaves))
	hs, err := tlog.StoredHashes(n, leaf, l.reader())
	if err != nil {
		l.t.Fatal(err)
	}
	l.hashes, l.leaves = append(l.hashes, hs...), append(l.leaves, leaf)
	return n
}

func (l *testLog) receipt(i int64) Receipt {
	size := int64(len(l.leaves))
	root, err := tlog.TreeHash(size, l.reader())
	if err != nil {
		l.t.Fatal(err)
	}
	c, err := note.Sign(&note.Note{Text: torchwood.Checkpoint{Origin: l.signer.Name(), Tree: tlog.Tree{N: size, Hash: root}}.String()}, l.signer)
	if err != nil {
		l.t.Fatal(err)
	}
	p, err := tlog.ProveRecord(size, i, l.reader())
	if err != nil {
		l.t.Fatal(err)
	}
	return Receipt{Proven{i, l.leaves[i], p}, string(c)}
}

func TestAReceiptWithAnyByteAlteredDoesNotVerify(t *testing.T) {
	l := newTestLog(t)
	for i := range 21 {
		e := entryOf(CredentialUsed, fmt.Sprint("req_", i), nil)
		e.Time, e.Writer = At(time.Unix(1_800_000_000, 0)), "broker-1"
		l.add(e)
	}
	r := l.receipt(13)
	if _, err := l.v.Check(r); err != nil {
		t.Fatal(err)
	}
	if rh := tlog.RecordHash(r.Leaf); torchwood.VerifyProof(torchwood.ThresholdPolicy(2, torchwood.OriginPolicy(l.v.Origin()), l.v.policy), rh, []byte(r.TlogProof())) != nil {
		t.Fatal("the tlog-proof does not verify elsewhere")
	}
	bad := func(what string, c Receipt) {
		t.Helper()
		if _, err := l.v.Check(c); !errors.Is(err, ErrReceipt) {
			t.Fatalf("%s: %v", what, err)
		}
	}
	for i := range r.Leaf {
		c := r
		c.Leaf = bytes.Clone(r.Leaf)
		c.Leaf[i] ^= 1
		bad(fmt.Sprint("leaf byte ", i), c)
	}
	for i := range r.Proof {
		for j := range r.Proof[i] {
			c := r
			c.Proof = append(tlog.RecordProof(nil), r.Proof...)
			c.Proof[i][j] ^= 1
			bad(fmt.Sprint("proof byte ", i, j), c)
		}
	}
	text := strings.Index(r.Checkpoint, "\n\n") + 1
	for i := range text { // what is signed
		c := r
		c.Checkpoint = r.Checkpoint[:i] + string(r.Checkpoint[i]^1) + r.Checkpoint[i+1:]
		bad(fmt.Sprint("checkpoint byte ", i), c)
	}
	for _, index := range []int64{-1, 0, 12, 14, 20, 21, 1 << 40} {
		c := r
		c.Index = index
		bad(fmt.Sprint("index ", index), c)
	}
	c := r
	c.Proof = c.Proof[:len(c.Proof)-1]
	bad("a shorter proof", c)
	other := newTestLog(t)
	other.add(entryOf(CredentialUsed, "req_1", nil))
	bad("another log's receipt", other.receipt(0))
}

func TestAWarrantHoldsOnlyForItsOwnFreshAllowedIntent(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	type parts struct{ req, intent *Entry }
	base := func() parts {
		req := requestedBy("req_1", "j", false)
		intent := entryOf(CredentialIssuing, "req_1", IssuingDetails{Attempt: 1, Grant: testGrant.Digest(), NotPast: At(now.Add(5 * time.Minute))})
		for _, e := range []*Entry{req, intent} {
			e.Time, e.Writer = At(now), "broker-1"
		}
		return parts{req, intent}
	}
	for name, c := range map[string]struct {
		alter func(p *parts)
		warr  func(l *testLog, w *Warrant)
		at    time.Time
		ok    bool
	}{
		"as it should be":               {ok: true},
		"29 seconds later":              {at: now.Add(29 * time.Second), ok: true},
		"an old intent":                 {at: now.Add(31 * time.Second)},
		"an intent of the future":       {at: now.Add(-31 * time.Second)},
		"none at all":                   {warr: func(_ *testLog, w *Warrant) { *w = Warrant{} }},
		"without its request":           {warr: func(_ *testLog, w *Warrant) { w.Request = Receipt{} }},
		"without its intent":            {warr: func(_ *testLog, w *Warrant) { w.Intent = Receipt{} }},
		"swapped":                       {warr: func(_ *testLog, w *Warrant) { w.Request, w.Intent = w.Intent, w.Request }},
		"the request twice":             {warr: func(_ *testLog, w *Warrant) { w.Intent = w.Request }},
		"a forged checkpoint":           {warr: func(l *testLog, w *Warrant) { w.Intent.Checkpoint = newTestLog(l.t).forge(w.Intent.Checkpoint) }},
		"a denial":                      {alter: func(p *parts) { p.req.Decision.Outcome = Deny }},
		"a request that needs approval": {alter: func(p *parts) { p.req.Decision.Outcome = NeedsApproval }},
		"a request without decision":    {alter: func(p *parts) { p.req.Decision = nil }},
		"an intent with a denial":       {alter: func(p *parts) { p.intent.Decision.Outcome = Deny }},
		"an intent of another request":  {alter: func(p *parts) { p.intent.Request = "req_2" }},
		"an intent of another run":      {alter: func(p *parts) { p.intent.Run = "run-2" }},
		"an intent of another step":     {alter: func(p *parts) { p.intent.Step = "step-2" }},
		"an intent of another agent":    {alter: func(p *parts) { p.intent.Agent = "spiffe://example.test/y" }},
		"an intent of another scope":    {alter: func(p *parts) { p.intent.Action = "orders-db:write" }},
		"an intent of another grant": {alter: func(p *parts) {
			p.intent.SetDetails(IssuingDetails{Attempt: 1, Grant: "sha256:00", NotPast: At(now.Add(time.Minute))})
		}},
		"an intent that ended": {alter: func(p *parts) {
			p.intent.SetDetails(IssuingDetails{Attempt: 1, Grant: testGrant.Digest(), NotPast: At(now)})
		}},
		"an intent without details":      {alter: func(p *parts) { p.intent.Details = nil }},
		"an issued entry for an intent":  {alter: func(p *parts) { p.intent.Type = CredentialIssued }},
		"a finished entry for a request": {alter: func(p *parts) { p.req.Type = StepFinished }},
	} {
		t.Run(name, func(t *testing.T) {
			l, p := newTestLog(t), base()
			if c.alter != nil {
				c.alter(&p)
			}
			r, i := l.add(p.req), l.add(p.intent)
			w := Warrant{Request: l.receipt(r), Intent: l.receipt(i)}
			if c.warr != nil {
				c.warr(l, &w)
			}
			at := c.at
			if at.IsZero() {
				at = now
			}
			got, err := w.Verify(l.v, at)
			if c.ok != (err == nil) || (err != nil && !errors.Is(err, ErrWarrant)) {
				t.Fatalf("err %v", err)
			}
			if c.ok && (got.Grant.Digest() != testGrant.Digest() || got.Issuing.Attempt != 1) {
				t.Fatalf("warranted %+v", got)
			}
		})
	}
	t.Run("an intent before its request", func(t *testing.T) {
		l, p := newTestLog(t), base()
		i, r := l.add(p.intent), l.add(p.req)
		w := Warrant{Request: l.receipt(r), Intent: l.receipt(i)}
		if _, err := w.Verify(l.v, now); !errors.Is(err, ErrWarrant) {
			t.Fatal(err)
		}
	})
}

// forge signs the text of a checkpoint with l's own key.
func (l *testLog) forge(checkpoint string) string {
	text, _, _ := strings.Cut(checkpoint, "\n\n")
	b, err := note.Sign(&note.Note{Text: text + "\n"}, l.signer)
	if err != nil {
		l.t.Fatal(err)
	}
	return string(b)
}

func TestACommitmentIsOpenedByItsOwnOpeningAlone(t *testing.T) {
	c, o := Commit("reason", "because")
	for name, bad := range map[string]struct {
		field string
		o     Opening
	}{
		"another field": {"summary", o},
		"another text":  {"reason", Opening{o.Salt, "because."}},
		"another salt":  {"reason", Opening{make([]byte, 32), "because"}},
		"a short salt":  {"reason", Opening{o.Salt[:31], "because"}},
		"no salt":       {"reason", Opening{nil, "because"}},
	} {
		if bad.o.Opens(bad.field, c) {
			t.Errorf("%s opens it", name)
		}
	}
	if !o.Opens("reason", c) {
		t.Error("its own opening does not open it")
	}
}

func FuzzParseSubmission(f *testing.F) {
	f.Add(submitted(f))
	f.Add([]byte(`{"v":1,"id":"","openings":{"a":{"salt":"","text":""}}}`))
	f.Add([]byte("{\"details\":{\"a\":\"\\u0000\"}}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := ParseSubmission(b)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		leaf, err := s.Stamp("w", At(time.Unix(1_800_000_000, 0)))
		if err != nil {
			return // too long once stamped
		}
		e, err := ParseLeaf(leaf)
		if err != nil {
			t.Fatalf("the leaf of an accepted submission is refused: %v\n%s", err, leaf)
		}
		if again, err := e.Marshal(); err != nil || !bytes.Equal(again, leaf) {
			t.Fatalf("%v\n%s\n%s", err, leaf, again)
		}
		if !json.Valid(leaf) || bytes.IndexByte(leaf, 0) >= 0 {
			t.Fatalf("leaf %q", leaf)
		}
	})
}

func FuzzParseLeaf(f *testing.F) {
	b := submitted(f)
	f.Add(b)
	f.Add([]byte(`{"v":7,"type":"of.tomorrow","more":[1,2]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := ParseLeaf(b)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		s := NewState()
		_ = s.Begin().Admit(e, nil, 0, true) // must not panic
		_ = e.Type.Known()
	})
}
