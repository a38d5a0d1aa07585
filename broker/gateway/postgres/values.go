package postgres

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgtype"
)

// maxValue is how much of a parameter is recorded, in bytes. Longer ones are
// recorded by length and digest.
const maxValue = 1 << 10

// recordedValues are the parameters of a Bind as they are recorded behind the
// statement, a line each, empty where there are none. types are those that are
// known. It is not ok where the formats are none.
func recordedValues(b *pgproto3.Bind, types []uint32) (string, bool) {
	for _, f := range b.ParameterFormatCodes {
		if f != 0 && f != 1 {
			return "", false
		}
	}
	if n := len(b.ParameterFormatCodes); n > 1 && n != len(b.Parameters) {
		return "", false
	}
	var s strings.Builder
	for i, v := range b.Parameters {
		format := int16(0)
		switch len(b.ParameterFormatCodes) {
		case 0:
		case 1:
			format = b.ParameterFormatCodes[0]
		default:
			format = b.ParameterFormatCodes[i]
		}
		typ := uint32(0)
		if i < len(types) {
			typ = types[i]
		}
		fmt.Fprintf(&s, "\n-- $%d = %s", i+1, recordedValue(v, typ, format == 1))
	}
	return s.String(), true
}

func recordedValue(v []byte, typ uint32, inBinary bool) string {
	switch {
	case v == nil:
		return "NULL"
	case len(v) > maxValue:
		sum := sha256.Sum256(v)
		return fmt.Sprintf("(%d bytes, sha256:%s)", len(v), hex.EncodeToString(sum[:]))
	case inBinary && textual(typ):
	case inBinary:
		if s, ok := readable(typ, v); ok {
			return quoted(s)
		}
		return `\x` + hex.EncodeToString(v)
	}
	if s := printable(v); len(s) == len(v) {
		return quoted(s)
	}
	return `\x` + hex.EncodeToString(v)
}

// quoted is s as a literal on one line of the record.
func quoted(s string) string {
	s = strings.ReplaceAll(s, "'", "''")
	if strings.ContainsAny(s, "\n\r\\") {
		return "E'" + strings.NewReplacer(`\`, `\\`, "\n", `\n`, "\r", `\r`).Replace(s) + "'"
	}
	return "'" + s + "'"
}

// printable is v as text, and in hex where it is none.
func printable(v []byte) string {
	if utf8.Valid(v) && bytes.IndexByte(v, 0) < 0 {
		return string(v)
	}
	return `\x` + hex.EncodeToString(v)
}

// codecs know PostgreSQL's own types. A Map is not safe for concurrent use.
var codecs = struct {
	sync.Mutex
	*pgtype.Map
}{Map: pgtype.NewMap()}

// readable is a value in binary format as text, where its type is known.
func readable(typ uint32, v []byte) (string, bool) {
	codecs.Lock()
	defer codecs.Unlock()
	t, ok := codecs.TypeForOID(typ)
	if !ok {
		return "", false
	}
	value, err := t.Codec.DecodeDatabaseSQLValue(codecs.Map, typ, pgtype.BinaryFormatCode, v)
	if err != nil {
		return "", false
	}
	switch value := value.(type) {
	case int64, float64, bool:
		return fmt.Sprint(value), true
	case time.Time:
		return value.Format(time.RFC3339Nano), true
	case string:
		return value, utf8.ValidString(value) && strings.IndexByte(value, 0) < 0
	case []byte:
		return `\x` + hex.EncodeToString(value), true
	}
	return "", false
}
