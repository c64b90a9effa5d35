package inbound

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/pires/go-proxyproto"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// startInbound binds in and serves it until the test's end, when Serve must return.
func startInbound(t *testing.T, in interface {
	proxy.Inbound
	BoundAddr() net.Addr
}, h proxy.Handler) net.Addr {
	t.Helper()
	proxytest.NoLeaks(t)
	if err := in.Listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	end := make(chan error, 1)
	go func() { end <- in.Serve(context.Background(), h) }()
	t.Cleanup(func() {
		in.Close()
		if err := <-end; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return in.BoundAddr()
}

func TestForward(t *testing.T) {
	h := &proxytest.RecordingHandler{}
	to := proxy.TCP("example.com", 80)
	a := startInbound(t, &Forward{Listener: Listener{Name: "web", Addr: loopback}, To: to}, h)
	c := dial(t, a)
	io.WriteString(c, "hello")
	c.(*net.TCPConn).CloseWrite()
	if b, err := io.ReadAll(c); string(b) != "hello" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	want := proxy.Flow{Inbound: "web", Client: addrPort(c.LocalAddr()), Local: addrPort(a), Dst: to}
	if got := h.Flows(); len(got) != 1 || got[0] != want {
		t.Errorf("flows %+v, want %+v", got, want)
	}
}

// The bare conn is given away: nothing hides what it can do.
func TestForwardGivesTheBareConn(t *testing.T) {
	types := make(chan string, 2)
	h := &proxytest.RecordingHandler{Serve: func(c net.Conn) { types <- fmt.Sprintf("%T", c) }}
	dial(t, startInbound(t, &Forward{Listener: Listener{Addr: loopback}, To: loopback}, h))
	path := filepath.Join(t.TempDir(), "s")
	dial(t, startInbound(t, &Forward{Listener: Listener{Addr: unixAddr(path)}, To: loopback}, h))
	want := "*net.TCPConn*net.UnixConn"
	if runtime.GOOS == "linux" {
		want = "*relay.Socket*relay.Socket"
	}
	if a, b := <-types, <-types; a+b != want && b+a != want {
		t.Error(a, b)
	}
}

func TestForwardRejectsWithReset(t *testing.T) {
	h := &proxytest.RecordingHandler{Err: syscall.ECONNREFUSED}
	if a := startInbound(t, &Forward{Listener: Listener{Addr: loopback}, To: loopback}, h); !isReset(a) {
		t.Error("the client is not reset")
	}
}

func TestForwardSendsProxyHeader(t *testing.T) {
	for _, version := range []int{1, 2} {
		for _, network := range []string{"tcp4", "tcp6", "unix", "header"} {
			t.Run(fmt.Sprintf("v%d %s", version, network), func(t *testing.T) {
				got := make(chan *proxyproto.Header, 1)
				h := &proxytest.RecordingHandler{Serve: func(c net.Conn) {
					r := bufio.NewReader(c)
					h, err := proxyproto.Read(r)
					if err != nil {
						t.Error(err)
					}
					got <- h
					io.Copy(c, r)
				}}
				l := Listener{Addr: loopback}
				switch network {
				case "tcp6":
					l.Addr = proxy.TCP("::1", 0)
				case "unix":
					l.Addr = unixAddr(filepath.Join(t.TempDir(), "s"))
				case "header":
					l.AcceptProxy = true
				}
				a := startInbound(t, &Forward{Listener: l, To: loopback, SendProxy: version}, h)
				c := dial(t, a)
				client, local := addrPort(c.LocalAddr()), addrPort(a)
				if network == "header" { // the client's address is passed on through both
					io.WriteString(c, v1Header)
					client, local = netip.MustParseAddrPort("192.0.2.7:4711"), netip.MustParseAddrPort("198.51.100.9:443")
				}
				io.WriteString(c, "payload")
				c.(interface{ CloseWrite() error }).CloseWrite()
				if b, err := io.ReadAll(c); string(b) != "payload" || err != nil {
					t.Errorf("%q, %v", b, err)
				}
				hdr := <-got
				if int(hdr.Version) != version {
					t.Errorf("version %d", hdr.Version)
				}
				src, dst, ok := hdr.TCPAddrs()
				if network == "unix" {
					if ok || !hdr.Command.IsLocal() {
						t.Errorf("for a Unix client: %+v", hdr)
					}
				} else if !ok || addrPort(src) != client || addrPort(dst) != local {
					t.Errorf("%v to %v, want %v to %v", src, dst, client, local)
				}
			})
		}
	}
}

func TestForwardSettings(t *testing.T) {
	for want, f := range map[string]*Forward{
		"no destination": {Listener: Listener{Addr: loopback}},
		"no version 3":   {Listener: Listener{Addr: loopback}, To: loopback, SendProxy: 3},
	} {
		if err := f.Listen(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}
