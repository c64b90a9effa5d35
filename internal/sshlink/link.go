// Package sshlink keeps an SSH connection to one server, and opens streams through it.
//
// What people know as ssh -L, -R and -D dies with its connection. A [Link] outlives it: it connects
// when it is first needed (or at once, and stays so), verifies the server as ssh(1) would, notices
// when the connection is dead, and connects again, while those who want a stream wait for as long as
// their contexts let them. Listeners at the far end are asked for again.
//
// A link knows the server by [Settings], which are what ~/.ssh/config says of it, and reaches it by a
// function, so that a link can lead through another: a jump host. [Link.Dial] opens a stream to a
// destination as seen from the server, [Link.Listen] takes the streams that arrive at an address
// there. All share the one connection.
package sshlink

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
)

// Link is a way to one SSH server. Set its exported fields before its first use. Close it when all
// its streams are closed.
type Link struct {
	Name     string   // for logs and errors, as in ssh://bastion
	Settings Settings // how the server is reached and verified

	// DialServer opens the conn to the server. Nil: from this machine, by TCP.
	DialServer func(ctx context.Context, host string, port uint16) (net.Conn, error)
	// Password returns the password, for the methods password and keyboard-interactive. Nil: it is asked for.
	Password func() (string, error)
	Prompt   Prompt       // who is asked; nil: nobody, and what would have to be asked is refused
	Keep     bool         // be connected always, and not only when a stream is wanted
	Log      *slog.Logger // changes of state, once each; nil: silent

	secrets secrets // what was asked for once

	mu        sync.Mutex
	begun     bool
	closed    bool
	ballast   []byte
	ctx       context.Context // of all that goes on; ends with Close
	cancel    context.CancelFunc
	all       sync.WaitGroup
	running   bool          // run runs
	changed   chan struct{} // closed, and made anew, at each change of what follows
	up        *session      // nil while there is none
	wasUp     bool
	waiting   int   // who waits for up
	attempts  int   // that have failed, ever
	lastErr   error // of the last attempt; nil once one succeeded
	lostWhy   error // what the last connection ended with; nil before the first
	final     bool  // lastErr is nothing that time heals
	nudge     chan struct{}
	listeners []*Listener
	annoyed   bool   // asking people was in vain: only for a stream that waits they are asked again
	silent    bool   // nobody was asked in the last attempt
	said      string // the last complaint logged
	lostAt    time.Time
}

// ErrClosed is returned by a Link after Close.
var ErrClosed = fmt.Errorf("sshlink: %w", net.ErrClosed)

// ballastSize is memory that a link which was once up holds and never touches, so that it costs address
// space and no more. x/crypto/ssh allocates each packet anew: in a process whose heap is small otherwise,
// the garbage collector would run dozens of times a second, and take a third of the throughput.
const ballastSize = 32 << 20

// The pauses between attempts to connect. They double, and half of each is left to chance, so that the
// clients of a server that restarts do not come all at once.
const (
	firstPause = 500 * time.Millisecond
	maxPause   = 30 * time.Second
	// nudgePause is how soon after an attempt a new stream may cause another.
	nudgePause = time.Second
	// lasting is how long a connection must have stood for the pauses to begin anew.
	lasting = 5 * time.Second
)

// begin prepares l. It is called with l.mu held.
func (l *Link) begin() error {
	if l.closed {
		return ErrClosed
	}
	if !l.begun {
		l.begun = true
		l.ctx, l.cancel = context.WithCancel(context.Background())
		l.changed = make(chan struct{})
		l.nudge = make(chan struct{}, 1)
		if l.Log == nil {
			l.Log = slog.New(slog.DiscardHandler)
		}
		if l.DialServer == nil {
			l.DialServer = dialTCP
		}
	}
	return nil
}

func dialTCP(ctx context.Context, host string, port uint16) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(port))))
}

// Start begins to connect, where Keep is set, and does not wait.
func (l *Link) Start() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.begin(); err != nil {
		return err
	}
	if l.Keep {
		l.ensure()
	}
	return nil
}

// Close ends the connection and all its streams, and returns when nothing of l runs any more.
func (l *Link) Close() error {
	l.mu.Lock()
	if l.closed || !l.begun {
		l.closed = true
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	l.cancel()
	if l.up != nil {
		l.up.wire.Close()
	}
	for _, ln := range l.listeners {
		ln.shut()
	}
	l.announce()
	l.mu.Unlock()
	l.all.Wait()
	return nil
}

// announce wakes who waits for a change. It is called with l.mu held.
func (l *Link) announce() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// ensure sees to it that somebody connects. It is called with l.mu held.
func (l *Link) ensure() {
	if !l.running {
		l.running = true
		l.all.Add(1)
		go l.run()
		return
	}
	select {
	case l.nudge <- struct{}{}:
	default:
	}
}

// wanted says whether somebody wants a connection. It is called with l.mu held.
func (l *Link) wanted() bool {
	return !l.closed && (l.Keep || len(l.listeners) > 0 || l.waiting > 0)
}

// session returns the connection, waiting for it while ctx lets it. It does not wait where the server
// has never been reached and cannot be now, or will not let us in: that would not become better.
func (l *Link) session(ctx context.Context) (*session, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.begin(); err != nil {
		return nil, err
	}
	before := l.attempts
	for {
		switch {
		case l.closed:
			return nil, ErrClosed
		case l.up != nil && !l.up.wire.isDead():
			return l.up, nil
		case l.attempts > before && (l.final || !l.wasUp):
			return nil, l.lastErr
		case ctx.Err() != nil && l.lastErr != nil:
			return nil, fmt.Errorf("not connected: %w", l.lastErr)
		case ctx.Err() != nil && l.lostWhy != nil:
			return nil, fmt.Errorf("connection lost (%v), and not connected again in time: %w", l.lostWhy, context.Cause(ctx))
		case ctx.Err() != nil:
			return nil, fmt.Errorf("not connected in time: %w", context.Cause(ctx))
		}
		l.waiting++
		l.ensure()
		changed := l.changed
		l.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		}
		l.mu.Lock()
		l.waiting--
	}
}

// run connects, again and again, for as long as a connection is wanted.
func (l *Link) run() {
	defer l.all.Done()
	for tries := 0; ; {
		s, err := l.connect()
		if err != nil {
			if tries++; !l.failed(err) || !l.pause(tries) {
				break
			}
			continue
		}
		begin := time.Now()
		l.connected(s)
		<-s.wire.dead
		if !l.lost(s) {
			break
		}
		if time.Since(begin) >= lasting {
			tries = 0
		} else if tries++; !l.pause(tries) { // a server that lets us in and throws us out
			break
		}
	}
}

// failed records an attempt, and says whether there is to be another.
func (l *Link) failed(err error) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.silent || l.waiting == 0 { // else somebody came who is to be asked
		l.attempts++
	}
	l.lastErr, l.final = fmt.Errorf("sshlink: %s: %w", l.Name, err), isFinal(err)
	l.annoyed = l.annoyed || l.final
	if !l.closed && err.Error() != l.said {
		l.said = err.Error()
		words := "SSH: cannot connect"
		if l.Keep || len(l.listeners) > 0 || l.wasUp && !l.final {
			words += "; trying again"
		}
		l.Log.Warn(words, "server", l.Name, "err", err)
	}
	l.announce()
	if l.Keep || len(l.listeners) > 0 {
		l.running = !l.closed
	} else {
		l.running = l.wanted() && l.wasUp && !l.final
	}
	return l.running
}

// connected records that s is there, and asks for the listeners at its far end.
func (l *Link) connected(s *session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.up, l.lastErr, l.final, l.annoyed, l.said = s, nil, false, false, ""
	switch {
	case l.closed:
		s.wire.Close()
	case l.wasUp:
		l.Log.Info("SSH: connected again", "server", l.Name, "after", time.Since(l.lostAt).Round(time.Millisecond))
	default:
		l.Log.Info("SSH: connected", "server", l.Name, "addr", s.wire.RemoteAddr().String(),
			"user", l.Settings.User, "version", printable(string(s.conn.ServerVersion())))
	}
	if !l.wasUp {
		l.ballast = make([]byte, ballastSize)
	}
	l.wasUp = true
	if len(l.listeners) > 0 && s.begin() {
		go s.renew(slices.Clone(l.listeners))
	}
	l.announce()
}

// lost records that s has ended, and says whether to connect again.
func (l *Link) lost(s *session) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.up, l.lostAt = nil, time.Now()
	l.lostWhy = s.wire.err
	l.all.Add(1)
	go l.bury(s) // its streams may have bytes that are still to be read
	l.running = l.wanted()
	if !l.closed {
		words := "SSH: connection lost"
		if l.running {
			words += "; connecting again"
		}
		l.Log.Warn(words, "server", l.Name, "err", s.wire.err)
	}
	l.announce()
	return l.running
}

// bury waits for all that is left of s.
func (l *Link) bury(s *session) {
	defer l.all.Done()
	s.wait()
}

// whom returns who may be asked now.
func (l *Link) whom() Prompt {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.silent = l.annoyed && l.waiting == 0; l.silent {
		return nil
	}
	return l.Prompt
}

// pause waits before another attempt, after so many that failed; it says whether that is still wanted.
func (l *Link) pause(tries int) bool {
	d := min(firstPause<<min(tries-1, 16), maxPause)
	d = d/2 + rand.N(d/2)
	soonest := time.After(min(d, nudgePause))
	timer := time.NewTimer(d)
	defer timer.Stop()
	var nudge <-chan struct{}
wait:
	for {
		select {
		case <-timer.C:
			break wait
		case <-soonest:
			nudge = l.nudge
		case <-nudge:
			break wait
		case <-l.ctx.Done():
			break wait
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.running = l.wanted()
	return l.running
}

// direct is what a request for a stream says, RFC 4254 section 7.2.
type direct struct {
	Host       string
	Port       uint32
	Origin     string
	OriginPort uint32
}

// directUnix is the same for a Unix socket: PROTOCOL section 2.4 of OpenSSH.
type directUnix struct {
	Path      string
	Reserved  string
	Reserved2 uint32
}

// Dial opens a stream from the server to address: "host:port" for network "tcp", the name being resolved
// there, or a path for "unix". The caller closes the conn, which is a [*Conn]. Where the server
// refuses, the error wraps a [*Refusal].
func (l *Link) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	var kind string
	var payload []byte
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
		kind, payload = "direct-tcpip", ssh.Marshal(&direct{host, uint32(port), "127.0.0.1", 0})
	case "unix":
		kind, payload = "direct-streamlocal@openssh.com", ssh.Marshal(&directUnix{Path: address})
	default:
		return nil, fmt.Errorf("sshlink: %s: network %s: %w", l.Name, network, errors.ErrUnsupported)
	}
	for {
		s, err := l.session(ctx)
		if err != nil {
			return nil, err
		}
		c, err := s.open(ctx, kind, payload, Addr{network, address})
		if err == nil {
			return c, nil
		}
		if _, lost := errors.AsType[*lostError](err); lost && ctx.Err() == nil {
			continue // nothing was sent: another connection will do
		}
		return nil, fmt.Errorf("sshlink: %s: %w", l.Name, err)
	}
}
