package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// front is the one address of the recorders: a load balancer for TCP that sends
// to the recorder whose GET /readyz is 200, and closes what leads to another.
type front struct {
	h      *house
	node   *node
	l      net.Listener
	active atomic.Pointer[string] // name of the recorder that is ready; nil: none
	ctx    context.Context
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu    sync.Mutex
	pipes map[net.Conn]string // to which recorder a caller's connection leads
}

func newFront(h *house) *front {
	f := &front{h: h, node: h.net.nodes["recorder"], pipes: map[net.Conn]string{}}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	return f
}

func (f *front) start() (err error) {
	if f.l, err = f.node.listen("8788"); err != nil {
		return err
	}
	for i := range recorders {
		name := fmt.Sprintf("recorder-%d", i+1)
		ask := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DialContext: f.node.dial, DisableKeepAlives: true}}
		f.done.Go(func() { f.look(name, ask) })
	}
	f.done.Go(func() {
		for {
			conn, err := f.l.Accept()
			if err != nil {
				return
			}
			f.done.Go(func() { f.through(conn) })
		}
	})
	return nil
}

func (f *front) close() {
	f.cancel()
	if f.l != nil {
		f.l.Close()
	}
	f.drop("")
	f.done.Wait()
}

// look keeps asking one recorder whether it is ready.
func (f *front) look(name string, ask *http.Client) {
	for f.ctx.Err() == nil {
		res, err := ask.Get("https://" + f.h.net.nodes[name].host() + ":8788/readyz")
		ready := err == nil && res.StatusCode == http.StatusOK
		if err == nil {
			res.Body.Close()
		}
		is := f.active.Load()
		switch {
		case ready && (is == nil || *is != name):
			f.active.Store(&name)
			if is != nil {
				f.drop(*is)
			}
		case !ready && is != nil && *is == name:
			f.active.CompareAndSwap(is, nil)
			f.drop(name)
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-f.ctx.Done():
		}
	}
}

// drop closes what leads to a recorder; "": everything.
func (f *front) drop(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for conn, to := range f.pipes {
		if name == "" || to == name {
			conn.Close()
		}
	}
}

func (f *front) through(conn net.Conn) {
	defer conn.Close()
	to := f.active.Load()
	if to == nil {
		return
	}
	ctx, cancel := context.WithTimeout(f.ctx, 2*time.Second)
	defer cancel()
	up, err := f.node.dial(ctx, "tcp", f.h.net.nodes[*to].host()+":8788")
	if err != nil {
		return
	}
	defer up.Close()
	f.mu.Lock()
	f.pipes[conn] = *to
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		delete(f.pipes, conn)
		f.mu.Unlock()
	}()
	f.done.Go(func() {
		_, _ = io.Copy(conn, up)
		conn.Close()
		up.Close()
	})
	_, _ = io.Copy(up, conn)
}
