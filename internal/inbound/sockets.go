package inbound

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/sluice-proxy/sluice/relay"
)

// socketServer accepts for a protocol without a handshake, on the relay's loop: a client whose session can be
// begun without blocking costs no goroutine at all.
type socketServer struct {
	*Listener
	ctx      context.Context
	handle   func(context.Context, *client)
	now      func(context.Context, *client) bool
	acceptor *relay.Acceptor

	mu    sync.Mutex
	pause time.Duration // after the last accept, which failed; 0: it did not
	said  bool          // that it did
}

// serveSockets is serve by way of the relay's loop; false where that cannot be. now is asked first about each client: it takes it
// without blocking, or leaves it to handle and returns false.
func (l *Listener) serveSockets(ctx context.Context, handle func(context.Context, *client), now func(context.Context, *client) bool) bool {
	s := l.s
	if !s.silent {
		return false
	}
	stop := context.AfterFunc(ctx, s.close)
	defer stop()
	srv := &socketServer{Listener: l, ctx: ctx, handle: handle, now: now}
	a, handled := relay.AcceptSockets(s.ln, srv.take, srv.fail)
	if !handled {
		return false
	}
	srv.acceptor = a
	s.slots.addGate(a)
	a.Resume()
	<-s.closed
	a.Close()
	s.close() // wait for the one under way
	s.all.Wait()
	return true
}

// take begins the session of an accepted client.
func (srv *socketServer) take(conn *relay.Socket) {
	s := srv.s
	srv.accepted()
	s.slots.force() // accepting pauses where there is none, but another loop may have been about to accept
	if s.slots.pauseFull() {
		s.sayFull()
	}
	c := srv.admit(conn)
	if c == nil {
		s.release()
		return
	}
	s.all.Add(2)
	if !srv.runNow(c) {
		go srv.run(srv.ctx, c, srv.handle)
	}
}

// accepted ends an episode of failure.
func (srv *socketServer) accepted() {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	srv.pause = 0
	if srv.said {
		srv.said = false
		srv.s.say(slog.LevelInfo, "accepting again")
	}
}

// runNow is run for a session that begins without blocking.
func (srv *socketServer) runNow(c *client) (taken bool) {
	defer func() {
		if srv.recovered(c, recover()) || taken {
			taken = true
			srv.s.all.Done()
		}
	}()
	return srv.now(srv.ctx, c)
}

// fail pauses accepting for a while.
func (srv *socketServer) fail(err error) {
	s := srv.s
	if isGone(err) {
		srv.acceptor.Resume()
		return
	}
	srv.mu.Lock()
	defer srv.mu.Unlock()
	if s.failing.begins() {
		s.say(slog.LevelWarn, "accepting paused", "err", err, "hint", acceptHint(err))
		srv.said = true
	}
	srv.pause = min(max(2*srv.pause, firstPause), maxPause)
	time.AfterFunc(srv.pause, srv.acceptor.Resume)
}
