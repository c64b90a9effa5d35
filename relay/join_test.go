package relay

import (
	"context"
	"io"
	"net"
	"testing"
)

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// tcpPair returns the two ends of a TCP connection on loopback.
func tcpPair(t testing.TB) (dialed, accepted *net.TCPConn) {
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
	return d.(*net.TCPConn), a.(*net.TCPConn)
}

func TestJoinHalfClose(t *testing.T) {
	client, ra := tcpPair(t)
	rb, origin := tcpPair(t)
	res := make(chan Result, 1)
	go func() { res <- Join(context.Background(), ra, rb) }()
	io.WriteString(client, "request")
	client.CloseWrite()
	if b, err := io.ReadAll(origin); string(b) != "request" || err != nil {
		t.Fatalf("origin read %q, %v", b, err)
	}
	io.WriteString(origin, "reply")
	origin.Close()
	if b, err := io.ReadAll(client); string(b) != "reply" || err != nil {
		t.Fatalf("client read %q, %v", b, err)
	}
	r := <-res
	if r.AToB.Bytes != 7 || r.BToA.Bytes != 5 || r.Err() != nil || r.First != A {
		t.Error(r, r.Err())
	}
}
