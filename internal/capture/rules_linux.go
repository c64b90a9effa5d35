package capture

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// builder makes the rules of a Capture. They are sent to the kernel by Flush.
type builder struct {
	*Capture
	v4, v6 netip.AddrPort // where packets go; invalid: they are left alone
	mark   uint32         // of what is captured by TPROXY

	sets map[string]*nftables.Set
	err  error
}

func (b *builder) build() {
	b.addSets()
	local := slices.ContainsFunc(b.from(), Source.Local)
	remote := slices.ContainsFunc(b.from(), func(s Source) bool { return !s.Local() })
	b.choose = b.conn.AddChain(&nftables.Chain{Name: "choose", Table: b.table})
	if !b.TProxy {
		// The rule has a chain of its own, which stays when that which leads there is emptied: without it, the kernel would
		// no longer follow connections, and what was redirected would be lost.
		turn := b.conn.AddChain(&nftables.Chain{Name: "turn", Table: b.table})
		b.rule(turn, protocol(unix.IPPROTO_TCP), b.redirect())
		b.addChoose(jump(turn)...)
		if local {
			output := b.base("output", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest)
			b.exempt(output)
			b.begins(output, nil)
		}
		if remote {
			b.addFrom(b.base("prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest))
		}
		return
	}

	// With TPROXY each packet is looked at, and a connection is known by its mark in the kernel's table of connections. A
	// connection that began before is not marked, and goes on as it did.
	b.addChoose(setConnMark(b.mark)...)
	divert := b.conn.AddChain(&nftables.Chain{Name: "divert", Table: b.table})
	b.rule(divert, nfproto(unix.NFPROTO_IPV4), b.tproxy(unix.NFPROTO_IPV4, b.v4))
	b.rule(divert, nfproto(unix.NFPROTO_IPV6), b.tproxy(unix.NFPROTO_IPV6, b.v6))
	known := join(direction(original), marked(b.mark))
	if local { // a mark sends the packet to lo, by the policy; from there it comes in again
		output := b.base("output", nftables.ChainTypeRoute, nftables.ChainHookOutput, nftables.ChainPriorityMangle)
		b.exempt(output)
		b.begins(output, nil)
		b.rule(output, known, setMark(b.mark))
	}
	prerouting := b.base("prerouting", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityMangle)
	if remote {
		b.addFrom(prerouting)
	}
	b.rule(prerouting, known, jump(divert))
}

// base adds a chain that the kernel calls.
func (b *builder) base(name string, typ nftables.ChainType, hook *nftables.ChainHook, at *nftables.ChainPriority) *nftables.Chain {
	return b.conn.AddChain(&nftables.Chain{Name: name, Table: b.table, Type: typ, Hooknum: hook, Priority: at})
}

func (b *builder) rule(c *nftables.Chain, parts ...[]expr.Any) {
	b.conn.AddRule(&nftables.Rule{Table: b.table, Chain: c, Exprs: join(parts...)})
}

// exempt leaves alone what the proxy itself sends.
func (b *builder) exempt(c *nftables.Chain) {
	b.rule(c, masked(markMask, Mark), verdict(expr.VerdictReturn))
	for _, m := range b.Marks {
		b.rule(c, masked(^uint32(0), m), verdict(expr.VerdictReturn))
	}
}

// addFrom has the packets of all remote sources looked at.
func (b *builder) addFrom(c *nftables.Chain) {
	for _, s := range b.from() {
		switch {
		case s.Interface != "":
			b.begins(c, incoming(s.Interface))
		case s.Network.IsValid():
			b.begins(c, within(s.Network, true))
		}
	}
}

// begins has the first packets of connections looked at. A NAT chain sees no others but, of connections that are older than the
// kernel's table of connections, one from their midst.
func (b *builder) begins(c *nftables.Chain, match []expr.Any) {
	b.rule(c, match, protocol(unix.IPPROTO_TCP), syn(), jump(b.choose))
	switch {
	case !b.TProxy:
	case b.UDP:
		b.rule(c, match, protocol(unix.IPPROTO_UDP), begun(), jump(b.choose))
	default:
		if b.DNS {
			b.rule(c, match, protocol(unix.IPPROTO_UDP), toPort(53), begun(), jump(b.choose))
		}
		for _, p := range b.Fake {
			b.rule(c, match, protocol(unix.IPPROTO_UDP), within(p, false), begun(), jump(b.choose))
		}
	}
}

// The types of addresses that are not captured, of rtnetlink(7).
var exemptTypes = []byte{unix.RTN_LOCAL, unix.RTN_BROADCAST, unix.RTN_ANYCAST, unix.RTN_MULTICAST}

// linkLocal are addresses that mean something else, or nothing, to a machine on another link.
var linkLocal = []netip.Prefix{netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fe80::/10")}

// addChoose fills the chain that decides, by its destination, whether a connection is captured; last does it.
func (b *builder) addChoose(last ...expr.Any) {
	leave := verdict(expr.VerdictReturn)
	for _, typ := range exemptTypes {
		b.rule(b.choose, addressType(typ), leave)
	}
	for _, p := range linkLocal {
		b.rule(b.choose, within(p, false), leave)
	}
	for _, f := range []struct {
		proto  byte
		to     netip.AddrPort
		suffix string
	}{{unix.NFPROTO_IPV4, b.v4, "4"}, {unix.NFPROTO_IPV6, b.v6, "6"}} {
		include, exclude := b.sets["include"+f.suffix], b.sets["exclude"+f.suffix]
		if !f.to.IsValid() {
			b.rule(b.choose, nfproto(f.proto), leave)
			continue
		}
		if exclude != nil {
			b.rule(b.choose, nfproto(f.proto), inSet(exclude, false), leave)
		}
		if b.DNS && len(b.Include) > 0 {
			b.rule(b.choose, nfproto(f.proto), toPort(53), last, leave)
		}
		switch {
		case include != nil:
			b.rule(b.choose, nfproto(f.proto), inSet(include, true), leave)
		case len(b.Include) > 0:
			b.rule(b.choose, nfproto(f.proto), leave)
		}
	}
	b.rule(b.choose, last)
}

// included returns the destinations that are captured; empty: all.
func (b *builder) included() []netip.Prefix {
	if len(b.Include) == 0 {
		return nil
	}
	return slices.Concat(b.Include, b.Fake)
}

// addSets adds the sets of networks that are not empty.
func (b *builder) addSets() {
	b.sets = make(map[string]*nftables.Set)
	for _, s := range []struct {
		name     string
		prefixes []netip.Prefix
		v6       bool
		key      nftables.SetDatatype
	}{
		{"include4", b.included(), false, nftables.TypeIPAddr}, {"include6", b.included(), true, nftables.TypeIP6Addr},
		{"exclude4", b.Exclude, false, nftables.TypeIPAddr}, {"exclude6", b.Exclude, true, nftables.TypeIP6Addr},
	} {
		all := spans(s.prefixes, s.v6)
		if len(all) == 0 {
			continue
		}
		set := &nftables.Set{Table: b.table, Name: s.name, KeyType: s.key, Interval: true}
		b.failed(b.conn.AddSet(set, nil))
		for part := range slices.Chunk(elements(all), 1000) { // a message holds 64 KiB
			b.failed(b.conn.SetAddElements(set, part))
		}
		b.sets[s.name] = set
	}
}

func (b *builder) failed(err error) {
	if b.err == nil {
		b.err = err
	}
}

func elements(all []span) (list []nftables.SetElement) {
	for _, s := range all {
		list = append(list, nftables.SetElement{Key: s.first.AsSlice()})
		if s.end.IsValid() {
			list = append(list, nftables.SetElement{Key: s.end.AsSlice(), IntervalEnd: true})
		}
	}
	return list
}

// redirect turns a connection to our port.
func (b *builder) redirect() []expr.Any {
	port := max(b.v4.Port(), b.v6.Port())
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
		&expr.Redir{RegisterProtoMin: 1},
	}
}

// tproxy hands a packet to the socket of its connection, or to our listener. The mark has it routed in.
func (b *builder) tproxy(family byte, to netip.AddrPort) []expr.Any {
	if !to.IsValid() {
		return verdict(expr.VerdictReturn)
	}
	return join([]expr.Any{
		&expr.Immediate{Register: 1, Data: to.Addr().AsSlice()},
		&expr.Immediate{Register: 2, Data: binary.BigEndian.AppendUint16(nil, to.Port())},
		&expr.TProxy{Family: family, RegAddr: 1, RegPort: 2},
	}, setMark(b.mark), verdict(expr.VerdictAccept))
}
