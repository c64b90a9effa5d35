package outbound

import (
	"bufio"
	"context"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/sluice-proxy/sluice/internal/sockopt"
)

// stubUpstreams is where systemd-resolved says which name servers it asks.
const stubUpstreams = "/run/systemd/resolve/resolv.conf"

// MarkedResolver returns a resolver like the system's whose questions carry a mark, as a [Direct] with that Mark needs it where
// unmarked packets come back to us. A name server on loopback would ask on without the mark; where it
// is systemd-resolved, its own name server is asked instead.
func MarkedResolver(mark int) *net.Resolver {
	m := &marked{net.Dialer{Control: sockopt.Mark(mark)}, stubUpstreams}
	return &net.Resolver{PreferGo: true, Dial: m.dial}
}

type marked struct {
	dialer    net.Dialer
	upstreams string
}

func (m *marked) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if ap, err := netip.ParseAddrPort(address); err == nil && ap.Addr().IsLoopback() {
		if server := firstNameServer(m.upstreams); server.IsValid() {
			address = netip.AddrPortFrom(server, ap.Port()).String()
		}
	}
	return m.dialer.DialContext(ctx, network, address)
}

// firstNameServer returns the first one of a file like resolv.conf that is not on loopback, or none.
func firstNameServer(file string) netip.Addr {
	f, err := os.Open(file)
	if err != nil {
		return netip.Addr{}
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if words := strings.Fields(lines.Text()); len(words) > 1 && words[0] == "nameserver" {
			if a, err := netip.ParseAddr(words[1]); err == nil && !a.IsLoopback() {
				return a
			}
		}
	}
	return netip.Addr{}
}
