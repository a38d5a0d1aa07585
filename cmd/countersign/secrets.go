package main

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/durable"
	"golang.org/x/mod/sumdb/note"
)

// privacyKeyLen is the length of a fresh privacy key in bytes, and the least
// that is accepted: HMAC-SHA256 gains nothing from a longer one (RFC 2104,
// section 3).
const privacyKeyLen = 32

// readSecret returns the content of a secret's file without the line break
// that editors and `echo` leave at its end. Configuration names secrets by
// file alone, so that none stands in a YAML file or a process list.
func readSecret(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	b = bytes.TrimRight(b, "\r\n")
	if len(b) == 0 {
		return "", fmt.Errorf("%s is empty", path)
	}
	return string(b), nil
}

// writeSecret creates path with mode 0600 and refuses to overwrite it: a key
// replaced by mistake cannot be had back. A crash leaves no file or a whole one.
func writeSecret(path string, content []byte) error {
	err := durable.CreateFile(path, content)
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("%s exists: choose another name, or move it away first", path)
	}
	return err
}

func generateLogKey(origin string) (skey string, err error) {
	if skey, _, err = note.GenerateKey(rand.Reader, origin); err != nil {
		return "", err
	}
	// Reading the key back refuses a name that a signature line cannot carry.
	if _, err := note.NewSigner(skey); err != nil {
		return "", fmt.Errorf("a log cannot be named %q: use letters, digits, dots and slashes, such as ledger.example.com/main", origin)
	}
	return skey, nil
}

// readLogKey reads the log's private note key (C2SP signed-note) and returns
// its signer and verifier key.
func readLogKey(path string) (note.Signer, string, error) {
	skey, err := readSecret(path)
	if err != nil {
		return nil, "", fmt.Errorf("log key: %w", err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		return nil, "", fmt.Errorf("log key %s: %w; make one with `countersign key generate log`", path, err)
	}
	vkey, err := logVerifierKey(skey)
	if err != nil {
		return nil, "", fmt.Errorf("log key %s: %w", path, err)
	}
	return signer, vkey, nil
}

func generatePrivacyKey() string {
	key := make([]byte, privacyKeyLen)
	rand.Read(key) // never fails since Go 1.24
	return "privacy-key-v1:" + base64.StdEncoding.EncodeToString(key)
}

// readPrivacyKey reads the key that brokers and recorder share.
func readPrivacyKey(path string) (store.PrivacyKey, error) {
	text, err := readSecret(path)
	if err != nil {
		return nil, fmt.Errorf("privacy key: %w", err)
	}
	key, ok := parsePrivacyKey(text)
	if !ok {
		return nil, fmt.Errorf("privacy key %s is none: make one with `countersign key generate privacy`", path)
	}
	return key, nil
}

func parsePrivacyKey(text string) (store.PrivacyKey, bool) {
	rest, ok := bytes.CutPrefix([]byte(text), []byte("privacy-key-v1:"))
	if !ok {
		return nil, false
	}
	key, err := base64.StdEncoding.Strict().DecodeString(string(rest))
	return key, err == nil && len(key) >= privacyKeyLen
}

// logVerifierKey derives the public note key from a private one, whose last
// field is a byte that names the algorithm and the Ed25519 seed (C2SP
// signed-note).
func logVerifierKey(skey string) (string, error) {
	parts := strings.SplitN(skey, "+", 5) // "PRIVATE+KEY+<name>+<hash>+<key>"
	if len(parts) != 5 {
		return "", errors.New("not a private note key")
	}
	key, err := base64.StdEncoding.DecodeString(parts[4])
	if err != nil || len(key) != 1+ed25519.SeedSize {
		return "", errors.New("not an Ed25519 note key")
	}
	public := ed25519.NewKeyFromSeed(key[1:]).Public().(ed25519.PublicKey)
	return note.NewEd25519VerifierKey(parts[2], public)
}
