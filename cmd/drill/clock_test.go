package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestMain is also a program that says the time whenever it is asked.
func TestMain(m *testing.M) {
	if os.Getenv("DRILL_TELLS_TIME") == "" {
		os.Exit(m.Run())
	}
	for range 8 { // threads that read the clock all the time
		go func() {
			for {
				_ = time.Now()
			}
		}()
	}
	in := bufio.NewScanner(os.Stdin)
	began := time.Now()
	for in.Scan() {
		fmt.Println(time.Now().Round(0).UnixMilli(), time.Since(began).Milliseconds())
	}
}

func TestAProcessReadsTheClockThatWasSetForIt(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, as the drill does")
	}
	for name, cmd := range map[string]*exec.Cmd{
		"a Go program": {Path: os.Args[0], Args: os.Args[:1]},
		"python":       exec.Command("python3", "-uc", "import sys,time\nfor _ in sys.stdin: print(int(time.time()*1000), 0)"),
	} {
		t.Run(name, func(t *testing.T) {
			cmd.Env = append(os.Environ(), "DRILL_TELLS_TIME=1")
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Skip(err)
			}
			defer func() {
				in.Close()
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			}()
			lines := bufio.NewScanner(out)
			tell := func() (time.Duration, time.Duration) {
				t.Helper()
				fmt.Fprintln(in)
				if !lines.Scan() {
					t.Fatal("it has ended")
				}
				f := strings.Fields(lines.Text())
				wall, _ := strconv.ParseInt(f[0], 10, 64)
				mono, _ := strconv.ParseInt(f[1], 10, 64)
				return time.Until(time.UnixMilli(wall)), time.Duration(mono) * time.Millisecond
			}
			near := func(got, want time.Duration) bool { return got > want-2*time.Second && got < want+2*time.Second }
			_, before := tell()
			for _, d := range []time.Duration{time.Hour, -40 * time.Second, 0} {
				if err := skew(cmd.Process.Pid, d); err != nil {
					t.Fatal(err)
				}
				wall, mono := tell()
				if !near(wall, d) || !near(mono, before) {
					t.Errorf("set off by %s, it is off by %s, and its monotonic clock moved by %s", d, wall, mono-before)
				}
			}
		})
	}
}
