package main

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
)

//go:generate go test -run ^TestTheReference(sAre|OfMetricsIs)WhatTheCodeSays$ -update .

// configured are the processes that have a configuration file.
var configured = []struct {
	command, about string
	config         func() interface{ check() error }
}{
	{"serve", "the broker and its gateways, on the machines' side", func() interface{ check() error } { return &serveConfig{} }},
	{"record", "the recorder, on the people's side", func() interface{ check() error } { return &recordConfig{} }},
	{"witness", "a witness, the reviewers' own", func() interface{ check() error } { return &witnessConfig{} }},
}

// configKey is one key of a configuration, as the structs have it.
type configKey struct {
	path    string // recorder.url, certificates[].name
	kind    string // for people
	sample  string // a value in YAML that it takes
	doc     string
	section bool // other keys stand below it
}

// configKeys are the keys of a configuration, in the order of the fields.
func configKeys(t testing.TB, config any) []configKey {
	s := sources{t: t, parsed: map[string]map[string]map[string]string{}}
	return s.keys(reflect.TypeOf(config).Elem(), "")
}

// sources reads the comments of fields.
type sources struct {
	t      testing.TB
	parsed map[string]map[string]map[string]string // package to type to field
}

func (s *sources) keys(of reflect.Type, prefix string) (list []configKey) {
	for f := range of.Fields() {
		name, options, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		switch {
		case name == "-":
			continue
		case options == "inline":
			list = append(list, s.keys(f.Type, prefix)...)
			continue
		case name == "":
			s.t.Errorf("%s.%s has no yaml tag", of, f.Name)
			continue
		}
		k := configKey{path: prefix + name, doc: s.doc(of, f.Name)}
		if k.doc == "" {
			s.t.Errorf("%s.%s (%s) has no comment that says what it is", of, f.Name, k.path)
		}
		below, inside := f.Type, ""
		for below.Kind() == reflect.Pointer || below.Kind() == reflect.Slice {
			if below.Kind() == reflect.Slice {
				inside += "[]"
			}
			below = below.Elem()
		}
		if below.Kind() == reflect.Struct {
			k.section, k.kind, k.sample = true, "section", "{}"
			if inside != "" {
				k.kind, k.sample = "list of sections", "[]"
			}
			list = append(list, k)
			list = append(list, s.keys(below, k.path+inside+".")...)
			continue
		}
		k.kind, k.sample = s.kind(f.Type, k.doc)
		list = append(list, k)
	}
	return list
}

// kind is what a value is called, and one of it.
func (s *sources) kind(t reflect.Type, doc string) (kind, sample string) {
	if t == reflect.TypeFor[time.Duration]() {
		return "duration", "90s"
	}
	switch t.Kind() {
	case reflect.Pointer:
		return s.kind(t.Elem(), doc)
	case reflect.String:
		switch first, _, _ := strings.Cut(doc, " "); strings.Trim(first, ",;:") {
		case "file":
			return "file", "x"
		case "directory":
			return "directory", "x"
		}
		return "string", "x"
	case reflect.Bool:
		return "true or false", "true"
	case reflect.Int, reflect.Int64, reflect.Float64:
		return "number", "7"
	case reflect.Slice:
		kind, sample = s.kind(t.Elem(), doc)
		return "list of " + plural(kind), "[" + sample + "]"
	case reflect.Map:
		kind, sample = s.kind(t.Elem(), doc)
		return "map to " + plural(kind), "{x: " + sample + "}"
	}
	s.t.Fatalf("the reference has no word for a %s", t)
	return "", ""
}

func plural(kind string) string {
	if strings.HasPrefix(kind, "list of ") {
		return strings.Replace(kind, "list", "lists", 1)
	}
	return kind + "s"
}

// doc is the comment of a field: the one above it, or behind it.
func (s *sources) doc(of reflect.Type, field string) string {
	pkg := of.PkgPath()
	if s.parsed[pkg] == nil {
		dir := "."
		if pkg != reflect.TypeFor[configKey]().PkgPath() {
			dir = filepath.Join("../..", strings.TrimPrefix(pkg, "github.com/countersign-dev/countersign/"))
		}
		s.parsed[pkg] = s.parse(dir)
	}
	return s.parsed[pkg][of.Name()][field]
}

func (s *sources) parse(dir string) map[string]map[string]string {
	found := map[string]map[string]string{}
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
		if err != nil {
			s.t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			spec, ok := n.(*ast.TypeSpec)
			if !ok {
				return true
			}
			st, ok := spec.Type.(*ast.StructType)
			if !ok {
				return false
			}
			fields := map[string]string{}
			for _, f := range st.Fields.List {
				text := f.Doc.Text()
				if text == "" {
					text = f.Comment.Text()
				}
				for _, name := range f.Names {
					fields[name.Name] = strings.Join(strings.Fields(text), " ")
				}
			}
			found[spec.Name.Name] = fields
			return false
		})
	}
	return found
}

// byDefault is the part of a comment that is a default.
var byDefault = regexp.MustCompile(`(?:^|; )([^;]*) by default$`)

// reference is docs/configuration.md.
func reference(t testing.TB) []byte {
	var b bytes.Buffer
	b.WriteString(`# Configuration

<!-- Made from the code by ` + "`go generate ./cmd/countersign`" + `; a test compares the two. Change the comments of the structs instead. -->

Every key of the three processes that have a configuration file, in YAML. A key that is not here is refused, with its line and column, and so is one that comes twice. Durations are written as Go writes them (` + "`90s`, `5m`, `720h`" + `). Secrets are named by the file that holds them; best, their owner alone may read it. A path that is not absolute is taken from where the process was started.

` + "`countersign doctor --config FILE`" + ` checks a file and what it names ([doctor.md](doctor.md)). [operations.md](operations.md) says how the parts are set up and run.

"Needed" are the keys without which a file like the example is refused; where the meaning names another key instead ("or ..."), one of them is. In a path, ` + "`[]`" + ` is each element of a list.
`)
	for _, p := range configured {
		fmt.Fprintf(&b, "\n## %s.yaml\n\n`countersign %[1]s --config FILE` runs %s. With every key: [examples/%[1]s.yaml](examples/%[1]s.yaml).\n\n", p.command, p.about)
		b.WriteString("| key | type | needed | default | meaning |\n|---|---|---|---|---|\n")
		for _, k := range configKeys(t, p.config()) {
			meaning, def, needed := k.doc, "", ""
			if m := byDefault.FindStringSubmatchIndex(meaning); m != nil {
				def, meaning = meaning[m[2]:m[3]], meaning[:m[0]]
			}
			if isNeeded(t, p.command, k.path) {
				needed = "yes"
			}
			fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", k.path, k.kind, needed, cell(def), cell(meaning))
		}
	}
	return b.Bytes()
}

// cell is text in a table of Markdown.
func cell(text string) string {
	text = strings.NewReplacer("|", `\|`, "<", "&lt;").Replace(text)
	// Between backticks nothing is escaped.
	parts := strings.Split(text, "`")
	for i := range parts {
		if i%2 == 1 {
			parts[i] = strings.ReplaceAll(parts[i], "&lt;", "<")
		}
	}
	return strings.Join(parts, "`")
}

// example is one of the commented configurations.
func example(t testing.TB, command string) []byte {
	b, err := os.ReadFile("../../docs/examples/" + command + ".yaml")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// isNeeded reports whether the example is refused without the key at path.
func isNeeded(t testing.TB, command, path string) bool {
	var whole yaml.MapSlice
	if err := yaml.UnmarshalWithOptions(example(t, command), &whole, yaml.UseOrderedMap()); err != nil {
		t.Fatal(err)
	}
	var out any = whole
	if !without(&out, strings.Split(path, ".")) {
		return false
	}
	b, err := yaml.Marshal(out)
	if err != nil {
		t.Fatal(err)
	}
	return taken(t, command, b) != nil
}

// without takes the key at path out of v, from the first element of each list
// that has it, and reports whether it was there.
func without(v *any, path []string) bool {
	name := strings.TrimSuffix(path[0], "[]")
	m, _ := (*v).(yaml.MapSlice)
	for i := range m {
		if m[i].Key != name {
			continue
		}
		if len(path) == 1 {
			*v = slices.Delete(slices.Clone(m), i, i+1)
			return true
		}
		if list, ok := m[i].Value.([]any); ok {
			for j := range list {
				if without(&list[j], path[1:]) {
					return true
				}
			}
			return false
		}
		return without(&m[i].Value, path[1:])
	}
	return false
}

// taken is what the process of command says of a configuration.
func taken(t testing.TB, command string, text []byte) error {
	for _, p := range configured {
		if p.command == command {
			c := p.config()
			if err := parseConfig(command+".yaml", text, c); err != nil {
				return err
			}
			return c.check()
		}
	}
	t.Fatalf("%s has no configuration", command)
	return nil
}

// ailments is docs/doctor.md.
func ailments() []byte {
	var b bytes.Buffer
	b.WriteString(`# What doctor finds

<!-- Made from the code by ` + "`go generate ./cmd/countersign`" + `; a test compares the two. Change cmd/countersign/doctor_checks.go instead. -->

` + "```sh" + `
countersign doctor --config serve.yaml --vault-token-file operator.token
countersign doctor --config broker-1.yaml --config broker-2.yaml --config record.yaml
` + "```" + `

Run it before the first start, after each change, and when something is wrong. It reads the files of serve, record and witness, and asks the servers that they name; the process itself need not run. Several files at once are also compared with each other. Run it as the user that the process runs as: whether a file can be read is a matter of that.

Each line is one thing that was looked at: ` + "`ok`" + `; ` + "`skipped`" + ` (there is nothing to look at, or nobody asked for it); ` + "`warning`" + ` (it runs, and somebody will be sorry); ` + "`unchecked`" + ` (it could not be looked at); ` + "`fault`" + ` (it does not run, or is not safe). Under a warning or a fault stands how to mend it. ` + "`-o json`" + ` gives ` + "`{\"findings\":[{\"check\",\"level\",\"what\",\"message\",\"mend\"}]}`" + `. No secret is shown. Exit status 0: no fault; 1: a fault; 2: no fault, but not all could be checked, a file that is no configuration among it.

Nothing is minted, and nothing on record is changed. The broker's login to Vault is renewed, as the broker does all the time; keys that are tried in Redis are gone within a second; a login is begun at the OpenID provider and not ended; files made to see whether a directory can be written are taken away at once.

The broker's own login to Vault may not read token roles, policies, mounts, database roles and audit devices, and should not. Give ` + "`--vault-token-file`" + ` with an operator's token that may read them, and these are looked at too.

| check | of | what is wrong | how to mend it |
|---|---|---|---|
`)
	for _, c := range checks {
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", c.code, c.of, cell(c.title), cell(c.mend))
	}
	return b.Bytes()
}

func TestTheReferencesAreWhatTheCodeSays(t *testing.T) {
	for file, want := range map[string][]byte{"../../docs/configuration.md": reference(t), "../../docs/doctor.md": ailments()} {
		if *update {
			if err := os.WriteFile(file, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not what the code says: run `go generate ./cmd/countersign`", file)
		}
	}
}

func TestEveryKeyOfTheReferenceIsTakenAndItsMisspellingRefused(t *testing.T) {
	for _, p := range configured {
		for _, k := range configKeys(t, p.config()) {
			one := func(name, value string) string {
				text := value
				parts := strings.Split(k.path, ".")
				parts[len(parts)-1] = name
				for _, part := range slices.Backward(parts) {
					if list, ok := strings.CutSuffix(part, "[]"); ok {
						part, text = list, "["+text+"]"
					}
					text = "{" + part + ": " + text + "}"
				}
				return text
			}
			name := k.path[strings.LastIndex(k.path, ".")+1:]
			if err := parseConfig("x.yaml", []byte(one(name, k.sample)), p.config()); err != nil {
				t.Errorf("%s: %s is not taken: %v", p.command, k.path, err)
			}
			err := parseConfig("x.yaml", []byte(one(name+"x", k.sample)), p.config())
			if err == nil || !strings.Contains(err.Error(), "unknown field") || !strings.Contains(err.Error(), "docs/configuration.md") {
				t.Errorf("%s: %sx: %v", p.command, k.path, err)
			}
		}
	}
}

func TestTheExamplesAreTakenAndNameEveryKey(t *testing.T) {
	for _, p := range configured {
		text := example(t, p.command)
		if err := taken(t, p.command, text); err != nil {
			t.Errorf("%s.yaml: %v", p.command, err)
		}
		for _, k := range configKeys(t, p.config()) {
			if p.command != "record" && strings.HasSuffix(k.path, "listen.client_ca") {
				continue // refused there, or of no use
			}
			name := strings.TrimSuffix(k.path[strings.LastIndex(k.path, ".")+1:], "[]")
			if !regexp.MustCompile(`(?m)(^|[\s{,#-])` + regexp.QuoteMeta(name) + `:`).Match(text) {
				t.Errorf("docs/examples/%s.yaml does not show %s", p.command, k.path)
			}
		}
	}
}

// What a link or a message leads to is there.
func TestNoDocumentLeadsToTheOldListOfKeys(t *testing.T) {
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".md") && !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "reference_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, []byte("operations.md lists every key")) || bytes.Contains(b, []byte("operations.md#serveyaml")) || bytes.Contains(b, []byte("operations.md#recordyaml")) {
			t.Errorf("%s: the keys are in docs/configuration.md", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
