//go:build unix

package sshlink

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// typist answers questions: the first rule whose word a question contains.
type typist struct {
	mu    sync.Mutex
	rules [][2]string
	asked []string
}

func (p *typist) Line(_ context.Context, q string) (string, error)   { return p.answer(q) }
func (p *typist) Secret(_ context.Context, q string) (string, error) { return p.answer(q) }

func (p *typist) answer(q string) (string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked = append(p.asked, q)
	for i, r := range p.rules {
		if strings.Contains(q, r[0]) {
			if i+1 < len(p.rules) && p.rules[i+1][0] == r[0] { // the next time another answer
				p.rules = append(p.rules[:i:i], p.rules[i+1:]...)
			}
			return r[1], nil
		}
	}
	return "", errors.New("the test has no answer")
}

func (p *typist) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.asked)
}

// logbook is a log that tests read.
type logbook struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logbook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logbook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// settingsFor returns settings that reach s and use nothing of the machine.
func settingsFor(t testing.TB, s *proxytest.SSHD, lines ...string) Settings {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config")
	proxytest.WriteFile(t, file, strings.Join(lines, "\n")+"\n")
	set, err := ReadSettings([]string{file}, Env{Home: t.TempDir(), User: "nobody"}, Asked{
		Host: s.Addr.Host, Port: s.Addr.Port, User: "root", IdentityFile: s.UserKey, KnownHosts: s.KnownHosts,
	})
	if err != nil {
		t.Fatal(err)
	}
	return set
}

// newLink returns a link to s and its log. It is closed at the test's end.
func newLink(t testing.TB, s *proxytest.SSHD, lines ...string) (*Link, *logbook) {
	t.Helper()
	book := new(logbook)
	l := &Link{Name: "ssh://test", Settings: settingsFor(t, s, lines...), Log: slog.New(slog.NewTextHandler(book, nil))}
	t.Cleanup(func() {
		l.Close()
		if t.Failed() {
			t.Logf("log:\n%s", book)
		}
	})
	return l, book
}

func withTimeout(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), proxytest.Patience)
	t.Cleanup(cancel)
	return ctx
}

// echoes dials an echo server through l, and checks that it echoes.
func echoes(t testing.TB, l *Link) error {
	t.Helper()
	origin := proxytest.Listen(t, "tcp", proxytest.Echo)
	c, err := l.Dial(withTimeout(t), "tcp", origin.Addr.HostPort())
	if err != nil {
		return err
	}
	defer c.Close()
	return echo(c)
}

func echo(c net.Conn) error {
	const words = "through and back"
	if _, err := io.WriteString(c, words); err != nil {
		return err
	}
	got := make([]byte, len(words))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != words {
		return fmt.Errorf("read %q, %w", got, err)
	}
	return nil
}

func TestLinkCarriesStreams(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	l, book := newLink(t, s)
	origin := proxytest.Listen(t, "tcp", proxytest.AfterEOF(func(b []byte) []byte { return append([]byte("got "), b...) }))
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			c, err := l.Dial(withTimeout(t), "tcp", origin.Addr.HostPort())
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			words := bytes.Repeat([]byte(fmt.Sprint(i, " ")), 40000)
			if _, err := c.Write(words); err != nil {
				t.Error(err)
			}
			c.(*Conn).CloseWrite()
			got, err := io.ReadAll(c)
			if err != nil || string(got) != "got "+string(words) {
				t.Errorf("%d: %d bytes, %v", i, len(got), err)
			}
		})
	}
	all.Wait()
	if n := strings.Count(book.String(), "SSH: connected"); n != 1 {
		t.Errorf("%d connections for all streams:\n%s", n, book)
	}
}

func TestUnixSocketsOfTheServer(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	l, _ := newLink(t, s)
	origin := proxytest.Listen(t, "unix", proxytest.Echo)
	c, err := l.Dial(withTimeout(t), "unix", origin.Addr.Host)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := echo(c); err != nil {
		t.Error(err)
	}
	if _, err := l.Dial(withTimeout(t), "unix", origin.Addr.Host+".not"); err == nil {
		t.Error("a socket that is not there was dialled")
	}
}

func TestRefusals(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	l, _ := newLink(t, s)
	closed := fmt.Sprintf("127.0.0.1:%d", proxytest.FreePort(t))
	if _, err := l.Dial(withTimeout(t), "tcp", closed); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a closed port: %v", err)
	}
	_, err := l.Dial(withTimeout(t), "tcp", "no-such-host.invalid:80")
	if dns, ok := errors.AsType[*net.DNSError](err); !ok {
		t.Errorf("a name that does not exist: %v", err)
	} else if !dns.IsNotFound && !dns.IsTemporary { // without a network, resolvers cannot tell
		t.Errorf("a name that does not exist: %#v", dns)
	}
	for _, line := range []string{"AllowTcpForwarding no", "PermitOpen none", "DisableForwarding yes"} {
		no := proxytest.StartSSHD(t, line)
		l, _ := newLink(t, no)
		if err := echoes(t, l); !errors.Is(err, syscall.EACCES) {
			t.Errorf("%s: %v", line, err)
		}
	}
	// Forwarding needs no session.
	l, _ = newLink(t, proxytest.StartSSHD(t, "MaxSessions 0"))
	if err := echoes(t, l); err != nil {
		t.Errorf("MaxSessions 0: %v", err)
	}
}

func TestRefusalsInWords(t *testing.T) {
	for message, want := range map[string]error{
		"Connection refused": syscall.ECONNREFUSED, "": syscall.ECONNREFUSED, "open failed": syscall.ECONNREFUSED,
		"Connection timed out": syscall.ETIMEDOUT, "No route to host": syscall.EHOSTUNREACH,
		"Network is unreachable": syscall.ENETUNREACH, "Permission denied": syscall.EACCES,
	} {
		if got := causeOf(message, "h"); got != want {
			t.Errorf("%q: %v, want %v", message, got, want)
		}
	}
	if dns, ok := causeOf("Name or service not known", "h").(*net.DNSError); !ok || !dns.IsNotFound || dns.Name != "h" {
		t.Error("an unknown name")
	}
	if got := printable("a\x1b[31m\nb" + strings.Repeat("x", 300)); strings.ContainsAny(got, "\x1b\n") || len(got) > 210 {
		t.Errorf("%q", got)
	}
}

func TestOneStalledStreamDoesNotStallTheOthers(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	l, _ := newLink(t, s)
	stalled := proxytest.Listen(t, "tcp", func(c net.Conn) { io.Copy(c, zeros{}) }) // never reads, always writes
	c, err := l.Dial(withTimeout(t), "tcp", stalled.Addr.HostPort())
	if err != nil {
		t.Fatal(err)
	}
	var sent sync.WaitGroup
	sent.Go(func() { io.Copy(c, zeros{}) }) // until the windows are full; its own reads stall, too
	c.Read(make([]byte, 1))
	for range 20 {
		if err := echoes(t, l); err != nil {
			t.Error(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	begin := time.Now()
	c.Close() // frees the Write, though neither end reads
	sent.Wait()
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("Close freed the Write after %v", d)
	}
	if err := echoes(t, l); err != nil {
		t.Error(err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestCloseFreesARead(t *testing.T) {
	proxytest.NoLeaks(t)
	l, _ := newLink(t, proxytest.StartSSHD(t))
	silent := proxytest.Listen(t, "tcp", proxytest.Sink)
	c, err := l.Dial(withTimeout(t), "tcp", silent.Addr.HostPort())
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(20*time.Millisecond, func() { c.Close() })
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, net.ErrClosed) {
		t.Errorf("read %d, %v", n, err)
	}
	if n, err := c.Write([]byte("x")); n != 0 || !errors.Is(err, net.ErrClosed) {
		t.Errorf("wrote %d, %v", n, err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := c.SetDeadline(time.Now()); !errors.Is(err, os.ErrNoDeadline) {
		t.Error(err)
	}
}

func TestLostConnectionIsNoEndOfStream(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	l, _ := newLink(t, s)
	origin := proxytest.Listen(t, "tcp", func(c net.Conn) {
		io.WriteString(c, "half a re")
		io.Copy(io.Discard, c)
	})
	c, err := l.Dial(withTimeout(t), "tcp", origin.Addr.HostPort())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.ReadFull(c, make([]byte, 9)); err != nil {
		t.Fatal(err)
	}
	s.Kill()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v", err)
	}
	if _, err := c.Write(make([]byte, 1)); err == nil {
		t.Error("a write succeeds")
	}
}

func TestDialsWaitForTheServerToComeBack(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	l, book := newLink(t, s)
	if err := echoes(t, l); err != nil {
		t.Fatal(err)
	}
	s.Kill()
	proxytest.Until(t, "the loss is logged", func() bool { return strings.Contains(book.String(), "connection lost") })
	result := make(chan error, 1)
	go func() { result <- echoes(t, l) }()
	time.Sleep(300 * time.Millisecond) // at least one attempt fails
	s.Run()
	if err := <-result; err != nil {
		t.Error(err)
	}
	if n := strings.Count(book.String(), "connected again"); n != 1 {
		t.Errorf("%d lines of connected again", n)
	}
	s.Kill()
	proxytest.Until(t, "the second loss is logged", func() bool { return strings.Count(book.String(), "connection lost") == 2 })
	proxytest.Until(t, "why there is no server", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		defer cancel()
		_, err := l.Dial(ctx, "tcp", "127.0.0.1:1")
		if reason := fmt.Sprint(err); !strings.Contains(reason, "connection lost") && !strings.Contains(reason, "refused") {
			t.Errorf("a server that stays away: %v", err)
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	})
}

func TestServerThatWasNeverThereIsRefusedAtOnce(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	s.Kill()
	l, _ := newLink(t, s)
	begin := time.Now()
	if err := echoes(t, l); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Error(err)
	}
	if time.Since(begin) > 5*time.Second {
		t.Error("it took", time.Since(begin))
	}
}

// TestRestartsUnderLoad cuts a link in use again and again, for SLUICE_SOAK (as in 30m) or three times.
// In the end nothing is left but the streams and listeners that there should be.
func TestRestartsUnderLoad(t *testing.T) {
	proxytest.NoLeaks(t)
	soak, _ := time.ParseDuration(os.Getenv("SLUICE_SOAK"))
	s := proxytest.StartSSHD(t)
	l, book := newLink(t, s)
	l.Keep = true
	if err := l.Start(); err != nil {
		t.Fatal(err)
	}
	origin := proxytest.Listen(t, "tcp", proxytest.Echo)
	stop := make(chan struct{})
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				ctx, cancel := context.WithTimeout(context.Background(), proxytest.Patience)
				c, err := l.Dial(ctx, "tcp", origin.Addr.HostPort())
				cancel()
				if err != nil {
					t.Error(err)
					return
				}
				for range 50 {
					if echo(c) != nil {
						break // the server was killed
					}
				}
				c.Close()
			}
		})
	}
	ln, err := l.Listen(withTimeout(t), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	wait := serveEcho(ln)
	far, cuts := ln.Addr().String(), 0
	for begin := time.Now(); cuts < 3 || time.Since(begin) < soak; cuts++ {
		proxytest.Until(t, "the link is up", func() bool { return l.isUp() })
		time.Sleep(50 * time.Millisecond)
		s.Kill()
		proxytest.Until(t, "the link is down", func() bool { return !l.isUp() })
		s.Run()
	}
	proxytest.Until(t, "the listener is back", func() bool { return dialEcho("tcp", far) == nil })
	close(stop)
	all.Wait()
	ln.Close()
	wait()
	if n := strings.Count(book.String(), "connection lost"); n != cuts {
		t.Errorf("lost %d times, said %d times:\n%s", cuts, n, book)
	}
	t.Logf("%d cuts", cuts)
}

func (l *Link) isUp() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.up != nil
}

func TestFrozenServerIsNoticed(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	l, book := newLink(t, s, "ServerAliveInterval 1", "ServerAliveCountMax 2")
	origin := proxytest.Listen(t, "tcp", proxytest.Echo)
	c, err := l.Dial(withTimeout(t), "tcp", origin.Addr.HostPort())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := echo(c); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1500 * time.Millisecond)
	if !l.isUp() {
		t.Fatal("an idle server was given up")
	}
	s.Signal(syscall.SIGSTOP)
	defer s.Signal(syscall.SIGCONT)
	begin := time.Now()
	_, err = c.Read(make([]byte, 1))
	d := time.Since(begin)
	if !errors.Is(err, syscall.ECONNRESET) || !errors.Is(err, errSilent) {
		t.Errorf("read: %v", err)
	}
	if d > 4*time.Second { // 2 and what a loaded machine takes
		t.Errorf("noticed after %v", d)
	}
	proxytest.Until(t, "it is logged", func() bool { return strings.Contains(book.String(), "does not answer for 2s") })
}

// strange starts a server that does with each conn what serve says, and returns settings for it.
func strange(t *testing.T, serve func(net.Conn)) *Link {
	origin := proxytest.Listen(t, "tcp", serve)
	l := &Link{Name: "ssh://strange", Settings: Settings{HostName: origin.Addr.Host, Port: origin.Addr.Port, User: "u",
		ConnectTimeout: time.Second}}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestServersThatAreNone(t *testing.T) {
	proxytest.NoLeaks(t)
	garbage := func(c net.Conn) { io.CopyN(c, zeros{}, 100<<10) }
	for name, serve := range map[string]func(net.Conn){
		"closes":       func(c net.Conn) {},
		"is silent":    proxytest.Sink,
		"is HTTP":      func(c net.Conn) { io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n"); proxytest.Sink(c) },
		"is garbage":   garbage,
		"stops midway": func(c net.Conn) { io.WriteString(c, "SSH-2.0-stuck\r\n"); proxytest.Sink(c) },
		"talks rubbish": func(c net.Conn) {
			io.WriteString(c, "SSH-2.0-odd\r\n")
			garbage(c)
			proxytest.Sink(c)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := strange(t, serve)
			begin := time.Now()
			_, err := l.Dial(withTimeout(t), "tcp", "127.0.0.1:1")
			if err == nil || time.Since(begin) > 10*time.Second {
				t.Errorf("%v after %v", err, time.Since(begin))
			}
			t.Log(err)
		})
	}
}

func TestClosedLink(t *testing.T) {
	proxytest.NoLeaks(t)
	s := proxytest.StartSSHD(t)
	l, _ := newLink(t, s)
	if err := echoes(t, l); err != nil {
		t.Fatal(err)
	}
	l.Close()
	if _, err := l.Dial(withTimeout(t), "tcp", "127.0.0.1:1"); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	if err := l.Start(); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if _, err := l.Listen(withTimeout(t), "tcp", "127.0.0.1:0"); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

func parse(t testing.TB, address string) proxy.Addr {
	t.Helper()
	a, err := proxy.ParseDst(address)
	if err != nil {
		t.Fatal(err)
	}
	return a
}
