package record

import (
	"bytes"
	"testing"
)

func FuzzSplit(f *testing.F) {
	f.Add([]byte("{}\n{}\n"))
	f.Add([]byte("{}"))
	f.Add([]byte("\n"))
	f.Add([]byte("{}\n\n{}"))
	f.Add([]byte("{}\r\n \n"))
	f.Fuzz(func(t *testing.T, body []byte) {
		lines, err := split(body)
		if err != nil {
			return
		}
		if len(lines) < 1 || len(lines) > MaxLines {
			t.Fatalf("%d lines", len(lines))
		}
		for _, l := range lines {
			if len(l) == 0 || bytes.ContainsRune(l, '\n') {
				t.Fatalf("line %q", l)
			}
		}
		if !bytes.Equal(bytes.Join(lines, []byte("\n")), bytes.TrimSuffix(body, []byte("\n"))) {
			t.Fatal("the lines are not the body")
		}
	})
}

func FuzzSize(f *testing.F) {
	f.Add("0")
	f.Add("-1")
	f.Add("00")
	f.Add("9223372036854775808")
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := size(s, "n"); err == nil && n < 0 {
			t.Fatal(n)
		}
	})
}
