//go:build unix

package sshlink

import (
	"io"
	"net"
	"testing"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// BenchmarkDownload moves bytes from an origin behind the real sshd.
func BenchmarkDownload(b *testing.B) {
	s := proxytest.StartSSHD(b)
	l, _ := newLink(b, s)
	origin := proxytest.Listen(b, "tcp", func(c net.Conn) { io.Copy(c, zeros{}) })
	c, err := l.Dial(withTimeout(b), "tcp", origin.Addr.HostPort())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, 64<<10)
	b.SetBytes(1 << 20)
	for b.Loop() {
		for n := 0; n < 1<<20; {
			k, err := c.Read(buf)
			if err != nil {
				b.Fatal(err)
			}
			n += k
		}
	}
}

// BenchmarkUpload moves bytes to one.
func BenchmarkUpload(b *testing.B) {
	s := proxytest.StartSSHD(b)
	l, _ := newLink(b, s)
	origin := proxytest.Listen(b, "tcp", proxytest.Sink)
	c, err := l.Dial(withTimeout(b), "tcp", origin.Addr.HostPort())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, 64<<10)
	b.SetBytes(1 << 20)
	for b.Loop() {
		for range 16 {
			if _, err := c.Write(buf); err != nil {
				b.Fatal(err)
			}
		}
	}
}
