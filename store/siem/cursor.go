package siem

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/go-json-experiment/json"

	"github.com/countersign-dev/countersign/store/durable"
)

// cursor is how far a destination has come: a file of its own beside the
// ledger, replaced as a whole.
type cursor struct {
	path string
	log  string // the log's origin
}

// cursorFile is what the file holds.
type cursorFile struct {
	Log  string `json:"log"`
	Next int64  `json:"next"` // index of the first entry that is not known to be delivered
}

func parseCursor(b []byte) (c cursorFile, err error) {
	if err = json.Unmarshal(b, &c, json.RejectUnknownMembers(true)); err == nil && (c.Log == "" || c.Next < 0) {
		err = errors.New("no log, or a negative index")
	}
	return c, err
}

// read returns the index to go on with; ok is false where there is no file. A
// file that cannot be used is an error: to begin anew would leave out entries,
// or send all again, and which of both is the operator's to say.
func (c *cursor) read(size int64) (next int64, ok bool, err error) {
	f, err := os.Open(c.path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	defer f.Close()
	b := make([]byte, 4096)
	n, _ := f.Read(b)
	at, err := parseCursor(b[:n])
	switch {
	case err != nil:
		return 0, false, fmt.Errorf("%s is no cursor (%w); remove it to begin anew, as since says", c.path, err)
	case at.Log != c.log:
		return 0, false, fmt.Errorf("%s is of the log %q, not %q; remove it to begin anew, as since says", c.path, at.Log, c.log)
	case at.Next > size:
		return 0, false, fmt.Errorf("%s stands at entry %d, and the log has %d: the ledger is older than what was sent", c.path, at.Next, size)
	}
	return at.Next, true, nil
}

// write keeps the index. A crash before it sends again what came since the older
// one.
func (c *cursor) write(next int64) error {
	b, err := json.Marshal(cursorFile{c.log, next})
	if err != nil {
		return err
	}
	return durable.WriteFile(c.path, append(b, '\n'))
}
