package main

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"
)

// clockOff is how far clocks are set wrong: more than the 30 s for which an intent
// warrants a mint, less than the minute by which a credential may be late.
const clockOff = 40 * time.Second

const partition = "partition"

// fault is something that befalls a part. inflict returns what ends it, nil where
// there is nothing to end.
type fault struct {
	name    string
	inflict func(h *house, p *process) (end func() error, err error)
}

var faults = []fault{
	{"kill -9", func(_ *house, p *process) (func() error, error) {
		return nil, p.signal(syscall.SIGKILL) // the supervisor starts it again
	}},
	{"stop", func(_ *house, p *process) (func() error, error) {
		return func() error { return p.signal(syscall.SIGCONT) }, p.signal(syscall.SIGSTOP)
	}},
	{partition, func(h *house, p *process) (func() error, error) {
		return h.net.mend, h.net.cut(p.name, h.behind(p)...)
	}},
	{"disk full", func(_ *house, p *process) (func() error, error) { return p.fill() }},
	{"slow", func(_ *house, p *process) (func() error, error) {
		end := p.slow()
		return func() error { end(); return nil }, nil
	}},
	{"clock fast", func(_ *house, p *process) (func() error, error) {
		return func() error { return p.skew(0) }, p.skew(clockOff)
	}},
	{"clock slow", func(_ *house, p *process) (func() error, error) {
		return func() error { return p.skew(0) }, p.skew(-clockOff)
	}},
}

// behind is what a partition cuts p off from: of brokers and recorders, what they
// need themselves, so that callers still come to them.
func (h *house) behind(p *process) []string {
	switch p.name {
	case "broker-1", "broker-2", "broker-3":
		return h.net.others(p.name, "orchestrator", "steps")
	case "recorder-1", "recorder-2":
		return []string{"ledger"}
	}
	return h.net.others(p.name)
}

// part is what a fault befalls; which process that is may change.
type part struct {
	name string
	is   func(h *house) (*process, error)
}

func parts() []part {
	named := func(name, shown string) part {
		return part{shown, func(h *house) (*process, error) { return h.byName[name], nil }}
	}
	recorder := func(active bool, shown string) part {
		return part{shown, func(h *house) (*process, error) {
			is := h.front.active.Load()
			if is == nil {
				return nil, errors.New("no recorder is active")
			}
			for _, name := range []string{"recorder-1", "recorder-2"} {
				if (name == *is) == active {
					return h.byName[name], nil
				}
			}
			return nil, errors.New("no recorder stands by")
		}}
	}
	return []part{
		named("broker-1", "broker-1 with gateway"), named("broker-2", "broker-2 with gateway"), named("broker-3", "broker-3"),
		recorder(true, "recorder, active"), recorder(false, "recorder, standing by"),
		named("redis", "Redis"), named("vault", "Vault"), named("ledger", "PostgreSQL of the ledger"), named("orders", "PostgreSQL of the target"),
	}
}

// well says why not all is well.
func (h *house) well(ctx context.Context) error {
	for _, p := range h.processes {
		if p.after != nil {
			if err := p.after(ctx); err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
		}
		if err := p.ready(ctx); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	if h.front.active.Load() == nil {
		return errors.New("no recorder is active")
	}
	return nil
}

// befall has a fault befall a part for hold, ends it, and waits until all is well
// again and every broker has handed out a credential since.
func (h *house) befall(ctx context.Context, l *load, f fault, on part, hold time.Duration) error {
	p, err := on.is(h)
	if err != nil {
		return err
	}
	w, active := l.j.next(f.name, on.name), h.front.active.Load()
	end, err := f.inflict(h, p)
	if err != nil {
		err = fmt.Errorf("%s of %s: %w", f.name, on.name, err)
	} else {
		select {
		case <-time.After(hold):
		case <-ctx.Done():
		}
		if f.name == partition && active != nil && *active == p.name {
			// The server gives its lock away once it has noticed.
			err = until(ctx, time.Minute, "the other recorder has taken over from one that is cut off from the ledger", func() error {
				if is := h.front.active.Load(); is == nil || *is == p.name {
					return errors.New("it has not")
				}
				return nil
			})
		}
	}
	if end != nil {
		// It may have ended by itself since, and then there is nothing to end.
		if e := end(); e != nil && len(p.tree()) > 0 {
			err = errors.Join(err, fmt.Errorf("ending %s of %s: %w", f.name, on.name, e))
		}
	}
	ended := time.Now()
	w.notHealed = until(ctx, 3*time.Minute, fmt.Sprintf("all is well after %s of %s", f.name, on.name), func() error {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		if err := h.well(ctx); err != nil {
			return err
		}
		return l.since(ended)
	})
	w.healed = time.Since(ended)
	return err
}
