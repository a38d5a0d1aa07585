package mcp

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Codes of JSON-RPC 2.0 (section 5.1), and of MCP (2026-07-28, SEP-2243 and
// SEP-2575).
const (
	codeParse          = -32700
	codeInvalid        = -32600
	codeMethod         = -32601
	codeParams         = -32602
	codeInternal       = -32603
	codeHeaderMismatch = -32020
	codeVersion        = -32022
)

// rpcError is the error of a JSON-RPC response.
type rpcError struct {
	Code    int64          `json:"code"`
	Message string         `json:"message"`
	Data    jsontext.Value `json:"data,omitzero"`
}

// message is one JSON-RPC message: a request (ID and Method), a notification
// (Method), or a response (ID and one of Result and Error).
type message struct {
	JSONRPC string         `json:"jsonrpc"`
	ID      jsontext.Value `json:"id,omitzero"` // canonical: a string, or an integer
	Method  string         `json:"method,omitzero"`
	Params  jsontext.Value `json:"params,omitzero"` // an object
	Result  jsontext.Value `json:"result,omitzero"` // an object
	Error   *rpcError      `json:"error,omitzero"`
}

func (m *message) request() bool      { return m.Method != "" && m.ID != nil }
func (m *message) notification() bool { return m.Method != "" && m.ID == nil }
func (m *message) response() bool     { return m.Method == "" }

// encode is m as it goes on, in one line. m holds valid JSON alone, but for
// names of members that became one when they were masked.
func (m *message) encode() []byte {
	m.JSONRPC = "2.0"
	b, err := json.Marshal(m, jsontext.AllowDuplicateNames(true))
	if err != nil {
		panic(err) // parse and the code of this package put nothing else in
	}
	return b
}

// Errors of parse.
var (
	errBatch   = errors.New("a batch: MCP 2025-06-18 has none")
	errMessage = errors.New("no JSON-RPC message")
)

const (
	maxID     = 256 // bytes of a request's id, and of a progress token
	maxMethod = 64  // bytes
)

// integers are the ids that every language reads as the same number.
var integers = regexp.MustCompile(`^(0|-?[1-9][0-9]{0,14})$`)

// parse reads one message, strictly: valid UTF-8, no member twice, none that
// JSON-RPC does not have, so that nothing that the gateway judged is read
// differently by a server. The error holds no value of b.
func parse(b []byte) (*message, error) {
	if b = bytes.TrimLeft(b, " \t\r\n"); len(b) > 0 && b[0] == '[' {
		return nil, errBatch
	}
	var w struct {
		JSONRPC jsontext.Value `json:"jsonrpc"`
		ID      jsontext.Value `json:"id"`
		Method  jsontext.Value `json:"method"`
		Params  jsontext.Value `json:"params"`
		Result  jsontext.Value `json:"result"`
		Error   jsontext.Value `json:"error"`
	}
	if err := json.Unmarshal(b, &w, json.RejectUnknownMembers(true)); err != nil {
		return nil, fmt.Errorf("%w: not strict JSON, or a member that JSON-RPC does not have", errMessage)
	}
	if string(w.JSONRPC) != `"2.0"` {
		return nil, fmt.Errorf("%w: jsonrpc is not 2.0", errMessage)
	}
	m := &message{}
	if w.ID != nil && (w.Method != nil || string(w.ID) != "null") { // a response to what could not be read has the id null
		id, ok := identifier(w.ID)
		if !ok {
			return nil, fmt.Errorf("%w: the id is no string and no integer", errMessage)
		}
		m.ID = id
	}
	if w.Method != nil {
		if json.Unmarshal(w.Method, &m.Method) != nil || m.Method == "" || len(m.Method) > maxMethod || strings.ContainsFunc(m.Method, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return nil, fmt.Errorf("%w: the method is no name", errMessage)
		}
		if w.Result != nil || w.Error != nil {
			return nil, fmt.Errorf("%w: a request and a response in one", errMessage)
		}
		if w.Params != nil && w.Params.Kind() != '{' {
			return nil, fmt.Errorf("%w: the params are no object", errMessage)
		}
		m.Params = w.Params
		return m, nil
	}
	switch {
	case w.Params != nil || w.ID == nil || (w.Result == nil) == (w.Error == nil):
		return nil, fmt.Errorf("%w: neither a request nor a response", errMessage)
	case w.Result != nil:
		if w.Result.Kind() != '{' || m.ID == nil {
			return nil, fmt.Errorf("%w: the result is no object", errMessage)
		}
		m.Result = w.Result
	default:
		m.Error = new(rpcError)
		if w.Error.Kind() != '{' || json.Unmarshal(w.Error, m.Error) != nil {
			return nil, fmt.Errorf("%w: the error is none of JSON-RPC", errMessage)
		}
	}
	return m, nil
}

// identifier is a request's id, or a progress token, in the one form that it
// goes on in.
func identifier(v jsontext.Value) (jsontext.Value, bool) {
	switch v.Kind() {
	case '0':
		return v, integers.Match(v)
	case '"':
		var s string
		if json.Unmarshal(v, &s) != nil || len(s) > maxID {
			return nil, false
		}
		return quoted(s), true
	}
	return nil, false
}

// quoted is s as JSON.
func quoted(s string) jsontext.Value {
	b, err := jsontext.AppendQuote(nil, strings.ToValidUTF8(s, "\uFFFD"))
	if err != nil {
		panic(err) // the text is valid
	}
	return b
}

// member is one of an object, in its order.
type member struct {
	name  string
	value jsontext.Value
}

// object is a JSON object that keeps its order.
type object []member

// membersOf reads an object. v must be one; nil has no members.
func membersOf(v jsontext.Value) (object, error) {
	if v == nil {
		return nil, nil
	}
	d := jsontext.NewDecoder(bytes.NewReader(v))
	if t, err := d.ReadToken(); err != nil || t.Kind() != '{' {
		return nil, errors.New("no JSON object")
	}
	var out object
	for d.PeekKind() != '}' {
		t, err := d.ReadToken()
		if err != nil {
			return nil, err
		}
		name := t.String()
		value, err := d.ReadValue()
		if err != nil {
			return nil, err
		}
		out = append(out, member{name, value.Clone()})
	}
	return out, nil
}

func elementsOf(v jsontext.Value) ([]jsontext.Value, error) {
	var out []jsontext.Value
	if v.Kind() != '[' {
		return nil, errors.New("no JSON array")
	}
	err := json.Unmarshal(v, &out)
	return out, err
}

func (o object) get(name string) jsontext.Value {
	for _, m := range o {
		if m.name == name {
			return m.value
		}
	}
	return nil
}

// text is a member that is a string.
func (o object) text(name string) (string, bool) {
	v := o.get(name)
	if v.Kind() != '"' {
		return "", false
	}
	var s string
	return s, json.Unmarshal(v, &s) == nil
}

func (o *object) set(name string, v jsontext.Value) {
	for i := range *o {
		if (*o)[i].name == name {
			(*o)[i].value = v
			return
		}
	}
	*o = append(*o, member{name, v})
}

// value is o as JSON.
func (o object) value() jsontext.Value {
	b := []byte{'{'}
	for i, m := range o {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(append(append(b, quoted(m.name)...), ':'), m.value...)
	}
	return append(b, '}')
}

// list is an array of vs as JSON.
func list(vs []jsontext.Value) jsontext.Value {
	b := []byte{'['}
	for i, v := range vs {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, v...)
	}
	return append(b, ']')
}
