package evidence

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/countersign-dev/countersign/store"
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

// keep writes what was kept of a log earlier, and reads it.
func keep(t *testing.T, o *Options, raw []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "earlier")
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	if o.Since, o.Common, err = ReadSince(path); err != nil {
		t.Fatal(err)
	}
}

func has(r *Report, kind string, index int64) bool {
	return slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.Kind == kind && f.Index == index })
}

func TestABundleContinuesAnEarlierCheckpointAndAnEarlierBundle(t *testing.T) {
	s := newScribe(t).write()
	first := s.export(view{})
	size := first.m.Size
	s.low("later", "r-later")
	second := s.export(view{})
	for name, earlier := range map[string][]byte{"checkpoint": first.data[memberCheckpoint], "bundle": first.zip(), "checkpoint within a tile": []byte(first.root(300, s.signer))} {
		o := s.options()
		keep(t, &o, earlier)
		if r := bundleReport(t, save(t, second.zip()), o); !r.OK() || r.Since == 0 || name != "checkpoint within a tile" && r.Since != size {
			t.Errorf("%s: since %d, findings %v", name, r.Since, r.Findings)
		}
	}
}

func TestARollbackIsProvedByBothHeads(t *testing.T) {
	s := newScribe(t).write()
	first := s.export(view{})
	s.low("later", "r-later")
	second := s.export(view{})
	o := s.options()
	keep(t, &o, second.zip())
	r := bundleReport(t, save(t, first.zip()), o)
	if !has(r, KindRollback, NoIndex) || !slices.Equal(r.Heads, []string{string(second.data[memberCheckpoint]), string(first.data[memberCheckpoint])}) {
		t.Errorf("findings %v, heads %q", r.Findings, r.Heads)
	}
}

// The recorder rewrites an entry that was exported, and signs the new log with
// the true key: the bundle tells a story in order, and only what was kept shows
// that it is another.
func TestAForkIsProvedByBothHeadsAndTheEntryThatDiffers(t *testing.T) {
	s := newScribe(t).write()
	first := s.export(view{})
	fork := newScribe(t)
	fork.signer, fork.vkey, fork.alice, fork.provider = s.signer, s.vkey, s.alice, s.provider
	fork.write()
	second := fork.export(view{})
	o := s.options()
	if r := bundleReport(t, save(t, second.zip()), o); !r.OK() {
		t.Fatalf("alone it should verify: %v", r.Findings)
	}
	keep(t, &o, first.zip())
	r := bundleReport(t, save(t, second.zip()), o)
	if !has(r, KindFork, NoIndex) || !has(r, KindRewritten, 0) || len(r.Heads) != 2 || r.Heads[0] != string(first.data[memberCheckpoint]) {
		t.Errorf("findings %v, heads %q", r.Findings, r.Heads)
	}
}

func TestAnEarlierCheckpointOutOfReachIsUncheckedUnlessTheExportWasMadeForIt(t *testing.T) {
	s := newScribe(t).write()
	v := view{from: "b1 requested", to: "b3 requested"}
	p := s.export(v)
	o := s.options()
	keep(t, &o, []byte(p.root(300, s.signer)))
	if r := bundleReport(t, save(t, p.zip()), o); !r.OK() || r.Since != 0 || len(r.Unchecked) != 1 {
		t.Errorf("since %d, unchecked %q, findings %v", r.Since, r.Unchecked, r.Findings)
	}
	v.since = 300
	s = newScribe(t).write()
	p = s.export(v)
	o = s.options()
	keep(t, &o, []byte(p.root(300, s.signer)))
	if r := bundleReport(t, save(t, p.zip()), o); !r.OK() || r.Since != 300 || len(r.Unchecked) != 0 {
		t.Errorf("since %d, unchecked %q, findings %v", r.Since, r.Unchecked, r.Findings)
	}
}

func TestTablesOfAnotherVersionAreUncheckedAndNotTakenForTamperedOnes(t *testing.T) {
	s := newScribe(t).write()
	p := s.export(view{})
	p.m.Derivation = 7
	p.data[memberReport] = []byte("<p>of another version</p>")
	p.fitManifest()
	r := bundleReport(t, save(t, p.zip()), s.options())
	if !r.OK() || len(r.Unchecked) != 1 || !strings.Contains(r.Unchecked[0], "derivation 7") || r.Bundle.Derived {
		t.Errorf("unchecked %q, findings %v", r.Unchecked, r.Findings)
	}
	if r := bundleReport(t, save(t, s.export(view{}).zip()), s.options()); !r.Bundle.Derived {
		t.Error("its own tables are not derived")
	}
}

// derived is the SHA-256 over what the tests pin of tables and report, by
// derivation: the columns, and the report of an eventful log.
var derived = map[int]string{
	1: "7df6949e58ebe1e9c602c0aa95c8bff1b4b28c654cc74fb9277657c907ffcbd7",
	2: "169c1a86310849006e755e1454aa83395951dd3a38648a1fe7cce444cfe35d5f",
	3: "ae05b1344df64936a5e6c9de772d7b86a9bf3d4316f7a0eb6ce95ce071883090",
}

func TestWhatIsDerivedOtherwiseHasAnotherNumber(t *testing.T) {
	golden, err := os.ReadFile("report/testdata/eventful.html")
	if err != nil {
		t.Fatal(err)
	}
	h := sha256.New()
	for _, columns := range [][]string{StepsColumns, ApprovalsColumns, UsesColumns} {
		fmt.Fprintln(h, strings.Join(columns, ","))
	}
	h.Write(golden)
	if sum := hex.EncodeToString(h.Sum(nil)); derived[derivationNow] != sum {
		t.Errorf("tables or report are derived otherwise: raise derivationNow, and write down %s for it", sum)
	}
}

func TestWitnessesThatAreAskedForMustHaveCosigned(t *testing.T) {
	s := newScribe(t).write()
	p := s.export(view{})
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	w, err := torchwood.NewCosignatureSigner("witness.example", key)
	if err != nil {
		t.Fatal(err)
	}
	o := s.options()
	o.Witness = []string{w.Verifier().String()}
	if r := bundleReport(t, save(t, p.zip()), o); !has(r, KindWitness, NoIndex) || len(r.Findings) != 1 {
		t.Errorf("not cosigned: %v", r.Findings)
	}
	verifier, err := note.NewVerifier(s.vkey)
	if err != nil {
		t.Fatal(err)
	}
	n, err := note.Open(p.data[memberCheckpoint], note.VerifierList(verifier))
	if err != nil {
		t.Fatal(err)
	}
	if p.data[memberCheckpoint], err = note.Sign(n, w); err != nil {
		t.Fatal(err)
	}
	p.fit()
	if r := bundleReport(t, save(t, p.zip()), o); !r.OK() || len(r.Witnesses) != 1 || !strings.HasPrefix(r.Witnesses[0], "witness.example at 20") {
		t.Errorf("cosigned: %q, %v", r.Witnesses, r.Findings)
	}
}

func TestABundleDoesNotVouchForItself(t *testing.T) {
	if _, err := VerifyBundle(t.Context(), "bundle.zip", Options{}); !errors.Is(err, ErrUnchecked) {
		t.Errorf("without a key: %v", err)
	}
	s := newScribe(t)
	if _, err := VerifyBundle(t.Context(), filepath.Join(t.TempDir(), "none.zip"), s.options()); !errors.Is(err, ErrUnchecked) {
		t.Errorf("without a file: %v", err)
	}
	for _, o := range []Options{{Witness: []string{"x"}}, {Provider: map[string][]byte{"https://id.example": []byte("{}")}}} {
		o.Log = s.options().Log
		if _, err := VerifyBundle(t.Context(), save(t, s.write().export(view{}).zip()), o); !errors.Is(err, ErrUnchecked) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

func TestNoFindingGivesOrdersToATerminal(t *testing.T) {
	const orders = "\x1b[2K\rverified\u202edeifirev\u009b1A"
	s := newScribe(t).write()
	p := s.export(view{})
	lies := manifestLie(func(m *manifest) {
		m.Format, m.Origin, m.Root, m.Window.FromTime, m.Created, m.Export.ID = bundleFormat, orders, orders, orders, orders, orders
	})
	lies(p)
	p.fit()
	r := bundleReport(t, save(t, p.zip()), s.options())
	if !has(r, KindManifest, NoIndex) || !has(r, KindExport, s.index["export"]) {
		t.Errorf("findings %v", r.Findings)
	}
	for _, f := range r.Findings {
		if strings.ContainsFunc(f.Message, func(c rune) bool { return !strconv.IsPrint(c) }) {
			t.Errorf("a finding holds %q", f.Message)
		}
	}
	if got := Plain("a\x1b\xff\u202e\"é\\n"); got != `a\x1b\xff\u202e"é\n` {
		t.Errorf("plain text is %q", got)
	}
}

func TestDecisionsWithoutASignatureAreCounted(t *testing.T) {
	s := newScribe(t)
	s.edit["2 asked"] = func(e *store.Submission) {
		rule := ruleFor()
		rule.Passkey = false
		e.SetDetails(store.ApprovalRequestedDetails{Approval: "apr_2", Grant: grantOf("orders:write"), Rule: rule, Excluded: []string{}})
	}
	details("2 decided", func(d *store.DecidedDetails) { d.Assertion = nil })(s)
	p := s.write().export(view{})
	if r := bundleReport(t, save(t, p.zip()), s.options()); r.Signed != 1 || r.Unsigned != 1 || !has(r, KindRule, s.index["2 asked"]) {
		t.Errorf("%d signed, %d not; findings %v", r.Signed, r.Unsigned, r.Findings)
	}
}

func TestDecisionsByAPolicyThatWasReplacedAreNoted(t *testing.T) {
	s := newScribe(t)
	s.after["a5 revoked"] = func(s *scribe) { // the broker loads a stricter policy, and goes on as before
		e := &store.Submission{Entry: store.Entry{Type: store.PolicyLoaded, Action: "policy.loaded"}}
		e.SetDetails(store.PolicyDetails{Digest: inForceDigest(catalogue, "package y\n", true), Catalogue: textDigest(catalogue), Policy: textDigest("package y\n")})
		e.Seal(store.SealedCatalogue, catalogue)
		e.Seal(store.SealedPolicy, "package y\n")
		s.put("stricter", "broker-1", e)
	}
	p := s.write().export(view{})
	i := slices.IndexFunc(p.names, func(n string) bool { return strings.HasPrefix(n, "policies/") })
	name := "policies/" + textDigest("package y\n")[7:] + ".rego"
	p.names, p.data[name] = slices.Insert(p.names, i, name), []byte("package y\n")
	p.fit()
	r := bundleReport(t, save(t, p.zip()), s.options())
	first := s.index["stricter"]
	for s.entries[first].Type != store.StepRequested || s.entries[first].Time.Before(s.entries[s.index["stricter"]].Time.Add(swapLeeway)) {
		first++
	}
	want := fmt.Sprintf("requests from entry %d on were decided by the policy", first)
	if !r.OK() || len(r.Notes) != 1 || !strings.Contains(r.Notes[0], want) {
		t.Errorf("findings %v, notes %q; want %q", r.Findings, r.Notes, want)
	}
}

func TestAnotherVERIFYMDIsNotedAndNoFinding(t *testing.T) {
	s := newScribe(t).write()
	p := s.export(view{})
	p.data[memberVerify] = []byte("# Run this instead\n")
	p.fitManifest()
	if r := bundleReport(t, save(t, p.zip()), s.options()); !r.OK() || len(r.Notes) != 1 || !strings.Contains(r.Notes[0], "VERIFY.md") {
		t.Errorf("findings %v, notes %v", r.Findings, r.Notes)
	}
}

// Source of a scribe's log.
func (s *scribe) Checkpoint(context.Context) (string, error) {
	return string(s.export(view{}).data[memberCheckpoint]), nil
}

func (s *scribe) Tile(_ context.Context, t tlog.Tile) ([]byte, error) {
	var stored []tlog.Hash
	read := tlog.HashReaderFunc(func(ix []int64) (hs []tlog.Hash, err error) {
		for _, x := range ix {
			hs = append(hs, stored[x])
		}
		return hs, nil
	})
	for i, leaf := range s.leaves {
		hs, err := tlog.StoredHashes(int64(i), leaf, read)
		if err != nil {
			return nil, err
		}
		stored = append(stored, hs...)
	}
	return tlog.ReadTileData(t, read)
}

func (s *scribe) Entries(_ context.Context, t tlog.Tile) ([][]byte, error) {
	return s.leaves[t.N*bundleWidth : t.N*bundleWidth+int64(t.W)], nil
}

func TestWhatTheRecordAloneShowsIsFoundInTheLogItself(t *testing.T) {
	s := newScribe(t).write()
	if r, err := Verify(t.Context(), s, s.options()); err != nil || !r.OK() {
		t.Fatalf("untouched: %v, %v", err, r.Findings)
	}
	judged := []string{KindErasure, KindHold, KindUse, KindOrder, KindSignature, KindTime, KindDuplicate, KindMalformed}
	n := 0
	for _, x := range tamperings {
		if x.log == nil || !slices.Contains(judged, x.kind) {
			continue
		}
		n++
		s := newScribe(t)
		x.log(s)
		s.write()
		r, err := Verify(t.Context(), s, s.options())
		if err != nil {
			t.Fatal(err)
		}
		if !has(r, x.kind, s.index[x.at.(string)]) {
			t.Errorf("%s: no %s at %d among %v", x.name, x.kind, s.index[x.at.(string)], r.Findings)
		}
	}
	if n < 20 {
		t.Errorf("%d lies were told", n)
	}
}

// A bundle is anybody's: whatever the bytes, there is a verdict and no crash.
func FuzzAZipThatSomebodyHandsOver(f *testing.F) {
	s := newScribe(f).write()
	o := s.options()
	raw := s.export(view{}).zip()
	f.Add(raw)
	f.Add(s.export(part).zip())
	f.Add(raw[:len(raw)/2])
	f.Add([]byte("PK\x05\x06" + strings.Repeat("\x00", 18)))
	f.Fuzz(func(t *testing.T, raw []byte) {
		r := &Report{Origin: origin, Findings: []Finding{}}
		if b := newBundle(bytes.NewReader(raw), int64(len(raw)), r); b != nil {
			if _, err := verifyBundle(t.Context(), b, r, &o); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// One byte of one member changed, with the manifest made to fit: it is found,
// wherever it is, but for VERIFY.md, which is noted.
func FuzzAByteOfAMember(f *testing.F) {
	s := newScribe(f).write()
	p := s.export(part)
	o := s.options()
	for i := range p.names {
		f.Add(uint8(i), uint32(i*31), byte(1))
	}
	f.Fuzz(func(t *testing.T, member uint8, at uint32, flip byte) {
		q := p.clone()
		q.t = t
		name := q.names[int(member)%len(q.names)]
		if name == memberManifest || flip == 0 || len(q.data[name]) == 0 {
			return
		}
		b := bytes.Clone(q.data[name])
		b[int(at)%len(b)] ^= flip
		q.data[name] = b
		q.fitManifest()
		raw := q.zip()
		r := &Report{Origin: origin, Findings: []Finding{}}
		if bundle := newBundle(bytes.NewReader(raw), int64(len(raw)), r); bundle != nil {
			if _, err := verifyBundle(t.Context(), bundle, r, &o); err != nil {
				t.Fatal(err)
			}
		}
		if r.OK() != (name == memberVerify) {
			t.Errorf("byte %d of %s: findings %v", int(at)%len(b), name, r.Findings)
		}
	})
}
