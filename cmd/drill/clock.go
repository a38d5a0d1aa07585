package main

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A process's clock is set wrong where the process reads it: in the vDSO, the
// page of code by which the kernel lets programs read the time without a system
// call. Each process has that page to itself once it is written to, and the
// kernel lets a debugger write. So the real binaries are skewed, those that link
// no libc (Go's) among them, and nothing in them knows of it. Monotonic time
// stays as it is, which is what a clock set by hand does.
//
// The code is for x86-64. A function of the vDSO is made to jump to what asks the
// kernel by system call and adds an offset in seconds that lies beside it.

// offsetAt is where the offset lies, and codeAt the code, counted from the end of
// the vDSO, which ends in zeros.
const (
	offsetAt = 8
	codeAt   = 256
)

// skewed are the functions of the vDSO, and what each does instead. The four
// bytes at to stand for the distance to the offset from the byte after them.
var skewed = []struct {
	name string
	code []byte
	to   int
}{
	{"__vdso_clock_gettime", []byte{
		0xb8, 0xe4, 0, 0, 0, // mov eax, 228 (clock_gettime)
		0x0f, 0x05, // syscall
		0x85, 0xff, // test edi, edi (CLOCK_REALTIME)
		0x74, 0x05, // je add
		0x83, 0xff, 0x05, // cmp edi, 5 (CLOCK_REALTIME_COARSE)
		0x75, 0x0a, // jne end
		0x48, 0x8b, 0x15, 0, 0, 0, 0, // add: mov rdx, [offset]
		0x48, 0x01, 0x16, // add [rsi], rdx
		0xc3, // end: ret
	}, 19},
	{"__vdso_gettimeofday", []byte{
		0xb8, 0x60, 0, 0, 0, // mov eax, 96 (gettimeofday)
		0x0f, 0x05, // syscall
		0x48, 0x85, 0xff, // test rdi, rdi
		0x74, 0x0a, // je end
		0x48, 0x8b, 0x15, 0, 0, 0, 0, // mov rdx, [offset]
		0x48, 0x01, 0x17, // add [rdi], rdx
		0xc3, // end: ret
	}, 15},
	{"__vdso_time", []byte{
		0xb8, 0xc9, 0, 0, 0, // mov eax, 201 (time)
		0x0f, 0x05, // syscall
		0x48, 0x03, 0x05, 0, 0, 0, 0, // add rax, [offset]
		0x48, 0x85, 0xff, // test rdi, rdi
		0x74, 0x03, // je end
		0x48, 0x89, 0x07, // mov [rdi], rax
		0xc3, // end: ret
	}, 10},
}

// skew sets the wall clock of p, and of all that descends from it, off by d.
func (p *process) skew(d time.Duration) error {
	tree := p.tree()
	if len(tree) == 0 {
		return fmt.Errorf("%s is down", p.name)
	}
	for i, pid := range tree {
		if err := skew(pid, d); err != nil && (i == 0 || !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ESRCH) && !errors.Is(err, io.EOF)) {
			return fmt.Errorf("the clock of %s: %w", p.name, err)
		}
	}
	return nil
}

func skew(pid int, d time.Duration) error {
	start, end, err := vdso(pid)
	if err != nil {
		return err
	}
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer mem.Close()
	page := make([]byte, end-start)
	if _, err := mem.ReadAt(page, int64(start)); err != nil {
		return err
	}
	code := len(page) - codeAt
	if page[code] == 0 {
		if err := patch(pid, mem, start, page, code); err != nil {
			return err
		}
	}
	var offset [8]byte
	binary.LittleEndian.PutUint64(offset[:], uint64(int64(d/time.Second)))
	_, err = mem.WriteAt(offset[:], int64(end-offsetAt))
	return err
}

// patch puts the code in place.
func patch(pid int, mem *os.File, start uint64, page []byte, code int) error {
	image, err := elf.NewFile(bytes.NewReader(page))
	if err != nil {
		return fmt.Errorf("the vDSO: %w", err)
	}
	if image.Machine != elf.EM_X86_64 {
		return errors.New("clocks are skewed on x86-64 alone")
	}
	symbols, err := image.DynamicSymbols()
	if err != nil {
		return fmt.Errorf("the vDSO: %w", err)
	}
	if len(bytes.Trim(page[code:], "\x00")) > 0 {
		return errors.New("this kernel's vDSO has no room at its end")
	}
	type jump struct {
		at   uint64
		code [5]byte
	}
	var jumps []jump
	at := code
	for _, f := range skewed {
		copy(page[at:], f.code)
		binary.LittleEndian.PutUint32(page[at+f.to:], uint32(len(page)-offsetAt-(at+f.to+4)))
		for _, s := range symbols {
			if s.Name == f.name {
				j := jump{at: s.Value}
				j.code[0] = 0xe9 // jmp, relative to the next instruction
				binary.LittleEndian.PutUint32(j.code[1:], uint32(int64(at)-int64(s.Value)-5))
				jumps = append(jumps, j)
			}
		}
		at += len(f.code)
	}
	if len(jumps) != len(skewed) {
		return fmt.Errorf("this kernel's vDSO has %d of %d functions", len(jumps), len(skewed))
	}
	if _, err := mem.WriteAt(page[code:], int64(start)+int64(code)); err != nil {
		return fmt.Errorf("writing to the vDSO: %w", err)
	}
	// No thread may be within the bytes that become jumps.
	for range 100 {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			return err
		}
		clear, err := outside(pid, func(pc uint64) bool {
			for _, j := range jumps {
				if at := start + j.at; pc > at && pc < at+uint64(len(j.code)) {
					return false
				}
			}
			return true
		})
		if err == nil && clear {
			for _, j := range jumps {
				if _, e := mem.WriteAt(j.code[:], int64(start+j.at)); e != nil {
					err = errors.Join(err, e)
				}
			}
		}
		if e := syscall.Kill(pid, syscall.SIGCONT); err == nil {
			err = e
		}
		if err != nil || clear {
			return err
		}
		time.Sleep(time.Millisecond) // let the thread move on
	}
	return errors.New("a thread was always reading the clock")
}

// outside waits until every thread of a process is stopped, and reports whether
// ok says so of each one's program counter.
func outside(pid int, ok func(pc uint64) bool) (bool, error) {
	for range 1000 {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
		if err != nil || len(tasks) == 0 {
			return false, os.ErrNotExist
		}
		all, clear := true, true
		for _, t := range tasks {
			stat, err := os.ReadFile(t + "/stat")
			if err != nil {
				continue // the thread has ended
			}
			// After the name, which may hold anything: the state.
			if i := bytes.LastIndexByte(stat, ')'); i < 0 || i+2 >= len(stat) || stat[i+2] != 'T' {
				all = false
				break
			}
			b, err := os.ReadFile(t + "/syscall") // "… SP PC", all in hexadecimal
			if err != nil {
				continue
			}
			f := strings.Fields(string(b))
			pc, err := strconv.ParseUint(strings.TrimPrefix(f[len(f)-1], "0x"), 16, 64)
			clear = clear && err == nil && ok(pc)
		}
		if all {
			return clear, nil
		}
		time.Sleep(time.Millisecond)
	}
	return false, errors.New("it does not stop")
}

// vdso is where a process has its vDSO.
func vdso(pid int) (start, end uint64, err error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(maps)) {
		if strings.HasSuffix(line, "[vdso]\n") {
			_, err = fmt.Sscanf(line, "%x-%x", &start, &end)
			return start, end, err
		}
	}
	return 0, 0, io.EOF
}
