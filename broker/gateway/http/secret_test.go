package http

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"math/rand/v2"
	"strings"
	"testing"
)

// FuzzRedactor holds that however a stream is cut, no secret is left in it, its
// length stays, and all else stays as it was.
func FuzzRedactor(f *testing.F) {
	f.Add([]byte("it is key/8d41c7+real&more and key/8d41"), uint64(1))
	f.Add([]byte("key/key/8d41c7+real&morekey/8d41c7+real&more"), uint64(2))
	f.Add([]byte("aaaaaaaaaaaaab"), uint64(3))
	f.Fuzz(func(t *testing.T, in []byte, seed uint64) {
		values := []string{apiKey, "aaaaaab", "abcabcabd", "cabdkey/"}
		s := newSecrets(values)
		rnd := rand.New(rand.NewPCG(seed, 1))
		// Secrets stand where chance would not put them.
		if rnd.IntN(2) == 0 {
			at := rnd.IntN(len(in) + 1)
			v := values[rnd.IntN(len(values))]
			in = append(append(append([]byte(nil), in[:at]...), v...), in[at:]...)
		}
		r := redactor{s: s}
		var out []byte
		for rest := in; len(rest) > 0; {
			n := 1 + rnd.IntN(len(rest))
			out = append(out, r.add(rest[:n])...)
			rest = rest[n:]
		}
		out = append(out, r.end()...)
		want := append([]byte(nil), in...)
		for v := range s.each() {
			for i := 0; i+len(v) <= len(in); i++ {
				if string(in[i:i+len(v)]) == v {
					copy(want[i:], strings.Repeat("*", len(v)))
				}
			}
		}
		if !bytes.Equal(out, want) {
			t.Fatalf("%q became %q, not %q", in, out, want)
		}
	})
}

func TestASecretIsFoundHoweverATargetWritesIt(t *testing.T) {
	s := newSecrets([]string{apiKey})
	quoted, err := json.Marshal(map[string]string{"k": apiKey})
	ok(t, err)
	for _, text := range []string{apiKey, "Bearer " + apiKey, string(quoted), "key%2F8d41c7%2Breal%26more", "key%2f8d41c7%2breal%26more", "key/8d41c7+real&amp;more", `key\/8d41c7+real&more`, "6b65792f38643431"} {
		if out, _ := s.text(text); strings.Contains(out, "8d41c7") {
			t.Errorf("%q stays %q", text, out)
		}
	}
	for _, before := range []string{"", "u:", "u", "user:", "xyz{"} {
		for _, enc := range []*base64.Encoding{base64.StdEncoding, base64.URLEncoding, base64.RawStdEncoding} {
			b := enc.EncodeToString([]byte(before + apiKey + "}"))
			out, n := s.text(b)
			plain, _ := enc.DecodeString(strings.ReplaceAll(out, "*", "A"))
			if n == 0 || bytes.Contains(plain, []byte("8d41c7")) {
				t.Errorf("%q stays %q", b, out)
			}
		}
	}
	if newSecrets([]string{"short"}) != nil {
		t.Error("what stands in texts by chance is looked for")
	}
}

func BenchmarkRedactor(b *testing.B) {
	s := newSecrets([]string{apiKey})
	data := bytes.Repeat([]byte("the quick brown fox jumps over the lazy dog. "), 1000)
	b.SetBytes(int64(len(data)))
	r := redactor{s: s}
	for b.Loop() {
		r.add(data)
	}
}
