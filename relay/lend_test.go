package relay_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/relay"
)

// lending is a conn that lends what it has received, in pieces.
type lending struct {
	net.Conn
	t    *testing.T
	mu   sync.Mutex
	held []byte
	lent bool
	size int // what WriteSize says; 0: no matter

	wrote []int
}

func (l *lending) Lend(most int) ([][]byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lent {
		l.t.Error("Lend before Return")
	}
	if len(l.held) == 0 {
		b := make([]byte, 10000)
		n, err := l.Conn.Read(b)
		if n == 0 {
			return nil, err
		}
		l.held = b[:n]
	}
	l.lent = true
	half := len(l.held) / 2
	return [][]byte{l.held[:half], l.held[half:]}, nil
}

func (l *lending) Return(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.lent || n > len(l.held) {
		l.t.Errorf("Return of %d, lent: %v", n, l.lent)
	}
	clear(l.held[:n]) // it is used up
	l.held, l.lent = l.held[n:], false
}

func (l *lending) Write(p []byte) (int, error) {
	l.wrote = append(l.wrote, len(p))
	return l.Conn.Write(p)
}

func (l *lending) WriteSize() int    { return l.size }
func (l *lending) CloseWrite() error { return l.Conn.(*net.TCPConn).CloseWrite() }

func lentPair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if a, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	a.SetDeadline(time.Now().Add(20 * time.Second))
	return a, b
}

// What a conn lends arrives, at a socket and at any conn, and is returned each time.
func TestLending(t *testing.T) {
	for name, wrap := range map[string]func(net.Conn) net.Conn{
		"socket": func(c net.Conn) net.Conn { return c },
		"other":  func(c net.Conn) net.Conn { return struct{ net.Conn }{c} },
	} {
		client, a := lentPair(t)
		origin, b := lentPair(t)
		l := &lending{Conn: a, t: t}
		joined := make(chan relay.Result, 1)
		go func() { joined <- relay.Join(context.Background(), l, wrap(b)) }()
		want := make([]byte, 1<<20)
		rand.Read(want)
		go func() {
			client.Write(want)
			client.(*net.TCPConn).CloseWrite()
		}()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(origin, got); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v", name, err)
		}
		origin.Close()
		client.Close()
		if res := <-joined; res.AToB.Bytes != int64(len(want)) {
			t.Errorf("%s: %v", name, res)
		}
		if l.lent {
			t.Errorf("%s: a loan was not returned", name)
		}
	}
}

// No Write is longer than what the conn takes best.
func TestWriteSize(t *testing.T) {
	client, a := lentPair(t)
	origin, b := lentPair(t)
	l := &lending{Conn: b, t: t, size: 5000}
	joined := make(chan relay.Result, 1)
	go func() { joined <- relay.Join(context.Background(), a, l) }()
	want := make([]byte, 1<<20)
	go func() {
		client.Write(want)
		client.(*net.TCPConn).CloseWrite()
	}()
	if n, err := io.Copy(io.Discard, io.LimitReader(origin, int64(len(want)))); n != int64(len(want)) || err != nil {
		t.Error(n, err)
	}
	origin.Close()
	client.Close()
	<-joined
	for _, n := range l.wrote {
		if n > l.size {
			t.Fatalf("a Write of %d bytes", n)
		}
	}
}
