package transparent

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// binary is the sluice under test.
var binary string

// binaryEnv names it for a test that was started in a namespace by another test.
const binaryEnv = "SLUICE_TRANSPARENT_BINARY"

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if binary = os.Getenv(binaryEnv); binary != "" {
		return m.Run()
	}
	flag.Parse()
	flag.Set("test.parallel", "4") // the tests mostly wait; more would only slow each other down
	dir, err := os.MkdirTemp("", "sluice-transparent-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	os.Chmod(dir, 0o755) // for who is not root
	binary = filepath.Join(dir, "sluice")
	build := exec.Command("go", "build", "-race", "-o", binary, "../../cmd/sluice")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building sluice: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// lab is three namespaces. The client reaches the origin through the router.
type lab struct{ client, router, origin namespace }

// The addresses of a lab. In each pair the first is of IPv4, the second of IPv6.
var (
	clientIP    = [2]string{"10.9.1.2", "fd09:1::2"}
	routerIP    = [2]string{"10.9.1.1", "fd09:1::1"} // as the client sees it
	routerOutIP = [2]string{"10.9.2.1", "fd09:2::1"} // as the origin sees it
	originIP    = [2]string{"10.9.2.2", "fd09:2::2"}
	otherIP     = [2]string{"10.9.2.3", "fd09:2::3"} // of the origin, too
)

type namespace string

var labs atomic.Int32

func newLab(t *testing.T) *lab {
	t.Helper()
	proxytest.NeedRoot(t)
	proxytest.Need(t, "ip", "nft", "sysctl")
	number := labs.Add(1)
	name := func(part string) namespace {
		return namespace(fmt.Sprintf("sluice-tr-%d-%d-%s", os.Getpid(), number, part))
	}
	l := &lab{name("client"), name("router"), name("origin")}
	for _, ns := range []namespace{l.client, l.router, l.origin} {
		command(t, "ip", "netns", "add", string(ns))
		t.Cleanup(func() { exec.Command("ip", "netns", "del", string(ns)).Run() })
		ns.ip(t, "link", "set", "lo", "up")
		// Addresses are usable at once, and bring no routes that come late.
		ns.run(t, "sysctl", "-qw", "net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0")
	}
	l.client.ip(t, "link", "add", "eth0", "type", "veth", "peer", "name", "lan0", "netns", string(l.router))
	l.router.ip(t, "link", "add", "wan0", "type", "veth", "peer", "name", "eth0", "netns", string(l.origin))
	l.client.address(t, "eth0", clientIP)
	l.router.address(t, "lan0", routerIP)
	l.router.address(t, "wan0", routerOutIP)
	l.origin.address(t, "eth0", originIP)
	l.origin.address(t, "eth0", otherIP)
	l.router.run(t, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	for _, at := range []struct {
		ns  namespace
		dev string
		gw  [2]string
	}{{l.client, "eth0", routerIP}, {l.router, "lan0", [2]string{}}, {l.router, "wan0", [2]string{}}, {l.origin, "eth0", routerOutIP}} {
		at.ns.ip(t, "link", "set", at.dev, "up")
		for _, gw := range at.gw {
			if gw != "" {
				at.ns.ip(t, "route", "add", "default", "via", gw)
			}
		}
	}
	proxytest.Until(t, "the lab's links are up", func() bool {
		for _, ip := range originIP {
			if exec.Command("ip", "netns", "exec", string(l.client), "ping", "-c1", "-W1", ip).Run() != nil {
				return false
			}
		}
		return true
	})
	return l
}

func (ns namespace) ip(t *testing.T, args ...string) {
	t.Helper()
	command(t, "ip", append([]string{"-n", string(ns)}, args...)...)
}

func (ns namespace) address(t *testing.T, dev string, ips [2]string) {
	t.Helper()
	ns.ip(t, "addr", "add", ips[0]+"/24", "dev", dev)
	ns.ip(t, "addr", "add", ips[1]+"/64", "dev", dev, "nodad")
}

// run runs a program in ns, and returns what it has printed.
func (ns namespace) run(t *testing.T, args ...string) string {
	t.Helper()
	return command(t, "ip", append([]string{"netns", "exec", string(ns)}, args...)...)
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
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

func (ns namespace) dial(ctx context.Context, network, addr string) (c net.Conn, err error) {
	err = ns.in(func() (err error) {
		var d net.Dialer
		c, err = d.DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// mustDial dials and closes the conn at the test's end.
func (ns namespace) mustDial(t *testing.T, network, addr string) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), proxytest.Patience)
	defer cancel()
	c, err := ns.dial(ctx, network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	return c
}

// serve listens in ns and serves each client until the test's end.
func (ns namespace) serve(t *testing.T, addr string, serve func(net.Conn)) {
	t.Helper()
	var ln net.Listener
	if err := ns.in(func() (err error) {
		ln, err = net.Listen("tcp", addr)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	t.Cleanup(func() { ln.Close(); all.Wait() })
	all.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(proxytest.Patience))
			all.Go(func() { defer c.Close(); serve(c) })
		}
	})
}

// greet tells a client its address as we see it, and then echoes.
func greet(c net.Conn) {
	host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
	if _, err := io.WriteString(c, host+"\n"); err == nil {
		io.Copy(c, c)
	}
}

// greeting asks an origin that greets, and returns how it sees us.
func greeting(c net.Conn) (string, error) {
	var line []byte
	b := make([]byte, 1)
	for {
		if _, err := c.Read(b); err != nil {
			return "", err
		}
		if b[0] == '\n' {
			return string(line), nil
		}
		line = append(line, b[0])
	}
}

// seen dials an origin that greets and returns how it sees us; on an error, that.
func (ns namespace) seen(t *testing.T, addr string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), proxytest.Patience)
	defer cancel()
	c, err := ns.dial(ctx, "tcp", addr)
	if err != nil {
		return reason(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	host, err := greeting(c)
	if err != nil {
		return reason(err)
	}
	return host
}

func reason(err error) string {
	for _, e := range []error{syscall.ECONNREFUSED, syscall.ECONNRESET, io.EOF} {
		if errors.Is(err, e) {
			return e.Error()
		}
	}
	return err.Error()
}

// sluice is a running sluice.
type sluice struct {
	cmd  *exec.Cmd
	log  *buffer
	done chan struct{}
}

type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// start runs sluice in ns until the test's end.
func (ns namespace) start(t *testing.T, args ...string) *sluice {
	t.Helper()
	s := &sluice{cmd: exec.Command("ip", append([]string{"netns", "exec", string(ns), binary}, args...)...),
		log: new(buffer), done: make(chan struct{})}
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	s.cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go s.wait()
	t.Cleanup(func() {
		s.cmd.Process.Kill()
		<-s.done
		if t.Failed() {
			t.Logf("sluice %s wrote:\n%s", strings.Join(args, " "), s.log)
		}
		if strings.Contains(s.log.String(), "DATA RACE") {
			t.Error("there was a data race")
		}
	})
	return s
}

func (s *sluice) wait() {
	s.cmd.Wait()
	close(s.done)
}

// startSluice is start, and waits until it serves.
func (ns namespace) startSluice(t *testing.T, args ...string) *sluice {
	t.Helper()
	s := ns.start(t, args...)
	proxytest.Until(t, "sluice serves", func() bool {
		select {
		case <-s.done:
			t.Fatalf("sluice ended: %s", s.log)
		default:
		}
		return strings.Contains(s.log.String(), "\n")
	})
	return s
}

// stop sends a signal and waits for the end.
func (s *sluice) stop(t *testing.T, sig os.Signal) {
	t.Helper()
	s.cmd.Process.Signal(sig)
	select {
	case <-s.done:
	case <-time.After(proxytest.Patience):
		t.Fatal("sluice does not end")
	}
}

// network returns all that sluice may have changed in ns.
func (ns namespace) network(t *testing.T) string {
	t.Helper()
	return ns.rules(t) + ns.policy(t)
}

func (ns namespace) rules(t *testing.T) string {
	t.Helper()
	return ns.run(t, "nft", "list", "ruleset")
}

func (ns namespace) policy(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	for _, family := range []string{"-4", "-6"} {
		all.WriteString(ns.run(t, "ip", family, "rule"))
		all.WriteString(ns.run(t, "ip", family, "route", "show", "table", "all"))
	}
	return all.String()
}
