package capture

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"slices"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/rtnetlink"
)

// policy is the routing that takes packets with a mark in, whatever they are for: a rule for the mark, and a routing table in
// which all addresses are this machine's.
type policy struct {
	number uint32 // the mark, and the number of the routing table
}

const (
	rulePriority  = 0x736c // behind that of the local table, before those of the others
	routeProtocol = 0x73   // who has made it, in rtnetlink(7)'s words: nobody else has this number
)

var families = []int{unix.AF_INET, unix.AF_INET6}

// install takes the place of what is left from a process with that number.
func (p *policy) install(v4, v6 bool) error {
	if err := p.remove(); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("interface lo: %w", err)
	}
	for _, family := range families {
		if family == unix.AF_INET && !v4 || family == unix.AF_INET6 && !v6 {
			continue
		}
		err := netlink.RouteAdd(p.route(family, lo.Attrs().Index))
		if family == unix.AF_INET6 && (lacks(err) || errors.Is(err, syscall.EACCES)) {
			continue // IPv6 is switched off
		}
		if err != nil {
			return fmt.Errorf("route to lo: %w", err)
		}
		if err := netlink.RuleAdd(p.rule(family)); err != nil {
			return fmt.Errorf("routing rule: %w", err)
		}
	}
	return nil
}

// lacks says that the kernel knows nothing of a family, which is what err was about.
func lacks(err error) bool {
	return errors.Is(err, syscall.EAFNOSUPPORT) || errors.Is(err, syscall.EOPNOTSUPP)
}

func (p *policy) route(family, link int) *netlink.Route {
	zero := make(net.IP, net.IPv4len)
	if family == unix.AF_INET6 {
		zero = make(net.IP, net.IPv6len)
	}
	return &netlink.Route{
		Table: int(p.number), Family: family, LinkIndex: link, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST,
		Protocol: routeProtocol, Dst: &net.IPNet{IP: zero, Mask: net.CIDRMask(0, 8*len(zero))},
	}
}

func (p *policy) rule(family int) *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Priority, r.Mark, r.Table, r.Protocol = family, rulePriority, p.number, int(p.number), routeProtocol
	return r
}

// remove removes the rules and routes that are there.
func (p *policy) remove() error {
	for _, family := range families {
		for {
			err := netlink.RuleDel(p.rule(family))
			if errors.Is(err, syscall.ENOENT) || lacks(err) {
				break
			}
			if err != nil {
				return fmt.Errorf("remove routing rule: %w", err)
			}
		}
		routes, err := rtnetlink.List(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(family, &netlink.Route{Table: int(p.number)}, netlink.RT_FILTER_TABLE)
		})
		if err != nil && !lacks(err) {
			return fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			if r.Protocol != routeProtocol {
				continue
			}
			if err := netlink.RouteDel(p.route(family, r.LinkIndex)); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("remove route: %w", err)
			}
		}
	}
	return nil
}

// policies returns those that are there, also in part.
func policies() (all []policy, err error) {
	add := func(table, protocol int) {
		if uint32(table)&markMask == Mark && protocol == routeProtocol {
			all = append(all, policy{uint32(table)})
		}
	}
	for _, family := range families {
		rules, err := rtnetlink.List(func() ([]netlink.Rule, error) { return netlink.RuleList(family) })
		if err != nil && !lacks(err) {
			return nil, fmt.Errorf("list routing rules: %w", err)
		}
		for _, r := range rules {
			add(r.Table, int(r.Protocol))
		}
		routes, err := rtnetlink.List(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(family, &netlink.Route{Protocol: routeProtocol, Table: unix.RT_TABLE_UNSPEC},
				netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		})
		if err != nil && !lacks(err) {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			add(r.Table, int(r.Protocol))
		}
	}
	slices.SortFunc(all, func(a, b policy) int { return cmp.Compare(a.number, b.number) })
	return slices.Compact(all), nil
}
