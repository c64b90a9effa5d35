package e2e

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

const patience = proxytest.Patience

// freeAddr returns an address of 127.0.0.0/8 and a port that nobody uses. Nobody else will: the
// address is random.
func freeAddr(t *testing.T) string {
	t.Helper()
	ip := netip.AddrFrom4([4]byte{127, byte(1 + rand.IntN(250)), byte(rand.IntN(256)), byte(1 + rand.IntN(250))})
	return netip.AddrPortFrom(ip, proxytest.FreePort(t)).String()
}

// isListening looks for addr in the kernel's table. It does not connect, which would count as a
// client.
func isListening(addr string) bool {
	if path, ok := strings.CutPrefix(addr, "unix://"); ok {
		_, err := os.Stat(path)
		return err == nil
	}
	if udp, ok := strings.CutPrefix(addr, "udp://"); ok {
		return inTableOf("udp", kernelAddr(udp)+" 00000000:0000 07 ")
	}
	return inTable(kernelAddr(addr) + " 00000000:0000 0A ")
}

// isDialing says whether somebody waits for an answer from addr.
func isDialing(addr string) bool { return inTable(kernelAddr(addr) + " 02 ") }

func inTable(entry string) bool { return inTableOf("tcp", entry) }

func inTableOf(network, entry string) bool {
	table, err := os.ReadFile("/proc/net/" + network)
	return err == nil && bytes.Contains(table, []byte(" "+entry))
}

// kernelAddr writes an IPv4 address and port as /proc/net/tcp does.
func kernelAddr(addr string) string {
	ap := netip.MustParseAddrPort(addr)
	ip := ap.Addr().AsSlice()
	slices.Reverse(ip)
	return fmt.Sprintf("%s:%04X", strings.ToUpper(hex.EncodeToString(ip)), ap.Port())
}

// output collects what a process writes, and can be read while it does.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// process is a running program.
type process struct {
	cmd  *exec.Cmd
	log  *output // standard output and standard error
	done chan struct{}
	err  error // of Wait, after done
}

// start runs a program until the end of the test.
func start(t *testing.T, name string, args ...string) *process {
	t.Helper()
	return startWith(t, nil, name, args...)
}

// startWith is start with a standard input.
func startWith(t *testing.T, stdin *os.File, name string, args ...string) *process {
	t.Helper()
	proxytest.Need(t, name)
	p := &process{cmd: exec.Command(name, args...), log: new(output), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	if stdin != nil {
		p.cmd.Stdin = stdin
	}
	p.cmd.WaitDelay = time.Second
	p.cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0") // or sluice takes a second to end
	p.cmd.SysProcAttr = diesWithUs(syscall.SysProcAttr{Setpgid: true})
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go p.wait()
	t.Cleanup(func() {
		syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) // its children, too
		<-p.done
		if t.Failed() {
			t.Logf("%s wrote:\n%s", filepath.Base(name), tail(p.log.String(), 8000))
		}
	})
	return p
}

func (p *process) wait() {
	p.err = p.cmd.Wait()
	close(p.done)
}

// startServer is start for a program that listens at addr, and waits until it does.
func startServer(t *testing.T, addr, name string, args ...string) *process {
	t.Helper()
	p := start(t, name, args...)
	p.waitListening(t, addr)
	return p
}

func (p *process) waitListening(t *testing.T, addr string) {
	t.Helper()
	proxytest.Until(t, p.cmd.Path+" listening at "+addr, func() bool {
		select {
		case <-p.done:
			t.Fatalf("%s ended: %v\n%s", p.cmd.Path, p.err, p.log)
		default:
		}
		return isListening(addr)
	})
}

// exitCode waits for the end of the process.
func (p *process) exitCode(t *testing.T, limit time.Duration) int {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(limit):
		t.Fatalf("%s has not ended within %v", p.cmd.Path, limit)
	}
	if exit, ok := errors.AsType[*exec.ExitError](p.err); ok {
		return exit.ExitCode()
	}
	if p.err != nil {
		t.Fatalf("%s: %v", p.cmd.Path, p.err)
	}
	return 0
}

// fds returns what the process has open, by descriptor.
func (p *process) fds() []string {
	open, _ := proxytest.Descriptors(p.cmd.Process.Pid)
	return open
}

// cpu returns the processor time that the process has used.
func (p *process) cpu(t *testing.T) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:])) // from field 3 on: proc_pid_stat(5)
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return time.Duration(user+system) * time.Second / 100
}

// sluice is the program under test.
type sluice struct {
	*process
	base int // descriptors before the first client
}

// startSluice starts sluice, which must come to listen at all addrs. At the end of the test it must
// be as it was before its first client, unless the test has stopped it.
func startSluice(t *testing.T, addrs []string, args ...string) *sluice {
	t.Helper()
	return startCommand(t, addrs, append([]string{binary}, args...))
}

// startCommand is startSluice for a command line that executes sluice in the end.
func startCommand(t *testing.T, addrs []string, command []string) *sluice {
	t.Helper()
	s := &sluice{process: start(t, command[0], command[1:]...)}
	for _, a := range addrs {
		s.waitListening(t, a)
	}
	s.base = len(s.fds())
	t.Cleanup(func() {
		select {
		case <-s.done:
		default:
			s.checkIdle(t)
			s.stop(t)
		}
		log, _, _ := strings.Cut(s.log.String(), "SIGQUIT: quit") // what follows was asked for
		if strings.Contains(log, "DATA RACE") || strings.Contains(log, "panic") {
			t.Errorf("sluice wrote:\n%s", log)
		}
	})
	return s
}

// keptOpen is what a poller or an event loop keeps once it has been needed: an epoll descriptor, and
// one to wake it up. A pipe is not to be kept.
var keptOpen = regexp.MustCompile(`anon_inode:\[(eventpoll|eventfd)\]|pidfd`)

// checkIdle waits until all that came with clients has been closed.
func (s *sluice) checkIdle(t *testing.T) {
	t.Helper()
	var open []string
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		open = open[:0]
		for _, fd := range s.fds() {
			if !keptOpen.MatchString(fd) {
				open = append(open, fd)
			}
		}
		if len(open) <= s.base {
			return
		}
		if time.Now().After(end) {
			t.Errorf("sluice has %d descriptors open after its last client, %d before the first:\n%s",
				len(open), s.base, strings.Join(open, "\n"))
			return
		}
	}
}

// stop asks sluice to end, which it must at once where nothing goes on.
func (s *sluice) stop(t *testing.T) {
	t.Helper()
	s.cmd.Process.Signal(syscall.SIGTERM)
	if code := s.exitCode(t, patience); code != 0 {
		t.Errorf("sluice ended with code %d", code)
	}
}

// goroutines ends the process and returns the stacks of its goroutines, without the runtime's own,
// of which there are more after the first garbage collection.
func (s *sluice) goroutines(t *testing.T) []string {
	t.Helper()
	s.cmd.Process.Signal(syscall.SIGQUIT)
	select {
	case <-s.done:
	case <-time.After(patience):
		t.Fatal("sluice has not ended after SIGQUIT")
	}
	_, dump, ok := strings.Cut(s.log.String(), "SIGQUIT: quit")
	if !ok {
		t.Fatalf("no dump after SIGQUIT:\n%s", s.log)
	}
	var stacks []string
	for _, block := range strings.Split(dump, "\n\n") {
		block = strings.TrimSpace(block)
		if strings.HasPrefix(block, "goroutine ") && !strings.HasPrefix(block, "goroutine 0 ") && !strings.Contains(block, "\ncreated by runtime.") {
			stacks = append(stacks, block)
		}
	}
	return stacks
}

// forward starts sluice forward to dst and returns its address.
func forward(t *testing.T, dst string, flags ...string) string {
	t.Helper()
	addr := freeAddr(t)
	startSluice(t, []string{addr}, append([]string{"forward", addr, dst}, flags...)...)
	return addr
}

// proxy starts sluice proxy and returns its address.
func proxy(t *testing.T, flags ...string) string {
	t.Helper()
	addr := freeAddr(t)
	startSluice(t, []string{addr}, append([]string{"proxy", addr}, flags...)...)
	return addr
}

// result is what a program that came to its end has said.
type result struct {
	code           int
	stdout, stderr string
}

// runProgram runs a program to its end. stdin may be nil.
func runProgram(t *testing.T, stdin io.Reader, name string, args ...string) result {
	t.Helper()
	var stdout bytes.Buffer
	r := runInto(t, &stdout, stdin, name, args...)
	r.stdout = stdout.String()
	return r
}

// runInto is runProgram for more output than should be kept.
func runInto(t *testing.T, stdout io.Writer, stdin io.Reader, name string, args ...string) result {
	t.Helper()
	proxytest.Need(t, name)
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = time.Second
	var stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stdout, &stderr
	err := cmd.Run()
	if ctx.Err() != nil {
		t.Fatalf("%s %q has not ended: %v\n%s", name, args, ctx.Err(), &stderr)
	}
	if cmd.ProcessState == nil {
		t.Fatalf("%s %q: %v", name, args, err)
	}
	return result{code: cmd.ProcessState.ExitCode(), stderr: stderr.String()}
}

// writeFile writes a file for one test and returns its path.
func writeFile(t *testing.T, name, content string) string {
	t.Helper()
	return writeIn(t, t.TempDir(), name, content)
}

func writeIn(t *testing.T, dir, name, content string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func tail(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}
