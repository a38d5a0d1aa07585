package masking

import (
	"bytes"
	"unicode/utf8"
)

// undisguised returns b as it is read by who takes off what does not show: without
// characters of no width and controls, in ASCII what is in its full-width forms
// (Unicode, block U+FF00), in their own what stands as %40 (RFC 3986) or \u0040
// (RFC 8259) and is printable ASCII. at[i] is where in b the byte i of plain came
// from, at[len(plain)] is len(b). It returns nil where that is b itself. One layer
// is taken off, of each kind.
func undisguised(b []byte) (plain []byte, at []int) {
	if !disguises(b) {
		return nil, nil
	}
	plain, at = make([]byte, 0, len(b)), make([]int, 0, len(b)+1)
	for i := 0; i < len(b); {
		c, n := b[i], 1
		keep := true
		switch {
		case c == '%':
			if d, ok := fromHex(b[i+1:], 2); ok {
				c, n = d, 3
			}
		case c == '\\' && i+1 < len(b) && b[i+1] == 'u':
			if d, ok := fromHex(b[i+2:], 4); ok {
				c, n = d, 6
			}
		case c < ' ' && c != '\t' && c != '\n' && c != '\v' && c != '\f' && c != '\r' || c == 0x7F:
			keep = false
		case c >= utf8.RuneSelf:
			var r rune
			r, n = utf8.DecodeRune(b[i:])
			switch {
			case r >= 0xFF01 && r <= 0xFF5E:
				c = byte(r - 0xFF01 + '!')
			case invisible(r):
				keep = false
			default:
				for j := range n {
					plain, at = append(plain, b[i+j]), append(at, i+j)
				}
				i += n
				continue
			}
		}
		if keep {
			plain, at = append(plain, c), append(at, i)
		}
		i += n
	}
	return plain, append(at, len(b))
}

// disguises reports whether there may be anything to take off.
func disguises(b []byte) bool {
	for i, c := range b {
		switch {
		case c == '%':
			if _, ok := fromHex(b[i+1:], 2); ok {
				return true
			}
		case c == '\\' && i+1 < len(b) && b[i+1] == 'u':
			return true
		case c == 0xC2 || c == 0xCD || c == 0xD8 || c == 0xE1 || c == 0xE2 || c == 0xEF || c == 0xF3:
			if r, _ := utf8.DecodeRune(b[i:]); invisible(r) || r >= 0xFF01 && r <= 0xFF5E {
				return true
			}
		case c < ' ' && c != '\t' && c != '\n' && c != '\v' && c != '\f' && c != '\r' || c == 0x7F:
			return true
		}
	}
	return false
}

// invisible reports whether r shows as nothing, wherever it stands (Unicode,
// Default_Ignorable_Code_Point, but for those of Hangul and Khmer), or is a
// control of C1.
func invisible(r rune) bool {
	return r >= 0x80 && r < 0xA0 || r == 0xAD || r == 0x34F || r == 0x61C || r >= 0x180B && r <= 0x180F ||
		r >= 0x200B && r <= 0x200F || r >= 0x202A && r <= 0x202E || r >= 0x2060 && r <= 0x206F ||
		r >= 0xFE00 && r <= 0xFE0F || r == 0xFEFF || r >= 0xE0000 && r <= 0xE0FFF
}

// fromHex returns the printable ASCII character that the first n hexadecimal
// digits of b are the number of.
func fromHex(b []byte, n int) (byte, bool) {
	if len(b) < n {
		return 0, false
	}
	v := 0
	for _, c := range b[:n] {
		d := bytes.IndexByte([]byte("0123456789abcdef"), c|0x20)
		if d < 0 || !isHex(c) {
			return 0, false
		}
		v = v<<4 | d
	}
	return byte(v), v >= ' ' && v < 0x7F
}
