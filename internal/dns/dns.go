// Package dns answers the DNS questions of programs whose traffic is taken as packets or redirected, so that the names
// they ask for go the way of their traffic.
//
// A program that uses a proxy gives it a name. One that does not know of the proxy asks a name server first, and then
// connects to an address: what the proxy sees has no name any more, and the question may have gone a way that cannot
// answer it, or that was not to see it. A [Handler] stands between an inbound and the engine, takes the flows to port 53,
// and does one of two things.
//
// With [Hijack] all questions go to one resolver through the outbound that the router chooses for it, whoever was asked. Where that
// carries no datagrams, they go over TCP. Names are resolved there, and flows go to addresses, as without a proxy.
//
// With [Fake] no question for an address leaves the machine: each name gets an address of its own out of a range
// that is used for nothing else, and a flow to that address becomes a flow to the name. So the last hop resolves it.
package dns

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

// Port is the port that flows to are taken for DNS, over UDP and TCP.
const Port = 53

// DefaultTimeout is how long a question may take; then the answer is SERVFAIL.
const DefaultTimeout = proxy.DefaultDialTimeout

// Mode is what becomes of DNS questions.
type Mode uint8

// The modes.
const (
	Fake   Mode = iota // addresses that stand for names
	Hijack             // to the Resolver
	Off                // nothing: they are flows like others
)

// ParseMode reads a setting: "fake", "fake,RESOLVER", "RESOLVER" (which is [Hijack]), or "off". A resolver is an IP address, with port
// 53 unless it says another: "1.1.1.1", "10.0.0.1:5353", "2606:4700:4700::1111", "[::1]:5353". The empty setting is "fake".
func ParseMode(s string) (Mode, proxy.Addr, error) {
	mode, word := Hijack, s
	switch kind, rest, more := strings.Cut(s, ","); {
	case s == "" || s == "fake":
		return Fake, proxy.Addr{}, nil
	case s == "off":
		return Off, proxy.Addr{}, nil
	case more && kind == "fake":
		mode, word = Fake, rest
	}
	if ip, err := netip.ParseAddr(word); err == nil {
		return mode, proxy.UDP(ip.String(), Port), nil
	}
	ap, err := netip.ParseAddrPort(word)
	if err != nil || ap.Port() == 0 {
		return 0, proxy.Addr{}, fmt.Errorf("dns: %q is neither fake, off, nor the IP address of a resolver", s)
	}
	return mode, proxy.UDP(ap.Addr().String(), ap.Port()), nil
}

// Prefixes returns the ranges that fake addresses are of: 198.18.0.0/15, which RFC 2544 sets aside for measurements and is not routed
// anywhere, and a range of unique local addresses (RFC 4193). They are to be routed to where the Handler's
// flows come from. The first 16 addresses of each stand for no name: they are free for devices.
func Prefixes() (v4, v6 netip.Prefix) {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18}), 15),
		netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0x5c, 0x1e, 0x7a, 0xb3, 0xd2, 0x01, 0x98}), 64)
}

// Handler is a [proxy.Handler] that answers DNS questions, and hands all else on. Set its fields before the first flow; it must not be copied. It
// serves one inbound.
type Handler struct {
	Next     proxy.Handler // takes the other flows
	Mode     Mode
	Router   proxy.Router  // chooses the way to the resolver, by a Flow without a client; nil: none is asked
	Resolver proxy.Addr    // for Fake it may be zero: then only what needs none is answered
	NoIPv6   bool          // Fake: names have no IPv6 address, for clients that have no way to one
	Timeout  time.Duration // for a question; 0: DefaultTimeout
	Log      *slog.Logger  // nil: silent
}

var _ proxy.NowHandler = (*Handler)(nil)

// HandleStream implements [proxy.Handler].
func (h *Handler) HandleStream(ctx context.Context, f proxy.Flow, p proxy.Pending) {
	h.Next.HandleStream(ctx, f, p)
}

// HandleStreamNow implements [proxy.NowHandler]: it takes what Next takes, and leaves DNS to HandleStream.
func (h *Handler) HandleStreamNow(ctx context.Context, f proxy.Flow, p proxy.Pending) bool {
	return false
}

// HandlePackets implements [proxy.Handler].
func (h *Handler) HandlePackets(ctx context.Context, f proxy.Flow, c relay.PacketConn) {
	h.Next.HandlePackets(ctx, f, c)
}

