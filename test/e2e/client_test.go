package e2e

import (
	"bufio"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// tryDialThrough connects to dst, an IPv4 address and port, by way of the sluice at addr: as a
// client of a forward, of SOCKS5, or of HTTP CONNECT. The handshakes are as short as they can be.
func tryDialThrough(way, addr, dst string) (*net.TCPConn, error) {
	if way == "direct" {
		addr = dst
	}
	nc, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		return nil, err
	}
	c := nc.(*net.TCPConn)
	c.SetDeadline(time.Now().Add(patience))
	switch way {
	case "socks5":
		err = socks5Handshake(c, dst)
	case "connect":
		err = connectHandshake(c, dst)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	c.SetDeadline(time.Time{})
	return c, nil
}

// socksRequest is a greeting without authentication and the request to connect to dst.
func socksRequest(dst string) []byte {
	ap := netip.MustParseAddrPort(dst)
	b := append([]byte{5, 1, 0, 5, 1, 0, 1}, ap.Addr().AsSlice()...)
	return append(b, byte(ap.Port()>>8), byte(ap.Port()))
}

func socks5Handshake(c net.Conn, dst string) error {
	request := socksRequest(dst)
	if _, err := c.Write(request[:3]); err != nil {
		return err
	}
	var reply [2 + 10]byte
	if _, err := io.ReadFull(c, reply[:2]); err != nil {
		return err
	}
	if _, err := c.Write(request[3:]); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, reply[2:]); err != nil {
		return err
	}
	if reply[1] != 0 || reply[3] != 0 {
		return fmt.Errorf("socks5 replies % x", reply)
	}
	return nil
}

func connectHandshake(c net.Conn, dst string) error {
	if _, err := fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", dst, dst); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(oneByteReader{c}), nil)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("CONNECT replies %s", resp.Status)
	}
	return nil
}

// oneByteReader keeps a bufio.Reader from reading too much.
type oneByteReader struct{ r io.Reader }

func (r oneByteReader) Read(p []byte) (int, error) { return r.r.Read(p[:min(1, len(p))]) }

// certificate writes a certificate for localhost that is its own authority, and its key.
func certificate(t *testing.T) (certFile, keyFile string) {
	t.Helper()
	cert, _ := proxytest.Certificate(t)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return writeFile(t, "cert.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}))),
		writeFile(t, "key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})))
}
