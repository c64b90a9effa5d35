//go:build !linux

package inbound

import (
	"net"
	"net/netip"
)

// batchReader reads the datagrams of a socket, one at a time.
type batchReader struct {
	conn    *net.UDPConn
	n, oobn int
	from    netip.AddrPort
	data    [64 << 10]byte
	oob     [128]byte
}

func newBatchReader(c *net.UDPConn) (*batchReader, error) { return &batchReader{conn: c}, nil }

func (r *batchReader) read() (n int, err error) {
	if r.n, r.oobn, _, r.from, err = r.conn.ReadMsgUDPAddrPort(r.data[:], r.oob[:]); err != nil {
		return 0, err
	}
	return 1, nil
}

func (r *batchReader) datagram(int) (data, oob []byte, from netip.AddrPort) {
	return r.data[:r.n], r.oob[:r.oobn], netip.AddrPortFrom(r.from.Addr().Unmap(), r.from.Port())
}

// lost: other systems do not tell it of one socket.
func (r *batchReader) lost() uint32 { return 0 }
