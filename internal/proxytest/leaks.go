package proxytest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

const module = "github.com/sluice-proxy/sluice"

// leakPatience is how long what is being closed may take to be gone.
const leakPatience = 10 * time.Second

// pipesKept is how many empty pipes one of the relay's loops keeps at most.
const pipesKept = 2

// NoLeaks checks at the test's end that all goroutines that run or were started by code of this module, and all
// descriptors of the process, that were not there when NoLeaks was called are gone again. Call it
// first, so that it looks last, and not in tests that run in parallel with others.
//
// The relay's event loop is not waited for: it stays by design for a second after its last session.
// So its goroutine is no leak, nor are the pollers' descriptors, nor the empty pipes that it keeps for
// the next session: two at most for each loop that lives.
func NoLeaks(t testing.TB) {
	t.Helper()
	noLeaks(t, leakPatience)
}

func noLeaks(t testing.TB, patience time.Duration) {
	t.Helper()
	before, fds := goroutines(), openFiles()
	t.Cleanup(func() {
		t.Helper()
		var leftG, leftF []string
		for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
			now := goroutines()
			loops := takeLoops(now)
			leftG = slices.DeleteFunc(since(before, now), func(g string) bool { return !strings.Contains(g, module) })
			leftF = exceptPipes(since(fds, openFiles()), pipesKept*loops)
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

// exceptPipes returns files without most pipes both of whose ends are among them.
func exceptPipes(files []string, most int) (left []string) {
	ends := make(map[string]int) // of each pipe
	for _, f := range files {
		if _, pipe, ok := strings.Cut(f, " pipe:"); ok {
			ends[pipe]++
		}
	}
	excused := make(map[string]bool)
	for pipe, n := range ends {
		if n == 2 && len(excused) < most {
			excused[pipe] = true
		}
	}
	for _, f := range files {
		if _, pipe, ok := strings.Cut(f, " pipe:"); !ok || !excused[pipe] {
			left = append(left, f)
		}
	}
	return left
}

// goroutines returns the stacks of all goroutines by "goroutine N".
func goroutines() map[string]string {
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
		if name, _, ok := bytes.Cut(g, []byte(" [")); ok {
			all[string(name)] = string(g)
		}
	}
	return all
}

// takeLoops takes the relay's loops out of all, and returns how many there are.
func takeLoops(all map[string]string) (loops int) {
	for name, g := range all {
		if strings.Contains(g, module+"/relay.(*loop).run(") {
			delete(all, name)
			loops++
		}
	}
	return loops
}

// openFiles returns the descriptors of the process, the first, second and so on of each file or socket, whatever their numbers: one
// may move while a test begins. There are none where there is no /proc.
// Those of pollers are left out: they are made once, when first needed, and kept.
func openFiles() map[string]string {
	const dir = "/proc/self/fd"
	all := make(map[string]string)
	of := make(map[string]int) // how many descriptors a file has
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil || to == "anon_inode:[eventpoll]" || to == "anon_inode:[eventfd]" {
			continue // gone by now: the one of ReadDir
		}
		of[to]++
		all[fmt.Sprint(to, " ", of[to])] = e.Name() + " " + to
	}
	return all
}

// Descriptors returns those that a process has open, each with what it is of: "3 socket:[17]".
func Descriptors(pid int) (open []string, err error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if to, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			open = append(open, e.Name()+" "+to)
		}
	}
	return open, err
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
