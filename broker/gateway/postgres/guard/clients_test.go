package guard

import (
	"net/url"
	"regexp"
	"strings"
	"testing"

	"github.com/countersign-dev/countersign/store"
)

// What psql asks for its commands, as it prints it itself, is let through.
func TestWhatPsqlAsksToDescribeTablesIsLetThrough(t *testing.T) {
	conn, _ := connect(t)
	g := New(&store.PostgresAccess{Statements: []string{"select"}, Tables: []string{"*"}}, newMasker(t), loadCatalog(t, conn))
	rows, err := querier{conn}.Query(t.Context(), "SELECT current_database()")
	if err != nil {
		t.Fatal(err)
	}
	dsn, err := url.Parse(server.DSN)
	if err != nil {
		t.Fatal(err)
	}
	dsn.Path = "/" + rows[0][0]
	args := []string{"-X", "-E", "-d", dsn.String()}
	for _, c := range []string{`\d`, `\d orders`, `\d+ orders`, `\d events`, `\d+ events`, `\d+ events_a`, `\d+ order_mails`, `\d child`, `\d counter`, `\dt`, `\dt+`, `\dv`, `\di`, `\ds`, `\dn`, `\du`, `\df`, `\dT`, `\l`, `\dp`, `\dd`, `\dD`, `\do`, `\dx`} {
		args = append(args, "-c", c)
	}
	out, err := server.Command("psql", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	asked := regexp.MustCompile(`(?s)\*{9} QUERY \*{10}\n(.*?)\n\*{26}`).FindAllStringSubmatch(string(out), -1)
	if len(asked) < 30 {
		t.Fatalf("psql asked %d times: %s", len(asked), out)
	}
	for _, q := range asked {
		if v := g.Check(q[1]); v.Refused != "" {
			t.Errorf("%s\n%s", v.Refused, strings.TrimSpace(q[1]))
		}
	}
}
