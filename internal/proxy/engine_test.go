package proxy_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

// bench is an engine with one client that waits for its answer.
type bench struct {
	engine   *proxy.Engine
	client   *net.TCPConn // the client's own end
	log      *lockedLog
	accepted *net.TCPConn
	head     []byte
	fail     error // what Accept returns

	rejected error
	done     chan struct{}
}

type lockedLog struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newBench(t *testing.T, d proxy.Dialer) *bench {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	a, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); a.Close() })
	log := new(lockedLog)
	return &bench{
		engine: &proxy.Engine{
			Router: proxy.Static{Name: "out", Dialer: d},
			Log:    slog.New(slog.NewTextHandler(log, nil)),
		},
		client: c.(*net.TCPConn), accepted: a.(*net.TCPConn), log: log, done: make(chan struct{}),
	}
}

func (b *bench) Accept() (net.Conn, []byte, error) {
	if b.fail != nil {
		b.accepted.Close()
		return nil, nil, b.fail
	}
	return b.accepted, b.head, nil
}
func (b *bench) Reject(err error) { b.rejected = err; relay.Abort(b.accepted) }
func (b *bench) Done()            { close(b.done) }
func (b *bench) Conn() net.Conn   { return b.accepted }

func (b *bench) handle() {
	f := proxy.Flow{Inbound: "in", User: "bob", Dst: proxy.TCP("origin.test", 80)}
	b.engine.HandleStream(context.Background(), f, b)
}

// wait waits for the session's end and returns its log line.
func (b *bench) wait(t *testing.T) string {
	t.Helper()
	select {
	case <-b.done:
	case <-time.After(proxytest.Patience):
		t.Fatal("the session does not end")
	}
	if n := b.engine.Sessions(); n != 0 {
		t.Error(n, "sessions left")
	}
	line := b.log.String()
	if strings.Count(line, "\n") != 1 {
		t.Errorf("want one line a session, got %q", line)
	}
	return line
}

func has(t *testing.T, line string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(line, w) {
			t.Errorf("no %s in %s", w, line)
		}
	}
}

// dialTo dials one address, whatever the flow wants.
type dialTo string

func (d dialTo) DialStream(ctx context.Context, _ proxy.Addr) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", string(d))
}

func TestEngineRelaysAfterTheHead(t *testing.T) {
	proxytest.NoLeaks(t)
	origin := proxytest.Listen(t, "tcp", proxytest.AfterEOF(func(req []byte) []byte { return append([]byte("re: "), req...) }))
	b := newBench(t, dialTo(origin.Addr.HostPort()))
	b.head = []byte("early ")
	b.handle()
	io.WriteString(b.client, "late")
	b.client.CloseWrite()
	if got, err := io.ReadAll(b.client); string(got) != "re: early late" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
	has(t, b.wait(t), "inbound=in", "user=bob", "dst=origin.test:80", "via=out", "reason=done", "up=10", "down=14", "first=client")
}

func TestEngineRejectsWithTheDialsError(t *testing.T) {
	proxytest.NoLeaks(t)
	b := newBench(t, &proxytest.ScriptedDialer{Script: func(context.Context, proxy.Addr) (net.Conn, error) {
		return nil, fmt.Errorf("dial: %w", syscall.ECONNREFUSED)
	}})
	b.handle()
	if !errors.Is(b.rejected, syscall.ECONNREFUSED) {
		t.Error("rejected with", b.rejected)
	}
	if !proxytest.Resets(b.client) {
		t.Error("client was not reset")
	}
	has(t, b.wait(t), "reason=refused", "level=WARN")
}

func TestEngineAcceptFails(t *testing.T) {
	proxytest.NoLeaks(t)
	origin := proxytest.Listen(t, "tcp", proxytest.Sink)
	b := newBench(t, dialTo(origin.Addr.HostPort()))
	b.fail = fmt.Errorf("accept: %w", syscall.ECONNRESET)
	b.handle()
	has(t, b.wait(t), "reason=reset")
}

// patient dials until its context ends.
type patient chan error

func (p patient) DialStream(ctx context.Context, _ proxy.Addr) (net.Conn, error) {
	close(p)
	<-ctx.Done()
	return nil, fmt.Errorf("dial: %w", ctx.Err())
}

func TestClientResetCancelsTheDial(t *testing.T) {
	proxytest.NoLeaks(t)
	dialing := make(patient)
	b := newBench(t, dialing)
	go b.handle()
	<-dialing
	b.client.SetLinger(0)
	b.client.Close()
	has(t, b.wait(t), "reason=canceled", "level=INFO")
}

func TestClientHalfCloseDoesNotCancelTheDial(t *testing.T) {
	proxytest.NoLeaks(t)
	origin := proxytest.Listen(t, "tcp", proxytest.AfterEOF(func(req []byte) []byte { return req }))
	release := make(chan struct{})
	b := newBench(t, &proxytest.ScriptedDialer{Script: func(ctx context.Context, _ proxy.Addr) (net.Conn, error) {
		select {
		case <-release:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		return net.Dial("tcp", origin.Addr.HostPort())
	}})
	go b.handle()
	io.WriteString(b.client, "kept")
	b.client.CloseWrite()
	time.AfterFunc(100*time.Millisecond, func() { close(release) }) // longer than a reset needs to be seen
	if got, err := io.ReadAll(b.client); string(got) != "kept" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
	has(t, b.wait(t), "reason=done")
}

func TestDialTimeout(t *testing.T) {
	proxytest.NoLeaks(t)
	dialing := make(patient)
	b := newBench(t, dialing)
	b.engine.DialTimeout = 50 * time.Millisecond
	b.handle()
	if proxy.ReasonOf(b.rejected) != proxy.Timeout {
		t.Error("rejected with", b.rejected)
	}
	has(t, b.wait(t), "reason=timeout")
}

func TestEngineAbort(t *testing.T) {
	t.Run("relaying", func(t *testing.T) {
		proxytest.NoLeaks(t)
		origin := proxytest.Listen(t, "tcp", proxytest.Echo)
		b := newBench(t, dialTo(origin.Addr.HostPort()))
		b.handle()
		if n := b.engine.Abort(); n != 1 {
			t.Error("aborted", n)
		}
		if !proxytest.Resets(b.client) {
			t.Error("client was not reset")
		}
		has(t, b.wait(t), "reason=canceled", "first=none")
	})
	t.Run("dialing", func(t *testing.T) {
		proxytest.NoLeaks(t)
		dialing := make(patient)
		b := newBench(t, dialing)
		go b.handle()
		<-dialing
		if n := b.engine.Abort(); n != 1 {
			t.Error("aborted", n)
		}
		has(t, b.wait(t), "reason=canceled")
	})
	t.Run("afterwards", func(t *testing.T) {
		proxytest.NoLeaks(t)
		b := newBench(t, make(patient))
		b.engine.Abort()
		b.handle()
		if !errors.Is(b.rejected, proxy.ErrStopped) {
			t.Error("rejected with", b.rejected)
		}
		has(t, b.wait(t), "reason=canceled")
	})
}

func TestOriginResetReachesTheClient(t *testing.T) {
	proxytest.NoLeaks(t)
	origin := proxytest.Listen(t, "tcp", func(c net.Conn) {
		io.WriteString(c, "half a re")
		io.ReadFull(c, make([]byte, 2)) // the client has it
		relay.Abort(c)
	})
	b := newBench(t, dialTo(origin.Addr.HostPort()))
	b.handle()
	io.ReadFull(b.client, make([]byte, len("half a re")))
	io.WriteString(b.client, "ok")
	if !proxytest.Resets(b.client) {
		t.Error("client saw a clean end of an aborted transfer")
	}
	has(t, b.wait(t), "reason=reset", "first=origin")
}
