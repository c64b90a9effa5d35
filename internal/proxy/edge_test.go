package proxy_test

import (
	"context"
	"io"
	"log/slog"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
)

// blockedLog is a log whose reader has stopped, as a terminal after Ctrl-S or a full pipe.
type blockedLog struct{ goOn chan struct{} }

func (b *blockedLog) Write(p []byte) (int, error) { <-b.goOn; return len(p), nil }

type connDialer struct{ c net.Conn }

func (d connDialer) DialStream(context.Context, proxy.Addr) (net.Conn, error) { return d.c, nil }

type panicDialer struct{}

func (panicDialer) DialStream(context.Context, proxy.Addr) (net.Conn, error) { panic("test") }

// waiting is a client that any number of may wait of one engine.
type waiting struct {
	net.Conn
	done sync.Once
	over chan struct{}
}

func (w *waiting) Accept() (net.Conn, []byte, error) { return w.Conn, nil, nil }
func (w *waiting) Reject(error)                      { w.Close() }
func (w *waiting) Done()                             { w.done.Do(func() { close(w.over) }) }

func tcpPair(t *testing.T) (dialed, accepted net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	d, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	a, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close(); a.Close() })
	return d, a
}

// TestBlockedLogDoesNotStopTheRelay: one session ends, and its line cannot be written. The others go on.
func TestBlockedLogDoesNotStopTheRelay(t *testing.T) {
	log := &blockedLog{make(chan struct{})}
	type end struct {
		client, origin net.Conn
		over           chan struct{}
	}
	var ends []end
	for range max(4, runtime.GOMAXPROCS(0)) { // on all loops
		client, a := tcpPair(t)
		b, origin := tcpPair(t)
		e := &proxy.Engine{Router: proxy.Static{Name: "out", Dialer: connDialer{b}}, Log: slog.New(slog.NewTextHandler(log, nil))}
		w := &waiting{Conn: a, over: make(chan struct{})}
		e.HandleStream(context.Background(), proxy.Flow{}, w)
		ends = append(ends, end{client, origin, w.over})
	}
	ends[0].client.Close()
	ends[0].origin.Close()
	for range 10 { // the session's end is noticed soon
		for _, e := range ends[1:] {
			e.origin.SetDeadline(time.Now().Add(2 * time.Second))
			io.WriteString(e.client, "x")
			if _, err := io.ReadFull(e.origin, make([]byte, 1)); err != nil {
				t.Error("while a line waits to be logged, another session stands still: ", err)
				close(log.goOn)
				return
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	close(log.goOn)
	for _, e := range ends {
		e.client.Close()
		e.origin.Close()
		<-e.over
	}
}

// TestPanicLeavesNoSession: inbounds outlive a panic under HandleStream, and so does the engine's list.
func TestPanicLeavesNoSession(t *testing.T) {
	e := &proxy.Engine{Router: proxy.Static{Name: "out", Dialer: panicDialer{}}}
	_, a := tcpPair(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	func() {
		defer func() { recover() }()
		e.HandleStream(ctx, proxy.Flow{}, &waiting{Conn: a, over: make(chan struct{})})
	}()
	if n := e.Sessions(); n != 0 {
		t.Error("sessions left:", n)
	}
}
