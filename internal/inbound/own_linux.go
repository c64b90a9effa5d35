package inbound

import (
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// isOfThisMachine says whether what is sent to ip stays on this machine, or is for many. That is the kernel's to say: there are
// addresses that no interface has.
func isOfThisMachine(ip netip.Addr) bool {
	routes, err := netlink.RouteGet(ip.AsSlice())
	if err != nil || len(routes) == 0 {
		return false // there is no way there
	}
	switch routes[0].Type {
	case unix.RTN_LOCAL, unix.RTN_BROADCAST, unix.RTN_ANYCAST, unix.RTN_MULTICAST:
		return true
	}
	return false
}
