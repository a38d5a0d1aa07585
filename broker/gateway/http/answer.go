package http

import (
	"bytes"
	"compress/gzip"
	"errors"
	"html"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/broker/gateway/masking"
)

// unsaid are headers of a target's that do not reach the step. A cookie of the
// target's would be a credential of its own; the others send the step, or make
// it speak, elsewhere.
var unsaid = []string{"Set-Cookie", "Set-Cookie2", "Alt-Svc", "Alt-Used", "Refresh", "Strict-Transport-Security", "Public-Key-Pins", "Clear-Site-Data", "Via", "Proxy-Status", "Sec-Websocket-Extensions"}

// lengths are headers that describe the content as it was before masking.
var lengths = []string{"Content-Length", "Etag", "Content-Md5", "Digest", "Content-Digest", "Repr-Digest", "Want-Digest", "Accept-Ranges", "Content-Range", "X-Amz-Checksum-Sha256", "X-Amz-Checksum-Crc32", "X-Amz-Checksum-Crc32c", "X-Amz-Checksum-Sha1", "X-Goog-Hash", "Signature", "Signature-Input"}

// answer makes of a target's answer what the step may see. An error means that
// nothing of it is handed on.
func (x *exchange) answer(res *http.Response) error {
	x.mu.Lock()
	x.out.Status = strconv.Itoa(res.StatusCode)
	x.mu.Unlock()
	x.watch.set(x.g.cfg.Idle)
	if res.StatusCode == http.StatusSwitchingProtocols {
		return x.switched(res)
	}
	h := res.Header
	for _, name := range unsaid {
		h.Del(name)
	}
	if err := x.redirect(res); err != nil {
		return err
	}
	if err := x.decoded(res); err != nil {
		return err
	}
	res.Body = &receiving{ReadCloser: res.Body, x: x}
	if err := x.masked(res); err != nil {
		return err
	}
	x.hideHeaders(h)
	x.head = x.heading(res)
	return nil
}

func (x *exchange) heading(res *http.Response) string {
	var b strings.Builder
	x.headers(&b, res.Header, x.v.access.HTTP.ResponseHeaders)
	return strings.TrimPrefix(b.String(), "\n")
}

// redirect lets Location lead to the same target alone, by the way that the step
// came.
func (x *exchange) redirect(res *http.Response) error {
	values := res.Header.Values("Location")
	res.Header.Del("Content-Location")
	if len(values) == 0 {
		return nil
	}
	res.Header.Del("Location")
	redirects := res.StatusCode >= 300 && res.StatusCode < 400 && res.StatusCode != http.StatusNotModified
	to, ok := x.location(values)
	switch {
	case ok:
		res.Header.Set("Location", to)
	case redirects:
		x.g.record(x.r, x.v.sess, gateway.Refusal{Use: x.use, Conn: "http " + x.r.RemoteAddr, Reason: errElsewhere.Error()})
		return errElsewhere
	}
	return nil
}

// location is where a Location leads, in the step's terms.
func (x *exchange) location(values []string) (string, bool) {
	if len(values) != 1 || strings.ContainsFunc(values[0], func(r rune) bool { return r <= ' ' || r > '~' || r == '\\' }) {
		return "", false
	}
	here := &url.URL{Scheme: x.v.base.Scheme, Host: x.v.base.Host, Path: x.v.base.Path + x.path}
	to, err := here.Parse(values[0])
	if err != nil || to.User != nil || to.Opaque != "" || !sameHost(to, x.v.base) {
		return "", false
	}
	path, err := canonical(to.EscapedPath())
	if to.Path == "" {
		path, err = "/", nil
	}
	rest, below := strings.CutPrefix(path, x.v.base.Path)
	if err != nil || !below || rest != "" && rest[0] != '/' {
		return "", false
	}
	if x.v.key != "" {
		q := to.Query()
		q.Del(x.v.key) // where the target was shown the secret
		to.RawQuery = q.Encode()
	}
	if q, n := x.v.query(to.RawQuery); n > 0 {
		to.RawQuery = q
		x.count(n, 0)
	}
	if x.by == reverse {
		to.Scheme, to.Host, to.Path, to.RawPath = x.g.self.Scheme, x.g.self.Host, rest, ""
	}
	return to.String(), true
}

// query hides in a query what rules by name call so, and counts it.
func (v *view) query(raw string) (string, int64) {
	var n int64
	pairs := strings.Split(raw, "&")
	for i, pair := range pairs {
		key, value, _ := strings.Cut(pair, "=")
		name, err := url.QueryUnescape(key)
		if v.masker.Column("", "", name, "") && value != "" || err != nil && v.named {
			pairs[i], n = key+"="+url.QueryEscape(masking.Hidden), n+1
		}
	}
	return strings.Join(pairs, "&"), n
}

// decoded takes a coding off that nobody asked for.
func (x *exchange) decoded(res *http.Response) error {
	var codings []string
	for _, v := range res.Header.Values("Content-Encoding") {
		for c := range strings.SplitSeq(v, ",") {
			if c = strings.ToLower(strings.TrimSpace(c)); c != "" && c != "identity" {
				codings = append(codings, c)
			}
		}
	}
	if len(codings) == 0 {
		return nil
	}
	res.Header.Del("Content-Encoding")
	if x.empty(res) {
		return nil
	}
	if len(codings) > 1 || codings[0] != "gzip" && codings[0] != "x-gzip" {
		return withheld("it is compressed in a way that the gateway does not read")
	}
	for _, name := range lengths {
		res.Header.Del(name)
	}
	res.ContentLength = -1
	res.Body = &unzipping{from: res.Body}
	return nil
}

// empty reports whether an answer has no content by what its head says.
func (x *exchange) empty(res *http.Response) bool {
	return x.r.Method == http.MethodHead || res.StatusCode == http.StatusNoContent || res.StatusCode == http.StatusNotModified || res.ContentLength == 0
}

// unzipping reads gzip (RFC 1952), whose head is read when the content is.
type unzipping struct {
	from io.ReadCloser
	z    *gzip.Reader
}

func (u *unzipping) Read(p []byte) (n int, err error) {
	if u.z == nil {
		if u.z, err = gzip.NewReader(u.from); err != nil {
			return 0, errors.New("not gzip")
		}
	}
	return u.z.Read(p)
}

func (u *unzipping) Close() error { return u.from.Close() }

// receiving is content on its way from the target.
type receiving struct {
	io.ReadCloser
	x *exchange
}

func (r *receiving) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.x.watch.touch()
	if err != nil && err != io.EOF {
		r.x.note(err)
	}
	return n, err
}

// masked replaces the content by what the step may see of it.
func (x *exchange) masked(res *http.Response) error {
	v := x.v
	if v.masker == nil {
		x.hideHeaders(res.Trailer) // their names are told now, their values when the content ends
		res.Body = &redacting{from: res.Body, r: redactor{s: v.secrets}, x: x, res: res}
		return nil
	}
	res.Trailer = nil
	for _, name := range lengths {
		res.Header.Del(name)
	}
	res.Header.Del("Trailer")
	// Reading the content to its end sets them again.
	defer func() { res.Trailer, res.Body = nil, &untrailed{res.Body, res} }()
	if x.empty(res) {
		if x.r.Method == http.MethodHead {
			res.ContentLength = -1
		}
		return nil
	}
	res.ContentLength = -1
	kind, err := x.kind(res)
	if err != nil {
		return err
	}
	switch kind {
	case streamed:
		t, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type"))
		m := &records{x: x, in: newLines(res.Body), events: t == "text/event-stream"}
		res.Body = &redacting{from: &recordBody{m: m, Closer: res.Body}, r: redactor{s: v.secrets}, x: x, res: res}
		return nil
	case unknown:
		// It may still be that there is nothing.
		if n, err := io.ReadFull(res.Body, make([]byte, 1)); n == 0 && err == io.EOF {
			return nil
		}
		if res.Header.Get("Location") != "" && res.StatusCode >= 300 && res.StatusCode < 400 {
			// What servers write beside a redirect says no more than its head.
			_ = res.Body.Close()
			res.Body = http.NoBody
			res.Header.Del("Content-Type")
			x.count(1, 0)
			return nil
		}
		return withheld("content of this type cannot be masked by the rules in force")
	}
	b, err := x.all(res)
	if err != nil {
		return err
	}
	b, n, err := x.whole(kind, b, res.Header)
	if err != nil {
		return err
	}
	out, found := v.secrets.text(string(b))
	x.count(n+found, 0)
	_ = res.Body.Close()
	res.Body = io.NopCloser(strings.NewReader(out))
	res.ContentLength = int64(len(out))
	res.Header.Set("Content-Length", strconv.Itoa(len(out)))
	return nil
}

// content is how an answer's content is masked.
type content int

const (
	unknown  content = iota // not at all
	document                // as JSON
	text                    // by detectors
	form                    // by detectors, decoded
	markup                  // by detectors, where character references hide nothing
	streamed                // line by line, or event by event
)

// kind says how content is masked, by its type. What the type does not surely
// say is not masked but withheld.
func (x *exchange) kind(res *http.Response) (content, error) {
	types := res.Header.Values("Content-Type")
	if len(types) != 1 || res.StatusCode == http.StatusPartialContent {
		return unknown, nil
	}
	t, params, err := mime.ParseMediaType(types[0])
	if err != nil {
		return unknown, nil
	}
	switch strings.ToLower(params["charset"]) {
	case "", "utf-8", "utf8", "us-ascii", "iso-8859-1", "windows-1252":
	default:
		return unknown, nil
	}
	sub := t[strings.IndexByte(t, '/')+1:]
	switch {
	case isJSON(t):
		return document, nil
	case t == "text/event-stream", slices.Contains([]string{"x-ndjson", "ndjson", "jsonl", "x-jsonl", "jsonlines", "x-jsonlines", "stream+json"}, sub) && strings.HasPrefix(t, "application/"):
		return streamed, nil
	case x.v.named:
		return unknown, nil
	case t == "application/x-www-form-urlencoded":
		return form, nil
	case sub == "xml" || strings.HasSuffix(sub, "+xml") || t == "text/html":
		return markup, nil
	case strings.HasPrefix(t, "text/"), slices.Contains([]string{"javascript", "ecmascript", "yaml", "x-yaml", "sql", "graphql", "toml"}, sub) && strings.HasPrefix(t, "application/"):
		return text, nil
	}
	return unknown, nil
}

func isJSON(t string) bool {
	return t == "application/json" || t == "text/json" || strings.HasPrefix(t, "application/") && strings.HasSuffix(t, "+json") && t != "application/stream+json"
}

// all reads content that is masked as a whole.
func (x *exchange) all(res *http.Response) ([]byte, error) {
	limit := time.Duration(x.v.access.HTTP.Timeout)
	if limit <= 0 {
		limit = x.g.cfg.Timeout
	}
	late := time.AfterFunc(limit, func() { x.cut(errTimeout) })
	defer late.Stop()
	b, err := io.ReadAll(io.LimitReader(res.Body, MaxMasked+1))
	switch {
	case err != nil && x.ctx.Err() != nil:
		return nil, err
	case err != nil:
		return nil, withheld("it broke off, and part of it cannot be masked")
	case len(b) > MaxMasked:
		return nil, withheld("it is larger than what is masked as a whole")
	}
	return b, nil
}

// whole masks content that is there in full.
func (x *exchange) whole(kind content, b []byte, h http.Header) ([]byte, int64, error) {
	m := x.v.masker
	if len(b) == 0 {
		return b, 0, nil
	}
	if kind == document {
		out, n, err := x.v.document(b)
		if err != nil {
			return nil, 0, withheld("it says it is JSON, and cannot be masked as that")
		}
		return out, n, nil
	}
	if bytes.IndexByte(b, 0) >= 0 { // UTF-16, or no text
		return nil, 0, withheld("it says it is text, and is not")
	}
	switch kind {
	case form:
		var n int64
		pairs := strings.Split(string(b), "&")
		for i, pair := range pairs {
			parts := strings.SplitN(pair, "=", 2)
			for j, p := range parts {
				s, err := url.QueryUnescape(p)
				if err != nil {
					return nil, 0, withheld("it says it is a form, and is not")
				}
				if out, found := m.Text([]byte(s)); found > 0 {
					parts[j], n = url.QueryEscape(string(out)), n+found
				}
			}
			pairs[i] = strings.Join(parts, "=")
		}
		return []byte(strings.Join(pairs, "&")), n, nil
	case markup:
		out, n := m.Text(b)
		if plain := html.UnescapeString(string(out)); plain != string(out) {
			if _, hidden := m.Text([]byte(plain)); hidden > 0 {
				return nil, 0, withheld("what is to be masked stands in character references")
			}
		}
		return out, n, nil
	}
	// JSON that says it is text may be read as JSON all the same.
	if t := bytes.TrimLeft(b, " \t\r\n"); len(t) > 0 && (t[0] == '{' || t[0] == '[') {
		if out, n, err := m.JSON(b); err == nil {
			return out, n, nil
		}
	}
	out, n := m.Text(b)
	return out, n, nil
}

// document masks a JSON document.
func (v *view) document(b []byte) ([]byte, int64, error) {
	if t := bytes.Trim(b, " \t\r\n"); v.named && len(t) > 0 && t[0] != '{' && t[0] != '[' && string(t) != "null" {
		if jsontext.Value(t).IsValid() {
			return []byte(strconv.Quote(masking.Hidden)), 1, nil // a value without a name, which may be any
		}
		return nil, 0, masking.ErrNotJSON
	}
	return v.masker.JSON(b)
}

func (x *exchange) count(masked, rows int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.out.Masked += masked
	x.out.Rows += rows
}

// hideHeaders masks the values of headers. A name that shows a secret goes with
// its values.
func (x *exchange) hideHeaders(h http.Header) {
	for name, values := range h {
		_, n := x.v.secrets.text(name)
		_, found := x.v.masker.Text([]byte(name))
		if n+found > 0 {
			delete(h, name)
			x.count(n+found, 0)
			continue
		}
		switch name {
		case "Date", "Content-Length", "Content-Type", "Transfer-Encoding", "Last-Modified", "Expires":
			if x.v.masker == nil || framed(name, values) {
				for i, v := range values {
					out, n := x.v.secrets.text(v)
					values[i] = out
					x.count(n, 0)
				}
				continue
			}
		}
		if x.v.named && !plain(name) {
			delete(h, name) // a value that a rule may mean under another name
			x.count(1, 0)
			continue
		}
		for i, v := range values {
			out, n := x.v.header(name, v)
			values[i] = out
			x.count(n, 0)
		}
	}
}

// known are headers that say nothing of what a target's data are, but for what
// detectors find: they pass where rules go by names.
var known = []string{"Age", "Allow", "Cache-Control", "Content-Language", "Content-Type", "Link", "Location", "Pragma", "Retry-After", "Server", "Vary", "Www-Authenticate",
	"Deprecation", "Sunset", "Accept-Patch", "Accept-Post", "Timing-Allow-Origin", "Traceparent", "X-Content-Type-Options", "X-Correlation-Id", "X-Request-Id", "X-Total-Count"}

func plain(name string) bool {
	return slices.Contains(known, name) || strings.HasPrefix(name, "Access-Control-") || strings.HasPrefix(name, "Ratelimit") || strings.HasPrefix(name, "X-Ratelimit-")
}

// framed reports whether a header's values are what HTTP says they are, in
// which no detector need look.
func framed(name string, values []string) bool {
	for _, v := range values {
		switch name {
		case "Date", "Last-Modified", "Expires":
			if _, err := http.ParseTime(v); err != nil {
				return false
			}
		case "Content-Length":
			if _, err := strconv.ParseInt(v, 10, 64); err != nil {
				return false
			}
		default:
			return false
		}
	}
	return true
}

// header masks a header's value. A rule that names a field names a header, too.
func (v *view) header(name, value string) (string, int64) {
	if v.masker == nil {
		return v.secrets.text(value)
	}
	if v.masker.Column("", "", name, "") {
		return masking.Hidden, 1
	}
	var n int64
	if !utf8.ValidString(value) {
		return masking.Hidden, 1
	}
	if t := strings.TrimSpace(value); strings.HasPrefix(t, "{") || strings.HasPrefix(t, "[") {
		out, found, err := v.masker.JSON([]byte(value))
		switch {
		case err == nil:
			value, n = string(out), found
		case v.named: // a reader may take from it what a rule hides
			return masking.Hidden, 1
		}
	}
	out, found := v.masker.Text([]byte(value))
	s, more := v.secrets.text(string(out))
	return s, n + found + more
}

// redacting is content without the secret, as it streams. Trailers are read when
// it ends, and then hidden likewise.
type redacting struct {
	from  io.ReadCloser
	r     redactor
	x     *exchange
	res   *http.Response
	out   []byte
	err   error
	said  int64
	plain [16 << 10]byte
}

func (r *redacting) Read(p []byte) (int, error) {
	for len(r.out) == 0 && r.err == nil {
		var n int
		n, r.err = r.from.Read(r.plain[:])
		r.out = r.r.add(r.plain[:n])
		if r.err == io.EOF {
			r.out = append(slices.Clip(r.out), r.r.end()...)
			r.x.hideHeaders(r.res.Trailer)
		}
		r.x.count(r.r.n-r.said, 0)
		r.said = r.r.n
	}
	n := copy(p, r.out)
	r.out = r.out[n:]
	if len(r.out) > 0 {
		return n, nil
	}
	return n, r.err
}

func (r *redacting) Close() error { return r.from.Close() }

// untrailed is content after which nothing comes.
type untrailed struct {
	io.ReadCloser
	res *http.Response
}

func (u *untrailed) Read(p []byte) (int, error) {
	n, err := u.ReadCloser.Read(p)
	if err != nil {
		u.res.Trailer = nil
	}
	return n, err
}

func (u *untrailed) Close() error {
	err := u.ReadCloser.Close()
	u.res.Trailer = nil
	return err
}
