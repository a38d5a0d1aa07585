package broker

import (
	"sync"
	"time"
)

// calls is what this process knows of its own calls and nobody else can: which
// intents it is working on, and when each request was answered.
type calls struct {
	mu      sync.Mutex
	working map[string]bool      // intents
	answers map[string]time.Time // by request; zero while the answer is on its way
}

func newCalls() *calls {
	return &calls{working: map[string]bool{}, answers: map[string]time.Time{}}
}

// began notes an intent that is about to be written for a request which another
// call may be minting for.
func (c *calls) began(intent string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.working[intent] = true
}

func (c *calls) started(request, intent string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.working[intent] = true
	c.answers[request] = time.Time{}
}

func (c *calls) ended(intent string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.working, intent)
}

// workingOn reports whether an intent is in the hands of a call.
func (c *calls) workingOn(intent string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.working[intent]
}

func (c *calls) answered(request string, at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if was, ok := c.answers[request]; ok && was.IsZero() {
		c.answers[request] = at
	}
}

// answer says when this broker answered a request: zero while it has not, and
// false where it never had it or no longer knows.
func (c *calls) answer(request string) (time.Time, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	at, ok := c.answers[request]
	return at, ok
}

func (c *calls) forget(request string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.answers, request)
}

// prune forgets answers given before then.
func (c *calls) prune(before time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for r, at := range c.answers {
		if !at.IsZero() && at.Before(before) {
			delete(c.answers, r)
		}
	}
}
