package socks5

import (
	"errors"
	"fmt"
	"io"
)

// Client is the client's half. The zero value comes without a name.
type Client struct {
	// User and Password are shown to a server that asks for them, as they are: only the conn can
	// keep them secret. With an empty User none are offered. At most 255 bytes each.
	User, Password string
}

// Handshake asks the server at the other end of rw for cmd and dst and returns the address that the
// server gives for it, which for CONNECT means little and is often 0.0.0.0:0; its host is empty where
// the server sent none that could be one. A name in dst is sent as a name, an IP address as an address.
//
// Handshake reads not a byte behind the server's reply: what rw yields then comes from dst. It waits
// for each answer before it goes on, since there are servers that take what comes with the greeting
// for a part of it.
//
// A server that could not do it is a [Reply]. One that does not let the client in is an error that
// equals syscall.EACCES. One that does not speak the protocol is [ErrMalformed], and one that closes
// instead of answering [io.ErrUnexpectedEOF]. After an error the conn is of no more use, and the
// caller closes it.
//
// Handshake waits for the server without a limit of its own: the caller interrupts it by a deadline
// or by closing the conn.
func (c *Client) Handshake(rw io.ReadWriter, cmd Command, dst Addr) (bound Addr, err error) {
	request, err := appendAddr([]byte{version, byte(cmd), 0}, dst)
	if err != nil {
		return Addr{}, err
	}
	if len(c.User) > 255 || len(c.Password) > 255 {
		return Addr{}, errors.New("socks5: user name or password longer than 255 bytes")
	}
	if c.User == "" && c.Password != "" {
		return Addr{}, errors.New("socks5: password without a user name")
	}
	m := &message{r: rw}
	if err := c.greet(rw, m); err != nil {
		return Addr{}, err
	}
	if _, err := rw.Write(request); err != nil {
		return Addr{}, fmt.Errorf("socks5: sending the request: %w", err)
	}
	return readReply(m)
}

// greet gets the client in, RFC 1928 section 3.
func (c *Client) greet(w io.Writer, m *message) error {
	greeting := []byte{version, 1, methodNone}
	if c.User != "" {
		greeting = []byte{version, 2, methodNone, methodPassword}
	}
	if _, err := w.Write(greeting); err != nil {
		return fmt.Errorf("socks5: sending the greeting: %w", err)
	}
	if err := m.need(2, 2); err != nil {
		return answerError("the greeting", err)
	}
	switch v, method := m.buf[0], m.buf[1]; {
	case v == 'H' && method == 'T':
		return malformed("answer: server speaks HTTP, not SOCKS5")
	case v != version:
		return malformed("answer: version %d, not 5: the server does not speak SOCKS5", v)
	case method == methodNone:
		return nil
	case method == methodPassword && c.User != "":
		return c.authenticate(w, m)
	case method == methodRefused && c.User == "":
		return authError("the proxy wants authentication: give it a user name and password")
	case method == methodRefused:
		return authError("the proxy lets nobody in by user name and password: it wants another way, " +
			"or does not serve this machine")
	default:
		return malformed("answer: server chose method %d, which was not offered", method)
	}
}

// authenticate shows user name and password, RFC 1929 section 2.
func (c *Client) authenticate(w io.Writer, m *message) error {
	b := make([]byte, 0, len(m.buf))
	b = append(b, authVersion, byte(len(c.User)))
	b = append(b, c.User...)
	b = append(b, byte(len(c.Password)))
	b = append(b, c.Password...)
	if _, err := w.Write(b); err != nil {
		return fmt.Errorf("socks5: sending user name and password: %w", err)
	}
	m.next()
	if err := m.need(2, 2); err != nil {
		return answerError("user name and password", err)
	}
	// Some servers have 5, the version of SOCKS, where RFC 1929 has its own.
	if m.buf[0] != authVersion && m.buf[0] != version {
		return malformed("answer to user name and password: version %d", m.buf[0])
	}
	if m.buf[1] != 0 {
		return authError("the proxy refused the user name or password: check them")
	}
	return nil
}

// ReadReply reads the second reply to BIND, RFC 1928 section 4, and not a byte more: the address is that of the host that has connected.
// Its errors are those of [Client.Handshake].
func ReadReply(r io.Reader) (peer Addr, err error) { return readReply(&message{r: r}) }

// readReply reads the reply, RFC 1928 section 6. Of one that refuses only the first two bytes count:
// there are servers that send no more.
func readReply(m *message) (bound Addr, err error) {
	m.next()
	if err := m.need(2, shortest); err != nil {
		return Addr{}, answerError("the request", err)
	}
	if m.buf[0] != version {
		return Addr{}, malformed("reply: version %d", m.buf[0])
	}
	if r := Reply(m.buf[1]); r != Succeeded {
		return Addr{}, r
	}
	bound, err = m.readAddr()
	if errors.Is(err, errAddrType) {
		return Addr{}, malformed("reply: %w", err)
	}
	if err != nil {
		return Addr{}, answerError("the request", err)
	}
	if host, ok := normalHost(bound.Host); ok {
		bound.Host = host
	} else {
		bound.Host = ""
	}
	return bound, nil
}

// answerError says which message the server left without an answer.
func answerError(to string, err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("socks5: the server closed instead of answering %s: %w", to, io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("socks5: waiting for the answer to %s: %w", to, err)
}
