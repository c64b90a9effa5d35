//go:build !linux

package sockopt

import (
	"net/netip"
	"syscall"
)

// PacketInfo has each datagram come with the address that it was sent to, for [PacketInfoOf]. A system that cannot
// do it does nothing.
func PacketInfo(_, _ string, _ syscall.RawConn) error { return nil }

// PacketInfoOf returns the zero Addr.
func PacketInfoOf([]byte) netip.Addr { return netip.Addr{} }

// AppendPacketInfo returns b.
func AppendPacketInfo(b []byte, _ netip.Addr, _ bool) []byte { return b }

// ReceiveBuffer does nothing.
func ReceiveBuffer(int) Control { return func(_, _ string, _ syscall.RawConn) error { return nil } }
