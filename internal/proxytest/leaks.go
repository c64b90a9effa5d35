package proxytest

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

const module = "github.com/sluice-proxy/sluice"

// leakPatience is how long what is being closed may take to be gone.
const leakPatience = 10 * time.Second

// NoLeaks checks at the test's end that all goroutines that run or were started by code of this module, and all
// descriptors of the process, that were not there when NoLeaks was called are gone again. Call it
// first, so that it looks last, and not in tests that run in parallel with others.
func NoLeaks(t testing.TB) {
	t.Helper()
	noLeaks(t, leakPatience)
}

func noLeaks(t testing.TB, patience time.Duration) {
	t.Helper()
	goroutines, fds := moduleGoroutines(), openFiles()
	t.Cleanup(func() {
		t.Helper()
		var leftG, leftF []string
		for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
			leftG, leftF = since(goroutines, moduleGoroutines()), since(fds, openFiles())
			if len(leftG)+len(leftF) == 0 {
				return
			}
			if time.Now().After(deadline) {
				break
			}
		}
		const most = 10 // the first ones say it
		for _, g := range leftG[:min(most, len(leftG))] {
			t.Errorf("a goroutine is left:\n%s", g)
		}
		for _, f := range leftF[:min(most, len(leftF))] {
			t.Errorf("a descriptor is left: %s%s", f, socketDetails(f))
		}
		t.Errorf("%d goroutines and %d descriptors are left", len(leftG), len(leftF))
	})
}

// since returns what of now was not there before.
func since(before, now map[string]string) []string {
	var left []string
	for key, text := range now {
		if _, ok := before[key]; !ok {
			left = append(left, text)
		}
	}
	return left
}

// moduleGoroutines returns the stacks of this module's goroutines by "goroutine N".
func moduleGoroutines() map[string]string {
	buf := make([]byte, 1<<20)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	all := make(map[string]string)
	for _, g := range bytes.Split(buf, []byte("\n\n")) {
		if name, _, ok := bytes.Cut(g, []byte(" [")); ok && bytes.Contains(g, []byte(module)) {
			all[string(name)] = string(g)
		}
	}
	return all
}

// openFiles returns the descriptors of the process by number and target; none where there is no /proc.
// Those of pollers are left out: they are made once, when first needed, and kept.
func openFiles() map[string]string {
	const dir = "/proc/self/fd"
	all := make(map[string]string)
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil || to == "anon_inode:[eventpoll]" || to == "anon_inode:[eventfd]" {
			continue // gone by now: the one of ReadDir
		}
		name := e.Name() + " " + to
		all[name] = name
	}
	return all
}

// socketDetails returns the line of /proc/net that tells what a socket is connected to.
func socketDetails(file string) string {
	_, inode, ok := strings.Cut(file, "socket:[")
	if !ok {
		return ""
	}
	inode = strings.TrimSuffix(inode, "]")
	for _, file := range []string{"tcp", "tcp6", "unix"} {
		b, _ := os.ReadFile("/proc/net/" + file)
		for line := range strings.Lines(string(b)) {
			for _, f := range strings.Fields(line) {
				if f == inode {
					return ": " + file + " " + strings.TrimSpace(line)
				}
			}
		}
	}
	return ""
}
