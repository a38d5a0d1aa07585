package auth

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/durable"
)

// tokenPrefix begins every API token, so that a scanner of repositories and
// logs finds one that leaked.
const tokenPrefix = "cs_"

// Token is what the token file keeps of one API token: never the token.
type Token struct {
	Name    string     `json:"name"`
	Role    Role       `json:"role"`
	SHA256  string     `json:"sha256"` // of the whole token, in hex
	Created time.Time  `json:"created"`
	Expires *time.Time `json:"expires,omitempty"`
	Groups  []string   `json:"groups,omitempty"`
	Owners  []string   `json:"owners,omitempty"`
}

// ID names t to an operator: the first 12 hex digits of its hash.
func (t *Token) ID() string { return t.SHA256[:12] }

// file is the token file: JSON, owner-only.
type file struct {
	Version int     `json:"version"` // 1
	Tokens  []Token `json:"tokens"`
}

// maxTokenFile is the largest token file in bytes, tens of thousands of tokens.
const maxTokenFile = 16 << 20

// parseFile is strict, since a misspelt "expires" would be a token that never
// ends.
func parseFile(b []byte) (*file, error) {
	var f file
	if err := json.Unmarshal(b, &f, json.RejectUnknownMembers(true)); err != nil {
		return nil, err
	}
	if f.Version != 1 {
		return nil, fmt.Errorf("version is %d, want 1", f.Version)
	}
	seen := map[string]bool{}
	for i, t := range f.Tokens {
		sum, err := hex.DecodeString(t.SHA256)
		switch {
		case err != nil || len(sum) != sha256.Size || hex.EncodeToString(sum) != t.SHA256:
			return nil, fmt.Errorf("tokens[%d]: sha256 is not 64 lower-case hex digits", i)
		case seen[t.SHA256]:
			return nil, fmt.Errorf("tokens[%d]: the token is listed twice", i)
		case !t.Role.Valid():
			return nil, fmt.Errorf("tokens[%d]: role %q is not one of %v", i, t.Role, Roles)
		case !store.ValidID(t.Name):
			return nil, fmt.Errorf("tokens[%d]: name %q is not a valid ID", i, t.Name)
		}
		seen[t.SHA256] = true
	}
	return &f, nil
}

// readFile reads path and what identifies the version read.
func readFile(path string) (*file, fs.FileInfo, error) {
	h, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer h.Close()
	info, err := h.Stat()
	if err != nil {
		return nil, nil, err
	}
	// Kubernetes lets a pod's group read a secret, whatever mode is asked for.
	if info.Mode().Perm()&0o037 != 0 {
		return nil, nil, fmt.Errorf("token file %s may be read or written by others: chmod 600 it", path)
	}
	if info.Size() > maxTokenFile {
		return nil, nil, fmt.Errorf("token file %s has %d bytes, at most %d", path, info.Size(), maxTokenFile)
	}
	b := make([]byte, info.Size())
	if n, err := h.ReadAt(b, 0); n != len(b) {
		return nil, nil, fmt.Errorf("reading token file %s: %w", path, err)
	}
	f, err := parseFile(b)
	if err != nil {
		return nil, nil, fmt.Errorf("token file %s: %w", path, err)
	}
	return f, info, nil
}

// Tokens authenticates callers by the API tokens of one file. It is safe for
// concurrent use. The file is looked at on every call and read again when it
// has changed, so that a revocation works at once. A file that is missing or
// broken authenticates nobody.
type Tokens struct {
	path string
	now  clock

	mu     sync.Mutex
	info   fs.FileInfo
	read   time.Time
	byHash map[[sha256.Size]byte]*Token
}

// OpenTokens reads the token file at path. now may be nil.
func OpenTokens(path string, now func() time.Time) (*Tokens, error) {
	t := &Tokens{path: path, now: now}
	if _, err := t.current(); err != nil {
		return nil, err
	}
	return t, nil
}

// settled is how old a file's mtime must be at the reading for an unchanged
// mtime to mean an unchanged file: kernels stamp files in ticks of some
// milliseconds.
const settled = 100 * time.Millisecond

func (t *Tokens) current() (map[[sha256.Size]byte]*Token, error) {
	info, err := os.Stat(t.path)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.info != nil && os.SameFile(t.info, info) && t.info.Size() == info.Size() &&
		t.info.ModTime().Equal(info.ModTime()) && t.info.Mode() == info.Mode() && t.read.Sub(info.ModTime()) > settled {
		return t.byHash, nil
	}
	read := time.Now() // the file system's clock, not the injected one
	f, info, err := readFile(t.path)
	if err != nil {
		t.info = nil
		return nil, err
	}
	m := make(map[[sha256.Size]byte]*Token, len(f.Tokens))
	for i := range f.Tokens {
		var sum [sha256.Size]byte
		if _, err := hex.Decode(sum[:], []byte(f.Tokens[i].SHA256)); err != nil {
			return nil, err
		}
		m[sum] = &f.Tokens[i]
	}
	t.info, t.read, t.byHash = info, read, m
	return m, nil
}

// Authenticate returns whose token it is. The error wraps ErrUnauthenticated
// unless the file could not be read.
func (t *Tokens) Authenticate(token string) (*Principal, error) {
	m, err := t.current()
	if err != nil {
		return nil, err
	}
	// The lookup is by hash: how long it takes says something about the hash
	// of what was sent, and nothing about a token.
	sum := sha256.Sum256([]byte(token))
	rec, ok := m[sum]
	if !ok {
		return nil, unauthenticated("no such API token")
	}
	want, err := hex.DecodeString(rec.SHA256)
	if err != nil || subtle.ConstantTimeCompare(want, sum[:]) != 1 {
		return nil, unauthenticated("no such API token")
	}
	if rec.Expires != nil && !t.now.now().Before(*rec.Expires) {
		return nil, unauthenticated("API token %s of %s expired", rec.ID(), rec.Name)
	}
	return &Principal{Name: rec.Name, Role: rec.Role, Method: "token", Groups: slices.Clone(rec.Groups), Owners: slices.Clone(rec.Owners)}, nil
}

// NewToken returns a fresh token of role, cs_<role>_<32 random bytes>, and what
// a token file keeps of it.
func NewToken(t Token, now time.Time) (string, Token) {
	secret := make([]byte, 32)
	rand.Read(secret) // never fails since Go 1.24
	token := tokenPrefix + string(t.Role) + "_" + base64.RawURLEncoding.EncodeToString(secret)
	sum := sha256.Sum256([]byte(token))
	t.SHA256, t.Created = hex.EncodeToString(sum[:]), now.UTC().Truncate(time.Second)
	return token, t
}

// CreateToken adds a token to the file at path, which is made where it is
// missing. t gives name, role, groups, owners and, where it is to end, Expires.
// The token is returned this once and kept nowhere.
func CreateToken(path string, t Token, now time.Time) (string, error) {
	if !t.Role.Valid() {
		return "", fmt.Errorf("role %q is not one of %v", t.Role, Roles)
	}
	if !store.ValidID(t.Name) {
		return "", fmt.Errorf("name %q: want letters, digits, '.', '_' and '-', at most 128, the first a letter or digit", t.Name)
	}
	token, rec := NewToken(t, now)
	return token, change(path, func(f *file) error {
		for _, o := range f.Tokens {
			if o.Name == t.Name && o.Role == t.Role && live(&o, now) {
				return fmt.Errorf("%s %s has a token already: rotate or revoke it", t.Role, t.Name)
			}
		}
		f.Tokens = append(f.Tokens, rec)
		return nil
	})
}

// RotateToken adds a new token for the holder of the given role and name, with
// the groups and owners of the present one, and lets the old ones end after
// overlap.
func RotateToken(path string, role Role, name string, overlap time.Duration, now time.Time) (string, error) {
	if overlap < 0 {
		return "", errors.New("the overlap is negative")
	}
	var token string
	err := change(path, func(f *file) error {
		end := now.Add(overlap).UTC()
		var last *Token
		for i := range f.Tokens {
			if o := &f.Tokens[i]; o.Name == name && o.Role == role && live(o, now) {
				if last == nil || o.Created.After(last.Created) {
					c := *o
					last = &c
				}
				if o.Expires == nil || o.Expires.After(end) {
					o.Expires = &end
				}
			}
		}
		if last == nil {
			return fmt.Errorf("%s %s has no token: create one", role, name)
		}
		var rec Token
		token, rec = NewToken(*last, now)
		f.Tokens = append(f.Tokens, rec)
		return nil
	})
	if err != nil {
		return "", err
	}
	return token, nil
}

// RevokeToken removes every token that match selects and returns how many.
func RevokeToken(path string, match func(*Token) bool) (int, error) {
	n := 0
	err := change(path, func(f *file) error {
		before := len(f.Tokens)
		f.Tokens = slices.DeleteFunc(f.Tokens, func(t Token) bool { return match(&t) })
		n = before - len(f.Tokens)
		return nil
	})
	return n, err
}

// ListTokens returns the records of the file at path.
func ListTokens(path string) ([]Token, error) {
	f, _, err := readFile(path)
	if err != nil {
		return nil, err
	}
	return f.Tokens, nil
}

func live(t *Token, now time.Time) bool { return t.Expires == nil || now.Before(*t.Expires) }

// change rewrites the token file under an exclusive lock.
//
// A crash leaves the old file or the new one.
func change(path string, fn func(*file) error) error {
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("locking token file: %w", err)
	}
	defer lock.Close() // releases the lock
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("locking token file: %w", err)
	}
	f, _, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = &file{Version: 1}, nil
	}
	if err != nil {
		return err
	}
	if err := fn(f); err != nil {
		return err
	}
	b, err := json.Marshal(f, json.Deterministic(true), jsontext.WithIndent("  "))
	if err != nil {
		return fmt.Errorf("token file: %w", err)
	}
	if err := durable.WriteFile(path, append(b, '\n')); err != nil {
		return fmt.Errorf("writing token file: %w", err)
	}
	return nil
}
