//go:build !linux

package inbound

import (
	"net"
	"net/netip"
)

// isOfThisMachine says whether an interface has the address.
func isOfThisMachine(ip netip.Addr) bool {
	addrs, _ := net.InterfaceAddrs()
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.Equal(net.IP(ip.AsSlice())) {
			return true
		}
	}
	return false
}
