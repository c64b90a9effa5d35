//go:build !linux

package inbound

import "net/netip"

// refuseDatagram tells a client nothing: elsewhere than on Linux there is no ICMP.
func refuseDatagram(_, _ netip.AddrPort, _ error) {}
