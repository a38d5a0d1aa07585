package http

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/broker/gateway/inject"
	"github.com/countersign-dev/countersign/broker/gateway/masking"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/trust"
)

// view is what a session's rules mean here.
type view struct {
	sess    *gateway.Session
	access  *store.Access
	base    *url.URL // of the target
	masker  *masking.Masker
	named   bool // a rule goes by a value's name or place, which JSON alone has
	secrets *secrets
	shown   string // the header in which the target is shown the secret, in lower case; empty: none
	key     string // the query's key in which it is
}

// view returns what is known of sess, and learns it the first time.
func (g *Gateway) view(sess *gateway.Session) (*view, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if v := g.views[sess]; v != nil {
		return v, nil
	}
	a := sess.Grant.Access
	if a.HTTP == nil {
		return nil, errors.New("the grant has no routes")
	}
	base, err := url.Parse(a.Upstream)
	if err != nil || base.Scheme != "http" && base.Scheme != "https" || base.Hostname() == "" || base.User != nil || base.RawQuery != "" || base.Fragment != "" {
		return nil, errors.New("the upstream is no base URL")
	}
	base.Path, base.RawPath = strings.TrimSuffix(base.Path, "/"), ""
	v := &view{sess: sess, access: a, base: base, secrets: newSecrets(inject.Values(a.Inject, sess.Secret))}
	if v.masker, err = masking.New(a.Masking); err != nil {
		return nil, err
	}
	for _, r := range a.Masking.Rules {
		v.named = v.named || r.Detector == ""
	}
	if in := a.Inject; in != nil {
		switch in.In {
		case inject.InHeader:
			v.shown = strings.ToLower(in.Name)
		case inject.InQuery:
			v.key = in.Name
		}
	}
	g.views[sess] = v
	context.AfterFunc(sess.Context(), func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.views, sess)
	})
	return v, nil
}

// newTransport reaches targets by the gateway's Dial, and never through a proxy
// of the environment. Connections are shared by the
// sessions of a target; whom a request is from is said by each request itself.
func (g *Gateway) newTransport() *trust.Transport {
	return g.cfg.Gateway.Targets.Transport(&http.Transport{
		DialContext:            g.cfg.Gateway.Dial,
		ForceAttemptHTTP2:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: 64 << 10,
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        90 * time.Second,
		TLSHandshakeTimeout:    10 * time.Second,
		WriteBufferSize:        16 << 10,
	})
}
