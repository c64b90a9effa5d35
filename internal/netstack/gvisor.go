package netstack

import (
	"fmt"
	"net/netip"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/log"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// nicID is that of the only interface.
const nicID = 1

// The settings of TCP.
const (
	bufferMin     = 4 << 10
	bufferDefault = 256 << 10
	bufferMax     = 4 << 20

	timeWait   = 5 * time.Second
	finWait2   = 30 * time.Second // of a stream that we have closed
	synRetries = 4                // a SYN-ACK that nobody acknowledges is given up after 1+2+4+8+16 s

	keepAlive      = 15 * time.Second // as Go's net has it
	keepAliveCount = 9
)

// newStack makes the TCP/IP: it has every address, and no route but the device.
func (r *running) newStack() error {
	log.SetLevel(log.Warning) // else gVisor writes to stderr of packets that are strange
	s := stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{
			tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6,
		},
	})
	r.stack = s
	s.SetTransportProtocolHandler(tcp.ProtocolNumber, r.tcp.handle)
	s.SetTransportProtocolHandler(udp.ProtocolNumber, r.udp.handle)
	s.SetTransportProtocolHandler(icmp.ProtocolNumber4, r.echo.handle)
	s.SetTransportProtocolHandler(icmp.ProtocolNumber6, r.echo.handle)
	r.tcp.newForwarder()
	r.link.syn, r.link.udp = r.tcp.reopens, r.udp.take

	var err tcpip.Error
	set := func(o tcpip.SettableTransportProtocolOption) {
		if err == nil {
			err = s.SetTransportProtocolOption(tcp.ProtocolNumber, o)
		}
	}
	sack, moderate := tcpip.TCPSACKEnabled(true), tcpip.TCPModerateReceiveBufferOption(true)
	control, retries := tcpip.CongestionControlOption("reno"), tcpip.TCPSynRetriesOption(synRetries)
	wait, linger := tcpip.TCPTimeWaitTimeoutOption(timeWait), tcpip.TCPLingerTimeoutOption(finWait2)
	// Reno: all the device loses is lost by a client's own network, where the way back is short, and there CUBIC grows no faster. What CUBIC
	// does sooner is to leave slow start, at the first delay (HyStart): here a delay is but a processor's turn, and a small window makes
	// small packets.
	// Without RACK: its probes of the tail are sent before acknowledgements that wait in the device's queue are read, and each that
	// was needless halves the window. SACK finds what is lost.
	recovery := tcpip.TCPRecovery(0)
	set(&recovery)
	set(&sack)
	set(&moderate)
	set(&control)
	set(&wait)
	set(&linger)
	set(&retries)
	set(&tcpip.TCPReceiveBufferSizeRangeOption{Min: bufferMin, Default: bufferDefault, Max: bufferMax})
	set(&tcpip.TCPSendBufferSizeRangeOption{Min: bufferMin, Default: bufferDefault, Max: bufferMax})
	if err == nil {
		err = s.CreateNIC(nicID, r.link)
	}
	if err == nil {
		err = s.SetPromiscuousMode(nicID, true)
	}
	if err == nil {
		err = s.SetSpoofing(nicID, true)
	}
	if err != nil {
		s.Destroy()
		return fmt.Errorf("netstack: %v", err)
	}
	s.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nicID},
		{Destination: header.IPv6EmptySubnet, NIC: nicID},
	})
	return nil
}

// unfinished says whether there are streams whose peer does not have all of it yet.
func (r *running) unfinished() bool {
	for _, e := range r.stack.RegisteredEndpoints() {
		ep, ok := e.(*tcp.Endpoint)
		if !ok {
			continue
		}
		switch ep.EndpointState() {
		case tcp.StateEstablished, tcp.StateCloseWait, tcp.StateFinWait1, tcp.StateLastAck, tcp.StateClosing:
			return true
		}
	}
	return false
}

// addrPort returns an address and port of gVisor's as Go's.
func addrPort(a tcpip.Address, port uint16) netip.AddrPort {
	ip, _ := netip.AddrFromSlice(a.AsSlice())
	return netip.AddrPortFrom(ip, port)
}

// errnoOf returns the errno that a socket of the kernel's would have returned.
func errnoOf(err tcpip.Error) syscall.Errno {
	switch err.(type) {
	case *tcpip.ErrConnectionReset, *tcpip.ErrAborted, *tcpip.ErrConnectionAborted:
		return syscall.ECONNRESET
	case *tcpip.ErrTimeout:
		return syscall.ETIMEDOUT
	case *tcpip.ErrClosedForSend:
		return syscall.EPIPE
	case *tcpip.ErrConnectionRefused:
		return syscall.ECONNREFUSED
	case *tcpip.ErrHostUnreachable, *tcpip.ErrHostDown:
		return syscall.EHOSTUNREACH
	case *tcpip.ErrNetworkUnreachable:
		return syscall.ENETUNREACH
	case *tcpip.ErrNotConnected:
		return syscall.ENOTCONN
	case *tcpip.ErrNoBufferSpace:
		return syscall.ENOBUFS
	}
	return syscall.EIO
}
