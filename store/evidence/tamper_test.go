package evidence

import (
	"archive/zip"
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/countersign-dev/countersign/store"
)

// tampering is one way to lie with a bundle. Exactly one of log, change and raw
// is the lie.
type tampering struct {
	name string
	v    view
	log  func(*scribe)       // the recorder lies: the log is written, signed and exported with it
	bend func(*parcel)       // whoever held the bundle lies
	raw  func([]byte) []byte // likewise, with the zip itself
	// fit says how a forger makes the rest fit: fitAll recomputes tables, report
	// and manifest, fitDigests the manifest alone. The lie must be found without
	// it too, as digest at the least.
	fit  func(*parcel)
	kind string
	at   any // name of the entry, or its index; nil: it belongs to none
	// python says that the Python check of VERIFY.md finds it too.
	python bool
}

func fitAll(p *parcel)     { p.fit() }
func fitDigests(p *parcel) { p.fitManifest() }

var (
	part   = view{from: "5 issuing", to: "b3 requested"} // within the story of request 5
	ofPath = view{from: "g used", to: "b3 requested"}
	ofRun2 = view{filters: map[string]string{"run": "r-2"}}
)

// line finds the line of the window that belongs to the named entry.
func (p *parcel) line(name string) int { return int(p.scribe.index[name] - p.m.Window.From) }

// masked is the member that holds the masking rules of the stories.
func masked() string {
	return "masking/" + strings.TrimPrefix(pathGrant().Access.Masking.Digest(), "sha256:") + ".json"
}

// bendLine changes one line of entries.jsonl.
func bendLine(name, old, new string) func(*parcel) {
	return func(p *parcel) {
		p.change(memberEntries, func(l [][]byte) [][]byte {
			i := p.line(name)
			bent := bytes.Replace(l[i], []byte(old), []byte(new), 1)
			if bytes.Equal(bent, l[i]) {
				p.t.Fatalf("%s holds no %q", name, old)
			}
			l[i] = bent
			return l
		})
	}
}

// dropContext leaves an entry out of the context, and its texts.
func dropContext(name string) func(*parcel) {
	return func(p *parcel) {
		at := fmt.Sprint(p.scribe.index[name])
		k := slices.IndexFunc(p.lines(memberContextIndex), func(l []byte) bool { return strings.TrimSpace(string(l)) == at })
		if k < 0 {
			p.t.Fatalf("%s is not in the context", name)
		}
		for _, m := range []string{memberContext, memberContextIndex} {
			p.change(m, func(l [][]byte) [][]byte { return slices.Delete(l, k, k+1) })
		}
		p.change(memberSealed, func(l [][]byte) [][]byte {
			return slices.DeleteFunc(l, func(x []byte) bool { return bytes.HasPrefix(x, []byte(`{"index":`+at+",")) })
		})
	}
}

// around puts an entry into the context.
func (p *parcel) around(index int64, leaf []byte) {
	n := 0
	p.change(memberContextIndex, func(l [][]byte) [][]byte {
		n = slices.IndexFunc(l, func(x []byte) bool {
			i, _ := strconv.ParseInt(strings.TrimSpace(string(x)), 10, 64)
			return i > index
		})
		return slices.Insert(l, n, fmt.Appendf(nil, "%d\n", index))
	})
	p.change(memberContext, func(l [][]byte) [][]byte { return slices.Insert(l, n, append(bytes.Clone(leaf), '\n')) })
}

// bendText changes the lines of sealed.jsonl that open an entry.
func bendText(name string, fn func([]byte) []byte) func(*parcel) {
	return func(p *parcel) {
		prefix := fmt.Appendf(nil, `{"index":%d,`, p.scribe.index[name])
		found := false
		p.change(memberSealed, func(l [][]byte) [][]byte {
			for i := range l {
				if bytes.HasPrefix(l[i], prefix) {
					l[i], found = fn(l[i]), true
				}
			}
			return l
		})
		if !found {
			p.t.Fatalf("%s has no text", name)
		}
	}
}

func replaced(old, new string) func([]byte) []byte {
	return func(b []byte) []byte { return bytes.Replace(b, []byte(old), []byte(new), 1) }
}

// lie changes an entry before it is stamped.
func lie(name string, fn func(*store.Submission)) func(*scribe) {
	return func(s *scribe) { s.edit[name] = fn }
}

// details changes the details of an entry.
func details[T any](name string, fn func(*T)) func(*scribe) {
	return lie(name, func(e *store.Submission) {
		d, err := store.DetailsAs[T](&e.Entry)
		if err != nil {
			panic(err)
		}
		fn(&d)
		e.SetDetails(d)
	})
}

// leave leaves entries out of the log.
func leave(names ...string) func(*scribe) {
	return func(s *scribe) {
		for _, n := range names {
			s.drop[n] = true
		}
	}
}

func then(name string, fn func(*scribe)) func(*scribe) {
	return func(s *scribe) { s.after[name] = fn }
}

// manifestLie changes the manifest itself, last of all.
func manifestLie(fn func(*manifest)) func(*parcel) {
	return func(p *parcel) { p.keep = fn; p.fit() }
}

// otherLog is a log of the same stories, by another key.
func otherLog(p *parcel) *parcel { return newScribe(p.t).write().export(view{}) }

// header packs one member with another header.
func header(name string, fn func(*zip.FileHeader)) func(*parcel) {
	return func(p *parcel) {
		p.pack = func(z *zip.Writer, n string, data []byte) bool {
			if n != name {
				return false
			}
			h := &zip.FileHeader{Name: name, Method: zip.Deflate}
			fn(h)
			pack(p.t, z, h, data)
			return true
		}
	}
}

// hide puts a file behind the last member of a zip, where its directory does not
// tell of it.
func hide(z []byte, name, text string) []byte {
	at := bytes.LastIndex(z, []byte("PK\x05\x06"))
	directory := int(binary.LittleEndian.Uint32(z[at+16:]))
	h := make([]byte, 30, 30+len(name)+len(text))
	copy(h, "PK\x03\x04\x14\x00")
	binary.LittleEndian.PutUint32(h[14:], crc32.ChecksumIEEE([]byte(text)))
	binary.LittleEndian.PutUint32(h[18:], uint32(len(text)))
	binary.LittleEndian.PutUint32(h[22:], uint32(len(text)))
	binary.LittleEndian.PutUint16(h[26:], uint16(len(name)))
	h = append(append(h, name...), text...)
	z = slices.Concat(z[:directory], h, z[directory:])
	binary.LittleEndian.PutUint32(z[at+len(h)+16:], uint32(directory+len(h)))
	return z
}

// extra adds a member that the manifest names.
func extra(name string) func(*parcel) {
	return func(p *parcel) {
		p.set(name, []byte("x"))
		p.names = append(p.names[:len(p.names)-2], name, memberManifest) // before the manifest
		p.fitManifest()
	}
}

var tamperings = []tampering{
	// Entries.
	{name: "an entry dropped", bend: func(p *parcel) {
		p.change(memberEntries, func(l [][]byte) [][]byte { return slices.Delete(l, 100, 101) })
	}, fit: fitAll, kind: KindLeaf, at: 0, python: true},
	{name: "the last entry of the window dropped", bend: func(p *parcel) {
		p.change(memberEntries, func(l [][]byte) [][]byte { return l[:len(l)-1] })
	}, fit: fitAll, kind: KindWindow, at: "b9 revoked", python: true},
	{name: "an entry added", bend: func(p *parcel) {
		p.change(memberEntries, func(l [][]byte) [][]byte { return slices.Insert(l, 300, l[299]) })
	}, fit: fitAll, kind: KindDuplicate, at: 300, python: true},
	{name: "two entries swapped", bend: func(p *parcel) {
		p.change(memberEntries, func(l [][]byte) [][]byte { l[300], l[301] = l[301], l[300]; return l })
	}, fit: fitAll, kind: KindTime, at: 301, python: true},
	{name: "an entry edited", bend: bendLine("3 requested", `"step":"s3"`, `"step":"s9"`), fit: fitAll, kind: KindLeaf, at: 0, python: true},
	{name: "an entry of the last tile edited", bend: bendLine("b9 used", "GET /orders/b9", "GET /orders/b8"), fit: fitAll, kind: KindLeaf, at: "b9 used", python: true},
	{name: "an entry of a window's edge edited", v: part, bend: bendLine("5 used", "GET /orders/5", "GET /orders/6"), fit: fitAll, kind: KindLeaf, at: "5 used", python: true},
	{name: "the entries cut short", bend: func(p *parcel) { p.data[memberEntries] = p.data[memberEntries][:len(p.data[memberEntries])/2] }, fit: fitAll, kind: KindMember, python: true},
	{name: "a line without its end", bend: func(p *parcel) { p.data[memberEntries] = bytes.TrimSuffix(p.data[memberEntries], []byte("\n")) }, fit: fitAll, kind: KindMember, python: true},
	{name: "a line that is too long", bend: func(p *parcel) {
		p.change(memberEntries, func(l [][]byte) [][]byte { l[5] = append(bytes.Repeat([]byte(" "), 1<<17), l[5]...); return l })
	}, fit: fitDigests, kind: KindMember, python: true},
	{name: "two logs spliced", bend: func(p *parcel) {
		o := otherLog(p).lines(memberEntries)
		p.change(memberEntries, func(l [][]byte) [][]byte { copy(l[260:360], o[260:360]); return l })
	}, fit: fitAll, kind: KindLeaf, at: 256, python: true},
	{name: "an approval's person changed", bend: bendLine("2 decided", "p-alice", "p-carol"), fit: fitAll, kind: KindSignature, at: "2 decided", python: true},
	{name: "a denial turned", bend: bendLine("2 decided", `"decision":"approve"`, `"decision":"deny"`), fit: fitAll, kind: KindSignature, at: "2 decided", python: true},
	{name: "a scope widened", bend: bendLine("2 issuing", `"action":"orders:write"`, `"action":"orders:admin"`), fit: fitAll, kind: KindOrder, at: "2 issuing", python: true},
	{name: "a time moved", bend: bendLine("2 decided", `"time":"2026-07-01`, `"time":"2026-06-30`), fit: fitAll, kind: KindTime, at: "2 decided", python: true},
	{name: "an entry made no entry", bend: bendLine("a5 used", `{"v":1`, `{"v":{}`), fit: fitAll, kind: KindMalformed, at: "a5 used", python: true},

	// The access path.
	{name: "a result dropped", bend: func(p *parcel) {
		p.change(memberEntries, func(l [][]byte) [][]byte { return slices.Delete(l, p.line("g done"), p.line("g done")+1) })
	}, fit: fitAll, kind: KindLeaf, at: "g done", python: true},
	{name: "a result edited", bend: bendLine("h done", `"rows":3`, `"rows":2`), fit: fitAll, kind: KindLeaf, at: "h done", python: true},
	{name: "a statement changed", bend: bendText("g used", replaced("SELECT email", "SELECT id")), fit: fitAll, kind: KindOpening, at: "g used"},
	{name: "a statement dropped", bend: bendText("g refused", func([]byte) []byte { return nil }), fit: fitAll, kind: KindTextMissing, at: "g refused"},
	{name: "a sample changed", bend: bendText("g done", replaced("[masked]", "a@b.example")), fit: fitAll, kind: KindOpening, at: "g done"},
	{name: "a sample added", bend: func(p *parcel) {
		at := p.scribe.index["h done"]
		p.change(memberSealed, func(l [][]byte) [][]byte {
			i := slices.IndexFunc(l, func(x []byte) bool {
				digits, _, _ := bytes.Cut(bytes.TrimPrefix(x, []byte(`{"index":`)), []byte(","))
				n, _ := strconv.ParseInt(string(digits), 10, 64)
				return n > at
			})
			return slices.Insert(l, i, fmt.Appendf(nil, `{"index":%d,"field":"sample","salt":"%s","text":"none"}`+"\n", at, base64.StdEncoding.EncodeToString(make([]byte, 32))))
		})
	}, fit: fitAll, kind: KindOpening, at: "h done"},
	{name: "a use's request left out of the context", v: ofPath, bend: dropContext("g requested"), fit: fitAll, kind: KindUse, at: "g used"},
	{name: "a result told otherwise in the table", bend: func(p *parcel) { p.swap(memberUses, ",SELECT 3,", ",SELECT 9,") }, fit: fitDigests, kind: KindTable, at: "g used"},
	{name: "a claim that is made to agree", bend: func(p *parcel) { p.swap(memberSteps, ",agree,", ",differ,") }, fit: fitDigests, kind: KindTable, at: "2 requested"},

	// The checkpoint.
	{name: "signed with another key", bend: func(p *parcel) {
		skey, _, _ := note.GenerateKey(rand.Reader, origin)
		signer, _ := note.NewSigner(skey)
		p.data[memberCheckpoint] = []byte(p.root(p.m.Size, signer))
	}, fit: fitAll, kind: KindCheckpoint, python: true},
	{name: "a log of another name", bend: func(p *parcel) {
		skey, _, _ := note.GenerateKey(rand.Reader, "other.example/log")
		signer, _ := note.NewSigner(skey)
		p.data[memberCheckpoint] = []byte(p.root(p.m.Size, signer))
	}, fit: fitAll, kind: KindCheckpoint, python: true},
	{name: "a checkpoint of another log", bend: func(p *parcel) { p.data[memberCheckpoint] = otherLog(p).data[memberCheckpoint] }, fit: fitAll, kind: KindRoot, python: true},
	{name: "an older checkpoint", bend: func(p *parcel) { p.data[memberCheckpoint] = []byte(p.root(p.m.Size-5, p.scribe.signer)) }, fit: fitAll, kind: KindMissing, at: "b9 issuing", python: true},
	{name: "the root in the checkpoint edited", bend: func(p *parcel) {
		p.swap(memberCheckpoint, p.m.Root, "AAAA"+p.m.Root[4:])
	}, fit: fitAll, kind: KindCheckpoint, python: true},
	{name: "no signature", bend: func(p *parcel) { p.data[memberCheckpoint], _, _ = bytes.Cut(p.data[memberCheckpoint], []byte("—")) }, fit: fitAll, kind: KindCheckpoint, python: true},
	{name: "no checkpoint at all", bend: func(p *parcel) { p.data[memberCheckpoint] = nil }, fit: fitAll, kind: KindCheckpoint, python: true},

	// Texts.
	{name: "a text changed", bend: bendText("2 decided", replaced("seen it", "seen all")), fit: fitAll, kind: KindOpening, at: "2 decided"},
	{name: "a salt changed", bend: bendText("2 requested", replaced(`"salt":"`, `"salt":"AAAA`)), fit: fitAll, kind: KindOpening, at: "2 requested"},
	{name: "a text dropped", bend: bendText("2 requested", func([]byte) []byte { return nil }), fit: fitAll, kind: KindTextMissing, at: "2 requested"},
	{name: "all texts dropped", bend: func(p *parcel) { p.data[memberSealed] = nil }, fit: fitAll, kind: KindTextMissing, at: "4 requested"},
	{name: "a text that was erased", bend: func(p *parcel) {
		erased := p.opening(p.scribe.index["1 requested"])
		at := slices.IndexFunc(p.lines(memberSealed), func(l []byte) bool {
			return bytes.HasPrefix(l, fmt.Appendf(nil, `{"index":%d,`, p.scribe.index["2 requested"]))
		})
		p.change(memberSealed, func(l [][]byte) [][]byte { return slices.Insert(l, at, erased) })
	}, fit: fitAll, kind: KindErasedText, at: "1 requested"},
	{name: "a text of no commitment", bend: bendText("3 requested", replaced(`"reason"`, `"motive"`)), fit: fitAll, kind: KindOpening, at: "3 requested"},
	{name: "a text twice", bend: bendText("3 requested", func(l []byte) []byte { return append(bytes.Clone(l), l...) }), fit: fitAll, kind: KindOpening, at: "3 requested"},
	{name: "a text of another entry", bend: bendText("2 requested", replaced(`{"index":`, `{"index":9`)), fit: fitAll, kind: KindTextMissing, at: "2 requested"},
	{name: "texts that are none", bend: bendText("2 requested", func([]byte) []byte { return []byte("{}\n") }), fit: fitAll, kind: KindOpening},

	// The context.
	{name: "the erasure left out of the context", v: view{from: "1 requested", to: "3 requested"}, bend: dropContext("erased"), fit: fitAll, kind: KindTextMissing, at: "1 requested"},
	{name: "an intent left out of the context", v: view{from: "5 issued", to: "b3 requested"}, bend: dropContext("5 issuing"), fit: fitAll, kind: KindOrder, at: "5 issued"},
	{name: "a decision left out of the context", v: part, bend: dropContext("5 decided"), fit: fitAll, kind: KindOrder, at: "5 issuing"},
	{name: "a request left out of the context", v: part, bend: dropContext("5 requested"), fit: fitAll, kind: KindOrder, at: "5 issuing"},
	{name: "a key's activation left out of the context", v: part, bend: dropContext("activated"), fit: fitAll, kind: KindSignature, at: "5 decided"},
	{name: "the policies left out of the context", v: view{from: "5 requested", to: "b3 requested"}, bend: func(p *parcel) { dropContext("policy")(p); dropContext("policy of the broker")(p) }, fit: fitAll, kind: KindPolicy, at: "5 requested"},
	{name: "the export left out of the context", bend: dropContext("export"), fit: fitAll, kind: KindExport, at: "export"},
	{name: "an entry of the context edited", v: part, bend: func(p *parcel) { p.swap(memberContext, `"decision":"approve"`, `"decision":"deny"`) }, fit: fitAll, kind: KindLeaf, at: "5 decided", python: true},
	{name: "the context's index shifted", v: part, bend: func(p *parcel) {
		at := fmt.Sprint(p.scribe.index["5 decided"])
		p.swap(memberContextIndex, at+"\n", at+"0\n")
	}, fit: fitAll, kind: KindMember, python: true},
	{name: "an entry of another log in the context", v: part, bend: func(p *parcel) {
		p.change(memberContext, func(l [][]byte) [][]byte { l[0] = otherLog(p).lines(memberEntries)[0]; return l })
	}, fit: fitAll, kind: KindLeaf, at: "policy", python: true},
	{name: "an entry both in window and context", v: part, bend: func(p *parcel) {
		i := p.scribe.index["b1 used"]
		p.around(i, p.scribe.leaves[i])
	}, fit: fitAll, kind: KindWindow, at: "b1 used", python: true},
	{name: "an entry that another hides", v: part, bend: func(p *parcel) {
		i := p.scribe.index["b1 used"]
		forged := bytes.Replace(p.scribe.leaves[i], []byte("GET /orders/b1"), []byte("GET /orders/b2"), 1)
		p.around(i, forged)
	}, fit: fitAll, kind: KindWindow, at: "b1 used", python: true},
	{name: "an index twice, first with another entry", v: ofRun2, bend: func(p *parcel) {
		p.change(memberEntries, func(l [][]byte) [][]byte {
			return slices.Insert(l, 0, bytes.Replace(l[0], []byte("sensitive"), []byte("insensate"), 1))
		})
		p.change(memberEntriesIndex, func(l [][]byte) [][]byte { return slices.Insert(l, 0, l[0]) })
	}, fit: fitAll, kind: KindMember, python: true},
	{name: "a last byte that is no line's end", bend: func(p *parcel) {
		b := bytes.Clone(p.data[memberEntries])
		b[len(b)-1] = '!'
		p.data[memberEntries] = b
	}, fit: fitDigests, kind: KindMember, python: true},

	// Tables and report.
	{name: "a step edited", bend: func(p *parcel) { p.swap(memberSteps, "OPS-2", "OPS-7") }, fit: fitDigests, kind: KindTable, at: "2 requested"},
	{name: "an approval edited", bend: func(p *parcel) { p.swap(memberApprovals, "seen it", "seen all") }, fit: fitDigests, kind: KindTable, at: "2 decided"},
	{name: "a use dropped", bend: func(p *parcel) {
		p.change(memberUses, func(l [][]byte) [][]byte { return slices.Delete(l, 1, 2) })
	}, fit: fitDigests, kind: KindTable, at: "1 used"},
	{name: "a use added", bend: func(p *parcel) {
		p.change(memberUses, func(l [][]byte) [][]byte { return append(l, l[1]) })
	}, fit: fitDigests, kind: KindTable},
	{name: "uses cut short", bend: func(p *parcel) {
		p.change(memberUses, func(l [][]byte) [][]byte { return l[:len(l)-1] })
	}, fit: fitDigests, kind: KindTable, at: "b9 used"},
	{name: "the report edited", bend: func(p *parcel) { p.swap(memberReport, "<title>", "<title>All is well: ") }, fit: fitDigests, kind: KindReport},
	{name: "no report", bend: func(p *parcel) { p.data[memberReport] = nil }, fit: fitDigests, kind: KindReport},

	// Policies and masking.
	{name: "a catalogue swapped", bend: func(p *parcel) {
		p.data["policies/"+textDigest(catalogue)[7:]+".yaml"] = []byte("orders:write low 0\n")
	}, fit: fitDigests, kind: KindPolicy},
	{name: "a catalogue dropped", bend: func(p *parcel) { p.remove("policies/" + textDigest(catalogue)[7:] + ".yaml") }, fit: fitDigests, kind: KindPolicy},
	{name: "a catalogue added", bend: func(p *parcel) {
		name := "policies/" + textDigest("x")[7:] + ".yaml"
		p.set(name, []byte("x"))
		p.names = slices.Insert(p.names[:len(p.names)-1], slices.Index(p.names, memberMasking), name)
	}, fit: fitDigests, kind: KindPolicy},
	{name: "masking that was not", bend: func(p *parcel) { p.data[memberMasking] = []byte(`{"rules":[{}]}`) }, fit: fitDigests, kind: KindMasking},
	{name: "a count of masked uses changed", bend: func(p *parcel) { p.swap(memberMasking, `"uses":4`, `"uses":3`) }, fit: fitDigests, kind: KindMasking},
	{name: "masking rules edited", bend: func(p *parcel) { p.swap(masked(), "email", "phone") }, fit: fitDigests, kind: KindMasking},
	{name: "masking rules dropped", bend: func(p *parcel) { p.remove(masked()) }, fit: fitDigests, kind: KindMasking},
	{name: "masking rules that nobody granted", bend: func(p *parcel) {
		name := "masking/" + textDigest("x")[7:] + ".json"
		p.set(name, []byte("x"))
		p.names = slices.Insert(p.names[:len(p.names)-1], slices.Index(p.names, memberMasking), name)
	}, fit: fitDigests, kind: KindMasking},

	// The manifest.
	{name: "another root in the manifest", bend: manifestLie(func(m *manifest) { m.Root = "AAAA" + m.Root[4:] }), kind: KindManifest, python: true},
	{name: "another size in the manifest", bend: manifestLie(func(m *manifest) { m.Size++ }), kind: KindManifest, python: true},
	{name: "another log in the manifest", bend: manifestLie(func(m *manifest) { m.Origin = "other.example/log" }), kind: KindManifest, python: true},
	{name: "another format", bend: manifestLie(func(m *manifest) { m.Format = "countersign-bundle/2" }), kind: KindManifest},
	{name: "another count", bend: manifestLie(func(m *manifest) { m.Counts.Uses-- }), kind: KindManifest},
	{name: "another count of a type", bend: manifestLie(func(m *manifest) { m.Counts.Types[store.ApprovalDecided]++ }), kind: KindManifest},
	{name: "another time of the window", bend: manifestLie(func(m *manifest) { m.Window.ToTime = "2026-12-31T00:00:00.000000Z" }), kind: KindManifest},
	{name: "another time of the export", bend: manifestLie(func(m *manifest) { m.Created = "2026-12-31T00:00:00.000000Z" }), kind: KindExport, at: "export"},
	{name: "another export", bend: manifestLie(func(m *manifest) { m.Export.ID = store.NewID() }), kind: KindExport, at: "export"},
	{name: "another export's index", bend: manifestLie(func(m *manifest) { m.Export.Index-- }), kind: KindExport, at: "b9 revoked"},
	{name: "a window narrowed to hide entries", bend: func(p *parcel) {
		p.change(memberEntries, func(l [][]byte) [][]byte { return l[:p.line("b9 requested")] })
		p.change(memberSealed, func(l [][]byte) [][]byte { return l[:len(l)-1] })
		p.m.Window.To = p.scribe.index["b9 requested"]
		last := tileName(tileAt(p.m.Size-1, p.m.Size))
		if p.data[last] == nil {
			p.t.Fatal("no tile at the edge")
		}
		p.fit()
	}, kind: KindExport, at: "export"},
	{name: "the entry before the window left out", v: part, bend: func(p *parcel) { dropContext("5 decided")(p) }, fit: fitAll, kind: KindWindow, at: "5 decided"},
	{name: "the entry behind the window left out", v: part, bend: func(p *parcel) { dropContext("b3 requested")(p) }, fit: fitAll, kind: KindWindow, at: "b3 requested"},
	{name: "a window widened", bend: manifestLie(func(m *manifest) { m.Window.From = 0; m.Window.To++ }), kind: KindWindow, at: "export", python: true},
	{name: "a filtered bundle that claims to be complete", v: ofRun2, bend: manifestLie(func(m *manifest) { m.Complete = true }), kind: KindManifest},
	{name: "a filter that is not told", v: ofRun2, bend: func(p *parcel) {
		p.m.Filters, p.m.Complete = map[string]string{}, true
		p.remove(memberEntriesIndex)
		p.fit()
	}, kind: KindExport, at: "export", python: true},
	{name: "another filter than on record", v: ofRun2, bend: manifestLie(func(m *manifest) { m.Filters["orchestrator"] = "demo" }), kind: KindExport, at: "export"},
	{name: "a member of the manifest that nobody knows", bend: func(p *parcel) { p.swap(memberManifest, `{"format"`, `{"verified":true,"format"`) }, kind: KindManifest},
	{name: "a manifest that is none", bend: func(p *parcel) { p.data[memberManifest] = []byte("[]") }, kind: KindManifest, python: true},
	{name: "no manifest", bend: func(p *parcel) { p.remove(memberManifest) }, kind: KindMember, python: true},
	{name: "an entry that the filter does not pick", v: ofRun2, bend: func(p *parcel) {
		i := p.scribe.index["policy"]
		p.change(memberEntries, func(l [][]byte) [][]byte { return slices.Insert(l, 0, append(bytes.Clone(p.scribe.leaves[i]), '\n')) })
		p.change(memberEntriesIndex, func(l [][]byte) [][]byte { return slices.Insert(l, 0, fmt.Appendf(nil, "%d\n", i)) })
		dropContext("policy")(p)
		p.change(memberSealed, func(l [][]byte) [][]byte { return slices.Insert(l, 0, p.opening(i)) })
	}, fit: fitAll, kind: KindWindow, at: "policy"},
	{name: "more indexes than entries", v: ofRun2, bend: func(p *parcel) { p.data[memberEntriesIndex] = append(p.data[memberEntriesIndex], "600\n"...) }, fit: fitAll, kind: KindMember, python: true},

	// Tiles.
	{name: "a tile of the tree changed", bend: func(p *parcel) { p.data["tiles/1/000.p/2"] = make([]byte, 64) }, fit: fitDigests, kind: KindRoot, python: true},
	{name: "a tile of leaves changed", v: part, bend: func(p *parcel) {
		name := tileName(tileAt(0, p.m.Size))
		p.data[name] = append(make([]byte, 32), p.data[name][32:]...)
	}, fit: fitDigests, kind: KindTile, python: true},
	{name: "a tile of the tree dropped", bend: func(p *parcel) { p.remove("tiles/1/000.p/2") }, fit: fitDigests, kind: KindMissing, python: true},
	{name: "a tile of leaves dropped", v: part, bend: func(p *parcel) { p.remove(tileName(tileAt(0, p.m.Size))) }, fit: fitDigests, kind: KindMissing, at: 5, python: true},
	{name: "a tile cut short", bend: func(p *parcel) { p.data["tiles/1/000.p/2"] = p.data["tiles/1/000.p/2"][:63] }, fit: fitDigests, kind: KindMissing, python: true},
	{name: "a tile of no tree", bend: func(p *parcel) {
		p.set("tiles/3/000", make([]byte, 256*32))
		p.names = slices.Insert(p.names[:len(p.names)-1], slices.Index(p.names, memberSteps), "tiles/3/000")
	}, fit: fitDigests, kind: KindMember},

	// The zip.
	{name: "a member twice", bend: func(p *parcel) {
		p.names = slices.Insert(p.names, slices.Index(p.names, memberUses), memberApprovals)
	}, kind: KindMember, python: true},
	{name: "a member too many", bend: extra("readme.txt"), kind: KindMember},
	{name: "a member that leads out of the directory", bend: extra("policies/../../x.yaml"), kind: KindMember},
	{name: "a member with an absolute path", bend: extra("/etc/passwd"), kind: KindMember},
	{name: "a directory", bend: func(p *parcel) {
		p.names = slices.Insert(p.names, slices.Index(p.names, memberSteps), "tiles/")
		p.pack = func(z *zip.Writer, n string, data []byte) bool {
			if n != "tiles/" {
				return false
			}
			_, err := z.CreateHeader(&zip.FileHeader{Name: n})
			if err != nil {
				p.t.Fatal(err)
			}
			return true
		}
	}, kind: KindMember, python: true},
	{name: "a table missing", bend: func(p *parcel) { p.remove(memberSteps) }, fit: fitDigests, kind: KindMember},
	{name: "members out of order", bend: func(p *parcel) {
		i, j := slices.Index(p.names, memberSteps), slices.Index(p.names, memberUses)
		p.names[i], p.names[j] = p.names[j], p.names[i]
	}, kind: KindMember},
	{name: "a symbolic link", bend: header(memberUses, func(h *zip.FileHeader) { h.SetMode(os.ModeSymlink | 0o777) }), kind: KindMember},
	{name: "a zip with a comment", bend: func(p *parcel) {
		first := true
		p.pack = func(z *zip.Writer, n string, data []byte) bool {
			if first {
				first = false
				if err := z.SetComment("verified"); err != nil {
					p.t.Fatal(err)
				}
			}
			return false
		}
	}, kind: KindMember},
	{name: "a bomb", bend: func(p *parcel) { p.data[memberUses] = make([]byte, 64<<20) }, fit: fitDigests, kind: KindMember},
	{name: "a compression that nobody knows", raw: func(z []byte) []byte {
		i := bytes.LastIndex(z, []byte("uses.csv")) // in the directory: the method lies 36 bytes before the name
		z[i-36] = 97
		return z
	}, kind: KindMember, python: true},
	{name: "a file between the members", raw: func(z []byte) []byte { return hide(z, "REPORT.html", "All is well") }, kind: KindMember},
	{name: "a header of another name", raw: func(z []byte) []byte {
		i := bytes.Index(z, []byte(memberReport)) // the first is that of the header
		copy(z[i:], "REPORT.htmX")
		return z
	}, kind: KindMember, python: true},
	{name: "a member renamed by an extra field", bend: header(memberUses, func(h *zip.FileHeader) {
		h.Extra = append([]byte{0x75, 0x70, 13, 0, 1, 0, 0, 0, 0}, "SAFE.csv"...)
	}), kind: KindMember},
	{name: "a zip cut short", raw: func(z []byte) []byte { return z[:len(z)-30] }, kind: KindMember, python: true},
	{name: "no zip", raw: func(z []byte) []byte { return []byte("PK, and nothing behind it") }, kind: KindMember, python: true},
	{name: "a byte of the compressed entries changed", raw: func(z []byte) []byte {
		i := bytes.Index(z, []byte(memberEntries))
		z[i+5000] ^= 0x10
		return z
	}, kind: KindDigest, python: true},

	// A recorder that lies, and signs with the log's own key.
	{name: "a passkey's signature forged", log: details("5 decided", func(d *store.DecidedDetails) { d.Assertion.Signature[10] ^= 1 }), kind: KindSignature, at: "5 decided"},
	{name: "another's decision under alice's signature", log: lie("5 decided", func(e *store.Submission) { e.Person = store.Ptr("p-carol") }), kind: KindSignature, at: "5 decided"},
	{name: "a signature used again", log: func(s *scribe) {
		var first *store.Assertion
		details("2 decided", func(d *store.DecidedDetails) { first = d.Assertion })(s)
		details("5 decided", func(d *store.DecidedDetails) { d.Assertion = first })(s)
	}, kind: KindSignature, at: "5 decided"},
	{name: "a decision without the signature that is due", log: details("5 decided", func(d *store.DecidedDetails) { d.Assertion = nil }), kind: KindOrder, at: "5 decided"},
	{name: "a key that its owner activated", log: details("activated", func(d *store.ActivatedDetails) { d.By = "p-alice" }), kind: KindSignature, at: "activated"},
	{name: "a login by another provider's key", log: func(s *scribe) {
		s.edit["enrolled"] = func(e *store.Submission) {
			d, _ := store.DetailsAs[store.EnrolledDetails](&e.Entry)
			e.Seal(store.SealedIDToken, s.idToken(&d, newScribe(s.t).provider, "alice"))
		}
	}, kind: KindAnchor, at: "enrolled"},
	{name: "a login of another person", log: lie("enrolled", func(e *store.Submission) { e.Seal(store.SealedPerson, "user:mallory") }), kind: KindAnchor, at: "enrolled"},
	{name: "a login at a provider that nobody knows", log: details("enrolled", func(d *store.EnrolledDetails) { d.Issuer = "https://other.example" }), kind: KindAnchor, at: "enrolled"},
	{name: "a weaker rule", log: func(s *scribe) {
		details("5 asked", func(d *store.ApprovalRequestedDetails) { d.Rule.Passkey = false })(s)
	}, kind: KindRule, at: "5 asked"},
	{name: "a sensitive scope without approval", log: func(s *scribe) {
		s.edit["a7 requested"] = toWrite(func(d *store.RequestedDetails) { d.Grant = grantOf("orders:write") })
	}, kind: KindRule, at: "a7 requested"},
	{name: "a sensitivity told too low", log: lie("5 requested", func(e *store.Submission) { e.Risk.Sensitivity = "low" }), kind: KindRule, at: "5 requested"},
	{name: "a scope of no catalogue", log: func(s *scribe) {
		s.edit["a7 requested"] = func(e *store.Submission) {
			toWrite(func(d *store.RequestedDetails) { d.Grant = grantOf("orders:all") })(e)
			e.Action = "orders:all"
		}
	}, kind: KindRule, at: "a7 requested"},
	{name: "a policy that is not on record", log: lie("a7 requested", func(e *store.Submission) { e.Decision.Policy = "sha256:none" }), kind: KindPolicy, at: "a7 requested"},
	{name: "a catalogue other than named", log: details("policy", func(d *store.PolicyDetails) { d.Catalogue = textDigest("another") }), kind: KindPolicy, at: "policy"},
	{name: "an issuance without intent", log: leave("a7 issuing"), kind: KindOrder, at: "a7 issued"},
	{name: "an intent without request", log: leave("a7 requested"), kind: KindOrder, at: "a7 issuing"},
	{name: "an issuance that nobody approved", log: leave("5 decided"), kind: KindOrder, at: "5 issuing"},
	{name: "an approval by the requester's side", log: details("5 asked", func(d *store.ApprovalRequestedDetails) { d.Excluded = []string{"p-alice"} }), kind: KindOrder, at: "5 decided"},
	{name: "an approval of something else", log: details("5 decided", func(d *store.DecidedDetails) { d.Requested = "AAAA" }), kind: KindOrder, at: "5 decided"},
	{name: "a grant wider than asked", log: details("5 issuing", func(d *store.IssuingDetails) { g := grantOf("orders:all"); d.Grant = g.Digest() }), kind: KindOrder, at: "5 issuing"},
	{name: "a credential that outlives its intent", log: details("5 issued", func(d *store.IssuedDetails) { d.Expires = store.At(d.Expires.Add(time.Hour)) }), kind: KindOrder, at: "5 issued"},
	{name: "a use after revocation", log: then("5 revoked", func(s *scribe) { s.useAgain("5", "r-5", "late") }), kind: KindUse, at: "late"},
	{name: "a use after expiry", log: then("5 issued", func(s *scribe) { s.now = s.now.Add(time.Hour) }), kind: KindUse, at: "5 used"},
	{name: "a use before issuance", log: then("5 issuing", func(s *scribe) { s.useAgain("5", "r-5", "early") }), kind: KindUse, at: "early"},
	{name: "a use of no credential", log: details("5 used", func(d *store.UsedDetails) { d.Intent = store.NewID() }), kind: KindUse, at: "5 used"},
	{name: "a use by another request's credential", log: then("a5 issued", func(s *scribe) {
		s.put("late", "broker-1", s.of(store.CredentialUsed, "2", "r-2", "orders:write", store.Allow, store.UsedDetails{Intent: s.ids["a5 issuing"], Via: "introspection", By: "orders", Use: "GET /again"}))
	}), kind: KindUse, at: "late"},
	{name: "a result twice", log: then("g done", func(s *scribe) { s.results("again", "g", "r-g", "", "g used") }), kind: KindUse, at: "again"},
	{name: "two results in one", log: details("g done", func(d *store.UseFinishedDetails) { d.Outcomes = append(d.Outcomes, d.Outcomes[0]) }), kind: KindUse, at: "g done"},
	{name: "a result of no use", log: details("g done", func(d *store.UseFinishedDetails) { d.Outcomes[0].Use = store.NewID() }), kind: KindUse, at: "g done"},
	{name: "a result of what is no use", log: func(s *scribe) {
		s.edit["g done"] = func(e *store.Submission) {
			e.SetDetails(store.UseFinishedDetails{Outcomes: []store.UseOutcome{{Use: s.ids["g issuing"]}}})
		}
	}, kind: KindUse, at: "g done"},
	{name: "a result before its use", log: then("g issued", func(s *scribe) {
		s.edit["g used"] = func(e *store.Submission) { e.ID = "0190a000-0000-7000-8000-0000000000aa" }
		s.ids["g used"] = "0190a000-0000-7000-8000-0000000000aa"
		s.results("early", "g", "r-g", "", "g used")
	}), kind: KindUse, at: "early"},
	{name: "a result in another request's name", log: then("h issued", func(s *scribe) { s.results("stray", "h", "r-h", "", "g cut") }), kind: KindUse, at: "stray"},
	{name: "a result that tells of nothing", log: details("g done", func(d *store.UseFinishedDetails) { d.Outcomes = nil }), kind: KindMalformed, at: "g done"},
	{name: "a use moved to another credential", log: func(s *scribe) {
		s.edit["h used"] = func(e *store.Submission) {
			d, _ := store.DetailsAs[store.UsedDetails](&e.Entry)
			d.Intent = s.ids["g issuing"]
			e.SetDetails(d)
		}
	}, kind: KindUse, at: "h used"},
	{name: "a use on the access path by a secret that was handed out", log: details("5 used", func(d *store.UsedDetails) { d.Via = store.ViaGateway }), kind: KindUse, at: "5 used"},
	{name: "a use on the access path after the end", log: then("g revoked", func(s *scribe) {
		s.now = s.now.Add(time.Minute)
		s.passes("late", "g", "r-g")
	}), kind: KindUse, at: "late"},
	{name: "a use under other rules", log: details("g used", func(d *store.UsedDetails) { d.Access = "sha256:00" }), kind: KindUse, at: "g used"},
	{name: "a use under another masking", log: details("g used", func(d *store.UsedDetails) { d.Masking = "sha256:00" }), kind: KindMasking, at: "g used"},
	{name: "a use that was not masked", log: details("g used", func(d *store.UsedDetails) { d.Masking = "" }), kind: KindMasking, at: "g used"},
	{name: "a refusal to another's credential", log: func(s *scribe) {
		s.edit["g refused"] = func(e *store.Submission) {
			d, _ := store.DetailsAs[store.RefusedDetails](&e.Entry)
			d.Intent = s.ids["h issuing"]
			e.SetDetails(d)
		}
	}, kind: KindUse, at: "g refused"},
	{name: "an alert of no form", log: lie("alert", func(e *store.Submission) { e.Details = []byte(`{"alert":7}`) }), kind: KindMalformed, at: "alert"},
	{name: "a grant for the access path that leads nowhere", log: details("h requested", func(d *store.RequestedDetails) { d.Grant.Access = nil }), kind: KindMalformed, at: "h requested"},
	{name: "a decision in another's name", log: lie("5 decided", func(e *store.Submission) { e.Seal(store.SealedPerson, "user:carol") }), kind: KindPerson, at: "5 decided"},
	{name: "one person in two seats", log: func(s *scribe) {
		two := ruleFor()
		two.Groups[0].Count, two.Passkey = 2, false
		details("5 asked", func(d *store.ApprovalRequestedDetails) { d.Rule = two })(s)
		s.after["5 asked"] = func(s *scribe) {
			e := s.of(store.ApprovalDecided, "5", "r-5", "orders:write", store.NeedsApproval, store.DecidedDetails{
				Approval: "apr_5", Requested: store.HashText(store.LeafHash(s.leaves[s.index["5 asked"]])), Decision: store.Approve, Groups: []string{"dba"}, Via: "page"})
			e.Person = store.Ptr("p-other")
			e.Seal(store.SealedPerson, "user:alice")
			e.Seal(store.SealedReason, "seen it too")
			s.put("5 other", "recorder", e)
		}
	}, kind: KindPerson, at: "5 decided"},
	{name: "a decision in Slack where the rule takes none", log: details("5 decided", func(d *store.DecidedDetails) { d.Via = "slack" }), kind: KindRule, at: "5 decided"},
	{name: "an intent that names a denial", v: view{from: "5 issuing"}, log: lie("5 issuing", func(e *store.Submission) { e.Decision.Outcome = store.Deny }), kind: KindRule, at: "5 issuing"},
	{name: "an intent that names no decision", v: view{from: "5 issuing"}, log: lie("5 issuing", func(e *store.Submission) { e.Decision = nil }), kind: KindRule, at: "5 issuing"},
	{name: "a catalogue that nobody can read", log: func(s *scribe) {
		s.after["policy of the broker"] = func(s *scribe) {
			e := &store.Submission{Entry: store.Entry{Type: store.PolicyLoaded, Action: "policy.loaded"}}
			e.SetDetails(store.PolicyDetails{Digest: "sha256:policy-2", Catalogue: textDigest("hidden")})
			s.put("hidden", "broker-1", e)
		}
		s.edit["5 requested"] = func(e *store.Submission) { e.Decision.Outcome, e.Decision.Policy = store.Allow, "sha256:policy-2" }
		s.edit["5 issuing"] = func(e *store.Submission) { e.Decision.Policy = "sha256:policy-2" }
		leave("5 asked", "5 decided")(s)
		details("5 issuing", func(d *store.IssuingDetails) { d.Approval = "" })(s)
	}, kind: KindPolicy, at: "5 requested"},
	{name: "a weak catalogue under a strong one's digest", log: then("policy of the broker", func(s *scribe) {
		weak := "orders:read low 0\norders:write sensitive 0\n"
		e := &store.Submission{Entry: store.Entry{Type: store.PolicyLoaded, Action: "policy.loaded"}}
		e.SetDetails(store.PolicyDetails{Digest: inForceDigest(catalogue, "package x\n", true), Catalogue: textDigest(weak), Policy: textDigest("package x\n")})
		e.Seal(store.SealedCatalogue, weak)
		e.Seal(store.SealedPolicy, "package x\n")
		s.put("weak", "broker-1", e)
	}), kind: KindPolicy, at: "weak"},
	{name: "a sensitivity told too low, to erase sooner", log: func(s *scribe) {
		lie("2 decided", func(e *store.Submission) { e.Risk.Sensitivity = "low" })(s)
		s.after["erased"] = func(s *scribe) { s.erase("sooner", day, "low", "2 decided") }
	}, kind: KindRule, at: "2 decided"},
	{name: "a time that goes back", log: lie("5 used", func(e *store.Submission) { e.Time = store.At(time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC)) }), kind: KindTime, at: "5 used"},
	{name: "one ID for two entries", log: func(s *scribe) {
		s.edit["5 used"] = func(e *store.Submission) { e.ID = s.ids["5 issuing"] }
	}, kind: KindDuplicate, at: "5 used"},
	{name: "an entry that is none", log: func(s *scribe) {
		s.tear["a7 used"] = func(l []byte) []byte { return append([]byte("["), l...) }
	}, kind: KindMalformed, at: "a7 used"},
	{name: "an erasure before its time", log: details("erased", func(d *store.ErasedDetails) { d.Kept = store.Duration(3 * day) }), kind: KindErasure, at: "erased"},
	{name: "an erasure sooner than the retention", log: details("erased", func(d *store.ErasedDetails) { d.Kept = store.Duration(time.Hour) }), kind: KindErasure, at: "erased"},
	{name: "an erasure sooner than the retention of its scope", log: details("policy", func(d *store.PolicyDetails) { d.Retention["scope:orders:read"] = store.Duration(90 * day) }), kind: KindErasure, at: "erased"},
	{name: "an erasure without retention on record", log: details("policy", func(d *store.PolicyDetails) { d.Retention = nil }), kind: KindErasure, at: "erased"},
	{name: "an erasure under hold", log: details("erased", func(d *store.ErasedDetails) { d.Entries = []int64{18} }), kind: KindErasure, at: "erased"},
	{name: "an erasure under a hold of a time", log: details("hold", func(d *store.HoldDetails) {
		*d = store.HoldDetails{From: store.At(time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC))}
	}), kind: KindErasure, at: "erased"},
	{name: "an erasure of what a policy said", log: details("erased", func(d *store.ErasedDetails) { d.Entries, d.Sensitivity, d.Kept = []int64{0}, "", store.Duration(day) }), kind: KindErasure, at: "erased"},
	{name: "an erasure of another sensitivity", log: details("erased", func(d *store.ErasedDetails) { d.Entries, d.Sensitivity = []int64{23}, "low" }), kind: KindErasure, at: "erased"},
	{name: "an erasure of what comes later", log: details("erased", func(d *store.ErasedDetails) { d.Entries = append(d.Entries, 5000) }), kind: KindErasure, at: "erased"},
	{name: "a fake erasure, with the text still there", log: func(s *scribe) {
		s.after["erased"] = func(s *scribe) { delete(s.lost, s.index["a0 requested"]) }
	}, kind: KindErasedText, at: "a0 requested"},
	{name: "a text lost without erasure", log: then("5 asked", func(s *scribe) { s.lost[s.index["5 asked"]] = true }), kind: KindTextMissing, at: "5 asked"},
	{name: "a request and a mint under a freeze", log: details("freeze", func(d *store.FreezeDetails) { d.Run = "r-5" }), kind: KindOrder, at: "5 requested"},
	{name: "a request under a freeze that was set before the window", v: view{from: "f requested"}, log: leave("thaw"), kind: KindOrder, at: "f requested"},
	{name: "a mint under a freeze of everything", log: details("freeze", func(d *store.FreezeDetails) { *d = store.FreezeDetails{All: true} }), kind: KindOrder, at: "5 requested"},
	{name: "a mint begun under a freeze", v: part, log: then("5 decided", func(s *scribe) { s.freeze("late", "user:ana", store.FreezeDetails{Step: "s5"}) }), kind: KindOrder, at: "5 issuing"},
	{name: "a freeze lifted by who set it", log: lie("thaw", func(e *store.Submission) {
		e.Person = store.Ptr(store.PrivacyKey(make([]byte, 32)).Pseudonym("user:ana"))
		e.Seal(store.SealedPerson, "user:ana")
	}), kind: KindOrder, at: "thaw"},
	{name: "a freeze lifted that nobody set", v: part, log: details("thaw", func(d *store.FreezeLiftedDetails) { d.Freeze = store.NewID() }), kind: KindOrder, at: "thaw"},
	{name: "a freeze lifted twice", log: then("thaw", func(s *scribe) { s.thaw("again", "user:cem", s.ids["freeze"]) }), kind: KindOrder, at: "again"},
	{name: "a freeze by nobody", log: lie("freeze", func(e *store.Submission) { e.Person = nil }), kind: KindOrder, at: "freeze"},
	{name: "a freeze lifted by nobody", log: lie("thaw", func(e *store.Submission) { e.Person = nil }), kind: KindOrder, at: "thaw"},
	{name: "a freeze of nothing", log: details("freeze", func(d *store.FreezeDetails) { *d = store.FreezeDetails{} }), kind: KindOrder, at: "freeze"},
	{name: "a hold lifted that nobody placed", log: details("lifted", func(d *store.HoldLiftedDetails) { d.Hold = store.NewID() }), kind: KindHold, at: "lifted"},
	{name: "a hold lifted twice", log: then("lifted", func(s *scribe) { s.lift("again", s.ids["hold"]) }), kind: KindHold, at: "again"},
	{name: "a hold over nothing", log: details("hold", func(d *store.HoldDetails) { d.Run = "" }), kind: KindHold, at: "hold"},
	{name: "an export of another window on record", log: details("export", func(d *store.ExportDetails) { d.To = 7 }), kind: KindExport, at: "export"},
	{name: "an export of another format on record", log: details("export", func(d *store.ExportDetails) { d.Format = "csv" }), kind: KindExport, at: "export"},
}

// checkPy is the Python of VERIFY.md, in a file.
func checkPy(t testing.TB) string {
	t.Helper()
	_, rest, ok := strings.Cut(verifyText, "```python\n")
	code, _, ok2 := strings.Cut(rest, "```\n")
	if !ok || !ok2 {
		t.Fatal("VERIFY.md has no Python")
	}
	path := filepath.Join(t.TempDir(), "check.py")
	if err := os.WriteFile(path, []byte(code), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// python runs it, and returns what it says on success.
func python(t testing.TB, check, bundle, vkey string) (string, bool) {
	t.Helper()
	key := filepath.Join(t.TempDir(), "log.pub")
	if err := os.WriteFile(key, []byte(vkey+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "python3", check, bundle, key).CombinedOutput()
	return string(out), err == nil
}

// pythons runs it over many bundles, in one process, and returns those in which it
// finds nothing. Each line of bundles is a bundle and a file with the log's key,
// with a tab between them.
func pythons(t testing.TB, check string, bundles []string) (passed []string) {
	t.Helper()
	const driver = `
import contextlib, io, sys
code = compile(open(sys.argv[1]).read(), "check.py", "exec")
for line in sys.stdin.read().splitlines():
    sys.argv = ["check.py", *line.split("\t")]
    try:
        with contextlib.redirect_stdout(io.StringIO()): exec(code, {"__name__": "__main__"})
        print("passed", line)
    except BaseException: print("refused", line)
`
	cmd := exec.CommandContext(t.Context(), "python3", "-c", driver, check)
	cmd.Stdin = strings.NewReader(strings.Join(bundles, "\n"))
	out, err := cmd.Output()
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if err != nil || len(lines) != len(bundles) {
		t.Fatalf("%v: %d answers about %d bundles", err, len(lines), len(bundles))
	}
	for _, l := range lines {
		if bundle, ok := strings.CutPrefix(l, "passed "); ok {
			passed = append(passed, bundle)
		}
	}
	return passed
}

func havePython(t *testing.T) bool {
	_, err := exec.LookPath("python3")
	if err != nil && os.Getenv("CI") != "" {
		t.Fatal("python3 is due in CI")
	}
	return err == nil
}

func TestEveryTamperingIsFoundAndNamed(t *testing.T) {
	if len(tamperings) < 50 {
		t.Fatalf("%d kinds of tampering, 50 are due", len(tamperings))
	}
	snakes := havePython(t)
	check := checkPy(t)
	type base struct {
		s *scribe
		p *parcel
	}
	bases := map[string]base{}
	dir := t.TempDir()
	var bent []string // for the Python check, whose start takes longer than the check
	snake := func(name string, raw []byte, vkey string) {
		file := filepath.Join(dir, strconv.Itoa(len(bent))+" "+strings.ReplaceAll(name, "/", " "))
		for ext, b := range map[string][]byte{".zip": raw, ".pub": []byte(vkey + "\n")} {
			if err := os.WriteFile(file+ext, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		bent = append(bent, file+".zip\t"+file+".pub")
	}
	for _, x := range tamperings {
		t.Run(x.name, func(t *testing.T) {
			var s *scribe
			var p *parcel
			if x.log != nil {
				s = newScribe(t)
				x.log(s)
				p = s.write().export(x.v)
			} else {
				key := fmt.Sprint(x.v)
				if bases[key].p == nil {
					s := newScribe(t).write()
					bases[key] = base{s, s.export(x.v)}
				}
				own := *bases[key].s
				s = &own
				p = bases[key].p.clone()
			}
			s.t, p.t, p.scribe = t, t, s
			if x.bend != nil {
				x.bend(p)
			}
			variants := map[string][]byte{"as it is": p.zip()}
			if x.fit != nil {
				x.fit(p)
				variants["made to fit"] = p.zip()
			}
			if x.raw != nil {
				variants = map[string][]byte{"as it is": x.raw(p.zip())}
			}
			want := Finding{Index: NoIndex, Kind: x.kind}
			switch at := x.at.(type) {
			case int:
				want.Index = int64(at)
			case string:
				index, ok := s.index[at]
				if !ok {
					t.Fatalf("no entry %q", at)
				}
				want.Index = index
			}
			for name, raw := range variants {
				path := save(t, raw)
				r := bundleReport(t, path, s.options())
				if !slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.Kind == want.Kind && f.Index == want.Index }) {
					t.Errorf("%s: no finding %s at %d among %v", name, want.Kind, want.Index, r.Findings)
				}
				if snakes && x.python && (name == "made to fit" || len(variants) == 1) {
					snake(x.name, raw, s.vkey)
				}
			}
		})
	}
	if !snakes || len(bent) == 0 {
		return
	}
	s := newScribe(t).write()
	snake("untouched", s.export(view{}).zip(), s.vkey)
	if passed := pythons(t, check, bent); len(passed) != 1 || passed[0] != bent[len(bent)-1] {
		t.Errorf("the Python check passes %q, and is to pass the last alone", passed)
	}
}

func TestThePythonOfVerifyMDAgreesOnUntouchedBundles(t *testing.T) {
	if !havePython(t) {
		t.Skip("no python3")
	}
	check := checkPy(t)
	for _, v := range []view{{}, part, ofRun2} {
		s := newScribe(t).write()
		if out, ok := python(t, check, save(t, s.export(v).zip()), s.vkey); !ok || !strings.HasPrefix(out, "verified") {
			t.Errorf("%+v: %s", v, out)
		}
	}
}

// The commands of VERIFY.md, as they stand there.
func TestTheCommandsOfVerifyMDWorkAndFindWhatTheyCover(t *testing.T) {
	for _, tool := range []string{"sh", "unzip", "jq", "sha256sum", "openssl"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("no %s", tool)
		}
	}
	parts := strings.Split(verifyText, "```sh\n")
	if len(parts) != 3 {
		t.Fatalf("%d blocks of shell commands in VERIFY.md, want 2", len(parts)-1)
	}
	run := func(raw []byte, vkey string) (string, error) {
		dir := t.TempDir()
		script := "set -e\n"
		for _, p := range parts[1:] {
			code, _, _ := strings.Cut(p, "```\n")
			script += strings.ReplaceAll(code, "cat log.pub", "cat ../log.pub")
		}
		for name, b := range map[string][]byte{"bundle.zip": raw, "log.pub": []byte(vkey + "\n"), "run.sh": []byte(script)} {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		cmd := exec.CommandContext(t.Context(), "sh", "run.sh")
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	s := newScribe(t).write()
	p := s.export(view{})
	if out, err := run(p.zip(), s.vkey); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	edited := p.clone()
	edited.swap(memberApprovals, "seen it", "seen all")
	if out, err := run(edited.zip(), s.vkey); err == nil {
		t.Errorf("an edited table passes: %s", out)
	}
	if out, err := run(p.zip(), newScribe(t).vkey); err == nil {
		t.Errorf("another key passes: %s", out)
	}
}
