package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"
)

// forward accepts Sockets and joins each with a dialled one, as the program's forward does.
func forward(t *testing.T, to netip.AddrPort, timeout time.Duration, failed func(error)) (addr string) {
	t.Helper()
	ln := listenSockets(t)
	var all sync.WaitGroup
	t.Cleanup(func() { ln.Close(); all.Wait() })
	all.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					t.Error(err)
				}
				return
			}
			all.Add(1)
			_, handled := DialSocket(c, to, timeout, nil, func(s *Socket, err error) {
				if err != nil {
					if failed != nil {
						failed(err)
					}
					Abort(c)
					all.Done()
					return
				}
				new(Relay).Start(c, s, nil, func(Result) { all.Done() })
			})
			if !handled {
				t.Error("not handled")
			}
		}
	})
	return ln.Addr().String()
}

func listenSockets(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if ln, err = SocketListener(ln); err != nil {
		t.Fatal(err)
	}
	return ln
}

func listenTCP(t *testing.T, serve func(c *net.TCPConn)) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	t.Cleanup(func() { ln.Close(); all.Wait() })
	all.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			})
		}
	})
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

func echo(c *net.TCPConn) { io.Copy(c, c); c.CloseWrite() }

// A client's bytes and the origin's answer to the dial may come in one turn of the loop, in
// either order; and the client may have said all it has to say by then.
func TestDialedPairsLoseNoEvent(t *testing.T) {
	addr := forward(t, listenTCP(t, echo), time.Minute, nil)
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := range 250 {
				if err := ping(addr, bytes.Repeat([]byte{byte(w)}, 1+i), i%3 == 0); err != nil {
					t.Errorf("worker %d, round %d: %v", w, i, err)
				}
				if t.Failed() {
					return
				}
			}
		})
	}
	wg.Wait()
}

// ping sends msg and awaits it back, half-closing before it reads if asked to.
func ping(addr string, msg []byte, halfClose bool) error {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	c.Write(msg)
	got := make([]byte, len(msg))
	if halfClose {
		c.(*net.TCPConn).CloseWrite()
		got, err = io.ReadAll(c)
	} else {
		_, err = io.ReadFull(c, got)
	}
	if err == nil && !bytes.Equal(got, msg) {
		err = errors.New("other bytes came back")
	}
	return err
}

func TestDialSocketRefused(t *testing.T) {
	nobody := unheard(t)
	why := make(chan error, 1)
	c, err := net.Dial("tcp", forward(t, nobody, time.Minute, func(err error) { why <- err }))
	reset := err // which may come before connect has returned
	if err == nil {
		defer c.Close()
		_, reset = c.Read(make([]byte, 1))
	}
	if !errors.Is(reset, syscall.ECONNRESET) {
		t.Error("client saw", reset)
	}
	if err := <-why; !errors.Is(err, syscall.ECONNREFUSED) {
		t.Error(err)
	}
}

// unheard returns an address where nobody listens, and nobody else can meanwhile: it is bound.
func unheard(t *testing.T) netip.AddrPort {
	t.Helper()
	_, at := bound(t)
	return at
}

// bound returns a socket that is bound, and to where.
func bound(t *testing.T) (fd int, at netip.AddrPort) {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fd, addrPortOf(sa)
}

// deaf returns the address of a listener that completes no more connections.
func deaf(t *testing.T) netip.AddrPort {
	t.Helper()
	fd, to := bound(t)
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	for range 3 { // its queue holds one or two
		c, err := net.DialTimeout("tcp", to.String(), 200*time.Millisecond)
		if err != nil {
			return to
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Fatal("the listener takes all")
	return to
}

func TestDialSocketTimeout(t *testing.T) {
	why := make(chan error, 1)
	c, err := net.Dial("tcp", forward(t, deaf(t), 100*time.Millisecond, func(err error) { why <- err }))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := <-why; !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

func TestDialSocketIsCancelledByTheClientsReset(t *testing.T) {
	why := make(chan error, 1)
	c, err := net.Dial("tcp", forward(t, deaf(t), time.Minute, func(err error) { why <- err }))
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(c, "early")
	c.(*net.TCPConn).CloseWrite()
	select {
	case err := <-why:
		t.Fatal("cancelled by a half-close:", err)
	case <-time.After(50 * time.Millisecond):
	}
	c.(*net.TCPConn).SetLinger(0)
	c.Close()
	if err := <-why; !errors.Is(err, syscall.ECONNRESET) {
		t.Error(err)
	}
}

// A Socket is an ordinary conn for whoever uses it as one.
func TestSocketIsANetConn(t *testing.T) {
	ln := listenSockets(t)
	defer ln.Close()
	client, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if s.RemoteAddr().String() != client.LocalAddr().String() || s.LocalAddr().String() != client.RemoteAddr().String() {
		t.Error(s.RemoteAddr(), s.LocalAddr())
	}
	io.WriteString(client, "in")
	read(t, s, "in")
	io.WriteString(s, "out")
	read(t, client, "out")
	s.SetReadDeadline(time.Now())
	if _, err := s.Read(make([]byte, 1)); err == nil || !err.(net.Error).Timeout() {
		t.Error(err)
	}
	// It can still be joined.
	rb, origin := tcpPair(t)
	s.SetReadDeadline(time.Time{})
	result := make(chan Result, 1)
	go func() { result <- Join(context.Background(), s, rb) }()
	io.WriteString(client, "joined")
	read(t, origin, "joined")
	client.Close()
	origin.Close()
	if res := <-result; res.Err() != nil {
		t.Error(res, res.Err())
	}
	if err := s.Close(); !errors.Is(err, net.ErrClosed) {
		t.Error("closed twice:", err)
	}
}

// TestDialSocketControl: options are set before the socket connects, and an error of theirs is that of the dial.
func TestDialSocketControl(t *testing.T) {
	to := listenSockets(t)
	defer to.Close()
	ln := listenSockets(t)
	defer ln.Close()
	bad := errors.New("bad")
	for _, want := range []error{nil, bad} {
		peer, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer peer.Close()
		client, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		var said string
		control := func(network, address string, c syscall.RawConn) error {
			said = network + " " + address
			if err := c.Control(func(fd uintptr) {
				if _, err := syscall.Getpeername(int(fd)); err == nil {
					t.Error("it is connected already")
				}
			}); err != nil {
				t.Error(err)
			}
			return want
		}
		done := make(chan error, 1)
		if _, handled := DialSocket(client, to.Addr().(*net.TCPAddr).AddrPort(), time.Minute, control, func(s *Socket, err error) {
			if s != nil {
				s.Close()
			}
			done <- err
		}); !handled {
			t.Fatal("not handled")
		}
		if err := <-done; !errors.Is(err, want) || said != "tcp "+to.Addr().String() {
			t.Errorf("%v after %q, want %v", err, said, want)
		}
	}
}

// TestSyscallConn: to ask for an option of a Socket leaves it what it is.
func TestSyscallConn(t *testing.T) {
	ln := listenSockets(t)
	defer ln.Close()
	peer, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s := c.(*Socket)
	for _, std := range []bool{false, true} {
		raw, err := s.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		typ := 0
		raw.Control(func(fd uintptr) { typ, _ = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_TYPE) })
		if typ != syscall.SOCK_STREAM || s.isConn() != std {
			t.Errorf("type %d, an ordinary conn: %v, want %v", typ, s.isConn(), std)
		}
		s.SetDeadline(time.Now()) // makes it one
	}
}
