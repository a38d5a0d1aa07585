package masking

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/store"
)

func masker(t testing.TB, rules ...store.MaskRule) *Masker {
	t.Helper()
	m, err := New(store.Masking{Rules: rules})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func detecting(t testing.TB, names ...string) *Masker {
	t.Helper()
	var rules []store.MaskRule
	for _, n := range names {
		rules = append(rules, store.MaskRule{Detector: n})
	}
	return masker(t, rules...)
}

func all(t testing.TB) *Masker {
	return detecting(t, "email", "card", "iban", "phone", "secret", "entropy")
}

func TestDocumentedExamplesOfDetectorsAreCaughtAndMissedAsDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../../docs/masking.md")
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile("(?m)^\\| (email|card|iban|phone|secret|entropy) \\| `([^`]+)` \\| (?:`([^`]+)`|stays) \\|")
	seen := map[string][2]int{}
	for _, r := range row.FindAllStringSubmatch(string(doc), -1) {
		want, kind := r[3], 0
		if want == "" {
			want, kind = r[2], 1
		}
		n := seen[r[1]]
		n[kind]++
		seen[r[1]] = n
		if out, _ := detecting(t, r[1]).Text([]byte(r[2])); string(out) != want {
			t.Errorf("%s: %q became %q, documented is %q", r[1], r[2], out, want)
		}
	}
	for name := range detectors {
		if seen[name][0] < 3 || seen[name][1] < 3 {
			t.Errorf("docs/masking.md has %d examples of what %s catches and %d of what it misses", seen[name][0], name, seen[name][1])
		}
	}
}

func TestKnownTokensAreCaught(t *testing.T) {
	// Put together here, so that no scanner takes this file for a leak.
	fill := func(n int) string { return strings.Repeat("aB3dE6gH9", n/9+1)[:n] }
	hex := strings.Repeat("0123456789abcdef", 4)
	pem := func(kind string) string {
		return "-----BEGIN " + kind + "-----\n" + fill(64) + "\n" + fill(40) + "=\n-----END " + kind + "-----"
	}
	secrets := []string{
		"AKIA" + "IOSFODNN7EXAMPLE", "ASIA" + "IOSFODNN7EXAMPLE",
		"ghp_" + fill(36), "gho_" + fill(36), "ghs_" + fill(36), "github_pat_" + fill(22) + "_" + fill(59), "glpat-" + fill(20),
		"xoxb-" + "123456789012-1234567890123-" + fill(24), "xoxp-" + "1-2-3-" + hex[:32], "xapp-" + "1-A0-" + hex,
		"https://hooks.slack.com/" + "services/T00000000/B00000000/" + fill(24),
		"sk_" + "live_" + fill(24), "rk_" + "live_" + fill(24), "sk_" + "test_" + fill(99), "whsec_" + fill(32),
		"AIza" + fill(35), "ya29." + fill(60), "GOCSPX-" + fill(28),
		"hvs." + fill(24), "hvb." + fill(90), "s." + fill(24),
		"npm_" + fill(36), "pypi-AgE" + fill(120), "SG." + fill(22) + "." + fill(43), "sk-ant-" + "api03-" + fill(90), "sk-" + fill(48), "hf_" + fill(34),
		"dop_v1_" + hex, "shpat_" + hex[:32], "dapi" + hex[:32], "AccountKey=" + fill(86) + "==",
		"AGE-SECRET-KEY-1" + strings.Repeat("QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L", 2)[:58],
		"eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ1c2VyLTEifQ." + fill(86),
		"eyJhbGciOiJkaXIiLCJlbmMiOiJBMjU2R0NNIn0.." + fill(16) + "." + fill(40) + "." + fill(22),
		pem("PRIVATE KEY"), pem("RSA PRIVATE KEY"), pem("OPENSSH PRIVATE KEY"), pem("PGP PRIVATE KEY BLOCK"),
		"-----BEGIN EC PRIVATE KEY-----\n" + fill(64), // cut off
	}
	m := detecting(t, "secret")
	for _, s := range secrets {
		for _, around := range [][2]string{{"", ""}, {"key: ", "\nnext"}, {`{"k":"`, `"}`}, {"(", ")."}} {
			out, n := m.Text([]byte(around[0] + s + around[1]))
			kept := s
			if strings.HasPrefix(s, "https://") {
				kept = s[len("https://hooks.slack.com/services/"):]
			}
			if n == 0 || strings.Contains(string(out), kept[len(kept)-12:]) || strings.Contains(string(out), kept[:min(len(kept), 12)]) {
				t.Errorf("%q became %q", around[0]+s+around[1], out)
			}
		}
	}
	for _, s := range []string{
		"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----", "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----",
		"https://example.com:8080/a@b", "http://[::1]:80/", "sk-learn", "npm_config_registry", "eyJ", "e.g. hvs.short", "AKIAlower", "DATA",
	} {
		if out, n := m.Text([]byte(s)); n != 0 {
			t.Errorf("%q became %q", s, out)
		}
	}
}

func TestRulesHideWhatTheyNameInJSON(t *testing.T) {
	field := func(s string) store.MaskRule { return store.MaskRule{Field: s} }
	path := func(s string) store.MaskRule { return store.MaskRule{Path: s} }
	found := func(s string) store.MaskRule { return store.MaskRule{Detector: s} }
	for _, tc := range []struct {
		rule     store.MaskRule
		in, want string
		masked   int64
	}{
		{field("email"), `{"email":"x","a":1.50}`, `{"email":"[masked]","a":1.50}`, 1},
		{field("email"), ` { "a" : [ { "EMail" : { "b" : [ 1 ] } , "c" : 1e2 } ] } `, ` { "a" : [ { "EMail" : "[masked]" , "c" : 1e2 } ] } `, 1},
		{field("email"), `{"email":null}`, `{"email":null}`, 0},
		{field("email"), `{"email":"[masked]"}`, `{"email":"[masked]"}`, 0},
		{field("email"), `{"email":7,"email":false,"email":[]}`, `{"email":"[masked]","email":"[masked]","email":"[masked]"}`, 3},
		{field("email"), `{"em\u0061il":"x"}`, `{"em\u0061il":"[masked]"}`, 1},
		{field("größe"), `{"GRÖSSE":1,"GRÖẞE":2,"größe":3}`, `{"GRÖSSE":1,"GRÖẞE":"[masked]","größe":"[masked]"}`, 2},
		{field("key"), "{\"\u212Aey\":1}", "{\"\u212Aey\":\"[masked]\"}", 1}, // the Kelvin sign is a k
		{field("email"), `{"a":"{\"email\":\"x\",\"n\":1}"}`, `{"a":"{\"email\":\"[masked]\",\"n\":1}"}`, 1},
		{field("email"), `{"a":"\"{\\\"email\\\":1}\""}`, `{"a":"\"{\\\"email\\\":\\\"[masked]\\\"}\""}`, 1},
		{field("email"), `{"a":"{\"email\":1}\n{\"email\":2}"}`, `{"a":"{\"email\":\"[masked]\"}\n{\"email\":\"[masked]\"}"}`, 2},
		{field("email"), `["{\"email\":\"\\ud800\"}"]`, `["{\"email\":\"[masked]\"}"]`, 1},
		{field("email"), `["{\"email\":1"]`, `["[masked]"]`, 1}, // no JSON, and a reader may take it from there
		{field("email"), `["{\"email\":","[email] x","{\"a\":1"]`, `["[masked]","[email] x","{\"a\":1"]`, 1},
		{path("$"), `[1]`, `"[masked]"`, 1},
		{path("$.a"), `{"a":1,"A":1,"b":{"a":1}}`, `{"a":"[masked]","A":1,"b":{"a":1}}`, 1},
		{path("$.a.b[*].c"), `{"a":{"b":[{"c":1,"d":2},{"c":[]}]},"b":[{"c":3}]}`, `{"a":{"b":[{"c":"[masked]","d":2},{"c":"[masked]"}]},"b":[{"c":3}]}`, 2},
		{path("$['a b'][0]"), `{"a b":[1,2]}`, `{"a b":["[masked]",2]}`, 1},
		{path(`$["it's"]['"','\'']`), `{"it's":{"\"":1,"'":2}}`, `{"it's":{"\"":"[masked]","'":"[masked]"}}`, 2},
		{path("$[1,'x',3]"), `[0,1,2,3]`, `[0,"[masked]",2,"[masked]"]`, 2},
		{path("$..x"), `{"x":1,"a":[{"x":2}],"b":{"c":{"x":3,"y":4}}}`, `{"x":"[masked]","a":[{"x":"[masked]"}],"b":{"c":{"x":"[masked]","y":4}}}`, 3},
		{path("$..a..b"), `{"b":0,"a":{"c":{"b":1}},"a":[[{"b":2}]]}`, `{"b":0,"a":{"c":{"b":"[masked]"}},"a":[[{"b":"[masked]"}]]}`, 2},
		{path("$..[0]"), `[[1,2],[3]]`, `["[masked]",["[masked]"]]`, 2},
		{path("$.*"), `{"a":1,"b":null}`, `{"a":"[masked]","b":null}`, 1},
		{path("$.a.b"), `{"a":"{\"b\":1}"}`, `{"a":"{\"b\":\"[masked]\"}"}`, 1}, // as if it stood there
		{path("$.ключ"), `{"ключ":1}`, `{"ключ":"[masked]"}`, 1},
		{found("email"), `{"a":["to a@b.example now"]}`, `{"a":["to [masked] now"]}`, 1},
		{found("email"), `{"a":"a\u0040b.example"}`, `{"a":"[masked]"}`, 1},
		{found("email"), `{"a@b.example":{"c@d.example":1,"e@f.example":2}}`, `{"[masked]":{"[masked]":1,"[masked]#2":2}}`, 3},
		{found("card"), `[4111111111111111,4111111111111112,4.111111111111111e15,4111111111111111.0]`, `["[masked]",4111111111111112,"[masked]","[masked]"]`, 3},
		{found("card"), `["4111 1111 1111 1111"]`, `["[masked]"]`, 1},
		{store.MaskRule{Type: "text"}, `no JSON`, `no JSON`, 0},
	} {
		m := masker(t, tc.rule)
		out, n, err := m.JSON([]byte(tc.in))
		if err != nil || string(out) != tc.want || n != tc.masked {
			t.Errorf("%+v: %s\n became %s (%d masked, %v)\n wanted %s (%d)", tc.rule, tc.in, out, n, err, tc.want, tc.masked)
			continue
		}
		if again, n, err := m.JSON(out); err != nil || string(again) != tc.want || n != 0 {
			t.Errorf("masked again, %s became %s (%d, %v)", out, again, n, err)
		}
	}
}

func TestWhatIsNoJSONIsAnError(t *testing.T) {
	m := masker(t, store.MaskRule{Field: "a"})
	for _, in := range []string{
		"", " ", "{", `{"a"}`, `{"a":1,}`, `{"a":1} {"a":1}`, `{"a":1}x`, "1 2", "{a:1}", `{"b":01}`, "\xef\xbb\xbf{}", `{"a":`, `{"a":1`, "]",
		"{\"b\":\"\xff\"}", "{\"\xff\":1}", `{"b":"\ud800"}`, `{"\ud800":1}`, "{\"a\":\"\xff\"}", "NaN", "[1,2",
	} {
		if out, _, err := m.JSON([]byte(in)); err == nil {
			t.Errorf("%q became %q", in, out)
		} else if !strings.Contains(err.Error(), ErrNotJSON.Error()) {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func TestErrorsTellNothingOfTheDocument(t *testing.T) {
	m := masker(t, store.MaskRule{Field: "email"})
	_, _, err := m.JSON([]byte(`{"email":"alice@example.com","alice":"x" "bob"`))
	if err == nil || strings.Contains(err.Error(), "alice") || strings.Contains(err.Error(), "bob") {
		t.Fatal(err)
	}
}

func TestDeepAndLargeDocumentsAreRefused(t *testing.T) {
	m := masker(t, store.MaskRule{Field: "email"})
	nest := func(n int) []byte { return []byte(strings.Repeat("[", n) + strings.Repeat("]", n)) }
	if _, _, err := m.JSON(nest(MaxDepth)); err != nil {
		t.Error(err)
	}
	if _, _, err := m.JSON(nest(MaxDepth + 1)); err != ErrTooLarge {
		t.Error(err)
	}
	if _, _, err := m.JSON([]byte(`"` + strings.Repeat("x", MaxDocument) + `"`)); err != ErrTooLarge {
		t.Error(err)
	}
	// Within a string they are hidden instead.
	deep := string(quote(nest(MaxDepth + 1)))
	if out, _, err := m.JSON([]byte(deep)); err != nil || string(out) != `"[masked]"` {
		t.Errorf("%.40s (%v)", out, err)
	}
	wrapped := `{"email":"x"}`
	for i := range maxNested + 3 {
		out, n, err := m.JSON([]byte(wrapped))
		if err != nil || n != 1 || strings.Contains(string(out), "x") {
			t.Errorf("wrapped %d times: %s (%d, %v)", i, out, n, err)
		}
		wrapped = string(quote([]byte(wrapped)))
	}
}

func TestColumnsAreHiddenByNameAndType(t *testing.T) {
	m := masker(t, store.MaskRule{Field: "Email"}, store.MaskRule{Column: "orders.card"}, store.MaskRule{Column: "sales.Orders.note"},
		store.MaskRule{Type: "character varying"}, store.MaskRule{Type: "timestamptz"}, store.MaskRule{Type: "inet"})
	for _, tc := range []struct {
		schema, table, column, typ string
		want                       bool
	}{
		{"public", "orders", "email", "text", true}, {"sales", "any", "EMAIL", "text", true}, {"", "", "email", "", true},
		{"public", "orders", "card", "text", true}, {"PUBLIC", "ORDERS", "CARD", "text", true}, {"sales", "orders", "card", "text", false},
		{"public", "orders2", "card", "text", false}, {"", "orders", "card", "text", true}, {"", "", "card", "text", true},
		{"sales", "orders", "note", "text", true}, {"public", "orders", "note", "text", false},
		{"x", "y", "z", "varchar", true}, {"x", "y", "z", "varchar(20)", true}, {"x", "y", "z", "character varying(20)", true}, {"x", "y", "z", "_varchar", true},
		{"x", "y", "z", "varchar[]", true}, {"x", "y", "z", "character varying(20)[][]", true}, {"x", "y", "z", "pg_catalog.varchar", true}, {"x", "y", "z", "CHARACTER  VARYING (3)", true},
		{"x", "y", "z", "timestamp(3) with time zone", true}, {"x", "y", "z", "timestamp with time zone", true}, {"x", "y", "z", "timestamp", false},
		{"x", "y", "z", "inet", true}, {"x", "y", "z", "text", false}, {"x", "y", "z", "bpchar", false}, {"x", "y", "z", "", false}, {"x", "y", "z", "int4", false},
	} {
		if got := m.Column(tc.schema, tc.table, tc.column, tc.typ); got != tc.want {
			t.Errorf("%+v: %v", tc, got)
		}
	}
	for sql, name := range map[string]string{"integer": "int4", "int": "int4", "bigint": "int8", "smallint": "int2", "real": "float4", "double precision": "float8",
		"boolean": "bool", "decimal(10, 2)": "numeric", "character(3)": "bpchar", "char": "bpchar", `"char"`: `"char"`, "bit varying(3)": "varbit", "time with time zone": "timetz", "int ARRAY": "_int4", "integer[3]": "int4"} {
		if canonicalType(sql) != canonicalType(name) {
			t.Errorf("%s and %s are %s and %s", sql, name, canonicalType(sql), canonicalType(name))
		}
	}
}

func TestANilMaskerHidesNothing(t *testing.T) {
	m, err := New(store.Masking{})
	if m != nil || err != nil {
		t.Fatal(m, err)
	}
	if out, n, err := m.JSON([]byte("no JSON")); string(out) != "no JSON" || n != 0 || err != nil {
		t.Error(string(out), n, err)
	}
	if out, n := m.Text([]byte("a@b.example")); string(out) != "a@b.example" || n != 0 {
		t.Error(string(out), n)
	}
	if m.Detects() || m.Column("public", "orders", "email", "text") {
		t.Error("it hides something")
	}
}

func TestRulesThatCannotBeUnderstoodAreErrors(t *testing.T) {
	for _, r := range []store.MaskRule{
		{}, {Field: "a", Path: "$.a"}, {Detector: "mail"}, {Detector: "Email"}, {Column: "email"}, {Column: "a.b.c.d"}, {Column: ".email"}, {Column: "a..b"}, {Field: "\xff"},
		{Path: "a"}, {Path: "$a"}, {Path: "$."}, {Path: "$.."}, {Path: "$..."}, {Path: "$["}, {Path: "$[]"}, {Path: "$[-1]"}, {Path: "$[01]"}, {Path: "$[1:2]"}, {Path: "$[?@.a]"}, {Path: "$['a]"},
		{Path: `$['\x']`}, {Path: "$.a b"}, {Path: "$.1"}, {Path: "$ .a"}, {Path: "$[9007199254740992]"}, {Path: `$['\"']`}, {Path: "$[a]"}, {Path: "$['a' 'b']"}, {Path: "$" + strings.Repeat(".a", maxSegments+1)},
	} {
		if _, err := New(store.Masking{Rules: []store.MaskRule{r}}); err == nil {
			t.Errorf("%+v is understood", r)
		}
	}
	if _, err := New(store.Masking{Rules: make([]store.MaskRule, MaxRules+1)}); err == nil {
		t.Error("any number of rules is understood")
	}
}

func TestMaskingTakesTimeInProportion(t *testing.T) {
	m := all(t)
	for _, part := range []string{
		"%40a", "a@", "a%40", "eyJ-", "eyJ.a", "-----BEGIN PRIVATE KE", "-----BEGIN X-----", "://a:", "://@", "1", "1 ", "4111 ", "0 ", "+1 ", "(0", "+", "DE00", "AD12 ", "GB82WEST", "a", "A1b/", "=", "sk-", "s.", "\"@", "\xff", "é", "é@é.é", "((", "12-12-", "xoxb-1", "hvs.",
	} {
		// A quadratic pass over so much would take minutes.
		text := []byte(strings.Repeat(part, (1<<18)/len(part)))
		began := time.Now()
		m.Text(text)
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("256 KiB of %q took %v", part, took)
		}
	}
}

func TestRandomWordsAreToldFromOthers(t *testing.T) {
	m := detecting(t, "entropy")
	rng := newRandom()
	for _, tc := range []struct {
		name  string
		word  func() string
		least float64
	}{
		{"18 random bytes in base64", func() string { return rng.base64(18) }, 0.9},
		{"24 random bytes in base64", func() string { return rng.base64(24) }, 0.95},
		{"32 random bytes in base64", func() string { return rng.base64(32) }, 0.97},
		{"16 random bytes in hex", func() string { return fmt.Sprintf("%x", rng.bytes(16)) }, 0.99},
		{"32 random bytes in hex", func() string { return fmt.Sprintf("%x", rng.bytes(32)) }, 0.99},
	} {
		const trials = 2000
		caught := 0
		for range trials {
			if _, n := m.Text([]byte("key " + tc.word() + ".")); n > 0 {
				caught++
			}
		}
		share := float64(caught) / trials
		t.Logf("%s: %.1f%% caught", tc.name, 100*share)
		if share < tc.least {
			t.Errorf("%s: %.1f%% caught", tc.name, 100*share)
		}
	}
	// Its own sources are as good a sample of what people write as any.
	src, err := os.ReadFile("detect.go")
	if err != nil {
		t.Fatal(err)
	}
	if out, n := m.Text(src); n > 1 { // the alphabet itself may stand in one
		t.Errorf("%d words of detect.go look random:\n%s", n, out)
	}
}

func FuzzText(f *testing.F) {
	for _, s := range []string{"a@b.example", "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00", "+49 151 12345678", "https://u:p@h/", "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ1c2VyLTEifQ.abc",
		"x030 1234567a@b.co030 1234567", "-----BEGIN PRIVATE KEY-----", "\xff@\xfe.com", `"a b"@c.de`, "a%40b.example", "aB3dE6gH9jK2mN5pQ8sT1vW4"} {
		f.Add([]byte(s))
	}
	m := all(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		was := string(in)
		out, n := m.Text(in)
		if string(in) != was {
			t.Fatal("the input was written to")
		}
		if m.matches(out) {
			t.Fatalf("%q became %q, in which something is still found", in, out)
		}
		if (n == 0) != (string(out) == was) {
			t.Fatalf("%q became %q with %d masked", in, out, n)
		}
	})
}

func FuzzJSON(f *testing.F) {
	for _, s := range []string{`{"email":"a@b.example","n":[4111111111111111,1.5e3,null,true]}`, `{"a":"{\"email\":1}"}`, `["\"[1]\"","{","[1] [2]"]`, `{"a b":{"c":[{"d":1}]}}`,
		`{"x":{"x":1},"x":2}`, `"4111 1111 1111 1111"`, `{"a@b.example":1,"c@d.example":2}`, `["{\"email\":\"\\ud800\",\"k\":\"-----BEGIN PRIVATE KEY-----\n\"}"]`} {
		f.Add([]byte(s))
	}
	m := masker(f, store.MaskRule{Field: "email"}, store.MaskRule{Path: "$['a b']..d"}, store.MaskRule{Path: "$.x.x"}, store.MaskRule{Detector: "email"}, store.MaskRule{Detector: "card"},
		store.MaskRule{Detector: "iban"}, store.MaskRule{Detector: "phone"}, store.MaskRule{Detector: "secret"}, store.MaskRule{Detector: "entropy"})
	f.Fuzz(func(t *testing.T, in []byte) {
		was := string(in)
		out, n, err := m.JSON(in)
		if string(in) != was {
			t.Fatal("the input was written to")
		}
		valid := jsontext.Value(in).IsValid(jsontext.AllowDuplicateNames(true))
		if err != nil {
			if valid && len(in) < 1000 {
				t.Fatalf("%q: %v", in, err)
			}
			return
		}
		if !valid {
			t.Fatalf("%q was taken for JSON", in)
		}
		if !jsontext.Value(out).IsValid(jsontext.AllowDuplicateNames(true)) {
			t.Fatalf("%q became %q", in, out)
		}
		if n == 0 && string(out) != was {
			t.Fatalf("%q became %q with nothing masked", in, out)
		}
		if again, n, err := m.JSON(out); err != nil || n != 0 || string(again) != string(out) {
			t.Fatalf("%q became %q and then %q (%d, %v)", in, out, again, n, err)
		}
		dec := jsontext.NewDecoder(strings.NewReader(string(out)), jsontext.AllowDuplicateNames(true))
		for {
			tok, err := dec.ReadToken()
			if err != nil {
				break
			}
			if k := tok.Kind(); (k == '"' || k == '0') && m.matches([]byte(tok.String())) {
				t.Fatalf("%q became %q, in which something is still found", in, out)
			}
		}
	})
}

func FuzzPath(f *testing.F) {
	for _, s := range []string{"$", "$.a.b[*].c", "$['a b'][0]", "$..x", `$["\u0041",'\'']`, "$..[*]", "$.ключ[ 0 , 'x' ]"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		m, err := New(store.Masking{Rules: []store.MaskRule{{Path: s}}})
		if err != nil || m == nil {
			return
		}
		in := []byte(`{"a":{"b":[{"c":1}]},"x":[[1],{"x":"{\"a\":[]}"}]}`)
		out, _, err := m.JSON(in)
		if err != nil || !jsontext.Value(out).IsValid() {
			t.Fatalf("%s: %s (%v)", s, out, err)
		}
	})
}

func BenchmarkMasking(b *testing.B) {
	var rows []map[string]any
	for i := range 100 {
		rows = append(rows, map[string]any{"id": i, "name": "Ada Lovelace", "email": fmt.Sprintf("ada%d@example.com", i), "total": 12.5, "note": "please deliver to the back door after 17:00",
			"created_at": "2026-11-23T10:00:00Z", "address": map[string]any{"street": "12 St James's Square", "city": "London"}})
	}
	doc, _ := json.Marshal(rows)
	text := []byte(strings.Repeat("please deliver to the back door after 17:00, order 4711 of 2026-11-23, Ada Lovelace, 12 St James's Square\n", 100))
	field, every := masker(b, store.MaskRule{Field: "email"}), all(b)
	run := func(name string, size int, f func()) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(size))
			for b.Loop() {
				f()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/(float64(size)/1024), "ns/KB")
		})
	}
	run("json/field", len(doc), func() { field.JSON(doc) })
	run("json/all-detectors", len(doc), func() { every.JSON(doc) })
	run("text/all-detectors", len(text), func() { every.Text(text) })
	for name := range detectors {
		d := detecting(b, name)
		run("text/"+name, len(text), func() { d.Text(text) })
	}
}
