package ledger

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// ErrNewer says that a newer version of this program made the ledger's schema,
// and that nothing was changed.
var ErrNewer = errors.New("the ledger is of a newer version of this program")

// ErrOlder says that the ledger's schema is of an older version, and that the
// role it was opened as may not bring it up.
var ErrOlder = errors.New("the ledger is of an older version of this program")

// migration takes a ledger's schema from one version to the next. It adds beside
// the log and takes nothing away: CREATE alone, so that entries, hashes and
// checkpoints, their columns and their triggers, are the same before and after.
type migration struct {
	sqlite   []string
	postgres []string // {schema} stands for the schema's name
	// describes is what PostgreSQL then says of what was added, as describe
	// reads it; {schema} as above.
	describes map[string]string
}

// How a ledger gets from one version of this program to the next: docs/upgrade.md.
//
// migrations lead from schema 1, which sqliteSchema and postgres.statements make,
// to the newest. One that was released is never changed. There is none yet:
// every version so far has schema 1.
var migrations []migration

// creates is what a statement of a migration begins with.
var creates = regexp.MustCompile(`^CREATE (UNIQUE )?(TABLE|INDEX|TRIGGER|FUNCTION|VIEW) `)

// checkMigrations refuses a migration that does more than add.
func checkMigrations(list []migration) error {
	for i, m := range list {
		for _, s := range slices.Concat(m.sqlite, m.postgres) {
			if !creates.MatchString(s) {
				return fmt.Errorf("migration %d: %q: a migration adds beside the log, and does nothing else", i+2, statementName(s))
			}
		}
	}
	return nil
}

// newest is the version of the schema after all of list.
func newest(list []migration) int { return 1 + len(list) }

// newer is the refusal of a schema that this program does not know.
func newer(found, known int) error {
	return fmt.Errorf("%w: its schema is %d, this program knows %d; run that version, or a later one (docs/upgrade.md)", ErrNewer, found, known)
}

// schemaComment is how a version stands in PostgreSQL: as the comment on the
// table entries, which a dump carries along. None is version 1.
const schemaComment = "countersign ledger schema "

// commentVersion reads a version from such a comment.
func commentVersion(comment string) (int, error) {
	if comment == "" {
		return 1, nil
	}
	n, err := strconv.Atoi(strings.TrimPrefix(comment, schemaComment))
	if err != nil || n < 1 || !strings.HasPrefix(comment, schemaComment) {
		return 0, alteredSchema("the comment on entries is %q", comment)
	}
	return n, nil
}
