package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// holds checks that path has the text, is its owner's alone, and that nothing
// else is in its directory.
func holds(t *testing.T, path, text string) {
	t.Helper()
	b, err := os.ReadFile(path)
	ok(t, err)
	info, err := os.Stat(path)
	ok(t, err)
	all, err := os.ReadDir(filepath.Dir(path))
	ok(t, err)
	if string(b) != text || info.Mode() != 0o600 || len(all) != 1 {
		t.Errorf("%q, %s, among %v", b, info.Mode(), all)
	}
}

func TestAFileIsReplacedWholeWhateverACrashLeftBesideIt(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cursor")
	ok(t, WriteFile(path, []byte("first")))
	holds(t, path, "first")
	ok(t, os.WriteFile(path+".new", []byte("a longer part of another"), 0o644))
	ok(t, WriteFile(path, []byte("second")))
	holds(t, path, "second")
}

func TestAFileThatCannotBeReplacedStays(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cursor")
	ok(t, WriteFile(path, []byte("first")))
	ok(t, os.Symlink(path, path+".new"))
	if err := WriteFile(path, []byte("second")); err == nil {
		t.Error("it was written through a link")
	}
	ok(t, os.Remove(path+".new"))
	holds(t, path, "first")
}

func TestAFileIsCreatedOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	ok(t, CreateFile(path, []byte("first")))
	if err := CreateFile(path, []byte("second")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("created again: %v", err)
	}
	holds(t, path, "first")
	if err := CreateFile(filepath.Join(path, "none"), nil); err == nil || errors.Is(err, fs.ErrExist) {
		t.Errorf("where nothing can be: %v", err)
	}
}
