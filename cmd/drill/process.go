package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// restartAfter is how long the supervisor leaves a process that ended down.
const restartAfter = time.Second

// process is a server on a machine of its own, with a disk of its own, that a
// supervisor starts again whenever it ends, as systemd does with Restart=always.
type process struct {
	name  string
	node  *node
	argv  []string
	env   []string
	user  *syscall.Credential             // nil: root
	disk  string                          // its tmpfs
	ready func(ctx context.Context) error // says why it does not serve yet
	after func(ctx context.Context) error // what an operator does after each start, such as to unseal; nil: nothing
	log   string                          // file
	part  string                          // what the table calls it

	mu    sync.Mutex
	pid   int // 0: it is down
	until chan struct{}
	ended chan struct{}
	runs  int
}

// newProcess gives a process a disk of size, as tmpfs counts it.
func newProcess(dir, name string, n *node, size string, argv ...string) (*process, error) {
	p := &process{name: name, part: name, node: n, argv: argv, disk: filepath.Join(dir, name), log: filepath.Join(dir, name+".log"), env: os.Environ()}
	if err := os.MkdirAll(p.disk, 0o755); err != nil {
		return nil, err
	}
	if err := unix.Mount("tmpfs", p.disk, "tmpfs", 0, "mode=755,size="+size); err != nil {
		return nil, fmt.Errorf("a disk for %s: %w", name, err)
	}
	return p, nil
}

func (p *process) file(name string) string { return filepath.Join(p.disk, name) }

// supervise runs p until stop is called.
func (p *process) supervise() {
	p.until, p.ended = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(p.ended)
		for {
			_ = p.run()
			select {
			case <-p.until:
				return
			case <-time.After(restartAfter):
			}
		}
	}()
}

// run runs p once, until it ends.
func (p *process) run() error {
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	return p.node.within(func() error {
		// Asked to end before it began: nobody would see it go.
		select {
		case <-p.until:
			return nil
		default:
		}
		cmd := exec.Command(p.argv[0], p.argv[1:]...)
		cmd.Env, cmd.Stdout, cmd.Stderr, cmd.Dir = p.env, log, log, "/"
		// The kernel sends it when the thread that forked ends, which lives as
		// long as within's function.
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: p.user, Setpgid: true}
		if err := cmd.Start(); err != nil {
			fmt.Fprintln(log, "drill: not started:", err)
			return err
		}
		p.mu.Lock()
		p.pid = cmd.Process.Pid
		p.runs++
		p.mu.Unlock()
		err := cmd.Wait()
		p.mu.Lock()
		p.pid = 0
		p.mu.Unlock()
		fmt.Fprintln(log, "drill: ended:", err)
		return err
	})
}

// tree are p's process and all that descend from it; the first first.
func (p *process) tree() []int {
	p.mu.Lock()
	pids := []int{p.pid}
	p.mu.Unlock()
	if pids[0] == 0 {
		return nil
	}
	for i := 0; i < len(pids); i++ {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pids[i]))
		for _, t := range tasks {
			b, _ := os.ReadFile(t)
			for _, f := range strings.Fields(string(b)) {
				if pid, err := strconv.Atoi(f); err == nil {
					pids = append(pids, pid)
				}
			}
		}
	}
	return pids
}

// signal signals p and all that descend from it.
func (p *process) signal(s syscall.Signal) error {
	var errs error
	tree := p.tree()
	if len(tree) == 0 {
		return fmt.Errorf("%s is down", p.name)
	}
	for _, pid := range tree {
		if err := syscall.Kill(pid, s); err != nil && !errors.Is(err, syscall.ESRCH) {
			errs = errors.Join(errs, err)
		}
	}
	return errs
}

// serves waits until p serves.
func (p *process) serves(ctx context.Context, limit time.Duration) error {
	return until(ctx, limit, p.name+" serves", func() error {
		if len(p.tree()) == 0 {
			return errors.New("it is down")
		}
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		if p.after != nil {
			if err := p.after(ctx); err != nil {
				return err
			}
		}
		return p.ready(ctx)
	})
}

// stop ends p for good.
func (p *process) stop() {
	if p.until == nil {
		return
	}
	close(p.until)
	_ = p.signal(syscall.SIGCONT)
	_ = p.signal(syscall.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(15 * time.Second):
		_ = p.signal(syscall.SIGKILL)
		<-p.ended
	}
}

// slow lets p run a fifth of the time, in bursts, until the returned function
// is called.
func (p *process) slow() (end func()) {
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			_ = p.signal(syscall.SIGSTOP)
			time.Sleep(80 * time.Millisecond)
			_ = p.signal(syscall.SIGCONT)
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	return func() {
		close(stop)
		<-done
		_ = p.signal(syscall.SIGCONT)
	}
}

// fill leaves no byte free on p's disk, until the returned function is called.
func (p *process) fill() (end func() error, err error) {
	path := p.file("filler")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	end = func() error { return os.Remove(path) }
	block := make([]byte, 1<<20)
	for n := len(block); n >= 1; {
		if _, err := f.Write(block[:n]); err == nil {
			continue
		} else if !errors.Is(err, syscall.ENOSPC) {
			return end, err
		}
		n /= 2
	}
	return end, nil
}

// onThread runs f on a thread of its own.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}
