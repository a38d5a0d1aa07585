package scopes

import (
	"sync"
	"sync/atomic"
)

// InForce holds the Set in force, for many readers. A request keeps the Set
// that it began with.
type InForce struct {
	set               atomic.Pointer[Set]
	mu                sync.Mutex // one change at a time
	catalogue, policy string     // paths; empty where the Set is not of a file
	onChange          func(old, new *Set) error
}

// Open loads catalogue and policy and puts them in force.
func Open(cataloguePath, policyPath string) (*InForce, error) {
	set, err := Load(cataloguePath, policyPath)
	if err != nil {
		return nil, err
	}
	f := &InForce{catalogue: cataloguePath, policy: policyPath}
	f.set.Store(set)
	return f, nil
}

// Static puts a Set in force that is not of a file. Reload keeps it.
func Static(set *Set) *InForce {
	f := &InForce{}
	f.set.Store(set)
	return f
}

// Current is the Set in force.
func (f *InForce) Current() *Set { return f.set.Load() }

// OnChange sets what is called with the old and the new Set before the new one
// takes force: the broker appends policy.loaded there. Where it fails the old
// one stays, so that no decision names a policy that is not on record.
func (f *InForce) OnChange(fn func(old, new *Set) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.onChange = fn
}

// Reload reads the files again and puts them in force where their digest has
// changed. On any error the old Set stays.
func (f *InForce) Reload() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.catalogue == "" {
		return nil
	}
	set, err := Load(f.catalogue, f.policy)
	if err != nil {
		return err
	}
	old := f.set.Load()
	if set.Digest() == old.Digest() {
		return nil
	}
	if f.onChange != nil {
		if err := f.onChange(old, set); err != nil {
			return err
		}
	}
	f.set.Store(set)
	return nil
}
