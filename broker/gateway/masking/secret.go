package masking

import "bytes"

// shape is how a kind of token is known: by what it begins with, and what
// follows.
type shape struct {
	prefix   string
	chars    *[256]bool // of the rest
	min, max int        // characters of the rest; no maximum where max is 0
	apart    bool       // no letter or digit may stand before it
}

var (
	upperDigits  = set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
	alnums       = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
	underscored  = alnums.with("_")
	base64url    = alnums.with("_-")
	base64dots   = alnums.with("_-.")
	base64chars  = alnums.with("+/=")
	slashed      = alnums.with("/")
	hyphened     = alnums.with("-")
	hexes        = set("0123456789abcdefABCDEF")
	bech32       = set("QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L")
	userinfoEnds = set(" \t\r\n/?#\"'<>\\`")
)

type charset [256]bool

func set(chars string) *charset { return new(charset).with(chars) }

func (c *charset) with(chars string) *charset {
	out := *c
	for i := range len(chars) {
		out[chars[i]] = true
	}
	return &out
}

func (c *charset) plain() *[256]bool { return (*[256]bool)(c) }

// shapes are what the issuers of tokens publish about theirs, so that they can
// be found where they have leaked.
var shapes = []shape{
	{"AKIA", upperDigits.plain(), 16, 16, true}, // AWS: access keys, long-lived and of STS, and unique IDs
	{"ASIA", upperDigits.plain(), 16, 16, true},
	{"ABIA", upperDigits.plain(), 16, 16, true},
	{"ACCA", upperDigits.plain(), 16, 16, true},
	{"ghp_", alnums.plain(), 36, 0, false}, // GitHub
	{"gho_", alnums.plain(), 36, 0, false},
	{"ghu_", alnums.plain(), 36, 0, false},
	{"ghs_", alnums.plain(), 36, 0, false},
	{"ghr_", alnums.plain(), 36, 0, false},
	{"github_pat_", underscored.plain(), 22, 0, false},
	{"glpat-", base64dots.plain(), 20, 0, false}, // GitLab
	{"xoxa-", hyphened.plain(), 10, 0, false},    // Slack
	{"xoxb-", hyphened.plain(), 10, 0, false},    //
	{"xoxc-", hyphened.plain(), 10, 0, false},    //
	{"xoxd-", base64chars.plain(), 10, 0, false}, //
	{"xoxe-", hyphened.plain(), 10, 0, false},    //
	{"xoxe.", base64dots.plain(), 10, 0, false},  //
	{"xoxo-", hyphened.plain(), 10, 0, false},    //
	{"xoxp-", hyphened.plain(), 10, 0, false},    //
	{"xoxr-", hyphened.plain(), 10, 0, false},    //
	{"xoxs-", hyphened.plain(), 10, 0, false},    //
	{"xapp-", hyphened.plain(), 10, 0, false},    //
	{"hooks.slack.com/services/", slashed.plain(), 20, 0, false},
	{"sk_live_", alnums.plain(), 16, 0, false}, // Stripe
	{"sk_test_", alnums.plain(), 16, 0, false},
	{"rk_live_", alnums.plain(), 16, 0, false},
	{"rk_test_", alnums.plain(), 16, 0, false},
	{"whsec_", base64chars.plain(), 24, 0, false},
	{"AIza", base64url.plain(), 35, 35, true},          // Google: API key
	{"ya29.", base64dots.plain(), 20, 0, true},         // access token
	{"GOCSPX-", base64url.plain(), 28, 28, false},      // client secret
	{"hvs.", base64url.plain(), 20, 0, false},          // Vault: service, batch and recovery tokens
	{"hvb.", base64url.plain(), 20, 0, false},          //
	{"hvr.", base64url.plain(), 20, 0, false},          //
	{"s.", alnums.plain(), 24, 24, true},               // before 1.10
	{"npm_", alnums.plain(), 36, 36, false},            //
	{"pypi-AgE", base64url.plain(), 50, 0, false},      //
	{"SG.", base64dots.plain(), 60, 0, true},           // SendGrid
	{"sk-ant-", base64url.plain(), 20, 0, false},       // Anthropic
	{"sk-proj-", base64url.plain(), 20, 0, false},      // OpenAI
	{"sk-", alnums.plain(), 32, 0, true},               //
	{"hf_", alnums.plain(), 34, 0, true},               // Hugging Face
	{"dop_v1_", hexes.plain(), 64, 64, false},          // DigitalOcean
	{"shpat_", hexes.plain(), 32, 32, false},           // Shopify
	{"shpss_", hexes.plain(), 32, 32, false},           //
	{"dapi", hexes.plain(), 32, 32, true},              // Databricks
	{"AccountKey=", base64chars.plain(), 40, 0, false}, // Azure Storage
	{"AGE-SECRET-KEY-1", bech32.plain(), 58, 58, false},
}

// byFirst is where to look in shapes by a token's first byte.
var byFirst = func() (out [256][]*shape) {
	for i := range shapes {
		c := shapes[i].prefix[0]
		out[c] = append(out[c], &shapes[i])
	}
	return out
}()

// secret finds tokens of known shapes, JSON Web Tokens, private keys in PEM,
// and the user and password of a URL.
func secret(b []byte, found spans) spans {
	if len(b) < 7 { // ://a:b@
		return found
	}
	pem := true // whether a key's end may still be found
	web := 0    // no web token begins before it
	for i := 0; i < len(b); {
		c := b[i]
		end := i
		switch {
		case c == '-' && pem && bytes.HasPrefix(b[i:], []byte("-----BEGIN ")):
			end = privateKey(b, i)
			pem = end < len(b)
		case c == 'e' && i >= web && bytes.HasPrefix(b[i:], []byte("eyJ")) && !follows(b, i):
			if run, ok := webToken(b, i); ok {
				end = run
			} else {
				web = run // what begins later in the same run has no more dots
			}
		case c == ':' && bytes.HasPrefix(b[i:], []byte("://")):
			if from, to := userinfo(b, i+3); to > from {
				found = append(found, span{from, to})
				i = to
				continue
			}
		default:
			for _, s := range byFirst[c] {
				if i+1 == len(b) || b[i+1] != s.prefix[1] {
					continue
				}
				if end = s.match(b, i); end > i {
					break
				}
			}
		}
		if end > i {
			found = append(found, span{i, end})
			i = end
			continue
		}
		i++
	}
	return found
}

// follows reports whether a letter or digit stands before i.
func follows(b []byte, i int) bool { return i > 0 && isAlnum(b[i-1]) }

func (s *shape) match(b []byte, i int) int {
	if len(b)-i < len(s.prefix)+s.min || string(b[i:i+len(s.prefix)]) != s.prefix || s.apart && follows(b, i) {
		return i
	}
	from := i + len(s.prefix)
	end := from
	for end < len(b) && s.chars[b[end]] {
		end++
		if s.max > 0 && end-from > s.max {
			return i
		}
	}
	if end-from < s.min {
		return i
	}
	return end
}

// webToken reports whether a token begins at i, and where the run of its
// characters ends: a JWS or JWE in compact form (RFC 7515, section 7.1, and RFC
// 7516), whose header is an object, and so begins with eyJ.
func webToken(b []byte, i int) (end int, ok bool) {
	end, dots := i, 0
	for end < len(b) && (base64dots[b[end]] || b[end] == '=') {
		if b[end] == '.' {
			dots++
		}
		end++
	}
	return end, dots >= 2 && end-i >= 30
}

// privateKey returns where the private key in PEM (RFC 7468) that begins at i
// ends, or i where it is another kind of thing. One without an end is all that
// is left: it was cut off.
func privateKey(b []byte, i int) int {
	label := b[i+len("-----BEGIN "):]
	label = label[:min(len(label), 64)]
	n := bytes.Index(label, []byte("-----"))
	if n < 0 || !bytes.Contains(label[:n], []byte("PRIVATE KEY")) {
		return i
	}
	rest := b[i+len("-----BEGIN "):]
	end := bytes.Index(rest, []byte("-----END "))
	if end < 0 {
		return len(b)
	}
	end += i + len("-----BEGIN ") + len("-----END ")
	tail := b[end:min(len(b), end+64)]
	if n := bytes.Index(tail, []byte("-----")); n >= 0 {
		return end + n + len("-----")
	}
	return len(b)
}

// userinfo returns where the "user:password" of the URL whose authority begins
// at i stands, and nothing where it has none (RFC 3986, section 3.2.1). It ends
// at the last @ of the authority, so that a password with an @ is hidden whole.
func userinfo(b []byte, i int) (from, to int) {
	at, colon := -1, false
	for j := i; j < len(b) && !userinfoEnds[b[j]]; j++ {
		switch b[j] {
		case '@':
			if colon {
				at = j
			}
		case ':':
			colon = true
		}
	}
	if at < 0 {
		return i, i
	}
	return i, at
}
