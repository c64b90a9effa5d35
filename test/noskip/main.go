// Noskip is go test for a suite in which a skipped test is a hole.
//
//	go run ./test/noskip [flags and packages of go test]
//
// It runs go test, prints what go test without -v would print, and exits as it does. In addition
// it fails where no test ran at all, and, with SLUICE_TEST_NOSKIP in the environment, where a
// test was skipped: it then names the test and the reason. Without the variable the skipped tests
// are only named.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
)

func main() {
	cmd := exec.Command("go", append([]string{"test", "-json"}, os.Args[1:]...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "noskip:", err)
		os.Exit(2)
	}
	r := &report{out: os.Stdout, tests: make(map[string]*written)}
	readErr := r.read(out)
	if readErr != nil {
		fmt.Fprintln(os.Stderr, "noskip: reading the output of go test:", readErr)
		io.Copy(os.Stderr, out) // or go test blocks
	}
	status := 0
	if err := cmd.Wait(); err != nil {
		status = 2
		if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() > 0 {
			status = exit.ExitCode()
		}
	}
	if ok := r.finish(os.Getenv("SLUICE_TEST_NOSKIP") != ""); status == 0 && (!ok || readErr != nil) {
		status = 1
	}
	os.Exit(status)
}

// event is what go test -json prints (go doc test2json).
type event struct {
	Action  string
	Package string
	Test    string // empty for events of the package
	Output  string
}

// report turns events into what go test prints without -v: nothing for a test that passes, all
// that a failed one wrote, and one line a package.
type report struct {
	out   io.Writer
	tests map[string]*written // by "package\ttest", of tests that are not over or have failed; the package's own under "package\t"
	seen  int
	ran   int
	skips []string
}

// written is what a test has written so far.
type written struct {
	strings.Builder
	seen int // the order in which tests began to write
}

func (r *report) read(in io.Reader) error {
	dec := json.NewDecoder(in)
	for {
		var e event
		if err := dec.Decode(&e); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		r.add(e)
	}
}

func (r *report) add(e event) {
	key := e.Package + "\t" + e.Test
	switch e.Action {
	case "build-output":
		io.WriteString(r.out, e.Output)
	case "output":
		if e.Test != "" && isChatter(e.Output) {
			return
		}
		if r.tests[key] == nil {
			r.seen++
			r.tests[key] = &written{seen: r.seen}
		}
		r.tests[key].WriteString(e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			r.endPackage(e)
		} else {
			r.endTest(e, key)
		}
	}
}

// endTest forgets what a test has written that passed. What a subtest has written that failed
// waits for the end of the test around it.
func (r *report) endTest(e event, key string) {
	isSub := strings.Contains(e.Test, "/")
	switch e.Action {
	case "skip":
		text := r.take(key)
		r.skips = append(r.skips, fmt.Sprintf("%s %s: %s", e.Package, e.Test, reason(text, e.Test)))
		return
	case "fail":
		if !isSub {
			io.WriteString(r.out, r.take(key)+r.takeAll(key+"/"))
		}
	case "pass":
		r.take(key)
		r.takeAll(key + "/")
	}
	r.ran++
}

// endPackage prints the package's line, and before it what a package that failed has left:
// the output of tests that never ended, after a panic or a timeout.
func (r *report) endPackage(e event) {
	own := r.take(e.Package + "\t")
	left := r.takeAll(e.Package + "\t")
	if e.Action == "fail" {
		io.WriteString(r.out, left)
	} else {
		own = strings.TrimPrefix(own, "PASS\n")
	}
	io.WriteString(r.out, own)
}

// take returns what was written under key and forgets it.
func (r *report) take(key string) string {
	w := r.tests[key]
	if w == nil {
		return ""
	}
	delete(r.tests, key)
	return w.String()
}

// takeAll is take for all keys that begin with prefix, in the order in which they came up.
func (r *report) takeAll(prefix string) string {
	var keys []string
	for key := range r.tests {
		if strings.HasPrefix(key, prefix) {
			keys = append(keys, key)
		}
	}
	slices.SortFunc(keys, func(a, b string) int { return r.tests[a].seen - r.tests[b].seen })
	var all strings.Builder
	for _, key := range keys {
		all.WriteString(r.take(key))
	}
	return all.String()
}

// finish names what was skipped and says whether that, and the number of tests, is fine.
func (r *report) finish(strict bool) bool {
	for _, s := range r.skips {
		fmt.Fprintln(r.out, "SKIPPED", s)
	}
	switch {
	case r.ran == 0:
		fmt.Fprintln(r.out, "FAIL: no test ran")
	case strict && len(r.skips) > 0:
		fmt.Fprintf(r.out, "FAIL: %d skipped\n", len(r.skips))
	default:
		return true
	}
	return false
}

// isChatter says whether go test prints line only with -v.
func isChatter(line string) bool {
	for _, p := range [...]string{"=== RUN", "=== PAUSE", "=== CONT", "=== NAME"} {
		if strings.HasPrefix(line, p) {
			return true
		}
	}
	return false
}

// reason finds in what was written what the test gave t.Skip: the line before its "--- SKIP".
func reason(text, test string) string {
	before, _, _ := strings.Cut(text, "--- SKIP: "+test+" ")
	lines := strings.Split(strings.TrimSpace(before), "\n")
	if last := strings.TrimSpace(lines[len(lines)-1]); last != "" {
		return last
	}
	return "no reason given"
}
