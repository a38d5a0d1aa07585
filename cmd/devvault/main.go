// Devvault finds or builds the Vault that development and tests run against,
// and prints its path as the last line of standard output.
//
// It is a module of its own, with Vault as a Go tool dependency, so that the
// exact version is pinned by go.sum while none of Vault's dependencies reach
// the product's go.mod. Nothing it builds is committed or shipped.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

const vaultPackage = "github.com/hashicorp/vault"

func main() {
	path, err := find()
	if err != nil {
		fmt.Fprintln(os.Stderr, "devvault:", err)
		os.Exit(1)
	}
	fmt.Println(path)
}

// find returns a vault or bao on PATH, the one built before, or a fresh build.
func find() (string, error) {
	for _, name := range []string{"vault", "bao"} {
		if path, err := exec.LookPath(name); err == nil {
			return filepath.Abs(path)
		}
	}
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Version}}", vaultPackage).Output()
	if err != nil {
		return "", fmt.Errorf("read Vault's version from cmd/devvault/go.mod (run this with `make vault`): %w", detail(err))
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the user's cache directory: %w; set XDG_CACHE_HOME or HOME", err)
	}
	version := strings.TrimSpace(string(out))
	path := filepath.Join(cache, "countersign", "vault-"+version)
	if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
		return path, nil
	}
	return path, build(path, version)
}

// build compiles Vault under a temporary name and renames it into place, so
// that an interrupted build leaves nothing that a later run would take for a
// Vault, and two builds at once do not disturb each other.
func build(path, version string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(path), ".build-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)

	start := time.Now()
	say("building Vault %s once, for development and tests: about 10 minutes on 2 cores. It is kept at %s", version, path)
	say("downloading its modules")
	list := exec.Command("go", "list", "-deps", vaultPackage)
	list.Env = env()
	deps, err := list.Output()
	if err != nil {
		return fmt.Errorf("download Vault's modules (is the Go module proxy reachable?): %w", detail(err))
	}
	total := strings.Count(string(deps), "\n")

	built := filepath.Join(tmp, "vault")
	cmd := exec.Command("go", "build", "-v", "-trimpath", "-ldflags=-s -w", "-o", built, vaultPackage)
	cmd.Env = env()
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	// With -v the go command names each package as it finishes it.
	var tail []string
	done := 0
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		done++
		tail = append(tail, lines.Text())
		if len(tail) > 20 {
			tail = tail[1:]
		}
		if terminal() {
			fmt.Fprintf(os.Stderr, "\r\033[Kcompiled %d of %d packages, %s", done, total, time.Since(start).Round(time.Second))
		}
	}
	if terminal() {
		fmt.Fprintln(os.Stderr)
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("go build %s: %w\n%s", vaultPackage, err, strings.Join(tail, "\n"))
	}
	if err := os.Rename(built, path); err != nil {
		return err
	}
	say("built in %s", time.Since(start).Round(time.Second))
	return nil
}

// env builds without cgo: the result then runs wherever it is copied, and no
// C compiler is needed.
func env() []string { return append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=readonly") }

func say(format string, a ...any) { fmt.Fprintf(os.Stderr, format+"\n", a...) }

func terminal() bool {
	info, err := os.Stderr.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// detail adds to a failed command's error what it wrote to stderr.
func detail(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) && len(exit.Stderr) > 0 {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
	}
	return err
}
