package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
	"github.com/countersign-dev/countersign/store/evidence"
	"github.com/countersign-dev/countersign/store/ledger"
)

// The exit codes of verify, by the outer contract.
const (
	exitProblem   = 1 // the log is wrong
	exitUnchecked = 2 // no verdict was reached
)

func verifyCommand() *cobra.Command {
	var key, since, token, saveTo, output string
	var witnesses, providers []string
	cmd := &cobra.Command{
		Use:   "verify FILE.zip|RECORDER-URL|LEDGER --key VERIFIER-KEY",
		Short: "Check an evidence bundle, or a recorder's whole log, from outside",
		Long: `Check an evidence bundle, or a recorder's whole log, from outside: the
signature on its head, every entry against the tree, that it continues what was
seen of it earlier, and the sense of the story that the entries tell.

FILE.zip is a bundle made by countersign export. It is checked offline, without
configuration: every file, every entry, every text against the commitment in its
entry, whether anything of the window is missing, approvals and their
signatures, erasures, uses, and that tables and report are what the entries
give. VERIFY.md in the bundle tells what is proved, and how to check it with
other people's tools.

With a RECORDER-URL and a reviewer's token the entries are read from the
recorder; without a token the tree is checked from its hashes. LEDGER is a
ledger's directory, its database file, a copy of either, or a PostgreSQL
connection string: for when the recorder refuses to run, or is not to be asked.
It is read and never written, also while a recorder has it open. What needs the
sealed texts is checked in bundles alone.

The key is the log's verifier key or a file that holds it, from a place other
than the recorder or the bundle itself: a log does not vouch for itself.

Exit status: 0 verified; 1 a problem, each named with its entry; 2 could not
be checked.`,
		Example: `  countersign verify bundle.zip --key log.pub
  countersign verify bundle.zip --key log.pub --since last-quarter.zip \
      --witness "witness.example.com+1234abcd+..." --provider https://id.example.com=jwks.json
  countersign verify https://recorder.example.com --key log.pub --save head.txt
  countersign verify /var/lib/countersign --key log.pub --since head.txt`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			unchecked := func(err error) error { return &exitError{exitUnchecked, err} }
			from := orEnv("", "COUNTERSIGN_RECORDER")
			if len(args) == 1 {
				from = args[0]
			}
			if from == "" {
				return unchecked(errors.New("nothing named: give a bundle, the recorder's URL or the ledger's directory, or set COUNTERSIGN_RECORDER"))
			}
			if key == "" {
				return unchecked(errors.New("no key given, and a log does not vouch for itself: add --key with the log's verifier key"))
			}
			vkey, err := readVerifierKey(key)
			if err != nil {
				return unchecked(err)
			}
			log, err := store.NewLogVerifier(vkey)
			if err != nil {
				return unchecked(err)
			}
			o := evidence.Options{Log: log, Rules: catalogueRules, Provider: map[string][]byte{}}
			if since != "" {
				if o.Since, o.Common, err = evidence.ReadSince(since); err != nil {
					return unchecked(err)
				}
			}
			for _, w := range witnesses {
				k, err := readVerifierKey(w)
				if err != nil {
					return unchecked(err)
				}
				o.Witness = append(o.Witness, k)
			}
			for _, p := range providers {
				issuer, file, ok := cutLast(p, "=")
				if !ok {
					return unchecked(fmt.Errorf("--provider %q: write ISSUER=FILE, where FILE is what the issuer's jwks_uri serves", p))
				}
				if o.Provider[issuer], err = os.ReadFile(file); err != nil {
					return unchecked(err)
				}
			}
			if isatty.IsTerminal(os.Stderr.Fd()) {
				o.Progress = func(done, total int64) {
					fmt.Fprintf(os.Stderr, "\r\033[K%d of %d entries", done, total)
					if done >= total {
						fmt.Fprint(os.Stderr, "\r\033[K")
					}
				}
			}
			report, err := verifyFrom(cmd.Context(), from, orEnv(token, "COUNTERSIGN_TOKEN"), o)
			if errors.Is(err, ledger.ErrMismatch) { // a database file that is none any more
				return &exitError{exitProblem, err}
			}
			if err != nil {
				return unchecked(err)
			}
			if output == "json" {
				err = printJSON(cmd, report)
			} else {
				err = printReport(cmd, report, &o)
			}
			if err != nil {
				return err
			}
			if !report.OK() {
				return &exitError{exitProblem, fmt.Errorf("it does not verify: %s", report.Findings[0])}
			}
			if len(report.Unchecked) > 0 {
				return unchecked(errors.New("could not be checked: " + report.Unchecked[0]))
			}
			if saveTo != "" {
				return os.WriteFile(saveTo, []byte(report.Checkpoint), 0o644)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&key, "key", "", "the log's verifier key, or a file that holds it")
	cmd.Flags().StringVar(&since, "since", "", "an earlier checkpoint or an earlier bundle, which the log must continue")
	cmd.Flags().StringArrayVar(&witnesses, "witness", nil, "verifier key of a witness that must have cosigned, or a file that holds it; repeat for each")
	cmd.Flags().StringArrayVar(&providers, "provider", nil, "ISSUER=FILE: the keys (JWKS) of an identity provider, to check the logins behind passkeys; repeat for each")
	cmd.Flags().StringVar(&saveTo, "save", "", "write the checkpoint here once it verified, for a later --since")
	cmd.Flags().StringVar(&token, "token", "", "a reviewer's token ($COUNTERSIGN_TOKEN)")
	outputFlag(cmd, &output, "text", "text", "json")
	return cmd
}

// verifyFrom verifies the bundle or log at from: a bundle's file, a recorder's
// URL, or the place of a ledger's database.
func verifyFrom(ctx context.Context, from, token string, o evidence.Options) (*evidence.Report, error) {
	switch {
	case isBundle(from):
		return evidence.VerifyBundle(ctx, from, o)
	case strings.Contains(from, "://") && !ledger.IsPostgres(from):
		src, err := evidence.NewRecorder(from, token)
		if err != nil {
			return nil, err
		}
		return evidence.Verify(ctx, src, o)
	}
	db, err := evidence.OpenDatabase(from)
	if err != nil {
		return nil, err
	}
	defer db.Close()
	return evidence.Verify(ctx, db, o)
}

// isBundle reports whether path is a zip, by its name or by how it begins.
func isBundle(path string) bool {
	if strings.EqualFold(filepath.Ext(path), ".zip") {
		return true
	}
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	var begin [4]byte
	_, err = io.ReadFull(f, begin[:])
	return err == nil && string(begin[:]) == "PK\x03\x04"
}

// cutLast cuts s around the last sep: an issuer's URL may hold one.
func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i <= 0 || i+len(sep) == len(s) {
		return "", "", false
	}
	return s[:i], s[i+len(sep):], true
}

// catalogueRules reads the least rules of a catalogue, as evidence.Rules.
func catalogueRules(catalogue []byte) (func(string) (*store.Rule, string, bool), error) {
	set, err := scopes.Parse("catalogue", catalogue, "", nil)
	if err != nil {
		return nil, err
	}
	return func(name string) (*store.Rule, string, bool) {
		sc, ok := set.Scope(name)
		if !ok {
			return nil, "", false
		}
		return sc.Approval, sc.Sensitivity, true
	}, nil
}

// readVerifierKey takes the key itself or a file that holds it.
func readVerifierKey(s string) (string, error) {
	if strings.Count(s, "+") >= 2 {
		if _, err := os.Stat(s); err != nil {
			return s, nil
		}
	}
	text, err := readSecret(s)
	if err != nil {
		return "", fmt.Errorf("key: %w", err)
	}
	return text, nil
}

// printReport says in words what was found, and what was proved and what not.
func printReport(cmd *cobra.Command, r *evidence.Report, o *evidence.Options) error {
	var out strings.Builder
	say := func(format string, a ...any) { fmt.Fprintf(&out, format+"\n", a...) }
	for _, f := range r.Findings {
		say("problem: %s", f)
	}
	if r.Cut {
		say("problem: and more that are not listed")
	}
	for i, head := range r.Heads {
		say("evidence: the %s signed checkpoint:\n", []string{"earlier", "present"}[min(i, 1)])
		for line := range strings.SplitSeq(strings.TrimSuffix(head, "\n"), "\n") {
			say("%s", evidence.Plain(line))
		}
		say("")
	}
	verdict := "verified"
	if !r.OK() {
		verdict = "NOT verified"
	}
	say("%s: %s, %d entries (%d read), root %s", verdict, r.Origin, r.Size, r.Leaves, r.Root)
	if b := r.Bundle; b != nil && r.OK() {
		if b.Complete {
			if b.Entries > 0 {
				say("complete: entries %d to %d, %s to %s, are all here", b.From, b.To-1, orNone(r.From), orNone(r.To))
			} else {
				say("complete: no entry lies in the window")
			}
			say("complete for the time after %s and before %s", cmp.Or(b.After, "the log's beginning"), cmp.Or(b.Before, "its end"))
		} else {
			say("filtered: %d entries between %d and %d match the filters; that there are no others is not proved", b.Entries, b.From, b.To-1)
		}
		say("context: %d more entries by which these are judged; that there are no others is not proved", b.Context)
		if b.Derived {
			say("files: %d are those of the manifest; tables and report are what the entries give", b.Files)
		} else {
			say("files: %d are those of the manifest", b.Files)
		}
		say("texts: %d open the commitments of their entries; those that are missing were lawfully erased", b.Sealed)
		say("rules: %d decisions and intents ask for no less than the catalogue that they name", r.Ruled)
	}
	if r.OK() && r.Signed > 0 {
		say("approvals: the passkey signatures of %d decisions hold", r.Signed)
	}
	if r.OK() && r.Unsigned > 0 {
		say("not signed: %d decisions; who took them is the recorder's word", r.Unsigned)
	}
	switch {
	case !r.OK() || r.Enrolled == 0:
	case len(o.Provider) == 0:
		say("not checked: the logins behind %d passkeys; add --provider ISSUER=JWKS-FILE", r.Enrolled)
	case r.Bundle == nil:
		say("not checked: the logins behind %d passkeys, whose texts are in bundles alone", r.Enrolled)
	default:
		say("passkeys: the logins behind %d of %d are signed by the providers given", r.Anchored, r.Enrolled)
	}
	switch {
	case len(r.Witnesses) > 0:
		say("cosigned by %s", strings.Join(r.Witnesses, ", "))
	case r.OK() && len(o.Witness) == 0 && r.Since == 0:
		say("not checked: that nobody was shown another log; add --witness KEY, or --since with an earlier checkpoint or bundle")
	}
	if r.Since > 0 {
		say("continues the earlier checkpoint of size %d", r.Since)
	}
	for _, u := range r.Unchecked {
		say("not checked: %s", u)
	}
	for _, n := range r.Notes {
		say("note: %s", n)
	}
	_, err := io.WriteString(cmd.OutOrStdout(), out.String())
	return err
}

func orNone(s string) string {
	if s == "" {
		return "no time"
	}
	return s
}

// orEnv returns value, or that of the environment variable name, or the content
// of the file that name_FILE names, as containers are given secrets; one that
// cannot be read is no value.
func orEnv(value, name string) string {
	if value != "" {
		return value
	}
	if v := os.Getenv(name); v != "" {
		return v
	}
	if file := os.Getenv(name + "_FILE"); file != "" {
		v, _ := readSecret(file)
		return v
	}
	return ""
}
