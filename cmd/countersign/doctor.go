package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"
)

// level says how bad a finding is.
type level string

const (
	levelOK        level = "ok"
	levelSkipped   level = "skipped"   // nobody asked for it, or there is nothing to look at
	levelWarning   level = "warning"   // it runs, and somebody will be sorry
	levelUnchecked level = "unchecked" // it was asked for, and could not be looked at
	levelFault     level = "fault"     // it does not run, or is not safe
)

// finding is one thing that doctor looked at.
type finding struct {
	Check   string `json:"check"` // a code of docs/doctor.md
	Level   level  `json:"level"`
	What    string `json:"what"`             // the key, file, scope or server that was looked at
	Message string `json:"message,omitzero"` // what is wrong, or a detail
	Mend    string `json:"mend,omitzero"`    // what to do about it
}

// doctor collects findings.
type doctor struct {
	now      func() time.Time
	free     func(path string) (bytes uint64, err error) // what a disk has left
	operator string                                      // Vault token of an operator; empty: none was given
	findings []finding
}

func newDoctor() *doctor { return &doctor{now: time.Now, free: freeBytes} }

func (d *doctor) add(l level, check, what, message string) {
	i := slices.IndexFunc(checks, func(c doctorCheck) bool { return c.code == check })
	if i < 0 {
		panic("doctor: no check " + check)
	}
	f := finding{Check: check, Level: l, What: what, Message: message}
	if l == levelFault || l == levelWarning {
		f.Mend = checks[i].mend
	}
	d.findings = append(d.findings, f)
}

func (d *doctor) ok(check, what, detail string) { d.add(levelOK, check, what, detail) }

func (d *doctor) skip(check, what, why string) { d.add(levelSkipped, check, what, why) }

func (d *doctor) warn(check, what, format string, args ...any) {
	d.add(levelWarning, check, what, fmt.Sprintf(format, args...))
}

func (d *doctor) fault(check, what, format string, args ...any) {
	d.add(levelFault, check, what, fmt.Sprintf(format, args...))
}

func (d *doctor) unchecked(check, what string, err error) {
	d.add(levelUnchecked, check, what, err.Error())
}

// look records err as a fault, or the detail where there is none. It reports
// whether all is well.
func (d *doctor) look(check, what string, err error, detail string) bool {
	if err != nil {
		d.fault(check, what, "%v", err)
		return false
	}
	d.ok(check, what, detail)
	return true
}

func doctorCommand() *cobra.Command {
	var files []string
	var output, operator string
	cmd := &cobra.Command{
		Use:   "doctor --config FILE [--config FILE]...",
		Short: "Find what is wrong with a configuration, and say how to mend it",
		Long: `Find what is wrong with a configuration of serve, record or witness before the
first request does: its files and who may read them, certificates, clocks and
disks, and every server that it names: recorder, Vault, Redis, PostgreSQL,
OpenID provider, Slack, witnesses. docs/doctor.md lists what is looked at.
Several files at once are also compared with each other, as two brokers, or a
broker and its recorder, have to agree.

Nothing is minted and nothing on record is changed. The login to Vault is
renewed, as the broker does all the time, and keys that are tried in Redis go
within a second. What the broker itself may not read in Vault (token roles,
database roles, audit devices) is looked at with an operator's token:
--vault-token-file.

Exit status 0: no fault (there may be warnings); 1: a fault; 2: no fault, but
not all could be checked.`,
		Example: `  countersign doctor --config serve.yaml --vault-token-file operator.token
  countersign doctor --config broker-1.yaml --config broker-2.yaml --config record.yaml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Minute)
			defer cancel()
			d := newDoctor()
			if operator != "" {
				var err error
				if d.operator, err = readSecret(operator); err != nil {
					return &exitError{code: 2, err: fmt.Errorf("--vault-token-file: %w", err)}
				}
			}
			if err := d.examine(ctx, files); err != nil {
				return &exitError{code: 2, err: err}
			}
			if output == "json" {
				if err := printJSON(cmd, struct {
					Findings []finding `json:"findings"`
				}{d.findings}); err != nil {
					return err
				}
			} else {
				d.print(cmd)
			}
			return d.verdict()
		},
	}
	cmd.Flags().StringArrayVar(&files, "config", nil, "configuration file (YAML) of serve, record or witness; may be given several times")
	_ = cmd.MarkFlagRequired("config")
	_ = cmd.MarkFlagFilename("config", "yaml", "yml")
	cmd.Flags().StringVar(&operator, "vault-token-file", "", "file of an operator's Vault token, to look at what the broker may not read")
	outputFlag(cmd, &output, "text", "text", "json")
	return cmd
}

// print writes the findings as one list.
func (d *doctor) print(cmd *cobra.Command) {
	for _, f := range d.findings {
		line := fmt.Sprintf("%-9s %-18s %s", f.Level, f.Check, f.What)
		if f.Message != "" {
			line += ": " + f.Message
		}
		if f.Mend != "" {
			line += fmt.Sprintf("\n%29smend: %s", "", f.Mend)
		}
		fmt.Fprintln(cmd.OutOrStdout(), line)
	}
}

// verdict is the exit status of what was found.
func (d *doctor) verdict() error {
	n := map[level]int{}
	for _, f := range d.findings {
		n[f.Level]++
	}
	switch {
	case n[levelFault] > 0:
		return fmt.Errorf("%d of %d checks found a fault; docs/doctor.md says more", n[levelFault], len(d.findings))
	case n[levelUnchecked] > 0:
		return &exitError{code: 2, err: fmt.Errorf("%d of %d checks could not be done", n[levelUnchecked], len(d.findings))}
	}
	return nil
}

// examine looks at each of files, and then at how they go together.
func (d *doctor) examine(ctx context.Context, files []string) error {
	var all together
	for _, path := range files {
		c, err := anyConfig(path)
		if err != nil {
			return err
		}
		switch c := c.(type) {
		case *serveConfig:
			d.serve(ctx, c)
			all.serve = append(all.serve, c)
		case *recordConfig:
			d.record(ctx, c)
			all.record = append(all.record, c)
		case *witnessConfig:
			d.witness(c)
		}
	}
	if len(files) > 1 {
		d.together(&all)
	}
	return nil
}

// anyConfig reads a configuration, and tells the three kinds apart by the keys
// that only one of them has.
func anyConfig(path string) (interface{ check() error }, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var keys map[string]any
	if err := yaml.Unmarshal(b, &keys); err != nil {
		return nil, fmt.Errorf("%s is not YAML: %w", path, err)
	}
	var c interface{ check() error } = &recordConfig{}
	switch {
	case keys["recorder"] != nil || keys["vault"] != nil:
		c = &serveConfig{}
	case keys["logs"] != nil:
		c = &witnessConfig{}
	}
	if err := parseConfig(path, b, c); err != nil {
		return nil, err
	}
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// secret checks that a file of a secret can be read, by its owner alone.
func (d *doctor) secret(key, path string) {
	if path == "" {
		return
	}
	what := key + " " + path
	_, err := readSecret(path)
	if errors.Is(err, os.ErrNotExist) {
		err = errors.New("is missing")
	}
	if !d.look("secret-file", what, err, "") {
		return
	}
	info, err := os.Stat(path)
	if err != nil {
		return
	}
	// What root gives to a group is the group's on purpose: so Kubernetes (fsGroup)
	// and systemd (LoadCredential, whose list shows as the group's rights) hand
	// over secrets.
	mine := fs.FileMode(0o077)
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && owner.Uid == 0 {
		mine = 0o037
	}
	if mode := info.Mode().Perm(); mode&mine != 0 {
		d.fault("secret-open", what, "may be read by others (mode %04o)", mode)
	}
}

const (
	diskLow   = 1 << 30   // bytes left at which it is time to look
	diskEmpty = 100 << 20 // bytes left that a busy day writes
)

// disk looks at what is left where path is, or will be.
func (d *doctor) disk(key, path string) {
	at := existing(path)
	left, err := d.free(at)
	switch {
	case err != nil:
		d.unchecked("disk", key+" "+path, err)
	case left < diskEmpty:
		d.fault("disk", key+" "+path, "%d MiB are left", left>>20)
	case left < diskLow:
		d.warn("disk", key+" "+path, "%d MiB are left", left>>20)
	default:
		d.ok("disk", key+" "+path, fmt.Sprintf("%d GiB left", left>>30))
	}
}

// freeBytes is what a process without privileges may still write where path is.
func freeBytes(path string) (uint64, error) {
	var s syscall.Statfs_t
	if err := syscall.Statfs(path, &s); err != nil {
		return 0, err
	}
	return s.Bavail * uint64(s.Bsize), nil
}

// existing is path, or the nearest directory above it that there is.
func existing(path string) string {
	for {
		if _, err := os.Stat(path); err == nil {
			return path
		}
		up := strings.TrimSuffix(path[:strings.LastIndex(path, "/")+1], "/")
		switch {
		case strings.HasPrefix(path, "/") && up == "":
			return "/"
		case up == "":
			return "."
		}
		path = up
	}
}

// writable checks that files can be made in dir, by making one. missing says
// whether dir may be missing, since it is made at the first start.
func (d *doctor) writable(check, key, dir string, missing bool) {
	what := key + " " + dir
	info, err := os.Stat(dir)
	if missing && errors.Is(err, os.ErrNotExist) {
		dir = existing(dir)
		info, err = os.Stat(dir)
	}
	switch {
	case err != nil:
		d.fault(check, what, "%v", err)
		return
	case !info.IsDir():
		d.fault(check, what, "is no directory")
		return
	}
	f, err := os.CreateTemp(dir, ".doctor-*")
	if err == nil {
		err = errors.Join(f.Close(), os.Remove(f.Name()))
	}
	d.look(check, what, err, "")
}

const (
	skewNoticed = 2 * time.Second
	// skewWrong leaves a receipt half of its 30 s.
	skewWrong = 15 * time.Second
)

// clock compares this machine's clock with another's, of which theirs was read
// between before and now; coarse is by how much theirs may be cut off.
func (d *doctor) clock(what string, before, theirs time.Time, coarse time.Duration) {
	after := d.now()
	var skew time.Duration
	switch {
	case theirs.Add(coarse).Before(before):
		skew = theirs.Add(coarse).Sub(before)
	case theirs.After(after):
		skew = theirs.Sub(after)
	}
	switch text := fmt.Sprintf("its clock is %s off this machine's", skew.Round(100*time.Millisecond)); {
	case skew.Abs() >= skewWrong:
		d.fault("clock", what, "%s", text)
	case skew.Abs() >= skewNoticed:
		d.warn("clock", what, "%s", text)
	default:
		d.ok("clock", what, "")
	}
}
