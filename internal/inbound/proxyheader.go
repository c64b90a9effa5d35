package inbound

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/pires/go-proxyproto"
)

var errNoProxyHeader = errors.New("the client does not begin with a PROXY header (is it a load balancer that sends one?)")

// readProxyHeader reads the PROXY header that c must begin with, and takes the addresses from it.
// What was read too much is c.head.
func (c *client) readProxyHeader() error {
	h, rest, err := readProxyHeader(c.reader())
	if err != nil {
		return fmt.Errorf("inbound: PROXY header: %w", err)
	}
	c.head = rest
	// LOCAL and UNKNOWN are the balancer's own connections, as for health checks: the conn's
	// addresses are the true ones. So they are for what is not TCP.
	if h.Command.IsProxy() {
		if src, dst, ok := h.TCPAddrs(); ok {
			c.peer, c.local = addrPort(src), addrPort(dst)
		}
	}
	return nil
}

// readProxyHeader reads a PROXY header of version 1 or 2 from r, in as many reads as it takes. It
// returns what it read after the header as rest. It is for r to have a deadline. It gives up at
// the first byte that shows that there is no header, and at a header of unreasonable length.
func readProxyHeader(r io.Reader) (h *proxyproto.Header, rest []byte, err error) {
	buf := make([]byte, 0, 256)
	for {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		end, frameErr := proxyHeaderLen(buf)
		if frameErr != nil {
			return nil, nil, frameErr
		}
		if end > 0 {
			h, err := proxyproto.Read(bufio.NewReader(bytes.NewReader(buf[:end])))
			if err != nil {
				return nil, nil, err
			}
			return h, bytes.Clone(buf[end:]), nil
		}
		if err == io.EOF && len(buf) > 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return nil, nil, err
		}
	}
}

const (
	proxyV1     = "PROXY "
	proxyV1Max  = 107 // with CRLF
	proxyV2Head = 16  // signature, command, family, and the length of what follows
)

// proxyHeaderLen returns the length of the header that b begins with; 0 while b is too short to tell.
func proxyHeaderLen(b []byte) (int, error) {
	switch {
	case isPrefix(b, proxyproto.SIGV2):
		if len(b) < proxyV2Head {
			return 0, nil
		}
		n := binary.BigEndian.Uint16(b[proxyV2Head-2:])
		if n > proxyproto.MaxV2HeaderSize {
			return 0, fmt.Errorf("version 2 header of %d bytes: more than %d", n, proxyproto.MaxV2HeaderSize)
		}
		if len(b) < proxyV2Head+int(n) {
			return 0, nil
		}
		return proxyV2Head + int(n), nil
	case isPrefix(b, []byte(proxyV1)):
		if i := bytes.IndexByte(b[:min(len(b), proxyV1Max)], '\n'); i >= 0 {
			return i + 1, nil
		}
		if len(b) >= proxyV1Max {
			return 0, proxyproto.ErrVersion1HeaderTooLong
		}
		return 0, nil
	}
	return 0, errNoProxyHeader
}

// isPrefix says whether b begins with sig, as far as b goes.
func isPrefix(b, sig []byte) bool {
	n := min(len(b), len(sig))
	return bytes.Equal(b[:n], sig[:n])
}
