//go:build unix

package proxytest

import (
	"bytes"
	"net"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Start starts a program and waits until something accepts at addr ("host:port", the path of a Unix
// socket, or empty for no wait). At the test's end it is killed and reaped; what it has
// printed is shown if the test failed.
func Start(t testing.TB, addr, program string, args ...string) *exec.Cmd {
	t.Helper()
	Need(t, program)
	out := new(lockedBuffer)
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // to kill its children with it
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go reap(cmd, ended)
	t.Cleanup(func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-ended
		if t.Failed() {
			t.Logf("%s printed:\n%s", cmd, out)
		}
	})
	if addr != "" && !awaitAccept(addr, ended) {
		t.Fatalf("%s does not accept at %s", cmd, addr)
	}
	return cmd
}

func reap(cmd *exec.Cmd, ended chan struct{}) {
	cmd.Wait()
	close(ended)
}

func awaitAccept(addr string, ended chan struct{}) bool {
	network := "tcp"
	if strings.HasPrefix(addr, "/") {
		network = "unix"
	}
	for deadline := time.Now().Add(Patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		select {
		case <-ended:
			return false
		default:
		}
		if c, err := net.DialTimeout(network, addr, time.Second); err == nil {
			c.Close()
			return true
		}
	}
	return false
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
