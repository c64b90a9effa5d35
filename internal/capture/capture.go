// Package capture brings traffic that is on its way elsewhere to a port of this machine: it installs packet filter
// rules (nf_tables) and, for TPROXY, policy routing, and removes them again.
//
// There are two ways. REDIRECT rewrites the destination of a new TCP connection; whoever accepts it asks the kernel
// where it was going. TPROXY leaves packets as they are and hands them to a socket that takes what is for other addresses;
// that works for UDP too. Traffic comes from this machine itself, or from others whose packets it forwards.
//
// What must not be captured: the connections that the proxy makes itself, which it marks ([Mark]); what is for this
// machine, for the local link, or for many (broadcast and multicast); and connections that were there before.
//
// All rules stand in one nf_tables table, called sluice-redirect-PORT or sluice-tproxy-PORT, which belongs to a socket of
// this process: the kernel removes the table when the process ends, however it ends. Routing rules and routes have no such
// owner. They match a mark that nobody sets without the table, and so do nothing once it is gone; they are recognised by
// the number of their routing table, and the next [Capture.Begin] at that port, or [Clean], removes them.
package capture

import (
	"fmt"
	"net/netip"
	"slices"
)

// Mark is what the proxy's own sockets are marked with (SO_MARK), so that they are not captured. All marks, and the numbers
// of all routing tables, that differ from it in the lower half only are sluice's: that half is the port they are for.
const Mark = 0x736c0000

// markMask is the part of a mark by which it is known to be one of sluice's.
const markMask = 0xffff0000

// Source says whose traffic is captured. The zero Source is this machine.
type Source struct {
	Interface string       // what comes in at this interface, to be forwarded
	Network   netip.Prefix // what comes from these addresses, to be forwarded
}

// Local says whether s is this machine.
func (s Source) Local() bool { return s == Source{} }

// Capture is what is captured, and how. Set its fields before Begin. Its methods must not be called at the same time.
type Capture struct {
	TProxy bool     // TPROXY, and not REDIRECT
	UDP    bool     // with TPROXY: datagrams, too
	From   []Source // empty: this machine

	// DNS: with TPROXY also questions to name servers, over TCP and UDP, wherever they go. Exclude still counts.
	DNS bool
	// Fake are destinations that nobody has but who answers questions. With TPROXY both TCP and UDP to them are captured.
	Fake []netip.Prefix

	Include []netip.Prefix // destinations that are captured; empty: all
	Exclude []netip.Prefix // those that are not, although included
	Marks   []uint32       // of sockets that are not captured, beside Mark

	*installed
}

// tableName returns the name of the table for a port.
func (c *Capture) tableName(port uint16) string {
	if c.TProxy {
		return fmt.Sprintf("sluice-tproxy-%d", port)
	}
	return fmt.Sprintf("sluice-redirect-%d", port)
}

// from returns the sources.
func (c *Capture) from() []Source {
	if len(c.From) == 0 {
		return []Source{{}}
	}
	return c.From
}

// targets returns where packets of either family are to be brought to, given where somebody listens; an invalid
// address for a family that nobody listens for.
func targets(at []netip.AddrPort) (v4, v6 netip.AddrPort) {
	for _, a := range at {
		ip, port := a.Addr().Unmap(), a.Port()
		switch {
		case ip == netip.IPv6Unspecified():
			v4 = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
			v6 = netip.AddrPortFrom(netip.IPv6Loopback(), port)
		case ip.IsUnspecified():
			v4 = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
		case ip.Is4():
			v4 = netip.AddrPortFrom(ip, port)
		default:
			v6 = netip.AddrPortFrom(ip, port)
		}
	}
	return v4, v6
}

// span is the addresses from first up to, but not including, end. Without an end it goes up to the last address there is.
type span struct{ first, end netip.Addr }

// spans returns the addresses of the prefixes of one family, as spans in order that neither overlap nor touch.
func spans(prefixes []netip.Prefix, v6 bool) (all []span) {
	var own []netip.Prefix
	for _, p := range prefixes {
		if p.Addr().Is6() == v6 {
			own = append(own, p.Masked())
		}
	}
	slices.SortFunc(own, netip.Prefix.Compare)
	for _, p := range own {
		s := span{p.Addr(), behind(p)}
		if len(all) == 0 {
			all = append(all, s)
			continue
		}
		last := &all[len(all)-1]
		switch {
		case !last.end.IsValid(): // covers the rest
		case s.first.Compare(last.end) > 0:
			all = append(all, s)
		case !s.end.IsValid() || s.end.Compare(last.end) > 0:
			last.end = s.end
		}
	}
	return all
}

// behind returns the first address behind p, or the zero Addr if there is none.
func behind(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last.Next()
}
