package sshlink

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// wire is the conn that the SSH transport runs over. It notices its death before the transport does:
// x/crypto/ssh ends all channels of a broken connection as if their streams had ended, and who reads
// them has to know better.
type wire struct {
	net.Conn
	heard atomic.Int64 // when bytes last came, since start
	start time.Time
	dead  chan struct{} // closed when the wire is of no more use

	once sync.Once
	err  error // why; read it after dead
}

func newWire(c net.Conn) *wire {
	return &wire{Conn: c, start: time.Now(), dead: make(chan struct{})}
}

// Read implements net.Conn.
func (w *wire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if n > 0 {
		w.heard.Store(int64(time.Since(w.start)))
	}
	if err != nil {
		w.fail(err)
	}
	return n, err
}

// Write implements net.Conn. A wire that cannot be written to is dead, whether or not the other end
// still sends.
func (w *wire) Write(p []byte) (int, error) {
	n, err := w.Conn.Write(p)
	if err != nil {
		w.fail(err)
	}
	return n, err
}

// Close implements net.Conn.
func (w *wire) Close() error {
	w.fail(net.ErrClosed)
	return nil
}

// fail ends the wire for the reason err, unless it has ended.
func (w *wire) fail(err error) {
	w.once.Do(func() {
		w.err = err
		close(w.dead)
		w.Conn.Close()
	})
}

func (w *wire) isDead() bool {
	select {
	case <-w.dead:
		return true
	default:
		return false
	}
}

// silence returns how long the other end has said nothing.
func (w *wire) silence() time.Duration { return time.Since(w.start) - time.Duration(w.heard.Load()) }

// lostError is what the streams of a connection get that broke below them. To them it is a reset.
type lostError struct{ cause error }

func (e *lostError) Error() string        { return fmt.Sprintf("the SSH connection was lost: %v", e.cause) }
func (e *lostError) Unwrap() error        { return e.cause }
func (e *lostError) Is(target error) bool { return target == syscall.ECONNRESET }

// errSilent is why a connection ends whose server no longer answers.
var errSilent = errors.New("the server does not answer")

// clock limits the time of a handshake. It stands still while a person is asked.
type clock struct {
	mu      sync.Mutex
	timer   *time.Timer
	since   time.Time
	left    time.Duration
	pauses  int
	expired func()
	over    bool
}

func newClock(d time.Duration, expired func()) *clock {
	c := &clock{left: d, since: time.Now(), expired: expired}
	c.timer = time.AfterFunc(d, expired)
	return c
}

func (c *clock) pause() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pauses++; c.pauses == 1 && !c.over {
		c.timer.Stop()
		c.left -= time.Since(c.since)
	}
}

func (c *clock) resume() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pauses--; c.pauses == 0 && !c.over {
		c.since = time.Now()
		c.timer = time.AfterFunc(max(c.left, time.Second), c.expired)
	}
}

func (c *clock) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
	c.timer.Stop()
}
