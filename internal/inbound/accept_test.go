package inbound

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
)

var loopback = proxy.TCP("127.0.0.1", 0)

func unixAddr(path string) proxy.Addr { return proxy.Addr{Network: "unix", Host: path} }

// logBuffer is a log that a test may read while others write it.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), s)
}

func (l *logBuffer) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// start binds l and serves it until the test's end, when serve must return.
func start(t *testing.T, ctx context.Context, l *Listener, handle func(context.Context, *client)) net.Addr {
	t.Helper()
	proxytest.NoLeaks(t)
	if err := l.Listen(ctx); err != nil {
		t.Fatal(err)
	}
	end := make(chan error, 1)
	go func() { end <- l.serve(ctx, handle) }()
	t.Cleanup(func() {
		l.Close()
		select {
		case err := <-end:
			if err != nil {
				t.Errorf("serve: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("serve goes on after Close")
		}
	})
	return l.BoundAddr()
}

func dial(t *testing.T, a net.Addr) net.Conn {
	t.Helper()
	c, err := net.DialTimeout(a.Network(), a.String(), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(10 * time.Second))
	t.Cleanup(func() { c.Close() })
	return c
}

// isReset says whether a new client is reset; that may be noticed by connect already.
func isReset(a net.Addr) bool {
	c, err := net.DialTimeout(a.Network(), a.String(), 5*time.Second)
	if err == nil {
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		_, err = c.Read(make([]byte, 1))
	}
	return errors.Is(err, syscall.ECONNRESET)
}

// echo is a protocol that gives back what it gets.
func echo(_ context.Context, c *client) {
	defer c.Done()
	if err := c.handshook(); err != nil {
		c.Close()
		return
	}
	io.Copy(c.Conn(), c.reader())
	c.Close()
}

func TestServe(t *testing.T) {
	for name, addr := range map[string]proxy.Addr{
		"tcp4": loopback,
		"tcp6": proxy.TCP("::1", 0),
		"all":  proxy.TCP("", 0),
		"unix": {Network: "unix", Host: filepath.Join(t.TempDir(), "s")},
	} {
		t.Run(name, func(t *testing.T) {
			a := start(t, t.Context(), &Listener{Addr: addr}, echo)
			for range 3 {
				c := dial(t, a)
				io.WriteString(c, "hello")
				c.(interface{ CloseWrite() error }).CloseWrite()
				if b, err := io.ReadAll(c); string(b) != "hello" || err != nil {
					t.Errorf("read %q, %v", b, err)
				}
			}
		})
	}
}

func TestAllAddressesAreBothFamilies(t *testing.T) {
	a := start(t, t.Context(), &Listener{Addr: proxy.TCP("", 0)}, echo).(*net.TCPAddr)
	dial(t, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: a.Port})
	dial(t, &net.TCPAddr{IP: net.IPv6loopback, Port: a.Port})
}

func TestFlow(t *testing.T) {
	flows := make(chan proxy.Flow, 1)
	l := &Listener{Name: "in", Addr: loopback}
	a := start(t, t.Context(), l, func(_ context.Context, c *client) {
		flows <- c.flow(proxy.TCP("example.com", 80), "ann")
		io.ReadFull(c.reader(), make([]byte, 1))
		c.abort()
		c.Done()
	})
	c := dial(t, a)
	want := proxy.Flow{Inbound: "in", Client: addrPort(c.LocalAddr()), Local: addrPort(a), User: "ann",
		Dst: proxy.TCP("example.com", 80)}
	if got := <-flows; got != want {
		t.Errorf("flow %+v, want %+v", got, want)
	}
	c.Write([]byte("x"))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("after abort: %v", err)
	}
}

func TestCloseBeforeServeAndTwice(t *testing.T) {
	l := &Listener{Addr: loopback}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := l.serve(t.Context(), echo); err == nil {
		t.Error("serve before Listen: no error")
	}
	if err := l.Listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := l.serve(t.Context(), echo); err != nil {
		t.Error(err)
	}
}

// Close, and cancelling the context, end handshakes and leave sessions alone.
func TestCloseEndsHandshakesOnly(t *testing.T) {
	for _, how := range []string{"close", "cancel"} {
		t.Run(how, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			failed := make(chan error, 1)
			var begun atomic.Int32
			l := &Listener{Addr: loopback}
			a := start(t, ctx, l, func(ctx context.Context, c *client) {
				begun.Add(1)
				b := make([]byte, 1)
				if _, err := io.ReadFull(c.reader(), b); err != nil {
					failed <- err
					c.fail(err)
					return
				}
				c.Write(b)
				echo(ctx, c)
			})
			session, shaking := dial(t, a), dial(t, a)
			session.Write([]byte("x"))
			if _, err := io.ReadFull(session, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			proxytest.Until(t, "one handshake is over, the other has begun", func() bool {
				return begun.Load() == 2 && l.s.shakes() == 1
			})
			if how == "close" {
				l.Close()
			} else {
				cancel()
			}
			if err := <-failed; !errors.Is(err, net.ErrClosed) {
				t.Errorf("the handshake failed with %v", err)
			}
			if _, err := shaking.Read(make([]byte, 1)); err == nil {
				t.Error("the client in its handshake was not closed")
			}
			session.Write([]byte("more"))
			session.(*net.TCPConn).CloseWrite()
			if b, err := io.ReadAll(session); string(b) != "more" || err != nil {
				t.Errorf("session: %q, %v", b, err)
			}
		})
	}
}

func (s *listening) shakes() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.shaking)
}

func TestHandshookAfterClose(t *testing.T) {
	got := make(chan error, 1)
	l := &Listener{Addr: loopback}
	a := start(t, t.Context(), l, func(_ context.Context, c *client) {
		l.Close()
		err := c.handshook()
		got <- err
		c.fail(err)
	})
	dial(t, a)
	if err := <-got; !errors.Is(err, net.ErrClosed) {
		t.Errorf("handshook: %v", err)
	}
}

// A client that never finishes its handshake is gone after the deadline, and one that
// has finished has none.
func TestHandshakeDeadline(t *testing.T) {
	var log logBuffer
	failed := make(chan error, 1)
	l := &Listener{Addr: loopback, HandshakeTimeout: 50 * time.Millisecond, Log: log.logger()}
	a := start(t, t.Context(), l, func(_ context.Context, c *client) {
		_, err := io.ReadFull(c.reader(), make([]byte, 2))
		failed <- err
		c.fail(err)
	})
	c := dial(t, a)
	c.Write([]byte("x"))
	if err := <-failed; proxy.ReasonOf(err) != proxy.Timeout {
		t.Errorf("handshake: %v", err)
	}
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("client reads %v, want EOF", err)
	}
	if log.count("reason=timeout") != 1 {
		t.Errorf("log: %s", log.b.String())
	}
}

// What fail's caller wrote last arrives although the client's bytes were not all read.
func TestFailDeliversLastWords(t *testing.T) {
	a := start(t, t.Context(), &Listener{Addr: loopback}, func(_ context.Context, c *client) {
		io.ReadFull(c.reader(), make([]byte, 1))
		io.WriteString(c, "go away")
		c.fail(errors.New("bad input"))
	})
	c := dial(t, a)
	c.Write(make([]byte, 100_000))
	if b, err := io.ReadAll(c); string(b) != "go away" || err != nil {
		t.Errorf("read %q, %v", b, err)
	}
}

func TestAllowDeny(t *testing.T) {
	p := netip.MustParsePrefix
	tests := []struct {
		allow, deny []netip.Prefix
		ip          string
		want        bool
	}{
		{nil, nil, "192.0.2.1", true},
		{[]netip.Prefix{p("192.0.2.0/24")}, nil, "192.0.2.1", true},
		{[]netip.Prefix{p("192.0.2.0/24")}, nil, "192.0.3.1", false},
		{[]netip.Prefix{p("192.0.2.0/24")}, []netip.Prefix{p("192.0.2.1/32")}, "192.0.2.1", false},
		{nil, []netip.Prefix{p("fe80::/10")}, "fe80::1%eth0", false},
		{[]netip.Prefix{p("::ffff:192.0.2.0/120")}, nil, "192.0.2.1", true},
		{[]netip.Prefix{p("::/0")}, nil, "192.0.2.1", false},
	}
	for _, test := range tests {
		l := &Listener{Allow: test.allow, Deny: test.deny}
		if got := l.allows(netip.MustParseAddr(test.ip)); got != test.want {
			t.Errorf("allow %v deny %v: %v is %v", test.allow, test.deny, test.ip, got)
		}
	}
	if l := (&Listener{Allow: tests[1].allow}); !l.allows(netip.Addr{}) {
		t.Error("a client of a Unix socket is refused for want of an address")
	}
}

// Clients that come over IPv4 to an IPv6 socket are compared as what they are.
func TestDeniedClientIsReset(t *testing.T) {
	var log logBuffer
	l := &Listener{Addr: proxy.TCP("", 0), Deny: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, Log: log.logger(),
		MaxConns: 1}
	a := start(t, t.Context(), l, echo).(*net.TCPAddr)
	for range 2 { // its slot is given back
		if !isReset(&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: a.Port}) {
			t.Error("the denied client is not reset")
		}
	}
	if log.count("refused by allow/deny") != 2 {
		t.Error(log.b.String())
	}
	c := dial(t, &net.TCPAddr{IP: net.IPv6loopback, Port: a.Port})
	c.Write([]byte("x"))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Error(err)
	}
}

func TestMaxConnsPausesAccepting(t *testing.T) {
	var log logBuffer
	var now, most atomic.Int32
	a := start(t, t.Context(), &Listener{Addr: loopback, MaxConns: 2, Log: log.logger()},
		func(ctx context.Context, c *client) {
			if n := now.Add(1); n > most.Load() {
				most.Store(n)
			}
			c.handshook()
			io.Copy(c, c.reader())
			c.Close()
			now.Add(-1)
			c.Done()
		})
	var conns []net.Conn
	for range 6 { // four wait in the kernel's queue
		c := dial(t, a)
		c.Write([]byte("x"))
		conns = append(conns, c)
	}
	for _, c := range conns { // in the order they came
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	if most.Load() != 2 {
		t.Errorf("%d sessions at a time", most.Load())
	}
	if log.count("accepting paused") != 1 {
		t.Errorf("accepting paused not once: %s", log.b.String())
	}
}

func TestPanicCostsOneClient(t *testing.T) {
	var log logBuffer
	var n atomic.Int32
	a := start(t, t.Context(), &Listener{Addr: loopback, MaxConns: 1, Log: log.logger()},
		func(ctx context.Context, c *client) {
			if n.Add(1) == 1 {
				panic("oh")
			}
			echo(ctx, c)
		})
	if !isReset(a) {
		t.Error("the client whose handler panicked is not reset")
	}
	c := dial(t, a)
	c.Write([]byte("x"))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Error(err)
	}
	if log.count("panic") == 0 {
		t.Error("the panic was not logged")
	}
}

// scriptedListener answers Accept with each error in turn, and then blocks. No error is a conn, and
// errQuiet is one after a while.
type scriptedListener struct {
	net.Listener // nil
	errs         []error
	calls        []time.Time
	closed       chan struct{}
}

var errQuiet = errors.New("20 s")

func (l *scriptedListener) Accept() (net.Conn, error) {
	l.calls = append(l.calls, time.Now())
	if n := len(l.calls) - 1; n < len(l.errs) {
		if l.errs[n] == errQuiet {
			time.Sleep(20 * time.Second)
		}
		if l.errs[n] == nil || l.errs[n] == errQuiet {
			c, d := net.Pipe()
			d.Close()
			return c, nil
		}
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", l.errs[n])}
	}
	<-l.closed
	return nil, net.ErrClosed
}

func (l *scriptedListener) Close() error { close(l.closed); return nil }

func TestAcceptBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, gone := syscall.EMFILE, syscall.ECONNABORTED
		ln := &scriptedListener{closed: make(chan struct{}), errs: []error{
			gone, m, m, gone, m, m, m, m, m, m, m, m, nil, syscall.ENOMEM, nil, errQuiet, m, nil}}
		ms := []int{0, 5, 10, 0, 20, 40, 80, 160, 320, 640, 1000, 1000, 0, 5, 0, 20_000, 5, 0}
		var log logBuffer
		l := &Listener{Log: log.logger()}
		l.listenOn(ln)
		end := make(chan error)
		go func() {
			end <- l.serve(t.Context(), func(_ context.Context, c *client) { c.Close(); c.Done() })
		}()
		time.Sleep(time.Minute)
		l.Close()
		if err := <-end; err != nil {
			t.Error(err)
		}
		for i, want := range ms {
			if got := ln.calls[i+1].Sub(ln.calls[i]); got != time.Duration(want)*time.Millisecond {
				t.Errorf("pause %d is %v, want %d ms", i, got, want)
			}
		}
		if log.count("accepting paused") != 2 || log.count("accepting again") != 2 {
			t.Error(log.b.String())
		}
	})
}

func TestCloseEndsThePause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := &scriptedListener{closed: make(chan struct{}), errs: []error{syscall.ENFILE}}
		l := &Listener{MaxConns: 1}
		l.listenOn(ln)
		end := make(chan error)
		go func() { end <- l.serve(t.Context(), echo) }()
		synctest.Wait()
		begin := time.Now()
		l.Close()
		<-end
		if d := time.Since(begin); d != 0 {
			t.Errorf("Close took %v", d)
		}
	})
}

func TestUsers(t *testing.T) {
	u := Users{"ann": "secret", "bob": ""}
	for _, c := range []struct {
		users          Users
		name, password string
		want           bool
	}{
		{nil, "", "", true}, {nil, "x", "y", true}, {Users{}, "", "", false},
		{u, "ann", "secret", true}, {u, "ann", "secre", false}, {u, "ann", "", false},
		{u, "bob", "", true}, {u, "eve", "", false}, {u, "eve", "secret", false}, {u, "Ann", "secret", false},
	} {
		if got := c.users.Check(c.name, c.password); got != c.want {
			t.Errorf("Check(%q, %q) of %v is %v", c.name, c.password, c.users, got)
		}
	}
}
