package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The first byte of a bulk connection says what the origin does.
const (
	opUpload   = 'U' // reads
	opDownload = 'D' // writes
	opBoth     = 'B'
	opProbe    = 'P' // answers with this byte; so do the echo, and the origin of datagrams
)

// bulkBuffer is what the ends read and write at once in bulk.
const bulkBuffer = 256 << 10

// message is the size of requests and replies.
const message = 64

// ask and answer are the lines that the benchmark and its ends exchange over stdin and stdout.
type ask struct {
	Op   string // start, count, stop, burst, answer, sample
	Load load   // for start, and Conns for sample
}

type answer struct {
	Addr     string  `json:",omitempty"` // where the origin listens: its first line
	N        int64   `json:",omitempty"` // bytes, messages, connections or datagrams so far
	T        int64   `json:",omitempty"` // when N was read, ns
	P50, P99 float64 `json:",omitempty"` // µs
	RTT      []int32 `json:",omitempty"` // ns: each round trip of answer and sample

	First, Last float64 `json:",omitempty"` // µs: the median time to open the first and the last 500 of idle
	Failed      int64   `json:",omitempty"` // connections that failed, or got no answer within a second
	Why         string  `json:",omitempty"` // the first of these failures
	Err         string  `json:",omitempty"`
}

// began anchors the times of answers.
var began = time.Now()

// end is a process at one end of the load. It ends with its stdin.
func end(args []string) int {
	if len(args) == 0 {
		return 2
	}
	runtime.GOMAXPROCS(max(2, runtime.GOMAXPROCS(0))) // a poller keeps one
	switch args[0] {
	case "origin":
		return originMain(args[1:])
	case "load":
		return loadMain()
	case "isolate":
		return isolateMain()
	}
	return 2
}

// converse answers the lines on stdin until it ends.
func converse(reply func(ask) answer) int {
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var q ask
		if err := in.Decode(&q); err != nil {
			return 0
		}
		if out.Encode(reply(q)) != nil {
			return 1
		}
	}
}

// origin counts the bytes it receives in bulk, or the datagrams.
type origin struct{ received atomic.Int64 }

// originMain is an origin of one of three kinds, because the echo's thread keeps a processor to itself.
func originMain(args []string) int {
	var o origin
	var at string
	switch {
	case len(args) == 2 && args[0] == "echo": // the address is port 0, or that of another process to share it with
		e, addr, err := newEcho(args[1])
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		at = addr
		go e.run()
	case len(args) == 2 && args[0] == "bulk":
		ln, err := net.Listen("tcp", args[1])
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		at = ln.Addr().String()
		go o.acceptBulk(ln)
	case len(args) == 2 && args[0] == "udp":
		conn, err := listenDatagrams(args[1])
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		at = conn.LocalAddr().String()
		go o.sinkDatagrams(conn)
	default:
		return 2
	}
	json.NewEncoder(os.Stdout).Encode(answer{Addr: at})
	return converse(o.reply)
}

func (o *origin) reply(ask) answer {
	return answer{N: o.received.Load(), T: int64(time.Since(began))}
}

func (o *origin) acceptBulk(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			time.Sleep(time.Millisecond)
			continue
		}
		go o.serveBulk(c)
	}
}

func (o *origin) serveBulk(c net.Conn) {
	defer c.Close()
	op := make([]byte, 1)
	if _, err := io.ReadFull(c, op); err != nil {
		return
	}
	switch op[0] {
	case opProbe:
		c.Write(op)
	case opUpload:
		drink(c, &o.received)
	case opDownload:
		pour(c)
	case opBoth:
		go pour(c)
		drink(c, &o.received)
	}
}

// drink reads until c ends.
func drink(c net.Conn, n *atomic.Int64) error {
	for buf := make([]byte, bulkBuffer); ; {
		m, err := c.Read(buf)
		n.Add(int64(m))
		if err != nil {
			return err
		}
	}
}

// pour writes until c breaks.
func pour(c net.Conn) error {
	for buf := make([]byte, bulkBuffer); ; {
		if _, err := c.Write(buf); err != nil {
			return err
		}
	}
}

// echo sends everything back, from one thread.
type echo struct {
	p      *poller
	listen int
	buf    []byte
	rest   map[int][]byte // what a peer that does not read has not taken yet; it is not read meanwhile
}

// newEcho listens on addr and returns the address. Several processes may listen on one.
func newEcho(addr string) (*echo, string, error) {
	a, err := net.ResolveTCPAddr("tcp4", addr)
	if err != nil {
		return nil, "", err
	}
	p, err := newPoller()
	if err != nil {
		return nil, "", err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, "", err
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	if err := unix.Bind(fd, sockaddr(a)); err != nil {
		return nil, "", err
	}
	if err := unix.Listen(fd, 4096); err != nil {
		return nil, "", err
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return nil, "", err
	}
	if err := p.add(fd, unix.EPOLLIN); err != nil {
		return nil, "", err
	}
	at := fmt.Sprintf("%v:%d", a.IP, sa.(*unix.SockaddrInet4).Port)
	return &echo{p: p, listen: fd, buf: make([]byte, 64<<10), rest: make(map[int][]byte)}, at, nil
}

func sockaddr(a *net.TCPAddr) *unix.SockaddrInet4 {
	sa := &unix.SockaddrInet4{Port: a.Port}
	copy(sa.Addr[:], a.IP.To4())
	return sa
}

func (e *echo) run() {
	for {
		for _, ev := range e.p.wait() {
			fd := int(ev.Fd)
			switch {
			case fd == e.listen:
				e.accept()
			case ev.Events&unix.EPOLLOUT != 0:
				e.flush(fd)
			default:
				e.read(fd)
			}
		}
	}
}

func (e *echo) accept() {
	for {
		fd, _, err := unix.Accept4(e.listen, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if err != nil {
			if err != unix.EAGAIN && err != unix.ECONNABORTED {
				time.Sleep(time.Millisecond)
			}
			return
		}
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		if e.p.add(fd, unix.EPOLLIN) != nil {
			unix.Close(fd)
		}
	}
}

func (e *echo) read(fd int) {
	n, err := unix.Read(fd, e.buf)
	if n <= 0 {
		if err != unix.EAGAIN && err != unix.EINTR {
			e.close(fd)
		}
		return
	}
	m, err := unix.Write(fd, e.buf[:n])
	if err != nil && err != unix.EAGAIN {
		e.close(fd)
		return
	}
	if m = max(m, 0); m < n {
		e.rest[fd] = append([]byte(nil), e.buf[m:n]...)
		e.p.change(fd, unix.EPOLLOUT)
	}
}

func (e *echo) flush(fd int) {
	rest := e.rest[fd]
	n, err := unix.Write(fd, rest)
	if err != nil && err != unix.EAGAIN {
		e.close(fd)
		return
	}
	if rest = rest[max(n, 0):]; len(rest) > 0 {
		e.rest[fd] = rest
		return
	}
	delete(e.rest, fd)
	e.p.change(fd, unix.EPOLLIN)
}

func (e *echo) close(fd int) {
	delete(e.rest, fd)
	unix.Close(fd)
}
