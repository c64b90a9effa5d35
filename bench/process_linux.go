package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// process is a program that the benchmark has started, with all that it forks.
type process struct {
	cmd  *exec.Cmd
	said tail
	done chan struct{} // closed once it has exited and been waited for
	err  error         // its exit, valid after done
}

// launch starts a program in a process group of its own. It is killed when the benchmark dies, however that is.
// The caller stops it. Where a program is to be talked to, talk is called before it starts.
func launch(talk func(*exec.Cmd) error, name string, args ...string) (*process, error) {
	p := &process{cmd: exec.Command(name, args...), done: make(chan struct{})}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	p.cmd.Stderr = &p.said
	p.cmd.WaitDelay = time.Second // a child of its own may keep stderr open
	if talk != nil {
		if err := talk(p.cmd); err != nil {
			return nil, err
		}
	} else {
		p.cmd.Stdout = &p.said
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go p.wait()
	return p, nil
}

func (p *process) wait() {
	p.err = p.cmd.Wait()
	close(p.done)
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// gone returns nil while the process runs, and then an error with what it said last.
func (p *process) gone() error {
	select {
	case <-p.done:
		err := p.err
		if err == nil {
			err = errors.New("exit status 0")
		}
		if s := p.said.line(); s != "" {
			return fmt.Errorf("it ended (%w): %s", err, s)
		}
		return fmt.Errorf("it ended (%w)", err)
	default:
		return nil
	}
}

// stop kills the process and all its descendants, and returns when they are reaped, or after a few seconds.
func (p *process) stop() {
	deadline := time.Now().Add(5 * time.Second)
	all := tree(processes(), p.pid())
	select {
	case <-p.done: // its pid and group may belong to another by now, unless it left children
	default:
		syscall.Kill(-p.pid(), syscall.SIGKILL)
	}
	for _, s := range all {
		if s.pid != p.pid() { // a child that made a session of its own, as sshd's do
			syscall.Kill(s.pid, syscall.SIGKILL)
		}
	}
	select {
	case <-p.done:
	case <-time.After(time.Until(deadline)):
	}
	for _, s := range all { // they are ours now: the benchmark is their subreaper, or process 1
		for s.pid != p.pid() && time.Now().Before(deadline) {
			if pid, err := syscall.Wait4(s.pid, nil, syscall.WNOHANG, nil); pid != 0 || err != nil && err != syscall.EINTR {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
}

// stopAll stops every process.
func stopAll(ps []*process) {
	for _, p := range ps {
		p.stop()
	}
}

// tail is a writer that keeps the last two KiB.
type tail struct {
	mu sync.Mutex
	b  []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if n := len(t.b) - 2048; n > 0 {
		t.b = append(t.b[:0], t.b[n:]...)
	}
	return len(p), nil
}

// line returns the line that most probably says what is wrong: the first of a Go panic, otherwise the last.
func (t *tail) line() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := strings.TrimSpace(string(t.b))
	if i := strings.Index(text, "panic: "); i >= 0 {
		text, _, _ = strings.Cut(text[i:], "\n")
		return text
	}
	if i := strings.LastIndexByte(text, '\n'); i >= 0 {
		text = text[i+1:]
	}
	if len(text) > 300 {
		text = text[:300] + "…"
	}
	return text
}

// lookPath finds a program, also where only root has it in its path.
func lookPath(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/local/sbin/", "/usr/sbin/", "/sbin/"} {
		if fi, err := os.Stat(dir + name); err == nil && fi.Mode()&0o111 != 0 {
			return dir + name, nil
		}
	}
	return "", fmt.Errorf("%s is not installed", name)
}

// versionOf runs a program that prints its version and returns the first line with a digit in it.
func versionOf(args []string) string {
	if len(args) == 0 {
		return ""
	}
	path, err := lookPath(args[0])
	if err != nil {
		return ""
	}
	cmd := exec.Command(path, args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second
	timer := time.AfterFunc(5*time.Second, func() { cmd.Process.Kill() })
	defer timer.Stop()
	out, _ := cmd.CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if line = strings.TrimSpace(line); strings.ContainsAny(line, "0123456789") {
			return line
		}
	}
	return ""
}
