package postgres

import (
	"context"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// pgbench runs the real one against dsn, and returns what it prints.
func pgbench(t testing.TB, dsn string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	program := "pgbench"
	if found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/pgbench"); len(found) > 0 { // Debian's on PATH is a wrapper that is slow to start
		program = found[len(found)-1]
	}
	out, err := exec.CommandContext(ctx, program, append(args, dsn)...).CombinedOutput()
	if err != nil {
		t.Fatalf("pgbench %v: %v: %s", args, err, out)
	}
	return string(out)
}

func TestPgbenchRunsUnchangedInEachProtocolAndEveryStatementIsOnRecord(t *testing.T) {
	pgbench(t, server.DSN, "-i", "-q", "-s", "1")
	pipeline := filepath.Join(t.TempDir(), "pipeline.sql")
	if err := os.WriteFile(pipeline, []byte("\\startpipeline\nselect 1;\nselect 2;\nselect 3;\n\\endpipeline\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, mode := range []string{"simple", "extended", "prepared"} {
		t.Run(mode, func(t *testing.T) {
			p := serve(t, everything())
			// pgbench asks for partitions and the scale first.
			used := func() (n int) {
				for _, u := range p.uses() {
					if !strings.Contains(u.Statement, "pg_catalog.") && !strings.Contains(u.Statement, "count(*)") {
						n++
					}
				}
				return n
			}
			pgbench(t, p.dsn(""), "-n", "-S", "-c", "2", "-t", "30", "-M", mode)
			if n := used(); n != 60 {
				t.Errorf("select only: %d uses on record, want 60", n)
			}
			pgbench(t, p.dsn(""), "-n", "-c", "2", "-t", "10", "-M", mode) // begin, 3 updates, a select, an insert, end
			if n := used(); n != 60+2*10*7 {
				t.Errorf("TPC-B: %d uses on record, want %d", n, 60+2*10*7)
			}
			if mode != "simple" {
				pgbench(t, p.dsn(""), "-n", "-c", "2", "-t", "10", "-M", mode, "-f", pipeline)
				if n := used(); n != 200+60 {
					t.Errorf("pipelines: %d uses on record, want %d", n, 200+60)
				}
			}
		})
	}
}

// BenchmarkSelect is `pgbench -S` with one client: direct, and through the
// gateway with a record in memory, so that the difference is ours.
func BenchmarkSelect(b *testing.B) {
	pgbench(b, server.DSN, "-i", "-q", "-s", "1")
	p := serve(b, everything())
	u, err := url.Parse(server.DSN)
	if err != nil {
		b.Fatal(err)
	}
	p.sess.Upstreams["orders.internal"] = u.Host // without the tap
	for _, clients := range []string{"1", "16"} {
		for name, dsn := range map[string]string{"direct": server.DSN, "gateway": p.dsn("")} {
			b.Run(name+"-"+clients, func(b *testing.B) {
				out := pgbench(b, dsn, "-n", "-S", "-c", clients, "-t", strconv.Itoa(max(1, b.N)))
				for line := range strings.Lines(out) {
					if rest, ok := strings.CutPrefix(line, "tps = "); ok {
						tps, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
						b.ReportMetric(tps, "tps")
					}
				}
			})
		}
	}
}
