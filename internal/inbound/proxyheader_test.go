package inbound

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
)

const v1Header = "PROXY TCP4 192.0.2.7 198.51.100.9 4711 443\r\n"

func v2Header(t testing.TB, src, dst string, tlvs ...proxyproto.TLV) string {
	h := proxyproto.HeaderProxyFromAddrs(2,
		net.TCPAddrFromAddrPort(netip.MustParseAddrPort(src)), net.TCPAddrFromAddrPort(netip.MustParseAddrPort(dst)))
	if err := h.SetTLVs(tlvs); err != nil {
		t.Fatal(err)
	}
	b, err := h.Format()
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

const (
	sig    = "\r\n\r\n\x00\r\nQUIT\n"
	local2 = sig + "\x20\x00\x00\x00"
)

func TestProxyHeader(t *testing.T) {
	for name, test := range map[string]struct{ header, client, local string }{
		"v1":         {v1Header, "192.0.2.7:4711", "198.51.100.9:443"},
		"v1 ipv6":    {"PROXY TCP6 2001:db8::1 2001:db8::2 1 2\r\n", "[2001:db8::1]:1", "[2001:db8::2]:2"},
		"v1 unknown": {"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", "", ""},
		"v2":         {v2Header(t, "192.0.2.7:4711", "198.51.100.9:443"), "192.0.2.7:4711", "198.51.100.9:443"},
		"v2 ipv6":    {v2Header(t, "[2001:db8::1]:1", "[2001:db8::2]:2"), "[2001:db8::1]:1", "[2001:db8::2]:2"},
		"v2 mapped":  {v2Header(t, "[2001:db8::1]:1", "192.0.2.1:2"), "[2001:db8::1]:1", "192.0.2.1:2"},
		"v2 local":   {local2, "", ""},
		"v2 with 4 KB of TLVs": {v2Header(t, "192.0.2.7:4711", "198.51.100.9:443",
			proxyproto.TLV{Type: 0xEE, Value: make([]byte, 4000)}), "192.0.2.7:4711", "198.51.100.9:443"},
		"v2 unix": {sig + "\x21\x31\x00\xd8" + strings.Repeat("\x00", 216), "", ""},
	} {
		for _, pace := range []string{"at once", "byte by byte"} {
			t.Run(name+" "+pace, func(t *testing.T) {
				flows := make(chan proxy.Flow, 1)
				a := start(t, t.Context(), &Listener{Addr: loopback, AcceptProxy: true},
					func(ctx context.Context, c *client) {
						flows <- c.flow(proxy.Addr{}, "")
						echo(ctx, c)
					})
				c := dial(t, a)
				all := test.header + "payload"
				if pace == "at once" {
					io.WriteString(c, all)
				} else {
					for _, b := range []byte(all)[:min(len(all), 300)] { // one segment each
						c.Write([]byte{b})
					}
					io.WriteString(c, all[min(len(all), 300):])
				}
				c.(*net.TCPConn).CloseWrite()
				if b, err := io.ReadAll(c); string(b) != "payload" || err != nil {
					t.Errorf("read %q, %v", b, err)
				}
				want := proxy.Flow{Client: addrPort(c.LocalAddr()), Local: addrPort(a)}
				if test.client != "" {
					want.Client, want.Local = netip.MustParseAddrPort(test.client), netip.MustParseAddrPort(test.local)
				}
				if got := <-flows; got != want {
					t.Errorf("flow %+v, want %+v", got, want)
				}
			})
		}
	}
}

// Bad headers end the client before it is handed over, most at the first wrong byte and without
// waiting for the deadline.
func TestBadProxyHeaders(t *testing.T) {
	for name, header := range map[string]string{
		"none":             "G",
		"almost v1":        "PROXX",
		"v1 long":          "PROXY TCP4 " + strings.Repeat("1", 107),
		"v1 no cr":         "PROXY TCP4 192.0.2.7 198.51.100.9 4711 443\n",
		"v1 port":          "PROXY TCP4 192.0.2.7 198.51.100.9 99999 443\r\n",
		"v1 name":          "PROXY TCP4 example.com 198.51.100.9 1 443\r\n",
		"v2 almost":        "\r\n\r\n\x00\r\nQUIT\r",
		"v2 version":       sig + "\x11\x11\x00\x00",
		"v2 family":        sig + "\x21\x77\x00\x00",
		"v2 long":          sig + "\x21\x11\xff\xff",
		"v2 short address": sig + "\x21\x11\x00\x04abcd",
		"v2 unspec proxy":  sig + "\x21\x00\x00\x00",
	} {
		t.Run(name, func(t *testing.T) {
			var log logBuffer
			a := start(t, t.Context(), &Listener{Addr: loopback, AcceptProxy: true, HandshakeTimeout: time.Hour, Log: log.logger()},
				func(ctx context.Context, c *client) { t.Error("handed over"); echo(ctx, c) })
			c := dial(t, a)
			io.WriteString(c, header)
			if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("client reads %v", err)
			}
			c.Close()
			proxytest.Until(t, "one line in the log", func() bool { return log.count("PROXY header") > 0 })
			if log.count("\n") != 1 {
				t.Errorf("log: %s", log.b.String())
			}
		})
	}
}

func TestTruncatedProxyHeaders(t *testing.T) {
	for _, header := range []string{v1Header, v2Header(t, "192.0.2.7:4711", "198.51.100.9:443")} {
		for n := range header {
			_, _, err := readProxyHeader(strings.NewReader(header[:n]))
			want := io.ErrUnexpectedEOF
			if n == 0 {
				want = io.EOF
			}
			if !errors.Is(err, want) {
				t.Errorf("%d bytes: %v", n, err)
			}
		}
	}
	silent := start(t, t.Context(), &Listener{Addr: loopback, AcceptProxy: true, HandshakeTimeout: 30 * time.Millisecond}, echo)
	c := dial(t, silent)
	io.WriteString(c, "PROXY TCP4")
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a header without an end: %v", err)
	}
}

// However the bytes are cut, the header is the same, and nothing after it is lost.
func FuzzProxyHeader(f *testing.F) {
	f.Add([]byte(v1Header + "rest"))
	f.Add([]byte(v2Header(f, "[2001:db8::1]:1", "[2001:db8::2]:2", proxyproto.TLV{Type: 1, Value: []byte("h2")}) + "rest"))
	f.Add([]byte(local2))
	f.Add([]byte(sig + "\x21\x11\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		h, rest, err := readProxyHeader(r)
		unread := len(b) - r.Len() - len(rest)
		slow := bytes.NewReader(b)
		h1, rest1, err1 := readProxyHeader(iotest.OneByteReader(slow))
		if (err == nil) != (err1 == nil) {
			t.Fatalf("at once %v, byte by byte %v", err, err1)
		}
		if err != nil {
			return
		}
		if !h.EqualsTo(h1) || len(rest1) != 0 || len(b)-slow.Len() != unread {
			t.Fatalf("at once %+v to byte %d, byte by byte %+v to byte %d", h, unread, h1, len(b)-slow.Len())
		}
		if !bytes.Equal(b[unread:unread+len(rest)], rest) {
			t.Fatalf("rest is %q", rest)
		}
		if src, dst, ok := h.TCPAddrs(); h.Command.IsProxy() && ok {
			_ = fmt.Sprint(addrPort(src), addrPort(dst))
		}
	})
}
