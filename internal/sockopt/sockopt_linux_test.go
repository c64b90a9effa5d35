package sockopt

import (
	"errors"
	"net"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

func TestOptions(t *testing.T) {
	proxytest.NeedRoot(t)
	proxytest.NoLeaks(t)
	o := proxytest.Listen(t, "tcp", proxytest.Sink)
	d := net.Dialer{Control: All(Mark(42), Device("lo"))}
	c, err := d.DialContext(t.Context(), "tcp", o.Addr.HostPort())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var mark int
	var device string
	raw.Control(func(fd uintptr) {
		mark, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK)
		device, _ = unix.GetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE)
	})
	if mark != 42 || device != "lo" {
		t.Errorf("mark %d, device %q", mark, device)
	}
}

func TestNoSuchDevice(t *testing.T) {
	d := net.Dialer{Control: Device("nosuch0")}
	c, err := d.DialContext(t.Context(), "tcp", "127.0.0.1:1")
	if err == nil {
		c.Close()
	}
	if !errors.Is(err, syscall.ENODEV) {
		t.Errorf("got %v, want ENODEV", err)
	}
}

func TestAllStopsAtTheFirstError(t *testing.T) {
	if All() != nil {
		t.Error("no options make a Control")
	}
	bad := errors.New("bad")
	ran := 0
	ok := func(_, _ string, _ syscall.RawConn) error { ran++; return nil }
	fail := func(_, _ string, _ syscall.RawConn) error { ran++; return bad }
	if err := All(ok, fail, ok)("tcp", "", nil); err != bad || ran != 2 {
		t.Errorf("%v after %d", err, ran)
	}
}
