package masking

import (
	"encoding/base64"
	"math/rand/v2"
)

// random is the same at every run, so that shares measured with it are too.
type random struct{ *rand.ChaCha8 }

func newRandom() random { return random{rand.NewChaCha8([32]byte{1})} }

func (r random) bytes(n int) []byte {
	b := make([]byte, n)
	_, _ = r.Read(b)
	return b
}

func (r random) base64(n int) string { return base64.StdEncoding.EncodeToString(r.bytes(n)) }
