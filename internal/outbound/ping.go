package outbound

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"
)

// ICMP types, RFC 792 and RFC 4443.
const (
	echoReply4, echoRequest4 = 0, 8
	echoRequest6, echoReply6 = 128, 129
)

// Ping sends an ICMP echo request with this payload to dst, and returns nil once the answer is there. It needs
// CAP_NET_RAW. It does not repeat the request: who asks does.
func (d *Direct) Ping(ctx context.Context, dst netip.Addr, payload []byte) error {
	network, request, reply := "ip4:icmp", byte(echoRequest4), byte(echoReply4)
	if dst.Is6() {
		network, request, reply = "ip6:ipv6-icmp", echoRequest6, echoReply6
	}
	dialer := net.Dialer{Control: d.control()}
	if d.BindAddr.IsValid() {
		dialer.LocalAddr = &net.IPAddr{IP: d.BindAddr.AsSlice(), Zone: d.BindAddr.Zone()}
	}
	conn, err := dialer.DialContext(ctx, network, dst.String())
	if err != nil {
		return fmt.Errorf("outbound: ping: %w", d.explain(err))
	}
	defer conn.Close()
	c, ok := conn.(*net.IPConn)
	if !ok {
		return fmt.Errorf("outbound: ping: %w", errors.ErrUnsupported)
	}
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()

	id := rand.Uint32() // identifier and sequence number
	message := append([]byte{request, 0, 0, 0}, binary.BigEndian.AppendUint32(nil, id)...)
	message = append(message, payload...)
	if request == echoRequest4 { // the kernel sums those of IPv6
		binary.BigEndian.PutUint16(message[2:], ^sum(message))
	}
	if _, err := c.Write(message); err != nil {
		return fmt.Errorf("outbound: ping: %w", err)
	}
	message[0] = reply
	b := make([]byte, 1<<16)
	for {
		n, _, err := c.ReadFromIP(b) // without the header of IPv4
		if err != nil {
			return fmt.Errorf("outbound: ping: %w", errors.Join(ctx.Err(), err))
		}
		if n >= 8 && b[0] == reply && b[1] == 0 && bytes.Equal(b[4:n], message[4:]) {
			return nil
		}
	}
}

// sum adds up 16-bit words in one's complement, RFC 1071.
func sum(b []byte) uint16 {
	var s uint32
	for ; len(b) > 1; b = b[2:] {
		s += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) > 0 {
		s += uint32(b[0]) << 8
	}
	s = s>>16 + s&0xffff
	return uint16(s>>16 + s)
}
