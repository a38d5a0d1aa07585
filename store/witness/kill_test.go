package witness

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"filippo.io/torchwood"
	"github.com/go-chi/chi/v5"
	"golang.org/x/mod/sumdb/note"
)

// TestMain becomes, when asked by the test below, the witness that is killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv("COUNTERSIGN_TEST_WITNESS"); dir != "" {
		serveUntilKilled(dir)
	}
	os.Exit(m.Run())
}

// serveUntilKilled is a witness that prints its URL and, where asked to, kills
// itself once a head is on disk and before its cosignature is answered.
func serveUntilKilled(dir string) {
	seed, err := base64.StdEncoding.DecodeString(os.Getenv("COUNTERSIGN_TEST_SEED"))
	if err != nil {
		panic(err)
	}
	signer, err := torchwood.NewCosignatureSigner("witness.example/killed", ed25519.NewKeyFromSeed(seed))
	if err != nil {
		panic(err)
	}
	s, err := NewServer(ServerConfig{Signer: signer, Dir: dir, Logs: []Log{{Key: os.Getenv("COUNTERSIGN_TEST_LOG")}}})
	if err != nil {
		panic(err)
	}
	if os.Getenv("COUNTERSIGN_TEST_DIE") != "" {
		s.persisted = func() { syscall.Kill(os.Getpid(), syscall.SIGKILL) }
	}
	r := chi.NewRouter()
	s.Routes(r)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println("http://" + l.Addr().String())
	panic(http.Serve(l, r))
}

func TestAWitnessKilledBeforeItAnswersDoesNotGoBack(t *testing.T) {
	k := newLogKey(t)
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	start := func(die string) (url string, wait func() error) {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "COUNTERSIGN_TEST_WITNESS="+dir, "COUNTERSIGN_TEST_LOG="+k.vkey,
			"COUNTERSIGN_TEST_SEED="+base64.StdEncoding.EncodeToString(key.Seed()), "COUNTERSIGN_TEST_DIE="+die)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill() })
		url, err = bufio.NewReader(out).ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(url), cmd.Wait
	}
	tr := (&tree{}).add("a", "b", "c", "d", "e", "f")
	other := (&tree{}).add("a", "b", "c", "d", "e", "x")
	for _, step := range []struct{ old, n int64 }{{0, 3}, {3, 6}} {
		url, wait := start("now")
		if res, err := http.Post(url+"/add-checkpoint", "", bytes.NewReader(k.ask(t, tr, step.old, step.n).marshal())); err == nil {
			t.Fatalf("it answered %d", res.StatusCode)
		}
		if err := wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Fatalf("it ended by %v", err)
		}
	}
	url, _ := start("")
	// It knows what it would have cosigned: neither the checkpoint before nor
	// another of the same size is cosigned.
	if code, body, _ := post(t, url, k.ask(t, tr, 3, 6).marshal()); code != http.StatusConflict || body != "6\n" {
		t.Fatalf("%d %q", code, body)
	}
	if code, body, _ := post(t, url, k.ask(t, other, 6, 6).marshal()); code != http.StatusConflict {
		t.Fatalf("%d %q", code, body)
	}
	// The log asks again for the one it got no answer for, and has it.
	r := k.ask(t, tr, 6, 6)
	code, lines, _ := post(t, url, r.marshal())
	signer, err := torchwood.NewCosignatureSigner("witness.example/killed", key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := note.Open([]byte(r.note+lines), note.VerifierList(signer.Verifier())); code != http.StatusOK || err != nil {
		t.Fatalf("%d %q %v", code, lines, err)
	}
}
