package relay

import (
	"errors"
	"net"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Segmenter sends datagrams of one size to one place by one call (UDP_SEGMENT): what the kernel does for a datagram it does once for
// all of them. The zero value is ready; one goroutine uses it at a time.
type Segmenter struct {
	oob   []byte
	stays int // how often it is not to be tried, after the way has proved to be unfit
}

// segmentsPause is how many calls a way is left alone that takes no segments: they are larger than its MTU, or
// its device cannot compute checksums.
const segmentsPause = 1000

// WriteSegments sends ps, of which [SameSegments] has counted, to a place, with these control messages. Where it returns false none of them
// was sent, and each is to be sent by itself.
func (s *Segmenter) WriteSegments(c *net.UDPConn, ps []Packet, to netip.AddrPort, oob []byte) bool {
	if s.stays > 0 {
		s.stays--
		return false
	}
	s.oob = appendSegmentSize(append(s.oob[:0], oob...), uint16(len(ps[0].Data)))
	all := largePackets.Get().(*[packetLarge]byte)
	defer largePackets.Put(all)
	n := 0
	for i := range ps {
		n += copy(all[n:], ps[i].Data)
	}
	_, _, err := c.WriteMsgUDPAddrPort(all[:n], s.oob, to)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EIO) || errors.Is(err, unix.EMSGSIZE) || errors.Is(err, unix.EOPNOTSUPP) {
		s.stays = segmentsPause
	}
	return err == nil
}

func appendSegmentSize(b []byte, size uint16) []byte {
	at := len(b)
	for range unix.CmsgSpace(2) {
		b = append(b, 0)
	}
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[at]))
	h.Level, h.Type = unix.SOL_UDP, unix.UDP_SEGMENT
	h.SetLen(unix.CmsgLen(2))
	*(*uint16)(unsafe.Pointer(&b[at+unix.CmsgLen(0)])) = size
	return b
}
