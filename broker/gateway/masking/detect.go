package masking

import (
	"bytes"
	"math"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A detector appends what it finds in a text. It takes time in proportion to
// the text: whatever looks ahead or back does so within a bound, or never over
// the same bytes more than a fixed number of times. docs/masking.md says what
// each catches and misses; TestDetectors reads its tables.
type detector func(text []byte, found spans) spans

var detectors = map[string]detector{
	"email":   email,
	"card":    card,
	"iban":    iban,
	"phone":   phone,
	"secret":  secret,
	"entropy": entropy,
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }
func isUpper(c byte) bool { return 'A' <= c && c <= 'Z' }
func isLower(c byte) bool { return 'a' <= c && c <= 'z' }
func isAlnum(c byte) bool { return isDigit(c) || isUpper(c) || isLower(c) }

// email finds addresses (RFC 5321, section 4.1.2, with the letters of RFC
// 6531): around each @, or %40 as in URLs, as much of a local part as there is,
// and a domain of at least two labels, or an address literal.
func email(b []byte, found spans) spans {
	floor := 0                           // what is before it belongs to the @ before
	sign := bytes.IndexByte(b, '@')      // the next one; -1: none is left
	encoded := bytes.Index(b, atEncoded) // likewise
	for sign >= 0 || encoded >= 0 {
		at, after := sign, sign+1
		if sign < 0 || encoded >= 0 && encoded < sign {
			at, after = encoded, encoded+len(atEncoded)
		}
		if from := local(b, floor, at); from < at {
			if end := domain(b, after); end > after {
				found = append(found, span{from, end})
			}
		}
		floor = after
		if at == sign {
			sign = bytes.IndexByte(b[after:], '@')
			if sign >= 0 {
				sign += after
			}
		} else {
			encoded = bytes.Index(b[after:], atEncoded)
			if encoded >= 0 {
				encoded += after
			}
		}
	}
	return found
}

var atEncoded = []byte("%40")

// maxQuoted is the longest quoted local part that is looked for: 64 octets
// (RFC 5321, section 4.5.3.1.1) and its quotes.
const maxQuoted = 66

// local returns where the local part before at begins, not before floor, and at
// where there is none.
func local(b []byte, floor, at int) int {
	if at > floor && b[at-1] == '"' {
		for i := at - 2; i >= floor && i >= at-maxQuoted; i-- {
			if b[i] == '"' && (i == 0 || b[i-1] != '\\') {
				return i
			}
		}
		return at
	}
	from, told := at, false // told: there is more than marks
	for from > floor {
		if c := b[from-1]; c < utf8.RuneSelf {
			// atext of RFC 5322, without {|} that delimit elsewhere more often
			// than they stand in an address.
			if !isAlnum(c) && strings.IndexByte("!#$%&'*+-/=?^_`~.", c) < 0 {
				break
			}
			told = told || isAlnum(c) || c == '_'
			from--
			continue
		}
		r, n := utf8.DecodeLastRune(b[floor:from])
		if r == utf8.RuneError || !unicode.In(r, unicode.Letter, unicode.Digit, unicode.Mark) {
			break
		}
		from, told = from-n, true
	}
	if !told {
		return at
	}
	return from
}

// domain returns where the domain that begins at i ends, and i where none does:
// labels of letters, digits and hyphens, at least two, the last one of at least
// two letters (or an A-label), or [address].
func domain(b []byte, i int) int {
	if i < len(b) && b[i] == '[' {
		for j := i + 1; j < len(b) && j < i+64; j++ {
			if c := b[j]; c == ']' && j > i+3 {
				return j + 1
			} else if !isHex(c) && c != '.' && c != ':' && c != 'I' && c != 'P' && c != 'v' {
				break
			}
		}
		return i
	}
	best, labels, start, letters := i, 0, i, 0
	for j := i; ; {
		r, n := rune(-1), 0
		if j < len(b) {
			r, n = utf8.DecodeRune(b[j:])
		}
		switch {
		case r == '-' || '0' <= r && r <= '9':
			j += n
			continue
		case r != utf8.RuneError && r >= 0 && unicode.In(r, unicode.Letter, unicode.Mark):
			letters++
			j += n
			continue
		}
		// A label ends. Longer names than RFC 1035 allows are taken too.
		if j > start {
			if labels++; labels > 1 && letters > 1 {
				best = j
			}
		}
		if r != '.' || j == start {
			break
		}
		j += n
		start, letters = j, 0
	}
	for best > i && b[best-1] == '-' {
		best--
	}
	return best
}

// issuers are what card numbers begin with and how long they are then (ISO/IEC
// 7812-1, as the schemes publish their ranges).
var issuers = []struct{ from, to, digits, min, max int }{
	{2200, 2204, 4, 16, 19}, // Mir
	{2221, 2720, 4, 16, 16}, // Mastercard
	{300, 305, 3, 14, 19},   // Diners Club
	{3095, 3095, 4, 14, 19},
	{34, 34, 2, 15, 15}, // American Express
	{37, 37, 2, 15, 15},
	{3528, 3589, 4, 16, 19}, // JCB
	{36, 36, 2, 14, 19},     // Diners Club
	{38, 39, 2, 14, 19},
	{4, 4, 1, 13, 13}, // Visa
	{4, 4, 1, 16, 16},
	{4, 4, 1, 19, 19},
	{50, 50, 2, 13, 19}, // Maestro, RuPay
	{51, 55, 2, 16, 16}, // Mastercard
	{56, 58, 2, 13, 19}, // Maestro
	{60, 69, 2, 13, 19}, // Discover, Maestro, RuPay, UnionPay
	{81, 82, 2, 16, 19}, // UnionPay, RuPay
}

// card finds payment card numbers: 13 to 19 digits in one piece, or in groups
// with one space or hyphen between them, that begin as an issuer's do and whose
// check digit is right (ISO/IEC 7812-1, annex B: Luhn).
func card(b []byte, found spans) spans {
	if len(b) < 13 {
		return found
	}
	for i := 0; i < len(b); {
		if !isDigit(b[i]) {
			i++
			continue
		}
		group := i
		for i < len(b) && isDigit(b[i]) {
			i++
		}
		// The fraction of a decimal number is none.
		if group > 1 && b[group-1] == '.' && isDigit(b[group-2]) {
			continue
		}
		if end := cardAt(b, group, i); end > 0 {
			found = append(found, span{group, end})
			i = end
		}
	}
	return found
}

// cardAt returns where the card number that begins with the digits from to end
// ends, or 0. It looks at no more than 19 digits and 4 separators.
func cardAt(b []byte, from, end int) int {
	var number [19]byte
	n, sepLen, best := 0, 0, 0
	var sep byte
	for groups := 1; groups <= 5 && n+end-from <= len(number); groups++ {
		n += copy(number[n:], b[from:end])
		if n >= 13 && issued(number[:n]) && luhn(number[:n]) {
			best = end
		}
		// Only the last of several groups may have fewer than three digits.
		if end-from < 3 || end == len(b) {
			break
		}
		s, l := separator(b[end:])
		if l == 0 || groups > 1 && (s != sep || l != sepLen) {
			break
		}
		sep, sepLen = s, l
		from = end + l
		end = from
		for end < len(b) && end-from < len(number) && isDigit(b[end]) {
			end++
		}
		if end == from || end < len(b) && isDigit(b[end]) {
			break
		}
	}
	return best
}

// separator returns what groups of digits are set apart by, and its length: a
// space, a no-break space, or a hyphen.
func separator(b []byte) (sep byte, length int) {
	switch {
	case len(b) == 0:
	case b[0] == ' ' || b[0] == '-':
		return b[0], 1
	case len(b) > 1 && b[0] == 0xC2 && b[1] == 0xA0:
		return ' ', 2
	case len(b) > 2 && b[0] == 0xE2 && b[1] == 0x80 && (b[2] == 0xAF || b[2] == 0x91): // U+202F, U+2011
		return ' ', 3
	}
	return 0, 0
}

func issued(number []byte) bool {
	for _, r := range issuers {
		prefix := 0
		for _, c := range number[:r.digits] {
			prefix = prefix*10 + int(c-'0')
		}
		if r.from <= prefix && prefix <= r.to && r.min <= len(number) && len(number) <= r.max {
			return true
		}
	}
	return false
}

func luhn(number []byte) bool {
	sum := 0
	for i, c := range number {
		d := int(c - '0')
		if (len(number)-i)%2 == 0 {
			if d *= 2; d > 9 {
				d -= 9
			}
		}
		sum += d
	}
	return sum%10 == 0
}

// ibanLength is how long each country's are (SWIFT, IBAN Registry, release 99).
var ibanLength = map[string]int{
	"AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BI": 27, "BR": 29, "BY": 28,
	"CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DJ": 27, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
	"FK": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HN": 28, "HR": 21, "HU": 28,
	"IE": 22, "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
	"LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MN": 20, "MR": 27, "MT": 31, "MU": 30, "NI": 28,
	"NL": 18, "NO": 15, "OM": 23, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "RU": 33, "SA": 24,
	"SC": 31, "SD": 18, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "SO": 23, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26,
	"UA": 29, "VA": 22, "VG": 24, "XK": 20, "YE": 30,
}

// iban finds international bank account numbers (ISO 13616-1): country, check
// digits and as many characters as the country has, in one piece or in groups
// of four, with the right check digits (mod 97).
func iban(b []byte, found spans) spans {
	if len(b) < 15 {
		return found
	}
	for i := 0; i+4 <= len(b); i++ {
		if !isDigit(b[i+2]) || !isDigit(b[i+3]) || !isAlpha(b[i]) || !isAlpha(b[i+1]) || i > 0 && isAlnum(b[i-1]) {
			continue
		}
		want := ibanLength[string([]byte{upper(b[i]), upper(b[i+1])})]
		if want == 0 {
			continue
		}
		// It is read once for its length, and once more for its sum, rotated.
		var number [34]byte
		n, grouped, j := 0, false, i
		for j < len(b) && n < want {
			if isAlnum(b[j]) {
				number[n] = upper(b[j])
				n++
				j++
				continue
			}
			_, l := separator(b[j:])
			if l == 0 || n%4 != 0 || n > 4 && !grouped {
				break
			}
			grouped = true
			j += l
		}
		if n != want || j < len(b) && isAlnum(b[j]) || mod97(number[:n]) != 1 {
			continue
		}
		found = append(found, span{i, j})
		i = j - 1
	}
	return found
}

func isAlpha(c byte) bool { return isUpper(c) || isLower(c) }

func upper(c byte) byte {
	if isLower(c) {
		c -= 'a' - 'A'
	}
	return c
}

// mod97 is the remainder of ISO/IEC 7064 over number, its first four characters
// moved to its end.
func mod97(number []byte) int {
	sum := 0
	for i := range number {
		c := number[(i+4)%len(number)]
		if isDigit(c) {
			sum = (sum*10 + int(c-'0')) % 97
		} else {
			sum = (sum*100 + int(c-'A') + 10) % 97
		}
	}
	return sum
}

// phone finds telephone numbers: international ones that begin with + (ITU-T
// E.164: at most 15 digits), or with 00 where they are in groups, and national
// ones in groups: North American ones, and those with a trunk 0. Numbers in one
// piece without + are not told from others.
func phone(b []byte, found spans) spans {
	if len(b) < 9 {
		return found
	}
	for i := 0; i < len(b); {
		c := b[i]
		if c != '+' && c != '(' && !isDigit(c) {
			i++
			continue
		}
		if i > 0 && (isAlnum(b[i-1]) || c != '+' && i > 1 && isDigit(b[i-2]) && strings.IndexByte(".,:-/ ", b[i-1]) >= 0) {
			i = pastDigits(b, i)
			continue
		}
		if end := phoneAt(b, i); end > i {
			found = append(found, span{i, end})
			i = end
			continue
		}
		i = pastDigits(b, i)
	}
	return found
}

// pastDigits returns the end of the digits at i, and i+1 where there is none.
func pastDigits(b []byte, i int) int {
	i++
	for i < len(b) && isDigit(b[i]) && isDigit(b[i-1]) {
		i++
	}
	return i
}

// phoneAt returns where the number that begins at i ends, or i. It looks at no
// more than 16 groups.
func phoneAt(b []byte, i int) int {
	var (
		digits  [16]byte
		n       int
		lengths [16]int // digits of each group
		ends    [16]int // where each group ends, and its closing parenthesis
		groups  int
		open    bool
		j       = i
	)
	plus := b[j] == '+'
	if plus {
		j++
	}
	for groups < len(lengths) {
		if j < len(b) && b[j] == '(' && !open {
			open = true
			j++
		}
		from := j
		for j < len(b) && isDigit(b[j]) {
			if n < len(digits) {
				digits[n] = b[j]
			}
			n++
			j++
		}
		if j == from {
			break
		}
		if n > 15 {
			break
		}
		if open && j < len(b) && b[j] == ')' {
			open = false
			j++
		}
		lengths[groups], ends[groups] = n, j
		groups++
		// Between groups: one mark, or one and a space, or only a parenthesis.
		k := j
		if k < len(b) && (b[k] == '.' || b[k] == '/') {
			k++
		} else if _, l := separator(b[k:]); l > 0 {
			k += l
		}
		if _, l := separator(b[k:]); l > 0 && k > j {
			k += l
		}
		if k < len(b) && (isDigit(b[k]) && (k > j || b[j-1] == ')') || b[k] == '(' && !open) {
			j = k
			continue
		}
		break
	}
	if groups == 0 || open {
		return i
	}
	word := func(end int) bool { // nothing that goes on with it
		return end == len(b) || !isAlnum(b[end]) && (b[end] != ':' || end+1 == len(b) || !isDigit(b[end+1]))
	}
	size := func(g int) int {
		if g == 0 {
			return lengths[0]
		}
		return lengths[g] - lengths[g-1]
	}
	if plus {
		if digits[0] == '0' {
			return i
		}
		for g := groups - 1; g >= 0; g-- {
			if lengths[g] >= 8 && lengths[g] <= 15 && (g < groups-1 || word(ends[g])) {
				return ends[g]
			}
		}
		return i
	}
	if groups < 2 {
		return i
	}
	last := groups - 1
	if !word(ends[last]) {
		return i
	}
	north := func(at int) bool { // area and exchange of the North American plan
		return digits[at] >= '2' && digits[at+3] >= '2'
	}
	switch {
	case groups == 3 && size(0) == 3 && size(1) == 3 && size(2) == 4 && north(0),
		groups == 4 && size(0) == 1 && digits[0] == '1' && size(1) == 3 && size(2) == 3 && size(3) == 4 && north(1):
		return ends[last]
	}
	if digits[0] != '0' {
		return i
	}
	n = lengths[last]
	if n > 2 && digits[1] == '0' {
		if digits[2] != '0' && n >= 10 && n <= 15 {
			return ends[last]
		}
		return i
	}
	if n < 9 || n > 12 || groups > 6 {
		return i
	}
	for g := range groups {
		if size(g) < 2 {
			return i
		}
	}
	if groups > 2 && size(0) == 2 && size(1) == 2 && size(2) == 4 { // a date
		return i
	}
	return ends[last]
}

func isHex(c byte) bool { return isDigit(c) || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F' }

// entropy finds words that look random. A word is made of the characters of
// base64 and base64url, and ends in at most two =. What is hexadecimal and of
// one case is judged as such from 32 characters on, by a Shannon entropy of at
// least 3 bits a character (random: 3.6 at 32, at most 4); all else from 24 on,
// if it has upper case, lower case and digits, by at least 85% of what so many
// characters can have at most, 4.5 bits from 40 characters on (random base64:
// 4.2 at 24, 5.2 at 64; English words joined: below 4). A UUID is none.
func entropy(b []byte, found spans) spans {
	if len(b) < 24 {
		return found
	}
	for i := 0; i < len(b); {
		if !words[b[i]] {
			i++
			continue
		}
		from := i
		for i < len(b) && words[b[i]] {
			i++
		}
		n := i - from
		if n < 24 {
			continue
		}
		var counts [256]int32
		var lowers, uppers, digits, hex int
		for _, c := range b[from:i] {
			counts[c]++
			switch {
			case isDigit(c):
				digits++
			case isLower(c):
				lowers++
			case isUpper(c):
				uppers++
			}
			if isHex(c) {
				hex++
			}
		}
		var min float64
		switch {
		case isUUID(b[from:i]):
			continue
		case hex == n && (lowers == 0) != (uppers == 0):
			if n < 32 || digits == 0 {
				continue
			}
			min = 3
		case lowers > 0 && uppers > 0 && digits > 0:
			min = math.Min(4.5, 0.85*math.Log2(float64(n)))
		default:
			continue
		}
		var bits float64
		for _, c := range counts {
			if c > 0 {
				p := float64(c) / float64(n)
				bits -= p * math.Log2(p)
			}
		}
		if bits < min {
			continue
		}
		end := i
		for end < len(b) && b[end] == '=' && end < i+2 {
			end++
		}
		found = append(found, span{from, end})
		i = end
	}
	return found
}

var words = alnums.with("+/-_")

// isUUID reports whether w has the form of RFC 9562, section 4.
func isUUID(w []byte) bool {
	if len(w) != 36 {
		return false
	}
	for i, c := range w {
		if i == 8 || i == 13 || i == 18 || i == 23 {
			if c != '-' {
				return false
			}
		} else if !isHex(c) {
			return false
		}
	}
	return true
}
