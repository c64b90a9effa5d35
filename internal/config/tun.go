package config

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/sluice-proxy/sluice/internal/dns"
	"github.com/sluice-proxy/sluice/internal/inbound"
	"github.com/sluice-proxy/sluice/internal/netstack"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/tundev"
)

// maxDeviceName is what Linux allows for the name of a network interface, without the end.
const maxDeviceName = 15

// fillTUN sets the defaults of a tun, and checks it.
func (c *Config) fillTUN(l *errorList, in *Inbound, path string) {
	if len(in.Name) > maxDeviceName {
		l.add(path+".name", "%q is too long for the name of a device (%d letters at most)", in.Name, maxDeviceName)
	}
	if strings.ContainsRune(in.Netns, '/') {
		l.add(path+".netns", "%q is not the name of a network namespace (as in ip netns add NAME)", in.Netns)
	}
	if l.src.has(path+".mtu") || in.MTU != 0 {
		if in.MTU < tundev.MinMTU || in.MTU > tundev.PacketMax {
			l.add(path+".mtu", "%d is not a number from %d to %d", in.MTU, tundev.MinMTU, tundev.PacketMax)
		}
	}
	for i, p := range in.Exclude {
		if slices.Contains(in.Include, p) {
			l.add(fmt.Sprintf("%s.exclude[%d]", path, i), "%v is included, too", p)
		}
	}
	// Where only some networks are taken in, or the way out needs no names, questions are nobody else's matter.
	if in.DNS == "" {
		if in.DNS = "fake"; len(in.Include) > 0 || len(in.Via)+len(c.Rules) == 0 {
			in.DNS = "off"
		}
	}
}

// nameDevice gives a tun the first default name that is none of names.
func (in *Inbound) nameDevice(names map[string]int) {
	for i := range len(names) + 1 {
		in.Name = fmt.Sprintf("%s%d", strings.TrimSuffix(tundev.DefaultName, "0"), i)
		if _, taken := names[in.Name]; !taken {
			return
		}
	}
}

// tunMark is the mark by which a tun tells our own connections from those that it is to take in; 0 where no tun takes in
// the network that we are in.
func (c *Config) tunMark() int {
	if slices.ContainsFunc(c.Inbounds, func(in Inbound) bool { return in.Type == "tun" && in.Netns == "" }) {
		return tundev.DefaultMark
	}
	return 0
}

func tun(in *Inbound, _ inbound.Listener, _ inbound.Users) proxy.Inbound {
	return &netstack.TUN{
		Stack: netstack.Stack{Name: in.Name},
		Setup: tundev.Setup{Name: in.Name, Namespace: in.Netns, MTU: in.MTU, Include: prefixes(in.Include), Exclude: prefixes(in.Exclude)},
	}
}

// tun finishes t, which is the inbound of bound.
func (b *builder) tun(in *Inbound, t *netstack.TUN, bound *Bound) {
	t.Log, t.Setup.Log = b.log, b.log
	b.kept = append(b.kept, undone{t})
	t.Ping = echoes{in.Name, bound.Router}.ping
	if in.Netns == "" {
		t.Setup.Marks = b.marks()
	}
	mode := b.names(in, bound, t.HasIPv6)
	if mode == dns.Off {
		return
	}
	t.Setup.DNS = true
	if v4, v6 := dns.Prefixes(); mode == dns.Fake && len(in.Include) > 0 {
		t.Setup.Include = slices.Concat(t.Setup.Include, []netip.Prefix{v4, v6})
	}
}

// names has the DNS questions that bound takes in answered as in says. hasIPv6 is asked once it listens.
func (b *builder) names(in *Inbound, bound *Bound, hasIPv6 func() bool) dns.Mode {
	mode, resolver, _ := dns.ParseMode(string(in.DNS)) // Fill has read it
	if mode != dns.Off {
		router, log := bound.Router, b.log
		bound.Front = func(next proxy.Handler) proxy.Handler {
			return &dns.Handler{Next: next, Mode: mode, Resolver: resolver, Router: router, NoIPv6: !hasIPv6(), Log: log}
		}
	}
	return mode
}

// undone undoes what an inbound has changed of the network also where its sessions do not end.
type undone struct{ of interface{ Undo() error } }

func (u undone) Start() error { return nil }
func (u undone) Close() error { return u.of.Undo() }

// echoes asks for answers to ICMP echoes where an inbound's way out can.
type echoes struct {
	inbound string
	router  proxy.Router
}

// ping is for [netstack.Stack].
func (e echoes) ping(ctx context.Context, dst netip.Addr, payload []byte) error {
	way, d := e.router.Route(proxy.Flow{Inbound: e.inbound, Dst: proxy.Addr{Network: "icmp", Host: dst.String()}})
	p, ok := d.(interface {
		Ping(context.Context, netip.Addr, []byte) error
	})
	if !ok {
		return fmt.Errorf("config: no echoes by way of %s: %w", way, errors.ErrUnsupported)
	}
	return p.Ping(ctx, dst, payload)
}

// marks returns those of all connections that we may make.
func (b *builder) marks() []uint32 {
	all := []uint32{uint32(b.mark)}
	for i := range b.c.Outbounds {
		if m := uint32(b.c.Outbounds[i].Mark); m != 0 && !slices.Contains(all, m) {
			all = append(all, m)
		}
	}
	return all
}
