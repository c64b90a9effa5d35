package conform

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/outbound"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// refusal is a destination that cannot be reached, and how clients are told so.
type refusal struct {
	name   string
	setup  func(t *testing.T) (proxy.Addr, proxy.Dialer)
	reply  byte   // of SOCKS5, RFC 1928 section 6
	status int    // of HTTP
	reason string // of HTTP: RFC 9209 section 2.3
}

var refusals = []refusal{
	{"refused", func(t *testing.T) (proxy.Addr, proxy.Dialer) { return refusing(t), &outbound.Direct{} },
		5, 502, "connection_refused"},
	{"silent", func(t *testing.T) (proxy.Addr, proxy.Dialer) { return blackHole(t), &outbound.Direct{} },
		6, 504, "connection_timeout"},
	{"no-host", func(t *testing.T) (proxy.Addr, proxy.Dialer) {
		return proxy.TCP("nowhere.example", 80), &outbound.Direct{Resolver: proxytest.NoNames(t)}
	}, 4, 502, "dns_error"},
	{"denied", func(t *testing.T) (proxy.Addr, proxy.Dialer) { return proxy.TCP("10.0.0.1", 80), outbound.Reject{} },
		2, 403, "http_request_denied"},
}

// A client is told why its destination cannot be reached, as exactly as its protocol can, also if it is
// another proxy that knows.
func TestRefusals(t *testing.T) {
	for _, via := range upstreams {
		for _, r := range refusals {
			t.Run(via.name+"/"+r.name, func(t *testing.T) {
				proxytest.NoLeaks(t)
				dst, dialer := r.setup(t)
				last := setup{dialer: dialer}
				if r.name == "silent" {
					last.dialTimeout = 100 * time.Millisecond // so that it is the last who gives up
				}
				var first setup
				first.dialer, _ = via.start(t, last)
				if via.name == "direct" {
					first.dialTimeout = last.dialTimeout
				}
				want := r
				if via.name == "socks5" && r.name == "no-host" {
					want.reason = "destination_ip_unroutable" // SOCKS5 has no word for it
				}
				for _, p := range protocols {
					for _, network := range []string{"tcp", "unix"} {
						first.protocol, first.network, first.to = p, network, dst
						if via.name != "direct" && network == "unix" {
							continue // it is the same
						}
						if err := want.check(p, network, refused(t, first, dst)); err != nil {
							t.Errorf("%s over %s: %v", p.name, network, err)
						}
					}
				}
			})
		}
	}
}

// What a refused client has heard when its conn ended, and how that ended.
type heard struct {
	answer []byte
	err    error
}

func refused(t *testing.T, s setup, dst proxy.Addr) heard {
	t.Helper()
	addr := start(t, s).addr
	c, err := net.DialTimeout(addr.Network, addr.HostPort(), proxytest.Patience)
	if err != nil {
		return heard{nil, err} // forward may reset it before Dial has looked
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	if _, err := io.WriteString(c, s.protocol.request(dst)); err != nil {
		return heard{nil, err} // a socket tells of its reset once
	}
	b, err := io.ReadAll(c)
	return heard{b, err}
}

func (r refusal) check(p protocol, network string, got heard) error {
	switch {
	case p.yes == "": // forward; a Unix socket has no reset
		if len(got.answer) > 0 || network == "tcp" && !errors.Is(got.err, syscall.ECONNRESET) {
			return errorf(got, "want a reset")
		}
		return nil
	case got.err != nil:
		return errorf(got, "the answer does not end cleanly")
	case p.yes == socksYes:
		want := []byte(socksYes)
		want[3] = r.reply
		if !bytes.Equal(got.answer, want) {
			return errorf(got, "want %q", want)
		}
		return nil
	}
	resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(got.answer)), &http.Request{Method: "CONNECT"})
	if err != nil {
		return errorf(got, "%v", err)
	}
	if resp.StatusCode != r.status || resp.Header.Get("Proxy-Status") != "sluice; error="+r.reason ||
		!strings.Contains(string(got.answer), "\r\nConnection: close\r\n") {
		return errorf(got, "want status %d and the reason %s", r.status, r.reason)
	}
	return nil
}

// A Unix socket that nobody listens at refuses like a port.
func TestRefusedByUnixSocket(t *testing.T) {
	proxytest.NoLeaks(t)
	gone := proxy.Addr{Network: "unix", Host: socketPath(t)} // no such file
	left := proxy.Addr{Network: "unix", Host: socketPath(t)} // of a process that has died
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: left.Host})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	for _, dst := range []proxy.Addr{gone, left} {
		s := setup{protocol: protocols[forward], to: dst, dialer: &outbound.Direct{}}
		if err := (refusal{}).check(s.protocol, "tcp", refused(t, s, dst)); err != nil {
			t.Error(err)
		}
	}
}

// When the upstream itself cannot be reached, the client is told that, and not that all is well.
func TestUpstreamRefuses(t *testing.T) {
	proxytest.NoLeaks(t)
	up := refusing(t)
	dst := proxy.TCP("127.0.0.1", 9)
	for _, d := range []proxy.Dialer{&outbound.SOCKS5{Server: up}, &outbound.HTTP{Server: up}} {
		for _, p := range protocols {
			s := setup{protocol: p, to: dst, dialer: d}
			if err := refusals[0].check(p, "tcp", refused(t, s, dst)); err != nil {
				t.Errorf("%s: %v", p.name, err)
			}
		}
	}
}

func errorf(got heard, format string, args ...any) error {
	return fmt.Errorf("read %q, %v: "+format, append([]any{got.answer, got.err}, args...)...)
}
