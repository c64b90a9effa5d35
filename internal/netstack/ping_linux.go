package netstack

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Pinger asks hosts for answers to ICMP echoes, from this machine and without privileges (net.ipv4.ping_group_range
// says who may). Its Ping is one for a [Stack] whose way out is direct.
type Pinger struct {
	// Control is called with each socket before it sends, as [net.Dialer]'s, to mark it. Nil: none.
	Control func(network, address string, c syscall.RawConn) error
}

// The types of messages.
const (
	echoRequest4, echoReply4 = 8, 0
	echoRequest6, echoReply6 = 128, 129
	echoHead                 = 8
)

// Ping sends one echo request to dst and waits for the answer with the same payload, until ctx ends. An ICMP message that
// dst is unreachable is an error.
func (p *Pinger) Ping(ctx context.Context, dst netip.Addr, payload []byte) error {
	c, err := p.open(dst)
	if err != nil {
		return fmt.Errorf("netstack: ping %v: %w", dst, err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	request, reply := byte(echoRequest4), byte(echoReply4)
	if dst.Is6() {
		request, reply = echoRequest6, echoReply6
	}
	message := append([]byte{request, 0, 0, 0, 0, 0, 0, 1}, payload...) // the kernel sets the sum and the identifier
	if _, err := c.Write(message); err != nil {
		return fmt.Errorf("netstack: ping %v: %w", dst, err)
	}
	answer := make([]byte, len(message)+1)
	for {
		n, err := c.Read(answer)
		if err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return fmt.Errorf("netstack: ping %v: %w", dst, err)
		}
		if n == len(message) && answer[0] == reply && binary.BigEndian.Uint16(answer[6:]) == 1 && bytes.Equal(answer[echoHead:n], payload) {
			return nil
		}
	}
}

// open returns a socket for the echoes of one host.
func (p *Pinger) open(dst netip.Addr) (net.Conn, error) {
	family, proto, network := unix.AF_INET6, unix.IPPROTO_ICMPV6, "udp6"
	var to unix.Sockaddr = &unix.SockaddrInet6{Addr: dst.As16()}
	if dst.Is4() {
		family, proto, network = unix.AF_INET, unix.IPPROTO_ICMP, "udp4"
		to = &unix.SockaddrInet4{Addr: dst.As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), "ping")
	defer f.Close()
	if p.Control != nil {
		raw, err := f.SyscallConn()
		if err != nil {
			return nil, err
		}
		if err := p.Control(network, dst.String(), raw); err != nil {
			return nil, err
		}
	}
	if err := unix.Connect(fd, to); err != nil {
		return nil, os.NewSyscallError("connect", err)
	}
	return net.FileConn(f)
}
