package socks5

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
)

// Server is the server's half. The zero value lets everyone in.
type Server struct {
	// Check says whether a client may come in with this user name and password; then one has to be
	// given. It is called once a handshake, from the goroutine that runs it, and must be safe for use
	// by many. With a nil Check anyone comes in, and a client that can only come with a name
	// and a password may have any.
	Check func(user, password string) bool
}

// Request is what a client asks for.
type Request struct {
	Command Command // one of the three, or a value that RFC 1928 does not have
	Addr    Addr    // as it came, except that an IP address, also one sent as a name, is in its shortest form
	User    string  // the name that Check let in; empty where Check is nil
}

// Handshake reads from rw up to the end of the client's request, and not a byte more. The request is
// not yet answered: the caller does what it asks for, or not, and says so by [WriteReply].
//
// On an error the client has been told, as far as the protocol has words for it and rw took them, and
// the caller closes the conn. The error wraps [ErrMalformed] for a client that does not speak the protocol, and
// equals syscall.EACCES for one that may not come in; a conn that ended early is
// [io.ErrUnexpectedEOF], and one that ended before its first byte is [io.EOF].
//
// Handshake waits for the client without a limit of its own: rw needs a deadline.
func (s *Server) Handshake(rw io.ReadWriter) (Request, error) {
	m := &message{r: rw}
	user, err := s.greet(rw, m)
	if err != nil {
		return Request{}, err
	}
	req, err := readRequest(rw, m)
	req.User = user
	return req, err
}

// greet reads the greeting and lets the client in, RFC 1928 section 3.
func (s *Server) greet(w io.Writer, m *message) (user string, err error) {
	// The shortest greeting has three bytes. One without methods is wrong, and known after two.
	if err := m.need(2, 3); err != nil {
		return "", readError("the client's greeting", err)
	}
	if m.buf[0] != version {
		return "", stranger(w, m.buf[0], m.buf[1])
	}
	end := 2 + int(m.buf[1])
	if err := m.need(end, end); err != nil {
		return "", readError("the client's greeting", err)
	}
	methods := m.buf[2:end]
	switch {
	case len(methods) == 0:
		choose(w, methodRefused)
		return "", malformed("greeting: no methods of authentication")
	case s.Check == nil && slices.Contains(methods, methodNone):
		return "", choose(w, methodNone)
	case slices.Contains(methods, methodPassword):
		if err := choose(w, methodPassword); err != nil {
			return "", err
		}
		return s.authenticate(w, m)
	}
	choose(w, methodRefused)
	if s.Check != nil {
		return "", authError("client offers no user name and password, and nobody comes in without")
	}
	return "", authError(fmt.Sprintf("client offers no method of authentication that is known here (% x)", methods))
}

// choose tells the client the method to go on with.
func choose(w io.Writer, method byte) error {
	if _, err := w.Write([]byte{version, method}); err != nil {
		return fmt.Errorf("socks5: answering the client's greeting: %w", err)
	}
	return nil
}

// authenticate reads user name and password, RFC 1929 section 2. It takes empty ones, which the RFC
// does not have but clients send: they are for Check to judge.
func (s *Server) authenticate(w io.Writer, m *message) (user string, err error) {
	const what = "the client's user name and password"
	m.next()
	if err := m.need(2, 3); err != nil {
		return "", readError(what, err)
	}
	if m.buf[0] != authVersion {
		letIn(w, false)
		return "", malformed("user name and password: version %d", m.buf[0])
	}
	end := 2 + int(m.buf[1])
	if err := m.need(end+1, end+1); err != nil {
		return "", readError(what, err)
	}
	user = string(m.buf[2:end])
	begin := end + 1
	end = begin + int(m.buf[end])
	if err := m.need(end, end); err != nil {
		return "", readError(what, err)
	}
	if s.Check == nil {
		return "", letIn(w, true)
	}
	if !s.Check(user, string(m.buf[begin:end])) {
		letIn(w, false)
		return "", authError(fmt.Sprintf("user %q: wrong name or password", user))
	}
	return user, letIn(w, true)
}

// letIn tells the client whether its user name and password are good.
func letIn(w io.Writer, ok bool) error {
	status := byte(0)
	if !ok {
		status = 1
	}
	if _, err := w.Write([]byte{authVersion, status}); err != nil {
		return fmt.Errorf("socks5: answering the client's user name and password: %w", err)
	}
	return nil
}

// readRequest reads the request, RFC 1928 section 4. Its reserved byte may be anything.
func readRequest(w io.Writer, m *message) (Request, error) {
	m.next()
	if err := m.need(1, shortest); err != nil {
		return Request{}, readError("the client's request", err)
	}
	if m.buf[0] != version {
		return Request{}, malformed("request: version %d", m.buf[0])
	}
	addr, err := m.readAddr()
	if errors.Is(err, errAddrType) {
		WriteReply(w, AddressUnsupported, netip.AddrPort{})
		return Request{}, malformed("request: %w", err)
	}
	if err != nil {
		return Request{}, readError("the client's request", err)
	}
	host, ok := normalHost(addr.Host)
	if !ok {
		WriteReply(w, GeneralFailure, netip.AddrPort{})
		return Request{}, malformed("request: %q is not the name of a host", addr.Host)
	}
	return Request{Command: Command(m.buf[1]), Addr: Addr{host, addr.Port}}, nil
}

// WriteReply answers a request, RFC 1928 section 6. bound is the address that the server has for
// the client: for CONNECT the near end of the connection to the host. The zero value is written
// as 0.0.0.0:0, which says nothing and is what most servers write.
//
// After any reply but [Succeeded] the caller closes the conn.
func WriteReply(w io.Writer, r Reply, bound netip.AddrPort) error {
	ip := bound.Addr().Unmap()
	if !ip.IsValid() {
		ip = netip.IPv4Unspecified()
	}
	b := make([]byte, 0, 4+16+2)
	b = appendIP(append(b, version, byte(r), 0), ip)
	b = binary.BigEndian.AppendUint16(b, bound.Port())
	if _, err := w.Write(b); err != nil {
		return fmt.Errorf("socks5: replying to the client: %w", err)
	}
	return nil
}

// readError says which message could not be read.
func readError(what string, err error) error {
	return fmt.Errorf("socks5: reading %s: %w", what, err)
}

// stranger tells a client that speaks another protocol, by its first two bytes, that this is
// none of its ports, in its own words where that takes one line.
func stranger(w io.Writer, first, second byte) error {
	switch {
	case first == 4:
		// The SOCKS4 reply: version 0, code 91 "rejected or failed", and six bytes to be ignored.
		w.Write([]byte{0, 91, 0, 0, 0, 0, 0, 0})
		return malformed("greeting: client speaks SOCKS4, and only SOCKS5 is spoken here")
	case isUpper(first) && isUpper(second):
		io.WriteString(w, "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: text/plain\r\n\r\n"+
			"This is a SOCKS5 proxy, and HTTP was spoken to it.\r\n")
		return malformed("greeting: client speaks HTTP, and only SOCKS5 is spoken here")
	case first == 0x16 && second == 3:
		return malformed("greeting: client speaks TLS, and only SOCKS5 without TLS is spoken here")
	}
	return malformed("greeting: version %d, and not 5", first)
}

func isUpper(c byte) bool { return 'A' <= c && c <= 'Z' }
