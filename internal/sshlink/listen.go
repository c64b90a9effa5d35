package sshlink

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

// backlog is how many streams may wait to be accepted, as at a socket.
const backlog = 128

// forwardRequest asks for a listener, RFC 4254 section 7.1.
type forwardRequest struct {
	Host string
	Port uint32
}

// forwarded announces a stream that arrived at one.
type forwarded struct {
	Host       string
	Port       uint32
	Origin     string
	OriginPort uint32
}

// forwardedUnix does the same for Unix sockets: PROTOCOL section 2.4 of OpenSSH.
type forwardedUnix struct {
	Path     string
	Reserved string
}

// Listener listens at an address of the server. It outlives connections: after each it is asked for
// again. What it accepts is an [*Incoming], a stream that is still to be granted or refused.
type Listener struct {
	link    *Link
	network string
	host    string // or the path
	queue   chan *Incoming
	closed  chan struct{}
	once    sync.Once

	// guarded by link.mu
	port uint16   // for good, once the server has chosen it
	on   *session // where it is listened at; nil: nowhere, yet
}

var _ net.Listener = (*Listener)(nil)

// Listen asks the server to listen: network is "tcp" and address "host:port", or "unix" and a path. An
// empty host is all addresses of the server, which it allows or not (GatewayPorts); for port 0 it
// chooses one, and keeps to it as long as it can. Listen waits for the connection while ctx lets it.
func (l *Link) Listen(ctx context.Context, network, address string) (*Listener, error) {
	ln := &Listener{link: l, network: network, queue: make(chan *Incoming, backlog), closed: make(chan struct{})}
	switch network {
	case "tcp":
		host, service, err := net.SplitHostPort(address)
		if err != nil {
			return nil, fmt.Errorf("sshlink: %w", err)
		}
		port, err := strconv.ParseUint(service, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("sshlink: %w", err)
		}
		ln.host, ln.port = host, uint16(port)
	case "unix":
		ln.host = address
	default:
		return nil, fmt.Errorf("sshlink: %s: network %s: %w", l.Name, network, errors.ErrUnsupported)
	}
	s, err := l.session(ctx)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { s.wire.fail(context.Cause(ctx)) })
	defer stop()
	if err := s.listen(ln); err != nil {
		return nil, fmt.Errorf("sshlink: %s: cannot listen at %v there: %w", l.Name, ln.Addr(), err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, ErrClosed
	}
	l.listeners = append(l.listeners, ln)
	switch {
	case l.up == s:
	case l.up == nil: // lost meanwhile
		l.ensure()
	case l.up.begin():
		go l.up.renew([]*Listener{ln})
	}
	return ln, nil
}

// errNoListen is a server's no to a listener. It gives no reason.
var errNoListen = &noListenError{}

type noListenError struct{}

func (*noListenError) Error() string {
	return "the server refuses (the address is in use, or forwarding or the address is not allowed)"
}
func (*noListenError) Is(target error) bool { return target == syscall.EACCES }

// listen asks for ln.
func (s *session) listen(ln *Listener) error {
	l := s.link
	kind, payload := "streamlocal-forward@openssh.com", ssh.Marshal(&struct{ Path string }{ln.host})
	l.mu.Lock()
	port := ln.port
	l.mu.Unlock()
	if ln.network == "tcp" {
		kind, payload = "tcpip-forward", ssh.Marshal(&forwardRequest{ln.host, uint32(port)})
	}
	ok, reply, err := s.conn.SendRequest(kind, true, payload)
	if err != nil {
		s.wire.fail(err)
		return &lostError{s.wire.err}
	}
	if !ok {
		return errNoListen
	}
	if ln.network == "tcp" && port == 0 {
		var chosen struct{ Port uint32 }
		if err := ssh.Unmarshal(reply, &chosen); err != nil || chosen.Port == 0 || chosen.Port > 65535 {
			return errors.New("the server does not say which port it has chosen")
		}
		port = uint16(chosen.Port)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	ln.port, ln.on = port, s
	return nil
}

// renew asks for listeners again, on a new connection. It tries for as long as that lasts: the server may
// hold on to their addresses until it has noticed that the old connection is gone.
func (s *session) renew(listeners []*Listener) {
	defer s.all.Done()
	pause, said := firstPause, false
	for {
		var err error
		listeners = slices.DeleteFunc(listeners, func(ln *Listener) bool {
			if ln.isClosed() {
				return true
			}
			e := s.listen(ln)
			if e != nil {
				err = fmt.Errorf("%v: %w", ln.Addr(), e)
			}
			return e == nil
		})
		switch {
		case len(listeners) == 0:
			if said {
				s.link.Log.Info("SSH: listening again", "server", s.link.Name)
			}
			return
		case !said && !s.wire.isDead():
			said = true
			s.link.Log.Warn("SSH: cannot listen at the server; trying again", "server", s.link.Name, "err", err)
		}
		select {
		case <-time.After(pause/2 + rand.N(pause/2)):
		case <-s.wire.dead:
			return
		}
		pause = min(2*pause, maxPause)
	}
}

// incoming hands a stream that the server opens to its listener. It does not block.
func (l *Link) incoming(s *session, ch ssh.NewChannel) {
	in := &Incoming{ch: ch, s: s}
	var network, host string
	var port uint32
	switch ch.ChannelType() {
	case "forwarded-tcpip":
		var f forwarded
		if err := ssh.Unmarshal(ch.ExtraData(), &f); err != nil {
			ch.Reject(ssh.ConnectionFailed, "malformed request")
			return
		}
		network, host, port = "tcp", f.Host, f.Port
		in.local, in.remote = tcpAddr(f.Host, f.Port), tcpAddr(f.Origin, f.OriginPort)
	case "forwarded-streamlocal@openssh.com":
		var f forwardedUnix
		if err := ssh.Unmarshal(ch.ExtraData(), &f); err != nil {
			ch.Reject(ssh.ConnectionFailed, "malformed request")
			return
		}
		network, host = "unix", f.Path
		in.local, in.remote = Addr{"unix", f.Path}, Addr{"unix", ""}
	default:
		ch.Reject(ssh.UnknownChannelType, "not supported")
		return
	}
	l.mu.Lock()
	i := slices.IndexFunc(l.listeners, func(ln *Listener) bool {
		return ln.network == network && ln.host == host && uint32(ln.port) == port
	})
	if i < 0 && network == "tcp" { // servers may tell the address in a form of their own
		i = slices.IndexFunc(l.listeners, func(ln *Listener) bool { return ln.network == network && uint32(ln.port) == port })
	}
	var ln *Listener
	if i >= 0 {
		ln = l.listeners[i]
	}
	l.mu.Unlock()
	if ln == nil || ln.isClosed() {
		ch.Reject(ssh.Prohibited, "nobody listens")
		return
	}
	select {
	case ln.queue <- in:
		if ln.isClosed() {
			ln.drain()
		}
	default:
		ch.Reject(ssh.ResourceShortage, "too many streams wait")
	}
}

// tcpAddr returns an address at the far end: a [*net.TCPAddr] where host is an IP address.
func tcpAddr(host string, port uint32) net.Addr {
	if ip, err := netip.ParseAddr(host); err == nil && port <= 65535 {
		return net.TCPAddrFromAddrPort(netip.AddrPortFrom(ip, uint16(port)))
	}
	return Addr{"tcp", net.JoinHostPort(host, strconv.Itoa(int(port)))}
}

// Accept implements net.Listener. The conn is an [*Incoming].
func (ln *Listener) Accept() (net.Conn, error) {
	select {
	case <-ln.closed: // also if streams wait
		return nil, ErrClosed
	default:
	}
	select {
	case in := <-ln.queue:
		return in, nil
	case <-ln.closed:
		return nil, ErrClosed
	}
}

// Addr returns the address at the server: for port 0, the one that it has chosen.
func (ln *Listener) Addr() net.Addr {
	if ln.network == "unix" {
		return Addr{"unix", ln.host}
	}
	ln.link.mu.Lock()
	defer ln.link.mu.Unlock()
	return Addr{"tcp", net.JoinHostPort(ln.host, strconv.Itoa(int(ln.port)))}
}

// Close ends the listening, and refuses the streams that wait. It does not wait for the server.
func (ln *Listener) Close() error {
	l := ln.link
	l.mu.Lock()
	l.listeners = slices.DeleteFunc(l.listeners, func(o *Listener) bool { return o == ln })
	s, port := ln.on, ln.port
	ln.on = nil
	l.mu.Unlock()
	ln.shut()
	ln.drain()
	if s != nil && s.begin() {
		go s.unlisten(ln, port)
	}
	return nil
}

// unlisten tells the server that ln is over.
func (s *session) unlisten(ln *Listener, port uint16) {
	defer s.all.Done()
	kind, payload := "cancel-streamlocal-forward@openssh.com", ssh.Marshal(&struct{ Path string }{ln.host})
	if ln.network == "tcp" {
		kind, payload = "cancel-tcpip-forward", ssh.Marshal(&forwardRequest{ln.host, uint32(port)})
	}
	s.conn.SendRequest(kind, true, payload)
}

// shut frees Accept.
func (ln *Listener) shut() { ln.once.Do(func() { close(ln.closed) }) }

// drain refuses what nobody accepts any more.
func (ln *Listener) drain() {
	for {
		select {
		case in := <-ln.queue:
			in.Reject(net.ErrClosed)
		default:
			return
		}
	}
}

func (ln *Listener) isClosed() bool {
	select {
	case <-ln.closed:
		return true
	default:
		return false
	}
}

// Incoming is a stream that has arrived at a [Listener], and whose client still waits to hear whether
// it is granted. It is a conn so that it can come from a net.Listener, but carries nothing: call
// Accept or Reject, once. Close is a Reject.
type Incoming struct {
	ch            ssh.NewChannel
	s             *session
	local, remote net.Addr
	once          sync.Once
}

// Accept grants the stream and returns it, a [*Conn].
func (in *Incoming) Accept() (net.Conn, error) {
	var c *Conn
	err := error(net.ErrClosed)
	in.once.Do(func() {
		var ch ssh.Channel
		var requests <-chan *ssh.Request
		if ch, requests, err = in.ch.Accept(); err == nil {
			c = in.s.newConn(ch, requests, in.local, in.remote)
		}
	})
	if err != nil {
		if in.s.wire.isDead() {
			err = &lostError{in.s.wire.err}
		}
		return nil, fmt.Errorf("sshlink: %s: %w", in.s.link.Name, err)
	}
	return c, nil
}

// Reject refuses the stream for the reason err, of which the server learns the kind and not the text.
func (in *Incoming) Reject(err error) {
	in.once.Do(func() {
		reason, words := ssh.ConnectionFailed, "connect failed"
		switch {
		case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
			reason, words = ssh.Prohibited, "not allowed"
		case errors.Is(err, syscall.ECONNREFUSED):
			words = "Connection refused"
		case errors.Is(err, context.DeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT):
			words = "Connection timed out"
		}
		in.ch.Reject(reason, words)
	})
}

// Close implements net.Conn.
func (in *Incoming) Close() error {
	in.Reject(net.ErrClosed)
	return nil
}

// Abort implements relay.Aborter. It is Close.
func (in *Incoming) Abort() error { return in.Close() }

// Read implements net.Conn. It fails: nothing comes before Accept.
func (in *Incoming) Read([]byte) (int, error) { return 0, errors.ErrUnsupported }

// Write implements net.Conn. It fails as Read does.
func (in *Incoming) Write([]byte) (int, error) { return 0, errors.ErrUnsupported }

// LocalAddr returns the address that the client has connected to, as the server tells it.
func (in *Incoming) LocalAddr() net.Addr { return in.local }

// RemoteAddr returns the client's address, as the server tells it.
func (in *Incoming) RemoteAddr() net.Addr { return in.remote }

// SetDeadline implements net.Conn. There is nothing to wait for, and nothing to do.
func (in *Incoming) SetDeadline(time.Time) error { return nil }

// SetReadDeadline implements net.Conn, as SetDeadline does.
func (in *Incoming) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline implements net.Conn, as SetDeadline does.
func (in *Incoming) SetWriteDeadline(time.Time) error { return nil }
