//go:build !linux

package relay

import (
	"net"
	"net/netip"
)

// Segmenter sends datagrams of one size to one place by one call, on Linux.
type Segmenter struct{}

// WriteSegments returns false: none of them was sent, and each is to be sent by itself.
func (*Segmenter) WriteSegments(*net.UDPConn, []Packet, netip.AddrPort, []byte) bool { return false }
