// Package durable writes files that a crash leaves whole: the older or the newer
// one, and no part of either.
package durable

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
)

// WriteFile puts b in the file at path, mode 0600, by rename; one caller at a
// time. A crash before the rename leaves the older file, and one ending in .new
// that the next write takes over; a crash after it, before the directory is
// synced, leaves either. Once it has returned, b is there to stay.
func WriteFile(path string, b []byte) error {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	if err = f.Chmod(0o600); err == nil { // one that was there may have had another
		_, err = f.Write(b)
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// CreateFile puts b in a new file at path, mode 0600. Where there is one already
// it stays, and the error is fs.ErrExist. A crash leaves no file at path or a
// whole one, and may leave one beside it whose name ends in .new, which nothing
// reads.
func CreateFile(path string, b []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+"-*.new") // mode 0600
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(f.Name())) }()
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); err != nil { // unlike rename, it fails where path exists
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir makes durable which files the directory has.
func SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
