// Package route chooses the way out for each flow by rules.
//
// A [Router] has a list of rules and a way for what none of them matches. The first rule that matches wins. A rule has
// conditions, all of which must hold; a condition with several values holds for any of them; one that is not given
// always holds.
//
// Destinations are taken as the client names them, and names are not resolved. So a network in a rule is about
// clients that ask for an address, and a name about those that ask for a name: [Targets] says more.
//
// A Router does no I/O, with one exception: rules that ask for the client's process have its [Owners] look for
// it, and only when all their other conditions hold.
package route

import (
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

	"github.com/sluice-proxy/sluice/internal/process"
	"github.com/sluice-proxy/sluice/internal/proxy"
)

// Rule sends the flows that it matches one way. The zero value of a condition holds always.
type Rule struct {
	To        *Targets    // the destination's host
	Ports     []Ports     // the destination's port
	Network   string      // "tcp" or "udp"
	Inbounds  []string    // names of inbounds
	Users     []string    // who the client has proved to be
	From      *bart.Lite  // the client's address; clients of Unix sockets have none
	Processes []Processes // the client's program, on this machine

	Name   string       // of the way out, for the log
	Dialer proxy.Dialer // the way out
}

// Owners finds the process of a client: see [process.Table].
type Owners interface {
	// Owner may block for a moment.
	Owner(client, peer netip.AddrPort, network string) (process.Owner, bool)
}

// Router chooses by rules. Its fields are not changed once it is used. Choosing allocates nothing.
type Router struct {
	Rules   []Rule
	Default proxy.Static // for what no rule matches
	Owners  Owners       // nil: no client's process is known
}

var _ proxy.NowRouter = (*Router)(nil)

// Route implements [proxy.Router].
func (r *Router) Route(f proxy.Flow) (name string, d proxy.Dialer) {
	i, _ := r.find(&f, true)
	return r.way(i)
}

// RouteNow implements [proxy.NowRouter].
func (r *Router) RouteNow(f proxy.Flow) (name string, d proxy.Dialer, ok bool) {
	i, ok := r.find(&f, false)
	if !ok {
		return "", nil, false
	}
	name, d = r.way(i)
	return name, d, true
}

// Find returns the index of the rule that f takes, -1 for the default.
func (r *Router) Find(f proxy.Flow) int {
	i, _ := r.find(&f, true)
	return i
}

func (r *Router) way(i int) (string, proxy.Dialer) {
	if i < 0 {
		return r.Default.Route(proxy.Flow{})
	}
	return r.Rules[i].Name, r.Rules[i].Dialer
}

// find returns the first rule that matches, or -1. ok is false where that takes I/O that is not allowed.
func (r *Router) find(f *proxy.Flow, mayBlock bool) (i int, ok bool) {
	var dst host
	dst.set(f.Dst)
	asked, found := false, false
	var owner process.Owner
	for i := range r.Rules {
		rule := &r.Rules[i]
		if !rule.holds(f, &dst) {
			continue
		}
		if len(rule.Processes) == 0 {
			return i, true
		}
		if !asked && r.Owners != nil && f.Client.IsValid() {
			if !mayBlock {
				return -1, false
			}
			asked = true
			owner, found = r.owner(f)
		}
		if found && slices.ContainsFunc(rule.Processes, func(p Processes) bool { return p.Contains(&owner) }) {
			return i, true
		}
	}
	return -1, true
}

func (r *Router) owner(f *proxy.Flow) (process.Owner, bool) {
	network := "tcp"
	if f.Dst.Network == "udp" {
		network = "udp"
	}
	return r.Owners.Owner(f.Client, f.Local, network)
}

// holds says whether the conditions hold that can be known without I/O.
func (r *Rule) holds(f *proxy.Flow, dst *host) bool {
	return (r.Network == "" || r.Network == f.Dst.Network) &&
		(len(r.Ports) == 0 || f.Dst.Port != 0 && containsPort(r.Ports, f.Dst.Port)) &&
		(len(r.Inbounds) == 0 || slices.Contains(r.Inbounds, f.Inbound)) &&
		(len(r.Users) == 0 || f.User != "" && slices.Contains(r.Users, f.User)) &&
		(r.From == nil || f.Client.IsValid() && r.From.Contains(f.Client.Addr().Unmap().WithZone(""))) &&
		(r.To == nil || r.To.contains(dst))
}

// Networks returns a table of networks.
func Networks(list []netip.Prefix) *bart.Lite {
	t := new(bart.Lite)
	for _, p := range list {
		t.Insert(p)
	}
	return t
}
