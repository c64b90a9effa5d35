package sshlink

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// namespace is a network namespace of the test, with a loopback interface.
type namespace string

func newNamespace(t *testing.T) namespace {
	t.Helper()
	proxytest.Need(t, "ip")
	proxytest.NeedRoot(t)
	ns := namespace(fmt.Sprintf("sluice-ssh-%d", os.Getpid()))
	ns.ip(t, "netns", "add", string(ns))
	t.Cleanup(func() { exec.Command("ip", "netns", "del", string(ns)).Run() })
	ns.ip(t, "-n", string(ns), "link", "set", "lo", "up")
	return ns
}

func (ns namespace) ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		if os.Getenv("SLUICE_TEST_NOSKIP") == "" {
			t.Skipf("no network namespaces: %v: %s", err, out)
		}
		t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// in runs f, whose sockets are made in ns.
func (ns namespace) in(f func() error) error {
	runtime.LockOSThread()
	old, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer old.Close()
	there, err := os.Open("/run/netns/" + string(ns))
	if err != nil {
		return err
	}
	defer there.Close()
	if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
		return err
	}
	err = f()
	if unix.Setns(int(old.Fd()), unix.CLONE_NEWNET) == nil {
		runtime.UnlockOSThread() // else the thread ends with its goroutine
	}
	return err
}

// TestBlackHole cuts a link in the middle of things, such that nobody is told.
func TestBlackHole(t *testing.T) {
	proxytest.NoLeaks(t)
	ns := newNamespace(t)
	s := proxytest.StartSSHD(t)
	s.Kill()
	proxytest.Start(t, "", "ip", "netns", "exec", string(ns), "/usr/sbin/sshd", "-D", "-f", filepath.Join(s.Dir, "sshd_config"))
	var silent net.Listener
	if err := ns.in(func() (err error) {
		silent, err = net.Listen("tcp", "127.0.0.1:0")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	l, book := newLink(t, s, "ServerAliveInterval 1", "ServerAliveCountMax 2", "ConnectTimeout 2")
	l.Keep = true
	l.DialServer = func(ctx context.Context, host string, port uint16) (c net.Conn, err error) {
		err = ns.in(func() (err error) {
			c, err = dialTCP(ctx, host, port)
			return err
		})
		return c, err
	}
	var c net.Conn
	proxytest.Until(t, "sshd accepts", func() (ok bool) {
		var err error
		c, err = l.Dial(withTimeout(t), "tcp", silent.Addr().String())
		return err == nil
	})
	defer c.Close()
	var writing sync.WaitGroup
	writing.Go(func() { io.Copy(c, zeros{}) }) // until no more fits, then it waits
	time.Sleep(200 * time.Millisecond)
	ns.ip(t, "-n", string(ns), "link", "set", "lo", "down")
	begin := time.Now()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v", err)
	}
	writing.Wait()
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("noticed after %v", d)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	if _, err := l.Dial(ctx, "tcp", "127.0.0.1:1"); err == nil {
		t.Error("a dial succeeds")
	}
	ns.ip(t, "-n", string(ns), "link", "set", "lo", "up")
	if _, err := l.Dial(withTimeout(t), "tcp", silent.Addr().String()); err != nil {
		t.Error(err)
	}
	if !strings.Contains(book.String(), "connected again") {
		t.Errorf("log:\n%s", book)
	}
}
