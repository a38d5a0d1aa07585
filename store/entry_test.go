package store

import (
	"bytes"
	"testing"
	"time"
)

func TestAWriterAcceptsItsOwnEntryAndNoOther(t *testing.T) {
	for _, seal := range []bool{false, true} {
		s := &Submission{Entry: *entryOf(CredentialUsed, "req_1", map[string]string{"a": "b"})}
		s.WriterTime = At(time.Unix(1_800_000_000, 0))
		if seal {
			s.Seal(SealedReason, `because ,"openings":{}} of "it"`)
		}
		line, err := s.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		submitted, err := ParseSubmission(line)
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := submitted.Stamp("broker-1", At(time.Now()))
		if err != nil {
			t.Fatal(err)
		}
		for i := range leaf {
			bent := bytes.Clone(leaf)
			bent[i] ^= 1
			again := *s
			if err := again.Accept(line, bent); err == nil && again.Writer == "broker-1" && again.Time == submitted.Time {
				t.Fatalf("accepted with byte %d (%q) changed", i, leaf[i])
			}
		}
		if err := s.Accept(line, leaf); err != nil {
			t.Fatal(err)
		}
		if s.Writer != "broker-1" || s.Time != submitted.Time {
			t.Fatalf("stamped with %q and %s", s.Writer, s.Time)
		}
		if err := s.Accept(line, append(leaf[:len(leaf)-1:len(leaf)-1], `,"x":1}`...)); err == nil {
			t.Fatal("a member more was accepted")
		}
	}
}
