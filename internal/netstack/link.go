package netstack

import (
	"errors"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/sluice-proxy/sluice/internal/tundev"
)

// device is what a link needs of a [tundev.Device].
type device interface {
	ReadPacket(h *tundev.Header, bufs [][]byte) (int, error)
	WritePacket(h tundev.Header, bufs [][]byte) error
	MTU() int
	Close() error
}

// link is the stack's network interface: the device.
type link struct {
	dev        device
	mtu        atomic.Uint32
	dispatcher stack.NetworkDispatcher // set before the first packet
	slices     sync.Pool
	chunks     chunks
	answers    answers
	valid      atomic.Bool // the sums of the packet that is being delivered are known to be right
	// syn is shown each SYN, before the stack; may be nil.
	syn func(tcpip.NetworkProtocolNumber, stack.TransportEndpointID)
	// udp takes each datagram that comes in one small packet, and keeps nothing of data; may be nil.
	udp func(client, dst netip.AddrPort, data []byte)
}

var (
	_ stack.LinkEndpoint = (*link)(nil)
	_ stack.GSOEndpoint  = (*link)(nil)
)

func newLink(dev device) *link {
	l := &link{dev: dev}
	l.mtu.Store(uint32(dev.MTU()))
	l.answers.init(l)
	l.chunks.init()
	l.slices.New = func() any { return new([][]byte) }
	return l
}

// headSize is that of the first part of the memory that a packet is read into. It holds all headers, and a small packet; what is
// behind it goes to a chunk.
const headSize = 2 << 10

// copyMax is how much of a packet is copied to memory of its size, so that it does not hold more than twice that.
const copyMax = 32 << 10

// read passes packets to the stack until the device fails.
func (l *link) read() error {
	var (
		views [2]*buffer.View
		bufs  [len(views)][]byte
		h     tundev.Header
	)
	for i := range views {
		views[i] = l.memory(i)
	}
	defer l.chunks.free()
	defer func() {
		for _, v := range views {
			v.Release()
		}
	}()
	for {
		for i, v := range views {
			bufs[i] = v.AsSlice()
		}
		n, err := l.dev.ReadPacket(&h, bufs[:])
		if err != nil {
			return err
		}
		if n <= len(bufs[0]) && l.udp != nil && l.datagram(&h, bufs[0][:n]) {
			continue
		}
		var payload buffer.Buffer
		for i := range views {
			if n <= 0 {
				break
			}
			v := views[i]
			if i > 0 && n <= copyMax {
				payload.Append(buffer.NewViewWithData(bufs[i][:n]))
				break
			}
			v.CapLength(n)
			n -= v.Size()
			payload.Append(v)
			views[i] = l.memory(i)
		}
		l.deliver(&h, payload)
	}
}

// memory returns that for part i of a packet.
func (l *link) memory(i int) *buffer.View {
	if i == 0 {
		return buffer.NewViewSize(headSize)
	}
	return l.chunks.get()
}

// deliver passes a packet to the stack. It owns payload.
func (l *link) deliver(h *tundev.Header, payload buffer.Buffer) {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: payload})
	defer pkt.DecRef()
	var version byte
	if head, ok := pkt.Data().PullUp(1); ok {
		version = head[0] >> 4
	}
	if valid := h.NeedsCsum || h.CsumValid; valid != l.valid.Load() {
		l.valid.Store(valid)
	}
	if h.GSO == tundev.GSOUDP {
		pkt.GSOOptions.MSS = h.SegSize // for the datagrams' handler
	}
	switch version {
	case header.IPv4Version:
		l.lookForSYN(pkt, header.IPv4MinimumSize)
		l.dispatcher.DeliverNetworkPacket(header.IPv4ProtocolNumber, pkt)
	case header.IPv6Version:
		l.lookForSYN(pkt, header.IPv6MinimumSize)
		l.dispatcher.DeliverNetworkPacket(header.IPv6ProtocolNumber, pkt)
	}
}

// datagram takes a packet past the stack if it is a plain datagram; all others, also those that are wrong, are the stack's.
func (l *link) datagram(h *tundev.Header, b []byte) bool {
	var u header.UDP
	var src, dst tcpip.Address
	switch {
	case len(b) == 0 || h.GSO != tundev.GSONone:
		return false
	case b[0] == header.IPv4Version<<4|header.IPv4MinimumSize/4:
		ip := header.IPv4(b)
		if !ip.IsValid(len(b)) || ip.Protocol() != uint8(header.UDPProtocolNumber) || ip.More() || ip.FragmentOffset() != 0 ||
			!ip.IsChecksumValid() {
			return false
		}
		u, src, dst = header.UDP(ip.Payload()), ip.SourceAddress(), ip.DestinationAddress()
	case b[0]>>4 == header.IPv6Version:
		ip := header.IPv6(b)
		if !ip.IsValid(len(b)) || ip.NextHeader() != uint8(header.UDPProtocolNumber) {
			return false
		}
		u, src, dst = header.UDP(ip.Payload()), ip.SourceAddress(), ip.DestinationAddress()
	}
	if len(u) < header.UDPMinimumSize || int(u.Length()) != len(u) {
		return false
	}
	if !h.NeedsCsum && !h.CsumValid {
		isV4 := src.Len() == header.IPv4AddressSize
		if sum := u.Checksum(); sum == 0 && !isV4 || sum != 0 && !u.IsChecksumValid(src, dst, checksum.Checksum(u.Payload(), 0)) {
			return false
		}
	}
	client, place := addrPort(src, u.SourcePort()), addrPort(dst, u.DestinationPort())
	if !isWay(client, place) {
		return false
	}
	l.udp(client, place, u.Payload())
	return true
}

// lookForSYN shows the SYNs of packets without options or extensions, whose IP header has a size.
func (l *link) lookForSYN(pkt *stack.PacketBuffer, size int) {
	b, ok := pkt.Data().PullUp(size + header.TCPMinimumSize)
	if !ok || l.syn == nil {
		return
	}
	t := header.TCP(b[size:])
	if t.Flags()&(header.TCPFlagSyn|header.TCPFlagAck) != header.TCPFlagSyn {
		return
	}
	id := stack.TransportEndpointID{LocalPort: t.DestinationPort(), RemotePort: t.SourcePort()}
	if size == header.IPv4MinimumSize {
		h := header.IPv4(b)
		if h.Protocol() == uint8(header.TCPProtocolNumber) && int(h.HeaderLength()) == size && h.FragmentOffset() == 0 {
			id.LocalAddress, id.RemoteAddress = h.DestinationAddress(), h.SourceAddress()
			l.syn(header.IPv4ProtocolNumber, id)
		}
	} else if h := header.IPv6(b); h.NextHeader() == uint8(header.TCPProtocolNumber) {
		id.LocalAddress, id.RemoteAddress = h.DestinationAddress(), h.SourceAddress()
		l.syn(header.IPv6ProtocolNumber, id)
	}
}

// WritePackets implements stack.LinkWriter.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	for i, pkt := range pkts.AsSlice() {
		if l.answers.take(pkt) {
			continue
		}
		if err := l.write(pkt); err != nil {
			return i, err
		}
	}
	return pkts.Len(), nil
}

func (l *link) write(pkt *stack.PacketBuffer) tcpip.Error {
	var h tundev.Header
	if gso := &pkt.GSOOptions; gso.Type != stack.GSONone {
		if gso.NeedsCsum {
			h.NeedsCsum, h.CsumStart, h.CsumOffset = true, uint16(len(pkt.NetworkHeader().Slice())), gso.CsumOffset
		}
		if pkt.Data().Size() > int(gso.MSS) {
			h.GSO, h.HdrLen, h.SegSize = tundev.GSOTCP4, uint16(pkt.HeaderSize()), gso.MSS
			if gso.Type == stack.GSOTCPv6 {
				h.GSO = tundev.GSOTCP6
			}
		}
	}
	bufs := l.slices.Get().(*[][]byte)
	views, skip := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		*bufs = append(*bufs, b[skip:])
		skip = 0
	}
	err := l.dev.WritePacket(h, *bufs)
	clear(*bufs)
	*bufs = (*bufs)[:0]
	l.slices.Put(bufs)
	if err != nil {
		return &tcpip.ErrAborted{}
	}
	return nil
}

// isClosing says whether err is that of a device that the stack has closed itself.
func (r *running) isClosing(err error) bool { return errors.Is(err, os.ErrClosed) }

// GSOMaxSize implements stack.GSOEndpoint.
func (l *link) GSOMaxSize() uint32 { return tundev.PacketMax }

// SupportedGSO implements stack.GSOEndpoint.
func (l *link) SupportedGSO() stack.SupportedGSO { return stack.HostGSOSupported }

// MTU implements stack.LinkEndpoint.
func (l *link) MTU() uint32 { return l.mtu.Load() }

// SetMTU implements stack.LinkEndpoint.
func (l *link) SetMTU(mtu uint32) { l.mtu.Store(mtu) }

// MaxHeaderLength implements stack.LinkEndpoint.
func (l *link) MaxHeaderLength() uint16 { return 0 }

// LinkAddress implements stack.LinkEndpoint.
func (l *link) LinkAddress() tcpip.LinkAddress { return "" }

// SetLinkAddress implements stack.LinkEndpoint.
func (l *link) SetLinkAddress(tcpip.LinkAddress) {}

// Capabilities implements stack.LinkEndpoint. The stack asks for them at each packet.
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	if l.valid.Load() {
		return stack.CapabilityRXChecksumOffload
	}
	return 0
}

// Attach implements stack.LinkEndpoint.
func (l *link) Attach(d stack.NetworkDispatcher) { l.dispatcher = d }

// IsAttached implements stack.LinkEndpoint.
func (l *link) IsAttached() bool { return l.dispatcher != nil }

// Wait implements stack.LinkEndpoint.
func (l *link) Wait() {}

// ARPHardwareType implements stack.LinkEndpoint.
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }

// AddHeader implements stack.LinkEndpoint.
func (l *link) AddHeader(*stack.PacketBuffer) {}

// ParseHeader implements stack.LinkEndpoint.
func (l *link) ParseHeader(*stack.PacketBuffer) bool { return true }

// Close implements stack.LinkEndpoint.
func (l *link) Close() {}

// SetOnCloseAction implements stack.LinkEndpoint.
func (l *link) SetOnCloseAction(func()) {}
