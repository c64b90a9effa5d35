//go:build linux

package outbound

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
)

func TestDirectReaches(t *testing.T) {
	for _, network := range []string{"tcp", "tcp6", "unix"} {
		t.Run(network, func(t *testing.T) {
			proxytest.NoLeaks(t)
			o := proxytest.Listen(t, network, proxytest.Echo)
			c, err := new(Direct).DialStream(t.Context(), o.Addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			switch c.(type) {
			case *net.TCPConn, *net.UnixConn:
			default:
				t.Errorf("not a bare conn: %T", c)
			}
			c.SetDeadline(time.Now().Add(proxytest.Patience))
			io.WriteString(c, "x")
			c.(interface{ CloseWrite() error }).CloseWrite()
			if b, err := io.ReadAll(c); string(b) != "x" || err != nil {
				t.Errorf("%q, %v", b, err)
			}
		})
	}
}

// A name with an address that does not answer is reached by its other one.
func TestDirectTriesAllAddresses(t *testing.T) {
	proxytest.NoLeaks(t)
	o := proxytest.Listen(t, "tcp", proxytest.Sink) // listens on IPv4 only; localhost is mostly both
	c, err := new(Direct).DialStream(t.Context(), proxy.TCP("localhost", o.Addr.Port))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestDirectBindAddr(t *testing.T) {
	proxytest.NoLeaks(t)
	o := proxytest.Listen(t, "tcp", proxytest.Echo)
	d := &Direct{BindAddr: netip.MustParseAddr("127.9.8.7")}
	c, err := d.DialStream(t.Context(), o.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	io.WriteString(c, "x")
	io.ReadFull(c, make([]byte, 1)) // it has accepted
	if got := o.Peer().(*net.TCPAddr).IP.String(); got != "127.9.8.7" {
		t.Errorf("the origin sees %s", got)
	}
}

// TestDirectTry: what does not fit this machine is known before the first dial.
func TestDirectTry(t *testing.T) {
	proxytest.NoLeaks(t)
	for want, d := range map[string]*Direct{
		"": {},
		"is 192.0.2.1 an address of this machine": {BindAddr: netip.MustParseAddr("192.0.2.1")},
		"no interface nowhere0":                   {Interface: "nowhere0"},
	} {
		if err := d.Try(); (err == nil) != (want == "") || !strings.Contains(fmt.Sprint(err), want) && want != "" {
			t.Errorf("%+v: %v", d, err)
		}
	}
	if err := (&Direct{BindAddr: netip.MustParseAddr("127.0.0.1")}).Try(); err != nil {
		t.Error(err)
	}
}

func TestDirectErrors(t *testing.T) {
	proxytest.NoLeaks(t)
	ctx := t.Context()
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	closed := proxy.TCP("127.0.0.1", proxytest.FreePort(t))
	nxdomain := proxytest.NoNames(t)
	for name, test := range map[string]struct {
		ctx    context.Context
		d      Direct
		dst    proxy.Addr
		reason proxy.Reason
		errno  error
		text   string
	}{
		"refused":         {ctx, Direct{}, closed, proxy.Refused, syscall.ECONNREFUSED, closed.String()},
		"no such name":    {ctx, Direct{Resolver: nxdomain}, proxy.TCP("no.such.test", 80), proxy.NoHost, nil, "no.such.test"},
		"empty name":      {ctx, Direct{}, proxy.TCP("", 80), proxy.NoHost, nil, ""},
		"no such socket":  {ctx, Direct{}, proxy.Addr{Network: "unix", Host: filepath.Join(t.TempDir(), "s")}, proxy.NoHost, syscall.ENOENT, ""},
		"canceled":        {canceled, Direct{}, closed, proxy.Canceled, context.Canceled, ""},
		"timeout":         {ctx, Direct{Timeout: 1}, closed, proxy.Timeout, nil, ""},
		"network":         {ctx, Direct{}, proxy.Addr{Network: "udp", Host: "127.0.0.1", Port: 1}, proxy.Unsupported, errors.ErrUnsupported, ""},
		"other family":    {ctx, Direct{BindAddr: netip.IPv6Loopback()}, closed, proxy.Unsupported, nil, "from ::1"},
		"foreign address": {ctx, Direct{BindAddr: netip.MustParseAddr("192.0.2.1")}, closed, proxy.Other, syscall.EADDRNOTAVAIL, "an address of this machine?"},
		"no interface":    {ctx, Direct{Interface: "nosuch0"}, closed, proxy.Other, syscall.ENODEV, "no interface nosuch0"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := test.d.DialStream(test.ctx, test.dst)
			if err == nil {
				c.Close()
				t.Fatal("no error")
			}
			if got := proxy.ReasonOf(err); got != test.reason {
				t.Errorf("%v: reason %v, want %v", err, got, test.reason)
			}
			if test.errno != nil && !errors.Is(err, test.errno) || !strings.Contains(err.Error(), test.text) ||
				!strings.HasPrefix(err.Error(), "outbound: direct: ") {
				t.Errorf("error %q, want %v and %q", err, test.errno, test.text)
			}
		})
	}
}

// A dial that nobody answers ends when its context does.
func TestDirectCancel(t *testing.T) {
	proxytest.NoLeaks(t)
	o := unanswered(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	c, err := new(Direct).DialStream(ctx, o)
	if err == nil {
		c.Close()
	}
	if proxy.ReasonOf(err) != proxy.Timeout {
		t.Errorf("got %v", err)
	}
}

// unanswered returns an address where SYNs are dropped: that of a listener whose queue is full.
func unanswered(t *testing.T) proxy.Addr {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	a := proxy.TCP("127.0.0.1", uint16(sa.(*syscall.SockaddrInet4).Port))
	for range 8 {
		c, err := net.DialTimeout("tcp", a.HostPort(), 200*time.Millisecond)
		if err != nil {
			return a
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Fatal("the queue does not fill")
	return a
}

func TestDirectMark(t *testing.T) {
	o := proxytest.Listen(t, "tcp", proxytest.Sink)
	if addr := os.Getenv("SLUICE_TEST_MARK"); addr != "" { // the child of TestDirectMarkNeedsPrivileges
		dst, _ := proxy.ParseDst(addr)
		_, err := (&Direct{Mark: 7}).DialStream(context.Background(), dst)
		io.WriteString(os.Stdout, err.Error()+" reason="+proxy.ReasonOf(err).String())
		os.Exit(0)
	}
	proxytest.NeedRoot(t)
	c, err := (&Direct{Mark: 7, Interface: "lo"}).DialStream(t.Context(), o.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var mark int
	raw, _ := c.(*net.TCPConn).SyscallConn()
	raw.Control(func(fd uintptr) { mark, _ = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_MARK) })
	if mark != 7 {
		t.Errorf("mark %d", mark)
	}
}

func TestDirectMarkNeedsPrivileges(t *testing.T) {
	proxytest.NeedRoot(t) // to become somebody else
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestDirectMark$")
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "SLUICE_TEST_MARK=127.0.0.1:9")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	for _, want := range []string{"operation not permitted", "CAP_NET_ADMIN", "reason=denied"} {
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%v, want %q: %s", err, want, out)
		}
	}
}

func TestReject(t *testing.T) {
	c, err := Reject{}.DialStream(t.Context(), proxy.TCP("example.com", 80))
	if c != nil || !errors.Is(err, proxy.ErrDenied) || proxy.ReasonOf(err) != proxy.Denied ||
		!strings.Contains(err.Error(), "example.com:80") {
		t.Errorf("%v, %v", c, err)
	}
}
