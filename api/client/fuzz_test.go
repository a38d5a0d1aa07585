package client

import (
	"bufio"
	"bytes"
	"testing"

	"github.com/go-json-experiment/json"
)

func FuzzAck(f *testing.F) {
	f.Add([]byte(`{"entries":[{"index":0,"leaf":"e30=","proof":[]}],"checkpoint":"x","consistency":["AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="]}` + "\n"))
	f.Add([]byte("\n\n{}\n"))
	f.Add([]byte("{"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bufio.NewReader(bytes.NewReader(b))
		for {
			line, err := readLine(r, 1<<16)
			if err != nil {
				return
			}
			var a Ack
			_ = json.Unmarshal(line, &a)
		}
	})
}
