// Package witness has both sides of C2SP tlog-witness: the witness, which
// cosigns a log's checkpoints as long as each continues the one before, and the
// log's side, which asks witnesses and publishes what they cosigned.
//
// A witness sees no entry, only tree sizes and roots. What it is good for is
// that a log cannot show two histories to two people, nor take one back, once
// it was witnessed.
package witness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"filippo.io/torchwood"
	"github.com/go-chi/chi/v5"
	"github.com/go-json-experiment/json"
	"go.uber.org/zap"
	"golang.org/x/mod/sumdb/note"
)

// ServerConfig says what a witness cosigns. Signer, Dir and Logs must be set.
type ServerConfig struct {
	Signer *torchwood.CosignatureSigner
	Dir    string           // of its state; made where it is missing
	Logs   []Log            //
	Now    func() time.Time // for what is shown of heads and forks; time.Now where nil. Cosignatures carry the time of the machine
	Log    *zap.Logger      // none where nil
}

// Log is a log that a witness cosigns.
type Log struct {
	Origin string // the first line of its checkpoints; the name of the key where empty
	Key    string // its verifier key (C2SP signed-note vkey)
}

// Server is a witness. It is safe for concurrent use.
type Server struct {
	c     ServerConfig
	logs  map[string][]note.Verifier // by origin
	state *state

	// persisted is called once a head is on disk and before its cosignature is
	// made. Tests end the process there.
	persisted func()
}

// NewServer opens the state in c.Dir.
func NewServer(c ServerConfig) (*Server, error) {
	if c.Signer == nil || c.Dir == "" || len(c.Logs) == 0 {
		return nil, errors.New("a witness needs a key, a directory and at least one log")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	s := &Server{c: c, logs: map[string][]note.Verifier{}, persisted: func() {}}
	for _, l := range c.Logs {
		v, err := note.NewVerifier(l.Key)
		if err != nil {
			return nil, fmt.Errorf("log key %q: %w", l.Key, err)
		}
		origin := l.Origin
		if origin == "" {
			origin = v.Name()
		}
		for _, other := range s.logs[origin] {
			if other.Name() == v.Name() && other.KeyHash() == v.KeyHash() {
				return nil, fmt.Errorf("log %q is named twice with one key", origin)
			}
		}
		s.logs[origin] = append(s.logs[origin], v)
	}
	var err error
	s.state, err = openState(c.Dir)
	return s, err
}

// Close closes the state.
func (s *Server) Close() error { return s.state.close() }

// Routes adds the witness to r: POST /add-checkpoint (C2SP tlog-witness), and
// what it knows, for whoever looks into a log: GET /logs, the latest checkpoint
// cosigned of each, and GET /forks, the evidence kept.
func (s *Server) Routes(r chi.Router) {
	r.Post("/add-checkpoint", s.addCheckpoint)
	r.Get("/logs", func(w http.ResponseWriter, r *http.Request) {
		list, err := s.state.heads(r.Context())
		s.list(w, r, list, err)
	})
	r.Get("/forks", func(w http.ResponseWriter, r *http.Request) {
		list, err := s.state.forks(r.Context())
		s.list(w, r, list, err)
	})
}

func (s *Server) list(w http.ResponseWriter, r *http.Request, list any, err error) {
	if err != nil {
		s.fail(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.MarshalWrite(w, list)
}

func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil { // whatever broke off broke off for that
		http.Error(w, "the connection was closed before the call was answered", http.StatusBadRequest)
		return
	}
	// Of the listener's own, where there is one.
	s.c.Log.Error("state", zap.String("request_id", w.Header().Get("X-Request-Id")), zap.Error(err))
	http.Error(w, "internal error", http.StatusInternalServerError)
}

var (
	errUnknownLog = errors.New("this witness does not know the log")
	errSignature  = errors.New("the checkpoint is not signed by a key that this witness knows of the log")
)

func (s *Server) addCheckpoint(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBody))
	var big *http.MaxBytesError
	switch {
	case errors.As(err, &big):
		http.Error(w, "the body is too large", http.StatusRequestEntityTooLarge)
		return
	case err != nil:
		http.Error(w, "the body broke off before its end", http.StatusBadRequest)
		return
	}
	cosignatures, err := s.cosign(r.Context(), body)
	var known *conflict
	switch {
	case err == nil:
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = w.Write(cosignatures)
	case errors.As(err, &known):
		w.Header().Set("Content-Type", "text/x.tlog.size")
		w.WriteHeader(http.StatusConflict)
		_, _ = io.WriteString(w, strconv.FormatInt(known.size, 10)+"\n")
	case errors.Is(err, errMalformed):
		http.Error(w, err.Error(), http.StatusBadRequest)
	case errors.Is(err, errUnknownLog):
		http.Error(w, err.Error(), http.StatusNotFound)
	case errors.Is(err, errSignature):
		http.Error(w, err.Error(), http.StatusForbidden)
	case errors.Is(err, errProof):
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
	default:
		s.fail(w, r, err)
	}
}

// cosign returns the signature lines for the checkpoint in body.
func (s *Server) cosign(ctx context.Context, body []byte) ([]byte, error) {
	r, err := parseRequest(body)
	if err != nil {
		return nil, err
	}
	keys := s.logs[r.checkpoint.Origin]
	if keys == nil {
		return nil, errUnknownLog
	}
	n, err := note.Open([]byte(r.note), note.VerifierList(keys...))
	var unverified *note.UnverifiedNoteError
	var invalid *note.InvalidSignatureError
	switch {
	case errors.As(err, &unverified), errors.As(err, &invalid):
		return nil, errSignature
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errMalformed, err)
	}
	// What was parsed before the signature was checked is what it covers.
	if n.Text != r.checkpoint.String() {
		return nil, fmt.Errorf("%w: not the canonical form of a checkpoint", errMalformed)
	}
	if r.old > r.checkpoint.N {
		return nil, fmt.Errorf("%w: the old size is larger than the checkpoint's", errMalformed)
	}
	// Signatures of others prove nothing about the log: they are not kept.
	text := n.Text
	kept, err := note.Sign(&note.Note{Text: text, Sigs: n.Sigs})
	if err != nil {
		return nil, err
	}
	r.note = string(kept)
	err = s.state.advance(ctx, r, s.c.Now())
	var c *conflict
	if errors.Is(err, errProof) || errors.As(err, &c) && c.fork {
		s.c.Log.Error("a checkpoint that the log signed does not continue the one cosigned last",
			zap.String("log", r.checkpoint.Origin), zap.Int64("size", r.checkpoint.N), zap.Int64("old", r.old), zap.Error(err))
	}
	if err != nil {
		return nil, err
	}
	s.persisted()
	signed, err := note.Sign(&note.Note{Text: text}, s.c.Signer)
	if err != nil {
		return nil, err
	}
	_, lines, ok := bytes.Cut(signed[len(text):], []byte("\n"))
	if !ok || len(lines) == 0 {
		return nil, errors.New("the cosignature is no signed note")
	}
	s.c.Log.Debug("cosigned", zap.String("log", r.checkpoint.Origin), zap.Int64("size", r.checkpoint.N))
	return lines, nil
}
