package witness

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/tlog"
)

// MaxBody is the largest body of POST /add-checkpoint in bytes: 63 lines of
// proof are under 3 KiB, the rest is the checkpoint and its signatures.
const MaxBody = 16 << 10

// maxProof is how many lines of proof a client may send (C2SP tlog-witness,
// "add-checkpoint").
const maxProof = 63

// request is the body of POST /add-checkpoint.
type request struct {
	old        int64
	proof      tlog.TreeProof
	checkpoint torchwood.Checkpoint // as it reads; its signatures are not checked yet
	note       string               // the signed checkpoint
}

var errMalformed = errors.New("malformed request")

// parseRequest reads a body. Errors wrap errMalformed.
func parseRequest(body []byte) (*request, error) {
	head, signed, ok := bytes.Cut(body, []byte("\n\n"))
	if !ok {
		return nil, fmt.Errorf("%w: no empty line before the checkpoint", errMalformed)
	}
	lines := strings.Split(string(head), "\n")
	size, ok := strings.CutPrefix(lines[0], "old ")
	if !ok {
		return nil, fmt.Errorf("%w: the first line is not the old size", errMalformed)
	}
	r := &request{note: string(signed)}
	if r.old, ok = parseSize(size); !ok {
		return nil, fmt.Errorf("%w: the old size is no decimal number", errMalformed)
	}
	if len(lines)-1 > maxProof {
		return nil, fmt.Errorf("%w: more than %d lines of proof", errMalformed, maxProof)
	}
	for _, line := range lines[1:] {
		h, err := tlog.ParseHash(line)
		if err != nil || h.String() != line {
			return nil, fmt.Errorf("%w: a line of the proof is no hash in base64", errMalformed)
		}
		r.proof = append(r.proof, h)
	}
	i := strings.LastIndex(r.note, "\n\n")
	if i < 0 {
		return nil, fmt.Errorf("%w: the checkpoint is no signed note", errMalformed)
	}
	var err error
	if r.checkpoint, err = torchwood.ParseCheckpoint(r.note[:i+1]); err != nil {
		return nil, fmt.Errorf("%w: %w", errMalformed, err)
	}
	return r, nil
}

// marshal is the inverse of parseRequest.
func (r *request) marshal() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "old %d\n", r.old)
	for _, h := range r.proof {
		b.WriteString(h.String() + "\n")
	}
	b.WriteString("\n" + r.note)
	return b.Bytes()
}

// parseSize reads a tree size in its one canonical form.
func parseSize(s string) (int64, bool) {
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil && n >= 0 && strconv.FormatInt(n, 10) == s
}
