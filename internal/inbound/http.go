package inbound

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"syscall"
	"time"

	"github.com/sluice-proxy/sluice/internal/connect"
	"github.com/sluice-proxy/sluice/internal/proxy"
)

// HTTP is an HTTP proxy: for CONNECT (RFC 9110 section 9.3.6), which asks for a bare stream, and
// for plain requests with an http:// URL, which it forwards.
//
// A conn whose first request is CONNECT becomes a session of its own. One that begins with another
// is served request by request, for as long as the client keeps it open, and each conn to an origin
// that its requests need is a session. It is the client's alone and ends with the client's conn.
type HTTP struct {
	Listener
	Users Users // who may use it, by Proxy-Authorization: Basic; nil: everybody
}

// Serve takes clients until Close and returns after the last session is done.
func (s *HTTP) Serve(ctx context.Context, h proxy.Handler) error {
	return s.serve(ctx, func(ctx context.Context, c *client) { s.serveClient(ctx, h, c) })
}

func (s *HTTP) serveClient(ctx context.Context, h proxy.Handler, c *client) {
	got, err := readMethod(c)
	switch {
	case err != nil:
		c.fail(fmt.Errorf("inbound: http: %w", err))
	case bytes.HasPrefix(got, methodConnect):
		s.serveConnect(ctx, h, c, got)
	default:
		s.serveForward(ctx, h, c, got)
	}
}

var methodConnect = []byte("CONNECT ")

// readMethod reads until it is known whether the client begins with CONNECT, and returns what it has
// read. That is at least a byte, and one that a request can begin with.
func readMethod(c *client) ([]byte, error) {
	buf := append(make([]byte, 0, 2<<10), c.head...)
	c.head = nil
	for {
		got := bytes.TrimPrefix(buf, []byte("\r\n")) // an empty line is ignored (RFC 9112 section 2.2)
		if len(got) > 0 && string(got) != "\r" {
			if err := foreign(got[0]); err != nil {
				return nil, err
			}
			n := min(len(got), len(methodConnect))
			if n == len(methodConnect) || !bytes.Equal(got[:n], methodConnect[:n]) {
				return got, nil
			}
		}
		n, err := c.bare.Read(buf[len(buf):cap(buf)])
		if buf = buf[:len(buf)+n]; n == 0 && err != nil {
			return nil, fmt.Errorf("reading the request: %w", err)
		}
	}
}

// foreign says what client it is that begins with a byte that no request begins with.
func foreign(first byte) error {
	switch {
	case first == 4 || first == 5:
		return fmt.Errorf("the client speaks SOCKS%d: point it at a socks5 or mixed inbound", first)
	case first == 0x16:
		return errors.New("the client speaks TLS: its proxy URL must begin with http://, also for https sites")
	case first <= ' ' || first >= 0x7f:
		return fmt.Errorf("the client does not speak HTTP: it begins with byte %#02x", first)
	}
	return nil
}

// serveConnect is the short way for a client whose first request is CONNECT.
func (s *HTTP) serveConnect(ctx context.Context, h proxy.Handler, c *client, got []byte) {
	req, rest, err := connect.ReadRequest(c.bare, got)
	if err != nil {
		if answer, ok := connect.RefusalOf(err); ok {
			connect.WriteRefusal(c.bare, answer)
		}
		c.fail(fmt.Errorf("inbound: http: %w", err))
		return
	}
	user, err := s.authorize(req.User, req.Password, req.HasUser)
	if err != nil {
		connect.WriteRefusal(c.bare, unauthorized)
		c.fail(err)
		return
	}
	if err := c.handshook(); err != nil {
		c.fail(err)
		return
	}
	dst := proxy.TCP(req.Host, req.Port)
	h.HandleStream(ctx, c.flow(dst, user), &tunnel{client: c, rest: rest, dst: dst})
}

// tunnel is a client that waits for the answer to its CONNECT.
type tunnel struct {
	*client
	rest []byte // read behind the request's head
	dst  proxy.Addr
}

// Accept answers 200.
func (t *tunnel) Accept() (net.Conn, []byte, error) {
	t.SetWriteDeadline(time.Now().Add(replyTimeout))
	err := connect.WriteOK(t.bare)
	if err == nil {
		err = t.SetWriteDeadline(time.Time{})
	}
	if err != nil {
		t.Close()
		return nil, nil, fmt.Errorf("inbound: http: answering CONNECT: %w", err)
	}
	return t.bare, t.rest, nil
}

// Reject answers why not.
func (t *tunnel) Reject(err error) {
	t.SetWriteDeadline(time.Now().Add(replyTimeout))
	if connect.WriteRefusal(t.bare, refusal(err, t.dst)) != nil {
		t.Close()
		return
	}
	t.hangUp()
}

// authorize returns the name of a client that has proved it, and empty where none is asked for.
func (s *HTTP) authorize(user, password string, shown bool) (string, error) {
	switch {
	case s.Users == nil:
		return "", nil
	case !shown:
		return "", errNoUser
	case !s.Users.Check(user, password):
		return "", fmt.Errorf("inbound: http: user %q refused: name or password is wrong: %w", user, syscall.EACCES)
	}
	return user, nil
}

var errNoUser = fmt.Errorf("inbound: http: client without a user name and password: %w", syscall.EACCES)

var unauthorized = connect.Refusal{Code: http.StatusProxyAuthRequired,
	Text: "sluice: this proxy wants a user name and a password that it knows (curl: -U user)."}

// refusal is the answer to a client whose destination cannot be reached because of err. It says
// which reason that is and not what err says, which may name hops that are none of the client's business.
func refusal(err error, dst proxy.Addr) connect.Refusal {
	r := refusals[proxy.ReasonOf(err)]
	if r.Code == 0 {
		r = refusals[proxy.Other]
	}
	r.Text = fmt.Sprintf("sluice: cannot connect to %v: %s.", dst, r.Text)
	return r
}

// refusals are the answers by reason, with the status codes and types of RFC 9209 section 2.3.
var refusals = map[proxy.Reason]connect.Refusal{
	proxy.Canceled:        {Code: 503, Error: "connection_terminated", Text: "given up, the proxy stops or the session was ended"},
	proxy.Timeout:         {Code: 504, Error: "connection_timeout", Text: "no answer in time"},
	proxy.Denied:          {Code: 403, Error: "http_request_denied", Text: "denied by a rule, here or at a proxy behind"},
	proxy.NoHost:          {Code: 502, Error: "dns_error", Text: "there is no host of that name"},
	proxy.Refused:         {Code: 502, Error: "connection_refused", Text: "connection refused, nobody listens there"},
	proxy.NetUnreachable:  {Code: 502, Error: "destination_ip_unroutable", Text: "there is no route to its network"},
	proxy.HostUnreachable: {Code: 502, Error: "destination_ip_unroutable", Text: "there is no way to the host"},
	proxy.Reset:           {Code: 502, Error: "connection_terminated", Text: "the connection was broken while it was made"},
	proxy.Unsupported:     {Code: 501, Error: "proxy_configuration_error", Text: "that is nothing this proxy can do"},
	proxy.Other:           {Code: 502, Error: "proxy_internal_error", Text: "it failed for a reason that stands in the proxy's log"},
}
