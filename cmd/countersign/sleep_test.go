package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/inflight/redistest"
)

// TestABrokerProcessThatSleepsDuringItsMintHandsNothingOver stops a broker that
// holds an intent, for longer than the grace, while another is awake.
func TestABrokerProcessThatSleepsDuringItsMintHandsNothingOver(t *testing.T) {
	h := newHouse(t)
	h.broker.term()
	h.recorder.term()
	file := func(name string) string { return filepath.Join(h.dir, name) }
	out, err := countersign(t, "token", "create", "--file", file("recorder-tokens"), "--role", "writer", "--name", "broker-2").Output()
	must(t, err)
	must(t, os.WriteFile(file("writer-token-2"), []byte(strings.TrimSpace(string(out))), 0o600))
	must(t, os.WriteFile(file("redis"), []byte(redistest.Start(t).URL()), 0o600))
	door := newDoorkeeper(t, h.vault.Addr)
	b, err := os.ReadFile(file("serve.yaml"))
	must(t, err)
	// Both share a Redis; the first reaches Vault through the door.
	first := strings.Replace(string(b), "redis: {embedded: true}", "redis: {url_file: "+file("redis")+"}", 1)
	addr := freeAddr(t)
	second := strings.NewReplacer(strings.TrimPrefix(h.broker.url, "http://"), addr, "writer: broker-1", "writer: broker-2",
		file("writer-token"), file("writer-token-2"), file("broker-head"), file("broker-head-2")).Replace(first)
	vault := regexp.MustCompile(`vault: \{addr: "[^"]*"`)
	must(t, os.WriteFile(file("serve.yaml"), []byte(vault.ReplaceAllString(first, `vault: {addr: "`+door.url+`"`)), 0o600))
	must(t, os.WriteFile(file("serve-2.yaml"), []byte(second), 0o600))
	h.recorder.start()
	h.broker.start()
	other := h.process("broker-2", "http://"+addr, "serve", "--config", file("serve-2.yaml"))
	other.start()

	door.close()
	answer := make(chan reply, 1)
	go func() { answer <- h.post("sleeps", `{"run":"sleep","scope":"vault:demo-read"}`, "") }()
	<-door.held
	must(t, h.broker.cmd.Process.Signal(syscall.SIGSTOP))
	eventually(t, "it is stopped", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", h.broker.cmd.Process.Pid))
		_, state, _ := strings.Cut(string(b), ") ") // proc(5)
		return err == nil && strings.HasPrefix(state, "T")
	})
	door.open() // Vault makes the token, and nobody takes it
	count := func(of store.Type) (n int) {
		for _, e := range h.history() {
			if e.Type == of {
				n++
			}
		}
		return n
	}
	eventually(t, "the other gives the intent up", func() bool { return count(store.CredentialAbandoned) == 1 })
	time.Sleep(asleep)
	must(t, h.broker.cmd.Process.Signal(syscall.SIGCONT))
	if r := <-answer; r.status == 201 {
		t.Errorf("it was handed over: %s", r.body)
	}
	if n := count(store.CredentialIssued); n != 0 {
		t.Errorf("%d issued", n)
	}
	eventually(t, "what Vault made is gone", func() bool { return len(h.stepTokens()) == 0 })
	// Awake, it is as good as new.
	eventually(t, "it issues again", func() bool {
		return h.post("sleeps", `{"run":"sleep","scope":"vault:demo-read"}`, "").status == 201
	})
	if n := count(store.CredentialIssued); n != 1 || len(h.stepTokens()) != 1 {
		t.Errorf("%d issued, %d tokens live", n, len(h.stepTokens()))
	}
}
