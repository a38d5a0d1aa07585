// Package inject shows a session's secret to an HTTP target, as a grant's
// inject rule says, and knows what to look for where a target shows it back.
package inject

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"golang.org/x/net/http/httpguts"

	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store"
)

// Where a secret is put: the values of store.Inject.In.
const (
	InHeader = "header"
	InQuery  = "query"
	InBasic  = "basic"
	InSigV4  = "sigv4"
)

// Errors of this package. None of them holds a value of the secret.
var (
	ErrUnsupported = errors.New("no such way to show a secret")     // In is not one that Apply knows
	ErrField       = errors.New("the secret has no such field")     // that a template names
	ErrTemplate    = errors.New("a template is not well formed")    // {{ without }}
	ErrValue       = errors.New("the secret cannot be shown there") // such as a line feed in a header
)

// MinValue is the length, in bytes, from which a secret's value is looked for
// in answers. What is shorter stands in them by chance.
const MinValue = 6

// theirs are headers that say how a message is framed or whom it is for; a
// secret in one of them would change what is asked, not who asks.
var theirs = []string{"Host", "Connection", "Content-Length", "Transfer-Encoding", "Trailer", "Te", "Upgrade", "Expect", "Content-Type", "Content-Encoding"}

// Apply shows secret to the target of req in the place that in names, and
// removes what stood there before: a step's own header of that name never
// arrives beside the real one. A nil in changes nothing. In is header, query or
// basic; sigv4 signs a request, and is ErrUnsupported here.
//
// On an error req may be changed, and must not be sent.
func Apply(req *http.Request, in *store.Inject, secret *issuer.Credential) error {
	if in == nil {
		return nil
	}
	fields := Fields(secret)
	switch in.In {
	case InHeader:
		v, err := expand(in.Value, fields)
		if err != nil {
			return err
		}
		name := http.CanonicalHeaderKey(in.Name)
		if !httpguts.ValidHeaderFieldName(name) || slices.Contains(theirs, name) || !httpguts.ValidHeaderFieldValue(v) {
			return fmt.Errorf("%w: header %q", ErrValue, in.Name)
		}
		req.Header.Set(name, v)
	case InQuery:
		v, err := expand(in.Value, fields)
		if err != nil {
			return err
		}
		q, err := without(req.URL.RawQuery, in.Name)
		if err != nil || in.Name == "" {
			return fmt.Errorf("%w: query key %q", ErrValue, in.Name)
		}
		req.URL.RawQuery = strings.TrimPrefix(q+"&"+url.QueryEscape(in.Name)+"="+url.QueryEscape(v), "&")
	case InBasic:
		user, err := expand(in.Username, fields)
		if err != nil {
			return err
		}
		password, err := expand(in.Password, fields)
		if err != nil {
			return err
		}
		if strings.Contains(user, ":") || !printable(user) || !printable(password) {
			return fmt.Errorf("%w: basic (RFC 7617, section 2)", ErrValue)
		}
		req.SetBasicAuth(user, password)
	default:
		return fmt.Errorf("%w: %q", ErrUnsupported, in.In)
	}
	return nil
}

// Values returns what shows the secret that Apply puts into requests: the
// fields that the templates name, as they are and as they are written in a
// query and in a basic Authorization. A target that echoes a request shows one
// of them. For sigv4 they are the secret key and the session token. Values
// shorter than MinValue are left out; the longest come first.
func Values(in *store.Inject, secret *issuer.Credential) []string {
	if in == nil {
		return nil
	}
	fields := Fields(secret)
	var out []string
	add := func(v string) {
		for _, v := range []string{v, url.QueryEscape(v), url.PathEscape(v)} {
			if len(v) >= MinValue && !slices.Contains(out, v) {
				out = append(out, v)
			}
		}
	}
	named := func(t string) {
		if parts, err := parse(t); err == nil {
			for _, p := range parts {
				add(fields[p.field])
			}
		}
	}
	switch in.In {
	case InSigV4:
		add(fields["secret_key"])
		add(fields["security_token"])
	case InBasic:
		named(in.Password)
		user, errU := expand(in.Username, fields)
		password, errP := expand(in.Password, fields)
		if errU == nil && errP == nil && password != "" {
			add(base64.StdEncoding.EncodeToString([]byte(user + ":" + password)))
		}
	default:
		named(in.Value)
	}
	slices.SortStableFunc(out, func(a, b string) int { return len(b) - len(a) })
	return out
}

// Fields returns what templates may name of secret: the members of its data
// that are strings or numbers, and token, username and password where it has
// them. Data read from a KV store of version 2, which wraps it in "data" beside
// "metadata", is unwrapped.
func Fields(secret *issuer.Credential) map[string]string {
	out := map[string]string{}
	if secret == nil {
		return out
	}
	for name, v := range map[string]string{"token": secret.Token, "username": secret.Username, "password": secret.Password} {
		if v != "" {
			out[name] = v
		}
	}
	members := object(secret.Data)
	if inner := object(members["data"]); inner != nil && len(members) == 2 && object(members["metadata"]) != nil {
		members = inner
	}
	for name, raw := range members {
		switch raw.Kind() {
		case '"':
			var s string
			if json.Unmarshal(raw, &s) == nil {
				out[name] = s
			}
		case '0':
			out[name] = string(raw)
		}
	}
	return out
}

func object(raw jsontext.Value) map[string]jsontext.Value {
	var m map[string]jsontext.Value
	if len(raw) == 0 || json.Unmarshal(raw, &m) != nil {
		return nil
	}
	return m
}

// part is literal text followed by the value of a field, where field is set.
type part struct{ literal, field string }

// parse cuts t at {{name}}. It is no template language.
func parse(t string) ([]part, error) {
	var out []part
	for {
		before, rest, found := strings.Cut(t, "{{")
		if strings.Contains(before, "}}") {
			return nil, ErrTemplate
		}
		if !found {
			return append(out, part{literal: before}), nil
		}
		name, after, closed := strings.Cut(rest, "}}")
		if name = strings.TrimSpace(name); !closed || name == "" || strings.ContainsAny(name, "{}") {
			return nil, ErrTemplate
		}
		out = append(out, part{before, name})
		t = after
	}
}

func expand(t string, fields map[string]string) (string, error) {
	parts, err := parse(t)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for _, p := range parts {
		b.WriteString(p.literal)
		if p.field == "" {
			continue
		}
		v, ok := fields[p.field]
		if !ok || v == "" {
			return "", fmt.Errorf("%w: %q", ErrField, p.field)
		}
		b.WriteString(v)
	}
	return b.String(), nil
}

// without takes every pair of key out of a raw query and leaves the rest as it
// is, in order: a target may sign or compare it.
func without(raw, key string) (string, error) {
	if raw == "" {
		return "", nil
	}
	var keep []string
	for pair := range strings.SplitSeq(raw, "&") {
		k, _, _ := strings.Cut(pair, "=")
		name, err := url.QueryUnescape(k)
		if err != nil || strings.Contains(pair, ";") { // some targets take ; for &
			return "", ErrValue
		}
		if name != key {
			keep = append(keep, pair)
		}
	}
	return strings.Join(keep, "&"), nil
}

func printable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}
