package netstack

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/netip"
	"runtime"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/tundev"
)

// Packets as no kernel sends them, or hardly any: they are put into the stack by hand.

// rig is a Stack on a wire.
type rig struct {
	t *testing.T
	*wire
	stack  *Stack
	served chan error
}

func newRig(t *testing.T, h proxy.Handler, set func(*Stack)) *rig {
	t.Helper()
	g := &rig{t: t, wire: newWire(), stack: new(Stack), served: make(chan error, 1)}
	if set != nil {
		set(g.stack)
	}
	if err := g.stack.listenOn(g.wire); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() { g.served <- g.stack.Serve(ctx, h) }()
	t.Cleanup(func() {
		cancel()
		within(t, "the end of Serve", g.served)
	})
	proxytest.Until(t, "Serve", func() bool { return serving(g.stack) })
	return g
}

// inject has the stack take a packet.
func (g *rig) inject(b []byte) {
	var h tundev.Header
	if !g.stack.r.link.datagram(&h, b) {
		g.stack.r.link.deliver(&h, buffer.MakeWithData(b))
	}
}

// next returns the next packet that the stack sends.
func (g *rig) next() []byte {
	g.t.Helper()
	return within(g.t, "a packet", g.out)
}

// nextTCP returns the next segment that the stack sends.
func (g *rig) nextTCP() header.TCP {
	g.t.Helper()
	for {
		b := g.next()
		if b[0]>>4 == 4 && header.IPv4(b).Protocol() == uint8(header.TCPProtocolNumber) {
			return header.TCP(header.IPv4(b).Payload())
		}
	}
}

// quiet complains of any packet that the stack sends before it answers one that it should answer.
func (g *rig) quiet(what string) {
	g.t.Helper()
	g.inject(packet4(ap("10.77.0.99", 0).Addr(), ap(host4, 0).Addr(), 253, []byte("unknown"))) // is answered
	for {
		b := g.next()
		ip := header.IPv4(b)
		if b[0]>>4 == 4 && ip.Protocol() == 1 && ip.DestinationAddress() == tcpip.AddrFrom4([4]byte{10, 77, 0, 99}) {
			return
		}
		g.t.Errorf("%s: the stack answers by %x", what, b)
	}
}

// open opens a stream by hand and returns the number that the client's next ACK is to have.
func (g *rig) open(iss uint32, flags header.TCPFlags) (ack uint32, answer header.TCP) {
	g.t.Helper()
	g.inject(segment(iss, 0, header.TCPFlagSyn|flags, nil))
	h := g.nextTCP()
	if h.Flags()&(header.TCPFlagSyn|header.TCPFlagAck) != header.TCPFlagSyn|header.TCPFlagAck {
		g.t.Fatalf("a SYN is answered by %v", h.Flags())
	}
	ack = h.SequenceNumber() + 1
	g.inject(segment(iss+1, ack, header.TCPFlagAck, nil))
	return ack, h
}

// packet4 makes a whole packet of IPv4.
func packet4(src, dst netip.Addr, proto byte, payload []byte) []byte {
	b := append(make([]byte, header.IPv4MinimumSize), payload...)
	h := header.IPv4(b)
	h.Encode(&header.IPv4Fields{TotalLength: uint16(len(b)), TTL: 64, Protocol: proto,
		SrcAddr: tcpip.AddrFrom4(src.As4()), DstAddr: tcpip.AddrFrom4(dst.As4())})
	h.SetChecksum(^h.CalculateChecksum())
	return b
}

// packet6 makes a whole packet of IPv6, whose payload begins with the header that next says.
func packet6(src, dst netip.Addr, next byte, payload []byte) []byte {
	b := append(make([]byte, header.IPv6MinimumSize), payload...)
	header.IPv6(b).Encode(&header.IPv6Fields{PayloadLength: uint16(len(payload)), TransportProtocol: tcpip.TransportProtocolNumber(next),
		HopLimit: 64, SrcAddr: tcpip.AddrFrom16(src.As16()), DstAddr: tcpip.AddrFrom16(dst.As16())})
	return b
}

// transport makes the TCP or UDP of a packet between two addresses.
func transport(src, dst netip.AddrPort, flags header.TCPFlags, udp bool, data []byte) []byte {
	s, d := tcpip.AddrFromSlice(src.Addr().AsSlice()), tcpip.AddrFromSlice(dst.Addr().AsSlice())
	if udp {
		b := append(make([]byte, header.UDPMinimumSize), data...)
		h := header.UDP(b)
		h.Encode(&header.UDPFields{SrcPort: src.Port(), DstPort: dst.Port(), Length: uint16(len(b))})
		sum := header.PseudoHeaderChecksum(header.UDPProtocolNumber, s, d, uint16(len(b)))
		h.SetChecksum(^h.CalculateChecksum(checksum.Checksum(data, sum)))
		return b
	}
	b := append(make([]byte, header.TCPMinimumSize), data...)
	h := header.TCP(b)
	h.Encode(&header.TCPFields{SrcPort: src.Port(), DstPort: dst.Port(), SeqNum: 1000, DataOffset: header.TCPMinimumSize, Flags: flags, WindowSize: 60000})
	sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, s, d, uint16(len(b)))
	h.SetChecksum(^h.CalculateChecksum(checksum.Checksum(data, sum)))
	return b
}

// received is a handler that keeps what the first stream sends, to its end.
type received struct {
	proxytest.RecordingHandler
	got chan []byte
}

func newReceived() *received {
	r := &received{got: make(chan []byte, 1)}
	r.Serve = func(c net.Conn) {
		b, err := io.ReadAll(c)
		if err == nil {
			r.got <- b
		}
	}
	return r
}

// A protocol that the stack does not know is said to be unreachable.
func TestUnknownProtocols(t *testing.T) {
	proxytest.NoLeaks(t)
	g := newRig(t, new(proxytest.RecordingHandler), nil)
	for _, proto := range []byte{47 /* GRE */, 50 /* ESP */, 132 /* SCTP */, 136 /* UDP-Lite */, 253, 254} {
		g.inject(packet4(fuzzSrc.Addr(), fuzzDst.Addr(), proto, make([]byte, 40)))
		b := g.next()
		m := header.ICMPv4(header.IPv4(b).Payload())
		if m.Type() != header.ICMPv4DstUnreachable || m.Code() != header.ICMPv4ProtoUnreachable || header.IPv4(m[8:]).Protocol() != proto {
			t.Errorf("IPv4, protocol %d: %x", proto, b)
		}
		g.inject(packet6(netip.MustParseAddr(client6), netip.MustParseAddr(host6), proto, make([]byte, 40)))
		b = g.next()
		if m := header.ICMPv6(header.IPv6(b).Payload()); m.Type() != header.ICMPv6ParamProblem || m.Code() != header.ICMPv6UnknownHeader {
			t.Errorf("IPv6, protocol %d: %x", proto, b)
		}
	}
}

// Segments that overlap and differ: of each byte, one version is passed on, and nothing more.
func TestOverlappingSegments(t *testing.T) {
	proxytest.NoLeaks(t)
	h := newReceived()
	g := newRig(t, h, nil)
	const iss = 1000
	ack, _ := g.open(iss, 0)
	send := func(off uint32, data string, flags header.TCPFlags) {
		g.inject(segment(iss+1+off, ack, header.TCPFlagAck|flags, []byte(data)))
	}
	send(4, "BBBB", 0)     // waits for what is before it
	send(6, "CCCC", 0)     // over its second half, and on
	send(0, "aaaaaaaa", 0) // fills the gap, and differs from what waits
	send(2, "dd", 0)       // was taken long since
	send(9, "eee", 0)      // over the last byte
	send(8, "ffff", 0)
	send(12, "", header.TCPFlagFin)
	got := string(within(t, "the stream", h.got))
	if len(got) != 12 || got[:4] != "aaaa" {
		t.Fatalf("the stream is %q", got)
	}
	versions := []string{0: "a", 1: "a", 2: "a", 3: "a", 4: "aB", 5: "aB", 6: "aBC", 7: "aBC", 8: "Cf", 9: "Cef", 10: "ef", 11: "ef"}
	for i, v := range versions {
		if !bytes.Contains([]byte(v), []byte{got[i]}) {
			t.Errorf("byte %d of %q is none that was sent there (%s)", i, got, v)
		}
	}
	for !g.nextTCP().Flags().Contains(header.TCPFlagFin) { // that of the handler, which has closed
	}
}

// A client that offers ECN gets its stream, without ECN, and marks do not change what arrives.
func TestECNIsNotTaken(t *testing.T) {
	proxytest.NoLeaks(t)
	h := newReceived()
	g := newRig(t, h, nil)
	const iss, ece, cwr = 1000, header.TCPFlags(0x40), header.TCPFlags(0x80)
	ack, answer := g.open(iss, ece|cwr)
	if flags := answer.Flags(); flags&(ece|cwr) != 0 {
		t.Errorf("the SYN-ACK has ECN's flags: %v", flags)
	}
	for i, data := range []string{"Not", "ECT1", "ECT0", "CE"} {
		b := segment(iss+1+uint32(len("NotECT1ECT0CE"[:[]int{0, 3, 7, 11}[i]])), ack, header.TCPFlagAck|cwr, []byte(data))
		ip := header.IPv4(b)
		ip.SetTOS(byte(i), 0)
		ip.SetChecksum(0)
		ip.SetChecksum(^ip.CalculateChecksum())
		g.inject(b)
	}
	g.inject(segment(iss+1+13, ack, header.TCPFlagAck|header.TCPFlagFin|ece, nil))
	if got := within(t, "the stream", h.got); string(got) != "NotECT1ECT0CE" {
		t.Errorf("the stream is %q", got)
	}
}

// Streams and datagrams behind IPv6's extension headers are taken.
func TestExtensionHeaders(t *testing.T) {
	proxytest.NoLeaks(t)
	g := newRig(t, new(proxytest.RecordingHandler), nil)
	src, dst := ap(client6, 4000), ap(host6, 80)
	const hop, options = 0, 60
	pad := func(next byte) []byte { return []byte{next, 0, 1, 4, 0, 0, 0, 0} } // PadN
	g.inject(packet6(src.Addr(), dst.Addr(), hop, bytes.Join([][]byte{pad(options), pad(17), transport(src, dst, 0, true, []byte("hello"))}, nil)))
	if b := g.next(); b[6] != 17 || string(b[header.IPv6MinimumSize+header.UDPMinimumSize:]) != "hello" {
		t.Errorf("the datagram is answered by %x", b)
	}
	g.inject(packet6(src.Addr(), dst.Addr(), options, append(pad(6), transport(src, dst, header.TCPFlagSyn, false, nil)...)))
	b := g.next()
	if h := header.TCP(b[header.IPv6MinimumSize:]); b[6] != 6 || h.Flags() != header.TCPFlagSyn|header.TCPFlagAck {
		t.Errorf("the SYN is answered by %x", b)
	}
	// Endless ones, truncated ones, and such as say more than there is.
	for _, payload := range [][]byte{
		bytes.Repeat(pad(options), 150), pad(options)[:1], {options, 255, 1, 4, 0, 0, 0, 0}, {44}, {17, 0, 0, 1, 0, 0, 0, 1},
	} {
		g.inject(packet6(src.Addr(), dst.Addr(), options, payload))
	}
	g.inject(packet6(src.Addr(), dst.Addr(), 17, transport(src, dst, 0, true, []byte("still there"))))
	for b := g.next(); b[6] != 17; b = g.next() {
	}
}

// Fragments whose rest never comes hold little memory, and keep nobody's datagram from being joined.
func TestFragmentsThatAreNeverWhole(t *testing.T) {
	proxytest.NoLeaks(t)
	g := newRig(t, new(proxytest.RecordingHandler), nil)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range uint32(50000) {
		src := netip.AddrFrom4([4]byte{10, 78, byte(i >> 8), byte(i)})
		b := fragment(17, uint16(i), 0, true, make([]byte, 1400))
		h := header.IPv4(b)
		h.SetSourceAddress(tcpip.AddrFrom4(src.As4()))
		h.SetChecksum(0)
		h.SetChecksum(^h.CalculateChecksum())
		g.inject(b)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if held := int64(after.HeapAlloc) - int64(before.HeapAlloc); held > 32<<20 {
		t.Errorf("%d MiB are held for fragments", held>>20)
	}
	whole := transport(fuzzSrc, fuzzDst, 0, true, bytes.Repeat([]byte("x"), 3000))
	g.inject(fragment(17, 7, 0, true, whole[:1480]))
	g.inject(fragment(17, 7, 1480, true, whole[1480:2960]))
	g.inject(fragment(17, 7, 2960, false, whole[2960:]))
	for got := 0; got < len(whole); {
		b := g.next()
		if header.IPv4(b).Protocol() != 17 {
			t.Fatalf("%x", b)
		}
		got += len(header.IPv4(b).Payload())
	}
}
