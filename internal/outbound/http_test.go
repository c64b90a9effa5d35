package outbound

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

// httpProxy returns an upstream that reads a CONNECT as net/http does, and answers with answer and then,
// if that is a yes, as Echo. got, if not nil, gets the request.
func httpProxy(answer string, got chan<- *http.Request) func(net.Conn) {
	return func(c net.Conn) {
		r, err := http.ReadRequest(bufio.NewReader(c))
		if err != nil {
			return
		}
		if got != nil {
			got <- r
		}
		io.WriteString(c, answer)
		if strings.HasPrefix(answer, "HTTP/1.1 200 ") {
			proxytest.Echo(c)
		}
	}
}

const established = "HTTP/1.1 200 Connection established\r\nContent-Length: 5\r\n\r\n"

func TestHTTPConnIsBare(t *testing.T) {
	for _, early := range []string{"", "banner"} {
		for _, network := range []string{"tcp", "tls"} {
			t.Run(network+" "+early, func(t *testing.T) {
				proxytest.NoLeaks(t)
				got := make(chan *http.Request, 1)
				up := proxytest.Listen(t, network, httpProxy(established+early, got))
				h := &HTTP{Server: up.Addr, User: "bob", Password: "hunter2"}
				if network == "tls" {
					h.TLS = &tls.Config{RootCAs: up.Roots}
				}
				ctx, cancel := context.WithCancel(t.Context())
				c, err := h.DialStream(ctx, proxy.TCP("example.com", 25))
				cancel() // of the dial's context, after the dial: the conn has nothing to do with it any more
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				r := <-got
				if r.Method != "CONNECT" || r.RequestURI != "example.com:25" || r.Host != "example.com:25" ||
					r.Header.Get("Proxy-Authorization") != "Basic Ym9iOmh1bnRlcjI=" {
					t.Errorf("the proxy got %+v", r)
				}
				bare := io.ReadWriteCloser(c)
				if w, ok := c.(relay.Transparent); ok {
					bare, _ = w.Unwrap()
				}
				_, isTCP := bare.(*net.TCPConn)
				_, isTLS := bare.(*tls.Conn)
				if isTCP != (network == "tcp") || isTLS != (network == "tls") {
					t.Errorf("got a %T", bare)
				}
				io.WriteString(c, ", echo")
				c.(relay.HalfCloser).CloseWrite()
				if got, err := io.ReadAll(c); string(got) != early+", echo" || err != nil {
					t.Errorf("%q, %v", got, err)
				}
			})
		}
	}
}

// The error says which hop it was, and the reason is that of the proxy.
func TestHTTPSaysWhichHop(t *testing.T) {
	no := func(head string) func(net.Conn) { return httpProxy("HTTP/1.1 "+head+"\r\n\r\n", nil) }
	for _, tt := range []struct {
		name   string
		serve  func(net.Conn) // nil: nobody listens
		reason proxy.Reason
		says   string
	}{
		{"no proxy", nil, proxy.Refused, "PROXY: proxy unreachable: "},
		{"refused", no("502 x\r\nProxy-Status: sluice; error=connection_refused"), proxy.Refused, "PROXY: origin example.com:80: connect: the proxy answered 502 x (connection_refused)"},
		{"no host", no("502 x\r\nProxy-Status: sluice; error=dns_error"), proxy.NoHost, "PROXY: origin example.com:80: "},
		{"502", no("502 Bad Gateway"), proxy.HostUnreachable, "PROXY: origin example.com:80: "},
		{"504", no("504 Gateway Timeout"), proxy.Timeout, "PROXY: origin example.com:80: "},
		{"403", no("403 Forbidden"), proxy.Denied, "PROXY: origin example.com:80: "},
		{"405", no("405 Method Not Allowed"), proxy.Unsupported, "PROXY: origin example.com:80: "},
		{"407", no("407 Proxy Authentication Required"), proxy.Denied, "PROXY: connect: the proxy answered 407 Proxy Authentication Required: it wants a user"},
		{"silent close", func(c net.Conn) { c.Read(make([]byte, 4096)) }, proxy.Reset, "PROXY: connect: the proxy closed instead of answering"},
		{"other service", func(c net.Conn) { io.WriteString(c, "SSH-2.0-x\r\n"); proxytest.Sink(c) }, proxy.Other, `PROXY: connect: the answer is not HTTP/1: it begins with "SSH-2.0-x`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			proxytest.NoLeaks(t)
			at := proxy.TCP("127.0.0.1", 0)
			if tt.serve != nil {
				at = proxytest.Listen(t, "tcp", tt.serve).Addr
			} else {
				at.Port = proxytest.FreePort(t)
			}
			_, err := (&HTTP{Server: at}).DialStream(t.Context(), proxy.TCP("example.com", 80))
			want := "outbound: http " + strings.Replace(tt.says, "PROXY", at.String(), 1)
			if err == nil || !strings.HasPrefix(err.Error(), want) || proxy.ReasonOf(err) != tt.reason {
				t.Errorf("got %v (%v), want %s (%v)", err, proxy.ReasonOf(err), want, tt.reason)
			}
		})
	}
	t.Run("certificate", func(t *testing.T) {
		proxytest.NoLeaks(t)
		up := proxytest.Listen(t, "tls", proxytest.Echo)
		_, err := (&HTTP{Server: up.Addr, TLS: &tls.Config{}}).DialStream(t.Context(), proxy.TCP("example.com", 80))
		if _, ok := errors.AsType[*tls.CertificateVerificationError](err); !ok ||
			!strings.HasPrefix(err.Error(), "outbound: https "+up.Addr.String()+": TLS with the proxy: ") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("unix", func(t *testing.T) {
		_, err := new(HTTP).DialStream(t.Context(), proxy.Addr{Network: "unix", Host: "/x"})
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("got %v", err)
		}
	})
}

// A proxy that does not answer, or not to the end, is given up with the context, in TLS and after.
func TestHTTPContextEndsDial(t *testing.T) {
	for _, tt := range []struct {
		name  string
		tls   bool
		serve func(net.Conn)
	}{
		{"silent", false, proxytest.Sink},
		{"silent in TLS", true, proxytest.Sink},
		{"half an answer", false, func(c net.Conn) { io.WriteString(c, "HTTP/1.1 200 OK\r\n"); proxytest.Sink(c) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			proxytest.NoLeaks(t)
			up := proxytest.Listen(t, "tcp", tt.serve)
			h := &HTTP{Server: up.Addr}
			if tt.tls {
				h.TLS = &tls.Config{}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			_, err := h.DialStream(ctx, proxy.TCP("example.com", 80))
			if proxy.ReasonOf(err) != proxy.Timeout {
				t.Errorf("deadline: %v", err)
			}
			ctx, cancel = context.WithCancel(t.Context())
			time.AfterFunc(50*time.Millisecond, cancel)
			_, err = h.DialStream(ctx, proxy.TCP("example.com", 80))
			if proxy.ReasonOf(err) != proxy.Canceled {
				t.Errorf("cancelled: %v", err)
			}
		})
	}
}

// Chains: an HTTP proxy behind an HTTP proxy, with a reason that passes through both.
func TestHTTPVia(t *testing.T) {
	proxytest.NoLeaks(t)
	last := proxytest.Listen(t, "tcp", httpProxy("HTTP/1.1 502 x\r\nProxy-Status: a; error=connection_refused\r\n\r\n", nil))
	first := proxytest.Listen(t, "tcp", func(c net.Conn) {
		r, err := http.ReadRequest(bufio.NewReader(c))
		if err != nil {
			return
		}
		next, err := net.Dial("tcp", r.Host)
		if err != nil {
			return
		}
		io.WriteString(c, established)
		relay.Join(context.Background(), c, next)
	})
	h := &HTTP{Server: last.Addr, Via: &HTTP{Server: first.Addr}}
	_, err := h.DialStream(t.Context(), proxy.TCP("example.com", 80))
	if !errors.Is(err, syscall.ECONNREFUSED) || !strings.Contains(err.Error(), last.Addr.String()) {
		t.Errorf("got %v", err)
	}
}
