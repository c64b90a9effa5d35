package proxytest

import (
	"context"
	"net"
	"testing"
)

// NoNames returns a resolver whose server answers each question with: there is no such name.
func NoNames(t testing.TB) *net.Resolver {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	end := make(chan struct{})
	go denyNames(pc, end)
	t.Cleanup(func() { pc.Close(); <-end })
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", pc.LocalAddr().String())
	}}
}

func denyNames(pc net.PacketConn, end chan struct{}) {
	defer close(end)
	b := make([]byte, 1500)
	for {
		n, from, err := pc.ReadFrom(b)
		if err != nil {
			return
		}
		if n < 12 {
			continue
		}
		b[2], b[3] = b[2]|0x80, 0x83   // an answer: recursion available, NXDOMAIN
		copy(b[6:12], make([]byte, 6)) // no records
		end := 12                      // of the question
		for end < n && b[end] != 0 {
			end += 1 + int(b[end])
		}
		pc.WriteTo(b[:min(n, end+5)], from)
	}
}
