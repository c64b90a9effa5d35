// Package inbound takes clients in: each file holds one protocol, and accept.go the loop that all
// share. An inbound reads what its client wants, within a deadline, and hands it over as a
// [proxy.Flow] with a [proxy.Pending]; it neither dials nor relays.
package inbound

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/sockopt"
	"github.com/sluice-proxy/sluice/relay"
)

// DefaultHandshakeTimeout is how long a client may take to say what it wants.
const DefaultHandshakeTimeout = 10 * time.Second

// Listener holds the settings that all stream inbounds share, and is embedded in them. It may be
// copied: copies made after Listen are the same listener.
type Listener struct {
	Name string      // for flows and logs
	Addr proxy.Addr  // where to listen
	Mode fs.FileMode // permissions of a Unix socket; 0: 0600, only this user

	// Allow are the clients let in (empty: all), Deny those refused although allowed. They are
	// compared with the other end of the accepted conn. With AcceptProxy that is the load balancer,
	// which is the one to be trusted: what its header says is a claim. Clients of a Unix socket
	// have no address; Mode is for them.
	Allow, Deny []netip.Prefix
	MaxConns    int  // sessions at a time; 0: no limit. At the limit accepting pauses
	AcceptProxy bool // every client must begin with a PROXY header (v1 or v2), which says its true address

	// ReusePort shares the port, which must be one of TCP, with other sockets that ask for the same and belong to the same user
	// (SO_REUSEPORT). Linux spreads new clients over them. A listener that closes resets the clients that nobody has accepted yet.
	ReusePort bool

	HandshakeTimeout time.Duration // from accept to the end of the handshake; 0: 10 s
	Log              *slog.Logger  // nil: silent

	control sockopt.Control // options of the listening socket; nil: none
	pool    *slots          // that of another listener, whose sessions count as ours do; nil: its own
	s       *listening      // nil before Listen
}

// listening is what a Listener is once bound.
type listening struct {
	ln net.Listener
	// silent: there is no handshake, so that conns need not be read, and are Sockets.
	silent bool
	log    *slog.Logger
	slots  *slots
	all    sync.WaitGroup
	lines  atomic.Int32 // that wait to be logged
	done   func()       // finish: made once

	strangers ration

	// Of accept alone: when there was last no slot, and when accepting last failed.
	full, failing episode

	once   sync.Once
	closed chan struct{}
	err    error // of ln.Close

	mu      sync.Mutex
	shaking map[*client]struct{} // clients in their handshake; nil once closed
}

// Listen binds the address. An address in use, a port that needs privileges and the like are
// errors that say what can be done. A Unix socket whose process is gone is replaced.
func (l *Listener) Listen(ctx context.Context) error {
	if l.s != nil {
		return errors.New("inbound: Listen was called twice")
	}
	control := l.control
	if l.ReusePort {
		if l.Addr.Network != "tcp" {
			return fmt.Errorf("inbound: %v: only a TCP port can be shared", l.Addr)
		}
		control = sockopt.ReusePort
		if l.control != nil {
			control = sockopt.All(l.control, sockopt.ReusePort)
		}
	}
	ln, err := bind(ctx, l.Addr, l.Mode, control)
	if l.ReusePort && errors.Is(err, syscall.EADDRINUSE) {
		err = &bindError{strings.TrimPrefix(err.Error(), "inbound: ") + "; to share it, both must ask for that (reuse-port) " +
			"and belong to the same user", err}
	}
	if err != nil {
		return err
	}
	l.listenOn(ln)
	return nil
}

func (l *Listener) listenOn(ln net.Listener) {
	if l.Log == nil {
		l.Log = slog.New(slog.DiscardHandler)
	}
	l.s = &listening{
		ln:      ln,
		log:     l.Log.With("inbound", l.Name),
		closed:  make(chan struct{}),
		shaking: make(map[*client]struct{}),
	}
	l.s.done = l.s.finish
	if l.s.slots = l.pool; l.s.slots == nil {
		l.s.slots = newSlots(l.MaxConns)
	}
}

// silent says, after Listen, that the protocol has no handshake: its conns are neither read nor written before
// they are given away, and can be Sockets.
func (l *Listener) silent() error {
	ln, err := relay.SocketListener(l.s.ln)
	if err != nil {
		l.s.close()
		return fmt.Errorf("inbound: listen at %v: %w", l.Addr, err)
	}
	l.s.ln, l.s.silent = ln, true
	return nil
}

// BoundAddr returns the address that Listen has bound: for port 0, the one the kernel chose.
// It is nil before Listen.
func (l *Listener) BoundAddr() net.Addr {
	if l.s == nil {
		return nil
	}
	return l.s.ln.Addr()
}

// Close stops accepting and closes the clients that are in their handshake; sessions go on.
// It may be called twice and from any goroutine once Listen has returned.
func (l *Listener) Close() error {
	if l.s == nil {
		return nil
	}
	l.s.close()
	return l.s.err
}

func (s *listening) close() {
	s.once.Do(func() {
		close(s.closed)
		s.err = s.ln.Close()
		s.mu.Lock()
		defer s.mu.Unlock()
		for c := range s.shaking {
			c.Close() // its handler sees net.ErrClosed and calls fail
		}
		s.shaking = nil
	})
}

func (s *listening) isClosed() bool {
	select {
	case <-s.closed:
		return true
	default:
		return false
	}
}

// serve accepts clients and runs handle for each in a goroutine of its own, until Close or the end
// of ctx; it returns after the last session is done. handle owns the client: it ends with c.fail, or
// with HandleStream and a Pending whose Done is c.Done.
func (l *Listener) serve(ctx context.Context, handle func(context.Context, *client)) error {
	s := l.s
	if s == nil {
		return errors.New("inbound: Serve was called before Listen")
	}
	stop := context.AfterFunc(ctx, s.close)
	defer stop()
	for {
		conn := s.accept()
		if conn == nil {
			break
		}
		c := l.admit(conn)
		if c == nil {
			s.release()
			continue
		}
		s.all.Add(2) // the handler, and the session, which may outlive it
		go l.run(ctx, c, handle)
	}
	s.close() // wait for the one under way
	s.all.Wait()
	return nil
}

// The pauses after an accept that failed for want of descriptors or memory.
const (
	firstPause = 5 * time.Millisecond
	maxPause   = time.Second
)

// accept returns the next conn, with a slot taken for it; nil once the listener is closed. It
// outlasts all errors: a listener that ends, or spins, for want of descriptors is worse than one
// that waits. Clients wait in the kernel's queue meanwhile.
func (s *listening) accept() net.Conn {
	if !s.acquire() {
		return nil
	}
	said := false
	for pause := time.Duration(0); ; {
		conn, err := s.ln.Accept()
		if err == nil {
			if said {
				s.log.Info("accepting again")
			}
			return conn
		}
		if s.isClosed() {
			s.release()
			return nil
		}
		if isGone(err) {
			continue
		}
		if s.failing.begins() {
			s.log.Warn("accepting paused", "err", err, "hint", acceptHint(err))
			said = true
		}
		pause = min(max(2*pause, firstPause), maxPause)
		select {
		case <-time.After(pause):
		case <-s.closed:
			s.release()
			return nil
		}
	}
}

// saying bounds the lines that wait for a log that does not take them.
const saying = 64

// say logs. Where clients are accepted by the relay's loop, which a log that blocks must not hold up, it does so in a goroutine; a
// line that comes while too many wait is dropped.
func (s *listening) say(level slog.Level, message string, args ...any) {
	if !s.silent {
		s.log.Log(context.Background(), level, message, args...)
		return
	}
	if s.lines.Add(1) > saying {
		s.lines.Add(-1)
		return
	}
	s.all.Go(func() {
		defer s.lines.Add(-1)
		s.log.Log(context.Background(), level, message, args...)
	})
}

// An episode is a time of trouble, which is logged once: when it begins.
type episode struct{ last time.Time }

// episodeGap is how long it must have been quiet for trouble to be a new episode.
const episodeGap = 10 * time.Second

// begins is called at each trouble and says whether a new episode begins with it.
func (e *episode) begins() bool {
	now := time.Now()
	defer func() { e.last = now }()
	return e.last.IsZero() || now.Sub(e.last) >= episodeGap
}

// isGone says whether err is about the client that was to be accepted and not about the listener.
// The kernel has taken that client off the queue, so that trying again at once cannot spin.
func isGone(err error) bool {
	return errors.Is(err, syscall.ECONNABORTED) || errors.Is(err, syscall.EPROTO) || errors.Is(err, syscall.EINTR)
}

func acceptHint(err error) string {
	switch {
	case errors.Is(err, syscall.EMFILE):
		return "this process may open no more files: raise its limit (ulimit -n, LimitNOFILE=)"
	case errors.Is(err, syscall.ENFILE):
		return "the machine may open no more files: raise fs.file-max"
	case errors.Is(err, syscall.ENOBUFS), errors.Is(err, syscall.ENOMEM):
		return "the kernel is short of memory for sockets"
	}
	return "trying again"
}

// acquire takes a slot, waiting for one at the limit; false once the listener is closed.
func (s *listening) acquire() bool {
	for !s.slots.take() {
		s.sayFull()
		select {
		case <-s.slots.freed:
		case <-s.closed:
			return false
		}
	}
	return true
}

func (s *listening) sayFull() {
	if s.full.begins() {
		s.say(slog.LevelWarn, "accepting paused: as many sessions as max-conns allows", "max-conns", s.slots.max)
	}
}

func (s *listening) release() { s.slots.release() }

// finish ends a session: its slot is free, and serve need not wait for it.
func (s *listening) finish() {
	s.release()
	s.all.Done()
}

// slots counts sessions, up to a limit.
type slots struct {
	max   int           // 0: no limit
	freed chan struct{} // gets a value when there is a slot again after there was none

	mu    sync.Mutex
	used  int
	gates []*relay.Acceptor // those that pause while there is no slot
}

func newSlots(most int) *slots { return &slots{max: most, freed: make(chan struct{}, 1)} }

// addGate has a paused whenever there is no slot.
func (s *slots) addGate(a *relay.Acceptor) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gates = append(s.gates, a)
}

// pauseFull pauses all gates if there is no slot, and says whether that is so.
func (s *slots) pauseFull() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.max == 0 || s.used < s.max {
		return false
	}
	for _, a := range s.gates {
		a.Pause()
	}
	return true
}

func (s *slots) take() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.max > 0 && s.used >= s.max {
		return false
	}
	s.used++
	return true
}

// force takes a slot, also beyond the limit.
func (s *slots) force() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used++
}

func (s *slots) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used--
	if s.max == 0 || s.used != s.max-1 {
		return
	}
	select {
	case s.freed <- struct{}{}:
	default:
	}
	for _, a := range s.gates {
		a.Resume()
	}
}

// admit makes a client of an accepted conn; nil if it is not let in.
func (l *Listener) admit(conn net.Conn) *client {
	c := &client{bare: conn, l: l, peer: addrPort(conn.RemoteAddr()), local: addrPort(conn.LocalAddr())}
	if !l.allows(c.peer.Addr()) {
		l.s.stranger(slog.LevelInfo, "client refused by allow/deny", "client", c.peer)
		relay.Abort(conn)
		return nil
	}
	if l.s.silent {
		return c
	}
	timeout := l.HandshakeTimeout
	if timeout == 0 {
		timeout = DefaultHandshakeTimeout
	}
	conn.SetDeadline(time.Now().Add(timeout))
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	if l.s.shaking == nil {
		conn.Close()
		return nil
	}
	l.s.shaking[c] = struct{}{}
	return c
}

// allows says whether a client at ip is let in; the zero address is that of a Unix socket.
func (l *Listener) allows(ip netip.Addr) bool {
	if !ip.IsValid() {
		return true
	}
	ip = ip.WithZone("") // no prefix contains an address with a zone
	contains := func(p netip.Prefix) bool {
		if p.Addr().Is4In6() && p.Bits() >= 96 {
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		return p.Contains(ip)
	}
	if slices.ContainsFunc(l.Deny, contains) {
		return false
	}
	return len(l.Allow) == 0 || slices.ContainsFunc(l.Allow, contains)
}

// run carries one client through its handshake. A panic there costs this client only.
func (l *Listener) run(ctx context.Context, c *client, handle func(context.Context, *client)) {
	defer l.s.all.Done()
	defer func() { l.recovered(c, recover()) }()
	if l.AcceptProxy {
		if err := c.readProxyHeader(); err != nil {
			c.fail(err)
			return
		}
	}
	handle(ctx, c)
}

// recovered ends a client whose handler has panicked with p, if that is not nil.
func (l *Listener) recovered(c *client, p any) bool {
	if p == nil {
		return false
	}
	l.s.say(slog.LevelError, "panic while serving a client", "client", c.peer, "panic", p, "stack", string(debug.Stack()))
	c.abort()
	c.Done()
	return true
}
