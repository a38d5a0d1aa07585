package vaultdev

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/scopes"
)

// TestMain lets the test binary be the process that is killed: with
// START_VAULT it starts a Vault, prints its address, and waits.
func TestMain(m *testing.M) {
	if os.Getenv("START_VAULT") == "" {
		os.Exit(m.Run())
	}
	binary, err := Find()
	if err == nil {
		var s *Server
		if s, err = Start(context.Background(), binary); err == nil {
			fmt.Println(s.Addr)
			select {}
		}
	}
	fmt.Println(err)
	os.Exit(1)
}

func vault(t *testing.T) string {
	t.Helper()
	binary, err := Find()
	if err != nil {
		t.Fatal(err)
	}
	return binary
}

func TestAVaultDiesWithTheProcessThatStartedIt(t *testing.T) {
	vault(t)
	parent := exec.Command(os.Args[0])
	tmp := t.TempDir()
	parent.Env = append(os.Environ(), "START_VAULT=1", "TMPDIR="+tmp)
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Run(parent); err != nil {
		t.Fatal(err)
	}
	addr, err := bufio.NewReader(out).ReadString('\n')
	host, ok := strings.CutPrefix(strings.TrimSpace(addr), "http://")
	if err != nil || !ok {
		t.Fatalf("%q, %v", addr, err)
	}
	answers := func() bool {
		c, err := net.DialTimeout("tcp", host, time.Second)
		if err == nil {
			c.Close()
		}
		return err == nil
	}
	if !answers() {
		t.Fatal("Vault does not answer")
	}
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); answers(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("Vault outlived its parent")
		}
	}
	if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

func TestAVaultIsPreparedTwiceWithoutHarmAndEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	t.Setenv("VAULT_TOKEN", "another")
	t.Setenv("VAULT_ADDR", "http://127.0.0.1:1")
	s, err := Start(ctx, vault(t))
	if err != nil {
		t.Fatal(err)
	}
	c, err := s.Client()
	if err != nil {
		t.Fatal(err)
	}
	set, err := scopes.Parse("demo", scopes.Demo(nil), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	var tokens, keys []string
	for range 2 {
		p, err := Prepare(ctx, c, Options{Scopes: set})
		if err != nil {
			t.Fatal(err)
		}
		tokens = append(tokens, p.BrokerToken)
		for _, path := range []string{"http-demo", "mcp-demo"} {
			secret, err := c.KVv2("secret").Get(ctx, path)
			if err != nil {
				t.Fatal(err)
			}
			key, _ := secret.Data["key"].(string)
			keys = append(keys, key)
		}
	}
	if len(keys[0]) < 26 || keys[0] == keys[1] || !slices.Equal(keys[:2], keys[2:]) {
		t.Errorf("the keys of the demo's targets are %q", keys) // of this Vault alone, which ends here
	}
	if tokens[0] == "" || tokens[0] == tokens[1] {
		t.Error("no token of its own for each")
	}
	issuers, err := c.Logical().List("pki/issuers")
	if err != nil || len(issuers.Data["keys"].([]any)) != 1 {
		t.Errorf("a second root CA: %v", err)
	}
	cancel()
	select {
	case <-s.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("Vault outlived its context")
	}
}

func TestAVaultThatCannotStartSaysWhy(t *testing.T) {
	if _, err := Start(t.Context(), "/bin/false"); err == nil || !strings.Contains(err.Error(), "ended at once") {
		t.Error(err)
	}
	if _, err := Start(t.Context(), "/nowhere/vault"); err == nil {
		t.Error("started nothing")
	}
	t.Setenv("PATH", t.TempDir())
	t.Setenv("HOME", t.TempDir())
	t.Setenv("XDG_CACHE_HOME", "")
	if _, err := Find(); !errors.Is(err, ErrNoVault) || !strings.Contains(err.Error(), "make vault") {
		t.Error(err)
	}
}

func TestADSNIsNotQuotedWhenItIsWrong(t *testing.T) {
	for _, dsn := range []string{"postgres://u:PLANTED@127.0.0.1:x/db", "postgres://u:PLANTED@127.0.0.1:1/db?connect_timeout=1"} {
		if err := Orders(t.Context(), nil, dsn, time.Hour); err == nil || strings.Contains(err.Error(), "PLANTED") {
			t.Error(err)
		}
	}
}
