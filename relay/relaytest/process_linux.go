package relaytest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// Processes returns the Meter of a relay that runs as these processes and their descendants. For
// goroutines it counts threads. On Linux it needs to be root or the relay's own user.
func Processes(pids ...int) Meter { return processes(pids) }

type processes []int

// CPU adds up what the processes have used, with that of children that have ended.
func (p processes) CPU() (sum time.Duration, err error) {
	err = p.each(func(_ string, stat []string) error {
		for _, field := range stat[11:15] { // utime to cstime, see proc_pid_stat(5)
			ticks, err := strconv.Atoi(field)
			if err != nil {
				return err
			}
			sum += time.Duration(ticks) * time.Second / 100
		}
		return nil
	})
	return sum, err
}

// Held counts descriptors and threads.
func (p processes) Held() (descriptors, threads int, err error) {
	err = p.each(func(dir string, stat []string) error {
		names, err := os.ReadDir(filepath.Join(dir, "fd"))
		if err != nil {
			return fmt.Errorf("counting descriptors: %w", err)
		}
		descriptors += len(names)
		n, err := strconv.Atoi(stat[17])
		threads += n
		return err
	})
	return descriptors, threads, err
}

// each calls f with the directory in /proc of each process and its stat, from the third field on.
// Descendants that end meanwhile are passed over.
func (p processes) each(f func(dir string, stat []string) error) error {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	stats := make(map[int][]string)
	children := make(map[int][]int)
	for _, dir := range dirs {
		b, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(dir))
		var fields []string
		for _, field := range bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:]) {
			fields = append(fields, string(field))
		}
		if len(fields) < 18 {
			continue
		}
		stats[pid] = fields
		parent, _ := strconv.Atoi(fields[1])
		children[parent] = append(children[parent], pid)
	}
	seen := make(map[int]bool)
	for todo := append([]int(nil), p...); len(todo) > 0; todo = todo[1:] {
		pid := todo[0]
		if seen[pid] {
			continue
		}
		seen[pid] = true
		stat, ok := stats[pid]
		given := len(seen) <= len(p)
		if !ok && given {
			return fmt.Errorf("no process has the number %d", pid)
		}
		if !ok {
			continue
		}
		if err := f(filepath.Join("/proc", strconv.Itoa(pid)), stat); err != nil && (given || !errors.Is(err, fs.ErrNotExist)) {
			return err
		}
		todo = append(todo, children[pid]...)
	}
	return nil
}
