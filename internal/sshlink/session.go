package sshlink

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"
)

// session is one SSH connection of a link, from its handshake to its end.
type session struct {
	link *Link
	conn ssh.Conn
	wire *wire
	ping chan struct{} // to ask, one at a time
	over chan struct{} // closed when nothing begins any more

	mu    sync.Mutex // guards that all grows only before over
	ended bool
	all   sync.WaitGroup
}

// newSession takes over a connection that has shaken hands.
func newSession(l *Link, w *wire, conn ssh.Conn, chans <-chan ssh.NewChannel, requests <-chan *ssh.Request) *session {
	s := &session{link: l, conn: conn, wire: w, ping: make(chan struct{}, 1), over: make(chan struct{})}
	s.all.Add(3)
	go s.serveOpens(chans)
	go s.serveRequests(requests)
	go s.reap()
	if l.Settings.AliveInterval > 0 {
		s.all.Add(2)
		go s.keepAlive(l.Settings.AliveInterval, l.Settings.AliveCountMax)
		go s.ask()
	}
	return s
}

// begin says whether a goroutine of the session may begin, and counts it.
func (s *session) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return false
	}
	s.all.Add(1)
	return true
}

// wait ends the session and returns when all its goroutines are gone.
func (s *session) wait() {
	s.wire.Close()
	s.mu.Lock()
	if !s.ended {
		s.ended = true
		close(s.over)
	}
	s.mu.Unlock()
	s.all.Wait()
}

// reap closes the wire when the transport has ended for a reason of its own.
func (s *session) reap() {
	defer s.all.Done()
	err := s.conn.Wait()
	s.wire.fail(err)
}

// serveRequests refuses the server's requests; those that only ask whether we are there are content with that.
func (s *session) serveRequests(requests <-chan *ssh.Request) {
	defer s.all.Done()
	for r := range requests {
		r.Reply(false, nil)
	}
}

// serveOpens hands the streams that the server opens to their listeners.
func (s *session) serveOpens(chans <-chan ssh.NewChannel) {
	defer s.all.Done()
	for ch := range chans {
		s.link.incoming(s, ch)
	}
}

// aliveRequest is what OpenSSH asks. Any answer will do, and servers that do not know it refuse it.
const aliveRequest = "keepalive@openssh.com"

// keepAlive ends a connection whose server has been silent for count intervals, in spite of questions.
func (s *session) keepAlive(interval time.Duration, count int) {
	defer s.all.Done()
	count = max(count, 1)
	limit := interval * time.Duration(count)
	for asked := 0; ; {
		quiet := s.wire.silence()
		if quiet >= limit && asked >= max(count-1, 1) { // and not that this process was stopped
			s.wire.fail(fmt.Errorf("%w for %v", errSilent, limit))
			return
		}
		wait := interval - quiet
		if quiet < interval {
			asked = 0
		} else {
			asked++
			select {
			case s.ping <- struct{}{}:
			default: // the one before waits still
			}
			wait = interval
		}
		select {
		case <-time.After(max(wait, time.Millisecond)):
		case <-s.wire.dead:
			return
		}
	}
}

// ask sends the questions of keepAlive: a send may block for as long as the server does not read.
func (s *session) ask() {
	defer s.all.Done()
	for {
		select {
		case <-s.ping:
			s.conn.SendRequest(aliveRequest, true, nil)
		case <-s.wire.dead:
			return
		}
	}
}

// opening is a channel that is asked for.
type opening struct {
	kind    string
	payload []byte
	remote  net.Addr
	decided atomic.Bool   // by its outcome, or by nobody's waiting any more
	done    chan struct{} // closed with the outcome, if somebody waits
	conn    *Conn
	err     error
}

// open opens a channel. One that is granted after ctx has ended is closed.
func (s *session) open(ctx context.Context, kind string, payload []byte, remote net.Addr) (*Conn, error) {
	if !s.begin() {
		return nil, &lostError{net.ErrClosed}
	}
	o := &opening{kind: kind, payload: payload, remote: remote, done: make(chan struct{})}
	go s.openChannel(o)
	select {
	case <-o.done:
		return o.conn, o.err
	case <-ctx.Done():
	}
	if !o.decided.Swap(true) {
		return nil, context.Cause(ctx)
	}
	<-o.done
	return o.conn, o.err
}

func (s *session) openChannel(o *opening) {
	defer s.all.Done()
	ch, requests, err := s.conn.OpenChannel(o.kind, o.payload)
	if err != nil {
		if refusal, ok := errors.AsType[*ssh.OpenChannelError](err); ok {
			o.err = newRefusal(refusal, hostOf(o.remote))
		} else {
			s.wire.fail(err)
			o.err = &lostError{s.wire.err}
		}
	} else {
		o.conn = s.newConn(ch, requests, s.wire.LocalAddr(), o.remote)
	}
	if o.decided.Swap(true) {
		if o.conn != nil {
			o.conn.Close()
		}
		return
	}
	close(o.done)
}

func hostOf(a net.Addr) string {
	host, _, err := net.SplitHostPort(a.String())
	if err != nil {
		return a.String()
	}
	return host
}
