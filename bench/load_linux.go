package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// load is what the client does.
type load struct {
	Kind  string // bulk, pingpong, short, idle, udp
	Addr  string
	Conns int
	Dir   byte   // bulk: opUpload, opDownload, opBoth
	From  string // idle: the source address, because each has its own ports; empty for any
}

// client is a load that runs. Its counters are read while it does.
type client struct {
	load
	n        atomic.Int64 // bytes received, round trips, connections, or datagrams sent
	failed   atomic.Int64
	mu       sync.Mutex
	why      error         // guarded by mu
	sampling atomic.Bool   // round trips are recorded
	stopped  atomic.Bool   // asks the loop to end
	done     chan struct{} // closed when it has
	rtt      []int32       // ns; the loop's until done
	idle     []net.Conn
	opened   []int32 // ns: how long each took to be opened and answered
}

func loadMain() int {
	c := &client{done: make(chan struct{})}
	return converse(c.reply)
}

func (c *client) reply(q ask) answer {
	var err error
	var rtts []int32
	switch q.Op {
	case "start":
		c.load = q.Load
		err = c.start()
	case "count":
		c.sampling.Store(true)
	case "burst":
		err = c.burst()
	case "answer":
		rtts = c.answerIdle(0)
	case "sample":
		rtts = c.answerIdle(q.Load.Conns)
	case "stop":
		return c.stop()
	}
	a := answer{N: c.n.Load(), T: int64(time.Since(began)), Failed: c.failed.Load(), RTT: rtts}
	if q.Op == "start" && c.Kind == "idle" {
		a.First, a.Last = ends500(c.opened)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil && c.Kind == "bulk" {
		err = c.why
	}
	if c.why != nil {
		a.Why = c.why.Error()
	}
	if err != nil {
		a.Err = err.Error()
	}
	return a
}

// fail counts a connection that failed, and keeps the first reason.
func (c *client) fail(err error) {
	c.failed.Add(1)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.why == nil {
		c.why = err
	}
}

// start begins the load, and returns when all its connections are established.
func (c *client) start() error {
	switch c.Kind {
	case "bulk":
		return c.startBulk()
	case "pingpong":
		return c.startPingPong()
	case "short":
		return c.startShort()
	case "idle":
		return c.holdIdle()
	case "udp":
		return c.startDatagrams()
	}
	return fmt.Errorf("no load %q", c.Kind)
}

func (c *client) stop() answer {
	var a answer
	c.stopped.Store(true)
	if c.Kind == "pingpong" || c.Kind == "short" || c.Kind == "udp" {
		select {
		case <-c.done:
		case <-time.After(3 * time.Second):
			return answer{Err: "the client's loop hangs"}
		}
		slices.Sort(c.rtt)
		a.P50, a.P99 = micros(c.rtt, 0.50), micros(c.rtt, 0.99)
	}
	a.Failed = c.failed.Load()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.why != nil {
		a.Why = c.why.Error()
	}
	return a
}

// micros returns the quantile q of sorted nanoseconds in microseconds.
func micros(sorted []int32, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return float64(sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]) / 1e3
}

func (c *client) startBulk() error {
	for range c.Conns {
		conn, err := net.DialTimeout("tcp", c.Addr, 5*time.Second)
		if err != nil {
			return err
		}
		if _, err := conn.Write([]byte{c.Dir}); err != nil {
			return err
		}
		if c.Dir != opDownload {
			go c.pour(conn)
		}
		if c.Dir != opUpload {
			go c.drink(conn)
		}
	}
	return nil
}

func (c *client) pour(conn net.Conn)  { c.fail(pour(conn)) }
func (c *client) drink(conn net.Conn) { c.fail(drink(conn, &c.n)) }

// connect returns a blocking socket that is connected. What blocks does so for five seconds at most.
func connect(to *unix.SockaddrInet4) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 5})
	if err := unix.Connect(fd, to); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("connect: %w", err)
	}
	return fd, nil
}

// exchange is a connection with one message under way.
type exchange struct {
	got  int // bytes of the reply
	sent time.Time
}

func (c *client) target() (*unix.SockaddrInet4, error) {
	a, err := net.ResolveTCPAddr("tcp4", c.Addr)
	if err != nil {
		return nil, err
	}
	return sockaddr(a), nil
}

// startPingPong opens the connections and starts the loop that keeps one message under way on each.
func (c *client) startPingPong() error {
	to, err := c.target()
	if err != nil {
		return err
	}
	p, err := newPoller()
	if err != nil {
		return err
	}
	var open []exchange // by descriptor
	for range c.Conns {
		fd, err := connect(to)
		if err != nil {
			return err
		}
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		if err := p.add(fd, unix.EPOLLIN); err != nil {
			return err
		}
		open = append(open, make([]exchange, max(0, fd+1-len(open)))...)
		open[fd].sent = time.Now()
		if _, err := unix.Write(fd, make([]byte, message)); err != nil {
			return err
		}
	}
	c.rtt = make([]int32, 0, 1<<20)
	go c.pingPong(p, open)
	return nil
}

func (c *client) pingPong(p *poller, open []exchange) {
	defer close(c.done)
	buf := make([]byte, message)
	for !c.stopped.Load() {
		for _, ev := range p.wait() {
			fd := int(ev.Fd)
			x := &open[fd]
			n, err := unix.Read(fd, buf)
			if n <= 0 {
				if err == nil {
					err = io.ErrUnexpectedEOF
				}
				c.fail(err)
				unix.Close(fd)
				continue
			}
			if x.got += n; x.got < message {
				continue
			}
			now := time.Now()
			if c.sampling.Load() && len(c.rtt) < cap(c.rtt) {
				c.rtt = append(c.rtt, int32(now.Sub(x.sent)))
			}
			c.n.Add(1)
			x.got, x.sent = 0, now
			if _, err := unix.Write(fd, buf); err != nil {
				c.fail(err)
				unix.Close(fd)
			}
		}
	}
}

// startShort starts the loop that keeps connections coming and going.
func (c *client) startShort() error {
	to, err := c.target()
	if err != nil {
		return err
	}
	p, err := newPoller()
	if err != nil {
		return err
	}
	s := &short{client: c, p: p, to: to, open: make([]exchange, c.Conns+64)}
	go s.run()
	return nil
}

// short is a loop of short connections.
type short struct {
	*client
	p    *poller
	to   *unix.SockaddrInet4
	open []exchange // by descriptor; sent is zero where there is none
	busy int
	buf  [message]byte
}

func (s *short) run() {
	defer close(s.done)
	seen := time.Now()
	for !s.stopped.Load() {
		for s.busy < s.Conns && s.begin() {
		}
		for _, ev := range s.p.wait() {
			s.read(int(ev.Fd))
		}
		if time.Since(seen) > 100*time.Millisecond {
			seen = time.Now()
			s.giveUp(seen)
		}
	}
}

// begin opens a connection and sends its request.
func (s *short) begin() bool {
	fd, err := connect(s.to)
	if err == nil {
		if _, err = unix.Write(fd, s.buf[:]); err == nil {
			err = s.p.add(fd, unix.EPOLLIN)
		}
		if err != nil {
			unix.Close(fd)
		}
	}
	if err != nil {
		s.fail(err)
		time.Sleep(time.Millisecond)
		return false
	}
	s.open = append(s.open, make([]exchange, max(0, fd+1-len(s.open)))...)
	s.open[fd] = exchange{sent: time.Now()}
	s.busy++
	return true
}

func (s *short) read(fd int) {
	n, err := unix.Read(fd, s.buf[:])
	if err == unix.EINTR {
		return
	}
	if s.open[fd].got += max(n, 0); n > 0 && s.open[fd].got < message {
		return
	}
	switch {
	case n > 0:
		s.n.Add(1)
	case err != nil:
		s.fail(err)
	default:
		s.fail(errors.New("closed without the reply"))
	}
	s.close(fd)
}

func (s *short) close(fd int) {
	unix.Close(fd)
	s.open[fd] = exchange{}
	s.busy--
}

// giveUp closes connections that have waited for a reply for over a second.
func (s *short) giveUp(now time.Time) {
	for fd, x := range s.open {
		if !x.sent.IsZero() && now.Sub(x.sent) > time.Second {
			s.fail(errors.New("no reply within a second"))
			s.close(fd)
		}
	}
}
