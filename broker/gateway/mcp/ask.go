package mcp

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/broker/gateway"
	"github.com/countersign-dev/countersign/store"
)

// maxReason is how long the arguments of a call that people are asked about may
// be, in bytes: they approve what they see, and so all of it is shown.
const maxReason = 12 << 10

// reasonOf is what people are asked to approve.
func reasonOf(q *asked) string { return "MCP " + q.use + " " + q.statement }

// ask asks for the scope that k's tool demands, and reports whether k may go on,
// under the session of what was minted. Meanwhile the step gets comments, so
// that nothing on the way takes the connection for dead.
func (x *exchange) ask(k *call) bool {
	ctx, stop := context.WithTimeout(x.ctx, x.g.cfg.ApprovalWait)
	defer stop()
	type answer struct {
		sess *gateway.Session
		err  error
	}
	done := make(chan answer, 1)
	go func() {
		sess, err := x.v.sess.Ask(ctx, k.q.scope, reasonOf(k.q))
		done <- answer{sess, err}
	}()
	alive := time.NewTicker(x.g.cfg.KeepAlive)
	defer alive.Stop()
	var got answer
	for waiting := true; waiting; {
		select {
		case got = <-done:
			waiting = false
		case <-alive.C:
			if x.stream() != nil || x.out.send(&event{}) != nil {
				x.cancel(errWrite)
				alive.Stop()
			}
		}
	}
	var due *gateway.Waiting
	switch {
	case x.ctx.Err() != nil:
		if got.sess != nil { // it was approved for nobody
			x.g.cfg.Gateway.End(got.sess.Intent)
		}
		x.fail(k, x.reason(errWrite))
		return false
	case errors.As(got.err, &due):
		text := fmt.Sprintf("Tool %s needs an approval for scope %s (request %s). Nothing was called. ", k.q.name, k.q.scope, due.Request)
		if due.URL != "" {
			text += "People decide at " + due.URL + " . "
		}
		x.toolError(k, text+"Call the tool again, with the same arguments, once it is approved.")
		return false
	case errors.Is(got.err, gateway.ErrDenied):
		x.toolError(k, fmt.Sprintf("Tool %s needs scope %s, which was denied. Nothing was called.", k.q.name, k.q.scope))
		return false
	case got.err != nil:
		x.g.cfg.Log.Info("a tool's scope was not granted", zap.String("scope", k.q.scope), zap.Error(got.err))
		x.toolError(k, fmt.Sprintf("Tool %s needs scope %s, which was not granted. Nothing was called.", k.q.name, k.q.scope))
		return false
	}
	if reason := x.adopt(k, got.sess); reason != "" {
		x.g.cfg.Gateway.End(got.sess.Intent)
		x.refuse(http.StatusOK, k.q.m, k.q.statement, &refused{codeParams, k.q.use, reason})
		return false
	}
	return true
}

// adopt lets k go on under sess, with the rules of both sessions, and says what
// speaks against it.
func (x *exchange) adopt(k *call, sess *gateway.Session) string {
	a := sess.Grant.Access
	var tool *store.MCPTool
	if a != nil {
		tool = toolOf(a, k.q.name)
	}
	switch {
	case a == nil || a.Protocol != store.ProtocolMCP || a.Upstream != x.v.access.Upstream:
		return "scope " + k.q.scope + " is not for this MCP server"
	case tool == nil || tool.Scope != "":
		return "scope " + k.q.scope + " does not allow the tool that demands it"
	}
	hide := x.v.hide.fresh()
	hide.maskers, hide.secrets = hide.maskers[:len(hide.maskers):len(hide.maskers)], hide.secrets[:len(hide.secrets):len(hide.secrets)]
	if err := hide.add(a, sess.Secret); err != nil {
		return "the rules of scope " + k.q.scope + " cannot be read"
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.sess, k.hide = sess, hide
	k.c.adopt(k.q.scope, hide)
	return ""
}

// toolError answers as a tool that failed does, so that the model reads it.
func (x *exchange) toolError(k *call, text string) {
	content := object{{"type", quoted("text")}, {"text", quoted(text)}}
	result := object{{"content", list([]jsontext.Value{content.value()})}, {"isError", jsontext.Value("true")}}
	if _, version := k.c.agreed(); version == stateless {
		result = append(result, member{"resultType", quoted("complete")})
	}
	_, _ = x.answer(http.StatusOK, &message{ID: k.q.m.ID, Result: result.value()}) // who has hung up calls again
}
