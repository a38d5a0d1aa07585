package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// pgbenchScale is how many times 100,000 accounts pgbench's table has.
const pgbenchScale = 5

// gateway measures pgbench's read-only script straight at PostgreSQL, through
// pgbouncer, and through the gateway, which has every statement on record before
// it forwards it: with the recorder in its own process, as in all rows about
// dev, and with the two apart.
func (d *dev) gateway(ctx context.Context, t *table, dsn string) error {
	if dsn == "" {
		return nil
	}
	u, err := url.Parse(dsn)
	if err != nil {
		return err
	}
	password, _ := u.User.Password()
	direct := target{u.Hostname(), u.Port(), u.User.Username(), password, strings.TrimPrefix(u.Path, "/")}
	if out, err := direct.command(ctx, "pgbench", "-i", "-q", "-s", strconv.Itoa(pgbenchScale)).CombinedOutput(); err != nil {
		return fmt.Errorf("pgbench -i: %w: %s", err, out)
	}
	// The role of a step is made by Vault, and may read what the catalogue's role
	// says; pgbench's tables are not in that.
	if out, err := direct.command(ctx, "psql", "-Xq", "-c", "GRANT SELECT ON pgbench_accounts, pgbench_branches TO PUBLIC").CombinedOutput(); err != nil {
		return fmt.Errorf("psql: %w: %s", err, out)
	}
	bouncer, stop, err := startBouncer(ctx, direct)
	if err != nil {
		return err
	}
	defer stop()
	pair, _, err := d.startPair(ctx, d.catalogue)
	if err != nil {
		return err
	}
	defer pair.end()
	through, err := d.session()
	if err != nil {
		return err
	}
	apart, err := pair.session()
	if err != nil {
		return err
	}
	const what = "pgbench -S -M "
	figures := map[string]figure{}
	for _, mode := range []string{"simple", "extended", "prepared"} {
		for _, c := range []int{1, 16} {
			for _, x := range []struct {
				who string
				to  target
			}{{"PostgreSQL", direct}, {"pgbouncer", bouncer}, {"countersign", through}, {"countersign, two processes", apart}} {
				if mode == "prepared" && x.who == "pgbouncer" {
					continue // Debian's pgbouncer knows no prepared statements across clients
				}
				f, err := x.to.pgbench(ctx, t, what+mode, x.who, mode, c)
				if err != nil {
					return fmt.Errorf("%s, %s at %d: %w", mode, x.who, c, err)
				}
				figures[fmt.Sprint(mode, x.who, c)] = f
			}
		}
	}
	added := figures["simplecountersign1"].p50 - figures["simplePostgreSQL1"].p50
	t.floor("gateway, pgbench -S, added p50 at 1", "at most 1 ms", ms(added)+" ms", added <= time.Millisecond)
	rate := figures["simplecountersign16"].rate
	t.floor("gateway, recorded statements at 16", "at least 5,000/s", fmt.Sprintf("%.0f/s; %.0f%% of direct, %.0f%% of pgbouncer", rate,
		100*rate/figures["simplePostgreSQL16"].rate, 100*rate/figures["simplepgbouncer16"].rate), rate >= 5000)
	return nil
}

// target is where pgbench connects to.
type target struct{ host, port, user, password, database string }

// command is a program of PostgreSQL's that connects to t.
func (t target) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "PGHOST="+t.host, "PGPORT="+t.port, "PGUSER="+t.user, "PGPASSWORD="+t.password, "PGDATABASE="+t.database, "PGSSLMODE=disable")
	return cmd
}

// pgbench runs pgbench's read-only script for tab.each from c clients, after a
// warm-up of a fifth of it.
func (t target) pgbench(ctx context.Context, tab *table, what, who, mode string, c int) (figure, error) {
	fmt.Fprintf(os.Stderr, "measuring %s, %s, at %d\n", what, who, c)
	dir, remove, err := scratch()
	if err != nil {
		return figure{}, err
	}
	defer remove()
	run := func(d time.Duration, log string) ([]byte, error) {
		args := []string{"-n", "-S", "-M", mode, "-c", strconv.Itoa(c), "-j", strconv.Itoa(min(c, 2)), "-T", strconv.Itoa(max(1, int(d/time.Second)))}
		if log != "" {
			args = append(args, "-l", "--log-prefix="+log)
		}
		out, err := t.command(ctx, "pgbench", args...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("pgbench: %w: %.500s", err, out)
		}
		return out, err
	}
	if _, err := run(tab.each/5, ""); err != nil {
		return figure{}, err
	}
	out, err := run(tab.each, filepath.Join(dir, "log"))
	if err != nil {
		return figure{}, err
	}
	_, after, _ := strings.Cut(string(out), "tps = ")
	number, _, _ := strings.Cut(after, " ")
	rate, err := strconv.ParseFloat(number, 64)
	if err != nil {
		return figure{}, fmt.Errorf("pgbench said no rate: %s", out)
	}
	lat, err := latencies(filepath.Join(dir, "log") + ".*")
	if err != nil {
		return figure{}, err
	}
	return tab.add(what, who, c, lat, rate), nil
}

// latencies reads pgbench's logs: of each transaction the third word is its
// latency in microseconds.
func latencies(pattern string) ([]time.Duration, error) {
	files, err := filepath.Glob(pattern)
	if err != nil {
		return nil, err
	}
	var out []time.Duration
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		for s := bufio.NewScanner(f); s.Scan(); {
			words := strings.Fields(s.Text())
			if len(words) < 3 {
				continue
			}
			us, err := strconv.ParseInt(words[2], 10, 64)
			if err != nil {
				continue // a failed transaction has a word there
			}
			out = append(out, time.Duration(us)*time.Microsecond)
		}
		f.Close()
	}
	if len(out) == 0 {
		return nil, errors.New("pgbench logged no transaction")
	}
	return out, nil
}

// startBouncer runs pgbouncer before to, with session pooling.
func startBouncer(ctx context.Context, to target) (target, func(), error) {
	dir, remove, err := scratch()
	if err != nil {
		return target{}, nil, err
	}
	host, port, _ := net.SplitHostPort(freeAddr())
	config := filepath.Join(dir, "pgbouncer.ini")
	text := fmt.Sprintf("[databases]\n%s = host=%s port=%s user=%s password=%s\n[pgbouncer]\nlisten_addr=%s\nlisten_port=%s\nauth_type=any\npool_mode=session\nmax_client_conn=100\ndefault_pool_size=50\nunix_socket_dir=\n",
		to.database, to.host, to.port, to.user, to.password, host, port)
	attr := &syscall.SysProcAttr{}
	if os.Getuid() == 0 { // pgbouncer refuses to run as root
		u, err := user.Lookup("postgres")
		if err != nil {
			return target{}, nil, err
		}
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		attr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		if err := errors.Join(os.Chmod(dir, 0o700), os.Chown(dir, uid, gid)); err != nil {
			return target{}, nil, err
		}
	}
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return target{}, nil, err
	}
	cmd := exec.Command("pgbouncer", config)
	cmd.SysProcAttr = attr
	cmd.Stdout, cmd.Stderr = io.Discard, io.Discard
	if err := cmd.Start(); err != nil {
		return target{}, nil, fmt.Errorf("pgbouncer: %w; Debian: apt-get install pgbouncer", err)
	}
	stop := func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		remove()
	}
	at := target{host, port, to.user, to.password, to.database}
	for range 100 {
		if err := at.command(ctx, "psql", "-Xq", "-c", "SELECT 1").Run(); err == nil {
			return at, stop, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	stop()
	return target{}, nil, errors.New("pgbouncer does not answer")
}

// catalogue is dev's.
func (d *dev) catalogue(string) (string, error) {
	return filepath.Join(d.dir, "dev", "catalogue.yaml"), nil
}

// session asks for a session at the PostgreSQL gateway.
func (d *dev) session() (target, error) {
	b, err := d.call(0, "POST", d.API+"/steps/bench/credential", "Authorization", "Bearer "+d.Orchestrators[0].Token,
		map[string]string{"run": "bench", "scope": "orders-db:read", "delivery": "gateway", "ttl": "15m"})
	if err != nil {
		return target{}, err
	}
	var answer struct {
		Credential struct{ Address, Token, Database string }
	}
	if err := json.Unmarshal(b, &answer); err != nil {
		return target{}, err
	}
	host, port, err := net.SplitHostPort(answer.Credential.Address)
	return target{host, port, "step", answer.Credential.Token, answer.Credential.Database}, err
}
