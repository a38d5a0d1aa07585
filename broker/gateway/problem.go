package gateway

import (
	"net/http"

	"github.com/go-json-experiment/json"
)

// Problem answers a step over HTTP with a problem document (RFC 9457) of the
// API's kinds. slug names the kind; detail holds no value of the step's or the
// target's.
func Problem(w http.ResponseWriter, status int, slug, detail string) {
	b, err := json.Marshal(map[string]any{
		"type": "https://countersign.dev/problems/" + slug, "title": http.StatusText(status), "status": status, "detail": detail,
	}, json.Deterministic(true))
	if err != nil {
		panic(err) // strings and a number always marshal
	}
	w.Header().Set("Content-Type", "application/problem+json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(b) // a step that does not read it has hung up
}
