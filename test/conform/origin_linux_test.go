package conform

import (
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
)

// refusing returns an address at which nobody listens, and nobody else can.
func refusing(t *testing.T) proxy.Addr {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return proxy.TCP("127.0.0.1", uint16(sa.(*syscall.SockaddrInet4).Port))
}

// blackHole returns an address that does not answer: a listener whose queue is full drops what comes.
func blackHole(t *testing.T) proxy.Addr {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	raw, err := ln.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if cerr := raw.Control(func(fd uintptr) { err = syscall.Listen(int(fd), 0) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	for range 8 {
		c, err := net.DialTimeout("tcp4", ln.Addr().String(), 200*time.Millisecond)
		if os.IsTimeout(err) {
			return addrOf(ln.Addr())
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Fatal("the kernel goes on taking connections")
	return proxy.Addr{}
}
