package guard

// maxDigits is how many digits an integer has at most that surely fits in 31
// bits: a longer one is another token to PostgreSQL's grammar (FCONST).
const maxDigits = 9

// shape is sql with every integer that is compared by "=" replaced by 0, appended
// to buf: what a client sends again and again with other keys has one shape. Its
// tree is that of sql but for the values of these constants, at which no rule
// looks. It is nil unless the text is so plain that this is seen without a lexer:
// no quotes, comments, dollars, other operators or casts, and nothing but ASCII.
func shape(buf []byte, sql string) []byte {
	if len(sql) > unscanned || len(sql) > cachedText {
		return nil
	}
	last := byte(' ')   // the last that is no space
	before := byte(' ') // the one before it, space or not
	for i := 0; i < len(sql); i++ {
		c := sql[i]
		switch {
		case c == ' ', c == '\t', c == '\n', c == '\r':
			buf = append(buf, c)
			continue
		case '0' <= c && c <= '9' && last == '=' && (word(before) || space(before) || before == ')'):
			n := i
			for n < len(sql) && '0' <= sql[n] && sql[n] <= '9' {
				n++
			}
			if n-i <= maxDigits && (n == len(sql) || space(sql[n]) || sql[n] == ';' || sql[n] == ')') {
				buf = append(buf, '0')
			} else {
				buf = append(buf, sql[i:n]...)
			}
			i, last, before = n-1, '0', '0'
			continue
		case word(c), c == '.', c == ',', c == '(', c == ')', c == '*', c == ';', c == '=':
		default:
			return nil
		}
		if before = ' '; i > 0 {
			before = sql[i-1]
		}
		last = c
		buf = append(buf, c)
	}
	return buf
}

func word(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '_'
}

func space(c byte) bool { return c == ' ' || c == '\t' || c == '\n' || c == '\r' }

// shaped reports whether v is the verdict on every text of its shape: one SELECT
// that is let through. What is refused is told with a place in the text, and what
// other statements set are values.
func (v *Verdict) shaped() bool {
	return v.Refused == "" && len(v.Statements) == 1 && v.Statements[0].Kind == "SELECT"
}
