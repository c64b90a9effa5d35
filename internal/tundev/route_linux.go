package tundev

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/rtnetlink"
)

// rule is a policy rule, comparable and fit for a record. One without a table and a target does nothing but to be a target.
type rule struct {
	V6       bool         `json:",omitempty"`
	Priority int          //
	From     netip.Prefix `json:",omitzero"`
	In       string       `json:",omitempty"` // the interface that packets come from; lo: this machine
	Mark     uint32       `json:",omitempty"`
	Proto    int          `json:",omitempty"` // IP protocol
	Port     uint16       `json:",omitempty"` // destination port
	Goto     int          `json:",omitempty"` // the priority to go on with
	Table    int          `json:",omitempty"`
	NoGlobal bool         `json:",omitempty"` // with Table: its default routes do not count
}

// rules returns the policy rules of s for one IP version, in the order of their priorities. addr is that of the device.
//
// What is in 7102 stays while sessions are being finished: packets of sockets that got the device's address.
func (s *Setup) rules(v6 bool, device string, addr netip.Addr) []rule {
	const (
		marked, back, ours, unbound, bound, udp, tcp, others, rest, end = firstPriority, firstPriority + 1, priorityOurs,
			firstPriority + 3, firstPriority + 4, firstPriority + 5, firstPriority + 6, firstPriority + 7,
			firstPriority + 8, lastPriority
	)
	var all []rule
	add := func(r rule) {
		r.V6 = v6
		all = append(all, r)
	}
	for _, m := range s.Marks {
		add(rule{Priority: marked, Mark: m, Goto: end})
	}
	add(rule{Priority: back, In: device, Goto: end}) // what comes out of the device does not go in again
	add(rule{Priority: ours, From: netip.PrefixFrom(addr, addr.BitLen()), Table: tableAll})

	// A socket without a source address is one whose way is yet to be chosen. In IPv4 it is from 0.0.0.0; in IPv6 it
	// is from nothing, which no rule with a source matches. Strict reverse-path filters ask for the way of an answer
	// like a socket that has its address, so this lets the answers to marked packets in, too.
	first := slices.IndexFunc([]bool{s.DNS, len(s.Include) == 0, true}, func(b bool) bool { return b })
	if v6 {
		for _, half := range []string{"::/1", "8000::/1"} {
			add(rule{Priority: bound, From: netip.MustParsePrefix(half), In: "lo", Goto: end})
		}
	} else {
		add(rule{Priority: unbound, From: netip.MustParsePrefix("0.0.0.0/32"), In: "lo", Goto: []int{udp, others, rest}[first]})
		add(rule{Priority: bound, In: "lo", Goto: end})
	}
	if s.DNS { // also to a name server on the LAN
		add(rule{Priority: udp, Proto: unix.IPPROTO_UDP, Port: 53, Table: tableAll})
		add(rule{Priority: tcp, Proto: unix.IPPROTO_TCP, Port: 53, Table: tableAll})
	}
	if len(s.Include) == 0 {
		add(rule{Priority: others, Table: unix.RT_TABLE_MAIN, NoGlobal: true})
		add(rule{Priority: rest, Table: tableAll})
	} else {
		add(rule{Priority: rest, Table: tableSome})
	}
	add(rule{Priority: end})
	return all
}

// priorityOurs is that of the rule for packets from the device's address.
const priorityOurs = firstPriority + 2

func (r rule) netlink() *netlink.Rule {
	n := netlink.NewRule()
	n.Family, n.Priority, n.Protocol, n.IifName, n.Mark, n.IPProto, n.Table = r.family(), r.Priority, protocol, r.In, r.Mark, r.Proto, r.Table
	if r.From.IsValid() {
		n.Src = ipNet(r.From)
	}
	if r.Port != 0 {
		n.Dport = netlink.NewRulePortRange(r.Port, r.Port)
	}
	if r.NoGlobal {
		n.SuppressPrefixlen = 0
	}
	switch {
	case r.Goto != 0:
		n.Goto = r.Goto
	case r.Table == 0:
		n.Type = actNop
	}
	return n
}

// actNop is FR_ACT_NOP of linux/fib_rules.h.
const actNop = 3

// kind is 0 for a rule that leads somewhere, 1 for an exception, 2 for one that does nothing.
func (r rule) kind() int {
	switch {
	case r.Table != 0:
		return 0
	case r.Goto != 0:
		return 1
	}
	return 2
}

func (r rule) family() int {
	if r.V6 {
		return netlink.FAMILY_V6
	}
	return netlink.FAMILY_V4
}

// ruleOf returns n as a rule, and whether it is one that a Setup made.
func ruleOf(n netlink.Rule) (r rule, ours bool) {
	r = rule{V6: n.Family == netlink.FAMILY_V6, Priority: n.Priority, In: n.IifName, Mark: n.Mark, Proto: n.IPProto,
		Table: n.Table, NoGlobal: n.SuppressPrefixlen == 0}
	if n.Src != nil {
		r.From = prefixOf(n.Src)
	}
	if n.Dport != nil {
		r.Port = n.Dport.Start
	}
	if n.Goto > 0 {
		r.Goto = n.Goto
	}
	return r, n.Protocol == protocol && n.Priority >= firstPriority && n.Priority <= lastPriority
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefixOf(n *net.IPNet) netip.Prefix {
	a, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(a, bits)
}

// routes returns the routes of s for one IP version through the device whose index and address these are. A network that is
// said several times has one route in a table: the kernel takes no second one.
func (s *Setup) routes(v6 bool, index int, addr netip.Addr) []*netlink.Route {
	type place struct {
		table int
		to    netip.Prefix
	}
	var all []*netlink.Route
	taken := make(map[place]bool)
	add := func(table, typ int, p netip.Prefix) {
		if p.Addr().Is6() != v6 || taken[place{table, p}] {
			return
		}
		taken[place{table, p}] = true
		r := &netlink.Route{Table: table, Type: typ, Dst: ipNet(p), Protocol: protocol}
		if typ == unix.RTN_UNICAST {
			r.LinkIndex, r.Src = index, addr.AsSlice()
			if !v6 {
				r.Scope = netlink.SCOPE_LINK
			}
		}
		all = append(all, r)
	}
	tables := []int{tableAll}
	if len(s.Include) > 0 {
		tables = append(tables, tableSome)
	}
	for _, p := range slices.Concat(s.Exclude, notUnicast) {
		if slices.Contains(s.Include, p) {
			continue
		}
		for _, table := range tables { // to go on with the next rule: the tables that were there before
			add(table, unix.RTN_THROW, p)
		}
	}
	for _, p := range s.Include {
		add(tableSome, unix.RTN_UNICAST, p)
	}
	// Unless all of it is excluded.
	add(tableAll, unix.RTN_UNICAST, netip.PrefixFrom(netip.IPv4Unspecified(), 0))
	add(tableAll, unix.RTN_UNICAST, netip.PrefixFrom(netip.IPv6Unspecified(), 0))
	return all
}

// network is what netlink says and does in one namespace.
type network struct{ h *netlink.Handle }

// ourRules returns the rules that a Setup made.
func (n network) ourRules() (all []rule, err error) {
	for _, family := range n.families() {
		list, err := rtnetlink.List(func() ([]netlink.Rule, error) { return n.h.RuleList(family) })
		if err != nil {
			return nil, fmt.Errorf("tundev: list rules: %w", err)
		}
		for _, r := range list {
			if r.Family = family; r.Protocol == protocol {
				if r, ours := ruleOf(r); ours {
					all = append(all, r)
				}
			}
		}
	}
	return all, nil
}

// tableRoutes returns the routes of our tables; those of others are their own, too.
func (n network) tableRoutes() (ours, foreign []netlink.Route, err error) {
	for _, family := range n.families() {
		for _, table := range []int{tableAll, tableSome} {
			list, err := rtnetlink.List(func() ([]netlink.Route, error) {
				return n.h.RouteListFiltered(family, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
			})
			if err != nil {
				return nil, nil, fmt.Errorf("tundev: list routes: %w", err)
			}
			for _, r := range list {
				if r.Family = family; r.Protocol == protocol {
					ours = append(ours, r)
				} else {
					foreign = append(foreign, r)
				}
			}
		}
	}
	return ours, foreign, nil
}

// families returns the IP versions that the kernel has.
func (n network) families() []int {
	if !hasIPv6() {
		return []int{netlink.FAMILY_V4}
	}
	return []int{netlink.FAMILY_V4, netlink.FAMILY_V6}
}

// removeRules removes those of our rules that which wants gone, and returns how many there were. It goes on after an error.
func (n network) removeRules(which func(rule) bool) (removed int, err error) {
	rules, err := n.ourRules()
	errs := []error{err}
	// First those that lead somewhere, then the exceptions from them, and what the exceptions lead to in the end.
	slices.SortStableFunc(rules, func(a, b rule) int { return a.kind() - b.kind() })
	for _, r := range rules {
		if !which(r) {
			continue
		}
		switch err := n.h.RuleDel(r.netlink()); {
		case err == nil:
			removed++
		case !errors.Is(err, unix.ENOENT):
			errs = append(errs, fmt.Errorf("tundev: remove rule %d: %w", r.Priority, err))
		}
	}
	return removed, errors.Join(errs...)
}

// removeRoutes removes what we have in our tables.
func (n network) removeRoutes() (removed int, err error) {
	ours, _, err := n.tableRoutes()
	errs := []error{err}
	for _, r := range ours {
		switch err := n.h.RouteDel(&r); {
		case err == nil:
			removed++
		case !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENODEV):
			errs = append(errs, fmt.Errorf("tundev: remove route %v of table %d: %w", r.Dst, r.Table, err))
		}
	}
	return removed, errors.Join(errs...)
}
