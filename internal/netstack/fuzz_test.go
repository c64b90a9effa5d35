package netstack

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/tundev"
	"github.com/sluice-proxy/sluice/relay"
)

// wire is a device whose packets a test writes and reads.
type wire struct {
	once   sync.Once
	closed chan struct{}
	out    chan []byte // what the stack has sent; what does not fit is dropped
}

func newWire() *wire { return &wire{closed: make(chan struct{}), out: make(chan []byte, 100)} }

func (w *wire) MTU() int     { return 1500 }
func (w *wire) Close() error { w.once.Do(func() { close(w.closed) }); return nil }

func (w *wire) ReadPacket(*tundev.Header, [][]byte) (int, error) {
	<-w.closed
	return 0, os.ErrClosed
}

func (w *wire) WritePacket(_ tundev.Header, bufs [][]byte) error {
	var b []byte
	for _, p := range bufs {
		b = append(b, p...)
	}
	select {
	case w.out <- b:
	default:
	}
	return nil
}

// The client of the fuzz test and its host.
var fuzzSrc, fuzzDst = netip.MustParseAddrPort("10.77.0.1:4000"), netip.MustParseAddrPort("192.0.2.1:80")

// segment makes a TCP segment of the client's.
func segment(seq, ack uint32, flags header.TCPFlags, payload []byte) []byte {
	size := header.IPv4MinimumSize + header.TCPMinimumSize
	b := append(make([]byte, size), payload...)
	s, d := tcpip.AddrFrom4(fuzzSrc.Addr().As4()), tcpip.AddrFrom4(fuzzDst.Addr().As4())
	ip := header.IPv4(b)
	ip.Encode(&header.IPv4Fields{TotalLength: uint16(len(b)), TTL: 64, Protocol: uint8(header.TCPProtocolNumber), SrcAddr: s, DstAddr: d})
	ip.SetChecksum(^ip.CalculateChecksum())
	h := header.TCP(b[header.IPv4MinimumSize:])
	h.Encode(&header.TCPFields{SrcPort: fuzzSrc.Port(), DstPort: fuzzDst.Port(), SeqNum: seq, AckNum: ack, DataOffset: header.TCPMinimumSize, Flags: flags, WindowSize: 60000})
	sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, s, d, uint16(len(b)-header.IPv4MinimumSize))
	h.SetChecksum(^h.CalculateChecksum(checksum.Checksum(payload, sum)))
	return b
}

// fragment makes a fragment of IPv4.
func fragment(proto byte, id uint16, off uint16, more bool, payload []byte) []byte {
	b := append(make([]byte, header.IPv4MinimumSize), payload...)
	f := header.IPv4Fields{
		TotalLength: uint16(len(b)), ID: id, TTL: 64, Protocol: proto, FragmentOffset: off &^ 7,
		SrcAddr: tcpip.AddrFrom4(fuzzSrc.Addr().As4()), DstAddr: tcpip.AddrFrom4(fuzzDst.Addr().As4()),
	}
	if more {
		f.Flags = header.IPv4FlagMoreFragments
	}
	h := header.IPv4(b)
	h.Encode(&f)
	h.SetChecksum(^h.CalculateChecksum())
	return b
}

// FuzzPackets has the stack take packets of any kind: the input is operations, each a byte that says which, one of
// the length of what follows, and that.
func FuzzPackets(f *testing.F) {
	syn := rawSegment(header.TCPFlagSyn)
	f.Add(op(0, syn))
	f.Add(op(0, []byte{0x60, 0, 0, 0, 0, 8, 58, 255, 254, 128}))
	f.Add(append(op(1, []byte{0, byte(header.TCPFlagAck), 'a', 'b', 'c'}), op(1, []byte{1, byte(header.TCPFlagAck), 'B', 'C', 'D'})...))
	f.Add(append(op(1, []byte{5, byte(header.TCPFlagAck | header.TCPFlagFin), 'x'}), op(1, []byte{0, byte(header.TCPFlagRst)})...))
	f.Add(append(op(2, []byte{17, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8}), op(2, []byte{17, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8})...))
	f.Add(op(3, append([]byte{1, 3, 0, 10, 0, 20, 0, 6}, syn...)))
	f.Add(op(3, append([]byte{3, 1, 0, 1, 0, 20, 0, 6}, fragment(17, 0, 0, false, make([]byte, 30))...)))
	f.Add(op(0, fragment(132, 0, 0, false, make([]byte, 30))))
	f.Add(op(0, fragment(1, 0, 0, false, []byte{8, 0, 0xf7, 0xff, 0, 0, 0, 0})))
	f.Fuzz(fuzzPackets)
}

func rawSegment(flags header.TCPFlags) []byte { return segment(7, 0, flags, nil) }

func op(kind byte, b []byte) []byte { return append([]byte{kind, byte(len(b))}, b...) }

func fuzzPackets(t *testing.T, in []byte) {
	w := newWire()
	s := &Stack{Ping: func(context.Context, netip.Addr, []byte) error { return nil }}
	if err := s.listenOn(w); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	h := &proxytest.RecordingHandler{Serve: func(c net.Conn) {
		defer context.AfterFunc(ctx, func() { relay.Abort(c) })()
		proxytest.Echo(c)
	}}
	go func() { served <- s.Serve(ctx, h) }()
	defer func() {
		cancel()
		select {
		case err := <-served:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(proxytest.Patience):
			t.Error("Serve does not return")
		}
	}()
	inject := func(h tundev.Header, b []byte) { s.r.link.deliver(&h, buffer.MakeWithData(b)) }
	for s.r.link.dispatcher == nil || !serving(s) {
		time.Sleep(10 * time.Microsecond)
	}
	const iss = 1000
	inject(tundev.Header{}, segment(iss, 0, header.TCPFlagSyn, nil))
	var ack uint32
	select {
	case b := <-w.out:
		ack = header.TCP(b[header.IPv4MinimumSize:]).SequenceNumber() + 1
	case <-time.After(proxytest.Patience):
		t.Fatal("no SYN-ACK")
	}
	inject(tundev.Header{}, segment(iss+1, ack, header.TCPFlagAck, nil))
	for len(in) >= 2 {
		kind, n := in[0], min(int(in[1]), len(in)-2)
		b := in[2 : 2+n]
		in = in[2+n:]
		switch {
		case kind%4 == 0:
			inject(tundev.Header{}, b)
		case kind%4 == 1 && n >= 2:
			inject(tundev.Header{}, segment(iss+1+uint32(int32(int8(b[0]))), ack, header.TCPFlags(b[1]&0x3f), b[2:]))
		case kind%4 == 2 && n >= 3:
			inject(tundev.Header{}, fragment(b[0], 9, uint16(b[1]), b[2]&1 != 0, b[3:]))
		case kind%4 == 3 && n >= 8:
			inject(tundev.Header{
				GSO: tundev.GSO(b[0] % 4), NeedsCsum: b[1]&1 != 0, CsumValid: b[1]&2 != 0, SegSize: binary.BigEndian.Uint16(b[2:]),
				CsumStart: binary.BigEndian.Uint16(b[4:]), CsumOffset: binary.BigEndian.Uint16(b[6:]),
			}, b[8:])
		}
	}
}

func serving(s *Stack) bool {
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	return s.r.handler != nil
}
