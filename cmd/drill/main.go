// Command drill shows what becomes of Countersign on a bad day: three brokers, two
// gateways, two recorders, a witness, Redis, Vault and two PostgreSQL run as real
// processes, each on a machine of its own (a network namespace with a disk), under
// a steady load. One part after the other is killed, stopped, cut off, left without
// a byte of disk, slowed and given a wrong clock. In the end, what callers were
// told is compared with what is on record, and with what Vault, its audit log and
// the target say themselves. docs/drill.md tells how to read what it prints.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Exit statuses.
const (
	held     = 0 // all that is promised held
	broken   = 1 // it did not
	unusable = 2 // the drill could not be held
)

// inside is set in the environment of the drill within its namespaces.
const inside = "COUNTERSIGN_DRILL_INSIDE"

func main() {
	o := options{}
	flag.DurationVar(&o.length, "for", 10*time.Minute, "how long the load runs at least; every fault befalls every part once, however long it takes")
	flag.StringVar(&o.binary, "countersign", "bin/countersign", "the program")
	flag.StringVar(&o.dir, "dir", "", "directory for logs and configuration, kept; none: a temporary one, removed if all held")
	flag.IntVar(&o.callers, "callers", 6, "how many steps are under way at once")
	flag.StringVar(&o.only, "only", "", "regular expression: only the faults \"FAULT of PART\" that it matches")
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(unusable)
	}
	if os.Getenv(inside) == "" {
		os.Exit(enter())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	status, err := o.drill(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "drill:", err)
	}
	os.Exit(status)
}

// enter runs this program again in namespaces of its own: of processes, so that
// none outlives it, of mounts and of the network, so that nothing is left behind.
func enter() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	err := onThread(func() error { // it is killed when the thread that forked it ends
		if err := cmd.Start(); err != nil {
			return err
		}
		go func() {
			for s := range signals {
				if s == syscall.SIGTERM { // a terminal sends an interrupt to both
					_ = cmd.Process.Signal(s)
				}
			}
		}()
		return cmd.Wait()
	})
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return max(exit.ExitCode(), broken)
	case errors.Is(err, os.ErrPermission):
		fmt.Fprintln(os.Stderr, "drill: network namespaces cannot be had here: it needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_SYS_PTRACE). Without them the drill would show less than it says, and is not held.")
		return unusable
	case err != nil:
		fmt.Fprintln(os.Stderr, "drill:", err)
		return unusable
	}
	return held
}

// settle makes the new namespaces usable.
func settle() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	for _, m := range [][2]string{{"proc", "/proc"}, {"tmpfs", "/run"}} {
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", m[1], err)
		}
	}
	for _, tool := range []string{"ip", "nft", "redis-server"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%s is not installed: apt-get install iproute2 nftables redis-server postgresql", tool)
		}
	}
	return nil
}

type options struct {
	length            time.Duration
	binary, dir, only string
	callers           int
}

// drill holds the drill and prints what came of it.
func (o *options) drill(ctx context.Context) (status int, err error) {
	only, err := regexp.Compile(o.only)
	if err != nil {
		return unusable, err
	}
	if o.binary, err = filepath.Abs(o.binary); err != nil {
		return unusable, err
	}
	if err := settle(); err != nil {
		return unusable, err
	}
	dir := o.dir
	if dir == "" {
		if dir, err = os.MkdirTemp("", "countersign-drill-"); err != nil {
			return unusable, err
		}
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return unusable, err
	}
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.Chmod(dir, 0o755)); err != nil {
		return unusable, err
	}
	defer func() {
		if o.dir == "" && status == held && err == nil {
			_ = os.RemoveAll(dir)
		} else {
			fmt.Println("logs and configuration:", dir)
		}
	}()
	say := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, time.Now().Format("15:04:05 ")+format+"\n", args...)
	}

	say("starting %d brokers, %d of them with a gateway, %d recorders, a witness, Redis, Vault and two PostgreSQL", brokers, gateways, recorders)
	h, err := newHouse(ctx, dir, o.binary)
	if err != nil {
		return unusable, err
	}
	defer h.stop()
	d := &drill{h: h, people: newPeople(h), eye: newEye(h)}
	j := newJournal()
	if d.load, err = newLoad(h, j, d.eye); err != nil {
		return unusable, err
	}

	say("trying the walls between the trust domains")
	if err := d.checkWalls(ctx); err != nil {
		return broken, err
	}

	loading, endLoad := context.WithCancel(ctx)
	defer endLoad()
	deciding, endPeople := context.WithCancel(ctx)
	defer endPeople()
	watching, endWatch := context.WithCancel(ctx)
	defer endWatch()
	var callers, others sync.WaitGroup
	for _, name := range approvers {
		others.Go(func() { d.people.decide(deciding, name) })
	}
	others.Go(func() { d.eye.watch(watching) })
	began := time.Now()
	for i := range o.callers {
		callers.Go(func() { d.load.run(loading, i) })
	}
	if err := until(ctx, 2*time.Minute, "every broker hands out credentials", func() error { return d.load.since(began) }); err != nil {
		return broken, err
	}
	pairs := 0
	for round := 1; round == 1 || time.Since(began) < o.length; round++ {
		done := 0
		for _, f := range faults {
			for _, p := range parts() {
				if ctx.Err() != nil {
					return unusable, ctx.Err()
				}
				if !only.MatchString(f.name+" of "+p.name) || round > 1 && time.Since(began) > o.length {
					continue
				}
				done++
				if err := h.befall(ctx, d.load, f, p, o.hold(only)); err != nil {
					d.finding("%v", err)
				}
				w := j.current()
				if w.notHealed != nil {
					d.finding("%v", w.notHealed)
				}
				say("%s of %s: %d calls, failed %s, longest stall %.1f s, well again after %.1f s", f.name, p.name, w.calls, problems(w.failed), w.stall.Seconds(), w.healed.Seconds())
			}
		}
		if pairs += done; done == 0 {
			break
		}
	}
	j.next("none", "after")
	endLoad()
	callers.Wait()
	say("the load ran for %s; waiting for what is out to end", time.Since(began).Round(time.Second))
	err = d.check(ctx)
	endPeople()
	endWatch()
	others.Wait()
	if err != nil {
		d.finding("%v", err)
	}
	d.findings = append(d.findings, d.load.findings...)

	fmt.Printf("\nA drill of %s, %d faults, %d callers.\n\n", time.Since(began).Round(time.Second), pairs, o.callers)
	if err := j.print(os.Stdout); err != nil {
		return broken, err
	}
	fmt.Println()
	for _, f := range d.facts {
		fmt.Println("-", f)
	}
	if len(d.findings) == 0 {
		fmt.Println("\nAll held.")
		return held, nil
	}
	fmt.Printf("\n%d things did not hold:\n- %s\n", len(d.findings), strings.Join(d.findings[:min(len(d.findings), 50)], "\n- "))
	return broken, nil
}

// hold is how long a fault lasts, so that all of them fit into the drill.
func (o *options) hold(only *regexp.Regexp) time.Duration {
	n := 0
	for _, f := range faults {
		for _, p := range parts() {
			if only.MatchString(f.name + " of " + p.name) {
				n++
			}
		}
	}
	return min(max(o.length/time.Duration(2*max(n, 1)), 2*time.Second), 10*time.Second)
}
