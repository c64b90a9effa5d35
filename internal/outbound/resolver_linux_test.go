package outbound

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/sockopt"
)

// TestMarkedQuestions: questions bear the mark, and do not go to a resolver that would ask on without it.
func TestMarkedQuestions(t *testing.T) {
	proxytest.NeedRoot(t)
	proxytest.NoLeaks(t)
	dir := t.TempDir()
	upstreams := filepath.Join(dir, "resolv.conf")
	if err := os.WriteFile(upstreams, []byte("# as systemd-resolved writes it\nnameserver 127.0.0.1\nnameserver\nnameserver x\nnameserver 192.0.2.53\nnameserver 192.0.2.54\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var asked string
	var mark int
	record := func(network, address string, c syscall.RawConn) error {
		asked = network + " " + address
		if err := sockopt.Mark(42)(network, address, c); err != nil {
			return err
		}
		return c.Control(func(fd uintptr) { mark, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK) })
	}
	for _, tt := range []struct{ file, server, want string }{
		{upstreams, "127.0.0.53:53", "udp4 192.0.2.53:53"},
		{upstreams, "[::1]:53", "udp4 192.0.2.53:53"},
		{upstreams, "198.51.100.1:53", "udp4 198.51.100.1:53"},
		{filepath.Join(dir, "none"), "127.0.0.53:53", "udp4 127.0.0.53:53"},
	} {
		mark = 0
		m := &marked{net.Dialer{Control: record}, tt.file}
		c, err := m.dial(t.Context(), "udp", tt.server)
		if err == nil {
			c.Close()
		}
		if asked != tt.want || mark != 42 {
			t.Errorf("%s: asked %s with mark %d, want %s (%v)", tt.server, asked, mark, tt.want, err)
		}
	}
}

func TestMarkedResolverAsksItself(t *testing.T) {
	r := MarkedResolver(42)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Dial(ctx, "udp", netip.MustParseAddrPort("192.0.2.1:53").String()); !r.PreferGo || err == nil {
		t.Error(r.PreferGo, err)
	}
}
