package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// accepted returns a Socket and its client.
func accepted(t *testing.T) (client *net.TCPConn, s *Socket) {
	t.Helper()
	ln := listenSockets(t)
	t.Cleanup(func() { ln.Close() })
	d, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close(); c.Close() })
	return d.(*net.TCPConn), c.(*Socket)
}

// answers says whether a pair still relays within a time.
func answers(client, origin net.Conn, within time.Duration) bool {
	b := make([]byte, 1)
	origin.SetReadDeadline(time.Now().Add(within))
	defer origin.SetReadDeadline(time.Time{})
	io.WriteString(client, "x")
	_, err := io.ReadFull(origin, b)
	return err == nil
}

// bystanders are pairs on all loops.
func bystanders(t *testing.T) (pairs [][2]*net.TCPConn) {
	t.Helper()
	for range 2 * loopCount() {
		client, origin, _, p, _ := started(t, new(Relay))
		t.Cleanup(func() { p.Abort(nil) })
		pairs = append(pairs, [2]*net.TCPConn{client, origin})
	}
	return pairs
}

// TestSpliceIsNotEndedByAnUrgentMark: urgent data, more data and the end arrive after the loop has asked epoll
// and before it splices. splice(2) then returns 0 at the mark, because the end has come, and that is not the end.
func TestSpliceIsNotEndedByAnUrgentMark(t *testing.T) {
	client, ra := tcpPair(t)
	rb, origin := tcpPair(t)
	l, err := newLoop()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { l.pipes.trim(); unix.Close(l.epfd); unix.Close(l.wakefd) }()
	ended := make(chan Result, 1)
	p := &kpair{m: newMachine(), relay: new(Relay), stats: new(Stats), done: func(r Result) { ended <- r }, start: clock()}
	sockets := [2]*Socket{asSocket(ra), asSocket(rb)}
	if _, err := sockets[A].register(l, nil); err != nil {
		t.Fatal(err)
	}
	if err := p.enter(sockets); err != nil {
		t.Fatal(err)
	}
	ra.Close()
	rb.Close()
	p.inTurn(l)
	p.setSplice(A, true)

	const before, after = 1000, 100000
	p.sides[A].note(unix.EPOLLIN) // told, and then:
	client.Write(make([]byte, before))
	raw, _ := client.SyscallConn()
	raw.Write(func(fd uintptr) bool { return unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) != unix.EAGAIN })
	client.Write(make([]byte, after))
	client.CloseWrite()
	wait(t, "all has arrived", func() bool { return tcpState(int(p.sides[A].fd)) == unix.BPF_TCP_CLOSE_WAIT })

	p.flow(l, A)
	origin.CloseWrite()
	go func() { // the loop, until the pair is over
		for !p.gone {
			l.now = clock()
			l.collect(l.epoll(100, false))
			for _, h := range l.batch {
				h.target.event(l, h.side, h.events)
			}
		}
	}()
	n, err := io.Copy(io.Discard, origin)
	if n < before+after || err != nil {
		t.Errorf("origin read %d of %d bytes, %v", n, before+after, err)
	}
	if res := <-ended; res.Err() != nil {
		t.Error(res, res.Err())
	}
}

// TestErrorBeforeThePairIsNoticed: a socket that its loop has known before was reset before it was joined. Nobody
// reads it, as the origin stalls, and the pair must end all the same.
func TestErrorBeforeThePairIsNoticed(t *testing.T) {
	client, s := accepted(t)
	if _, err := s.register(nil, nil); err != nil {
		t.Fatal(err)
	}
	fill(t, client)
	client.SetLinger(0)
	client.Close()
	wait(t, "reset seen", func() bool {
		s.loop.mu.Lock()
		defer s.loop.mu.Unlock()
		return s.seen&unix.EPOLLERR != 0
	})
	rb, origin := tcpPair(t)
	rb.SetWriteBuffer(4 << 10)
	origin.SetReadBuffer(4 << 10)
	result := make(chan Result, 1)
	p := new(Relay).Start(s, rb, nil, func(r Result) { result <- r })
	defer p.Abort(nil)
	select {
	case res := <-result:
		if !errors.Is(res.Err(), syscall.ECONNRESET) {
			t.Error(res, res.Err())
		}
	case <-time.After(5 * time.Second):
		t.Error("the pair goes on although its client was reset")
	}
}

// TestBlockingDescriptor: File().Fd() makes a conn's descriptor a blocking one. The loop must not wait in it.
func TestBlockingDescriptor(t *testing.T) {
	if runtime.GOMAXPROCS(0) == 1 {
		t.Skip("the loop would hold the only processor")
	}
	others := bystanders(t)
	client, ra := tcpPair(t)
	rb, origin := tcpPair(t)
	f, err := rb.File()
	if err != nil {
		t.Fatal(err)
	}
	f.Fd()
	f.Close()
	p := new(Relay).Start(ra, rb, nil, nil)
	defer p.Abort(nil)
	defer origin.Close() // frees the loop
	fill(t, client)      // until the origin, which does not read, takes no more
	for _, o := range others {
		if !answers(o[0], o[1], 2*time.Second) {
			t.Fatal("a pair is held up by another one's stalled reader")
		}
	}
}

// TestAbortHasNoGrace: Pair.Abort says that it does without.
func TestAbortHasNoGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, ra := newHalfPipe()
		rb, _ := newHalfPipe()
		result := make(chan Result, 1)
		start := time.Now()
		(&Relay{Grace: time.Hour}).Start(ra, rb, nil, func(r Result) { result <- r }).Abort(nil)
		<-result
		if d := time.Since(start); d > 0 {
			t.Error("aborted after", d)
		}
	})
}

// embedded is a conn as people write them: what it does not need is an interface's nil.
type embedded struct {
	net.Conn
	*halfPipe
}

func (e embedded) Read(b []byte) (int, error)  { return e.halfPipe.Read(b) }
func (e embedded) Write(b []byte) (int, error) { return e.halfPipe.Write(b) }
func (e embedded) Close() error                { return e.halfPipe.Close() }

// TestPanicInSetReadDeadline: a panic of a conn's method ends its pair, and not the process.
func TestPanicInSetReadDeadline(t *testing.T) {
	_, ra := newHalfPipe()
	rb, origin := newHalfPipe()
	origin.Abort() // so that reading from a must stop
	defer func() {
		if v := recover(); v != nil {
			t.Error("panicked: ", v)
		}
	}()
	Join(context.Background(), embedded{nil, ra}, rb)
}

// stuck is a conn whose CloseWrite waits for its peer, as that of a multiplexed stream may, until Close.
type stuck struct {
	*halfPipe
	closed chan struct{}
}

func (s *stuck) CloseWrite() error { <-s.closed; return io.ErrClosedPipe }
func (s *stuck) Abort() error      { close(s.closed); return s.halfPipe.Abort() }

// TestSocketThatWasReadIsCarriedByTheKernel: who peeks at a Socket, or shakes hands over it, must not lose the loop by that.
func TestSocketThatWasReadIsCarriedByTheKernel(t *testing.T) {
	client, s := accepted(t)
	b, origin := tcpPair(t)
	io.WriteString(client, "hello")
	head := make([]byte, 5)
	if _, err := io.ReadFull(s, head); err != nil {
		t.Fatal(err)
	}
	var st Stats
	result := make(chan Result, 1)
	new(Relay).Start(WithHead(s, head), b, &st, func(res Result) { result <- res })
	if st.Engine() != Kernel {
		t.Errorf("carried by %v", st.Engine())
	}
	client.Close()
	got, err := io.ReadAll(origin)
	if string(got) != "hello" || err != nil {
		t.Errorf("origin got %q, %v", got, err)
	}
	origin.Close()
	if res := <-result; res.Err() != nil {
		t.Error(res.Err())
	}
	if _, err := s.Write(nil); !errors.Is(err, net.ErrClosed) {
		t.Error("the Socket can still be used:", err)
	}
}

// TestHalfCloseThatWaits: a half-close that does not come back must keep neither limits nor a cancel from ending the pair.
func TestHalfCloseThatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, ra := newHalfPipe()
		rb, _ := newHalfPipe()
		b := &stuck{rb, make(chan struct{})}
		ctx, cancel := context.WithCancel(context.Background())
		result := make(chan Result, 1)
		go func() { result <- new(Relay).Join(ctx, ra, b, nil) }()
		client.CloseWrite()
		synctest.Wait()
		cancel()
		select {
		case <-result:
		case <-time.After(time.Hour):
			t.Error("Join did not end an hour after it was cancelled")
			close(b.closed)
			b.closed = make(chan struct{})
			<-result
		}
	})
}

// TestSameSocketTwice: a conn joined with itself is an echo, and no deadlock.
func TestSameSocketTwice(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	client, s := &Socket{fd: fds[0]}, &Socket{fd: fds[1]}
	defer client.Close()
	began := make(chan *Pair, 1)
	go func() { began <- new(Relay).Start(s, s, nil, nil) }()
	select {
	case p := <-began:
		defer p.Abort(nil)
	case <-time.After(5 * time.Second):
		t.Fatal("Start hangs")
	}
	client.SetDeadline(time.Now().Add(5 * time.Second))
	io.WriteString(client, "x")
	read(t, client, "x")
}

// TestSocketKeepsItsAddress: a Socket that has become an ordinary conn knows its local address still.
func TestSocketKeepsItsAddress(t *testing.T) {
	ln, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	sl, err := SocketListener(ln)
	if err != nil {
		t.Fatal(err)
	}
	defer sl.Close()
	d, err := net.Dial("tcp4", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(ln.Addr().(*net.TCPAddr).Port)).String())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	c, err := sl.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Time{})
	if got, want := c.LocalAddr().String(), d.RemoteAddr().String(); got != want {
		t.Errorf("local address %q, not %q", got, want)
	}
}

// TestLongestIdle: the longest time there is means no limit, and not at once.
func TestLongestIdle(t *testing.T) {
	for _, r := range []*Relay{{Idle: math.MaxInt64}, {Idle: math.MaxInt64, Portable: true}} {
		client, origin, _, p, result := started(t, r)
		first := answers(client, origin, time.Second)
		if second := answers(client, origin, time.Second); !first || !second {
			select {
			case res := <-result:
				t.Error(res, res.Err())
			default:
				t.Error("no answer")
			}
		}
		p.Abort(nil)
	}
}

// TestLoopEndsThoughNotAsleep: what was registered last leaves while the loop is at work, just after it has found that
// it is still needed. It must end after another idle time nevertheless.
func TestLoopEndsThoughNotAsleep(t *testing.T) {
	_, c := tcpPair(t)
	l, err := newLoop()
	if err != nil {
		t.Fatal(err)
	}
	s := asSocket(c)
	defer s.Close()
	if _, err := s.register(l, nil); err != nil {
		t.Fatal(err)
	}
	// As run does, up to the end of the turn after the first wait that slept through.
	var w waiting
	for !w.slept {
		n := l.wait(&w)
		l.collect(n)
		if w.slept && l.end() {
			t.Fatal("ended too early")
		}
		w.needed = w.slept
		w.worked = n > 0
	}
	s.mu.Lock()
	s.leave() // from another goroutine
	s.mu.Unlock()
	ended := make(chan bool, 1)
	go func() {
		for {
			n := l.wait(&w)
			l.collect(n)
			if w.slept && l.end() {
				break
			}
			w.needed = w.slept
			w.worked = n > 0
		}
		ended <- true
	}()
	select {
	case <-ended:
	case <-time.After(4 * lingerTime):
		t.Error("the loop waits for ever with nothing registered")
		l.asleep.Store(true)
		l.notify()
		<-ended
	}
	unix.Close(l.epfd)
	unix.Close(l.wakefd)
}

// TestNoDescriptorIsNoCleanEnd: a Socket that cannot become an ordinary conn for want of descriptors is reset.
func TestNoDescriptorIsNoCleanEnd(t *testing.T) {
	client, s := accepted(t)
	_, rb := tcpPair(t)
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		t.Fatal(err)
	}
	none := lim
	none.Cur = 3
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	res := Join(context.Background(), s, rb)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		t.Fatal(err)
	}
	if res.Err() == nil {
		t.Error(res)
	}
	client.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Error("client saw", err)
	}
}

// TestDialSocketNotToItself: a port of the kernel's range where nobody listens may be given to the very socket that
// connects to it (a simultaneous open with itself). net takes that for a refusal; so must we.
func TestDialSocketNotToItself(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	to := ln.Addr().(*net.TCPAddr).AddrPort()
	ln.Close()
	to = netip.AddrPortFrom(to.Addr(), to.Port()&^1) // bind prefers odd ports, connect even ones
	for range 4000 {                                 // the kernel's choice goes through its range; 40000 are sure to meet it
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fds[1])
		client := &Socket{fd: fds[0]}
		dialed := make(chan *Socket, 1)
		if _, handled := DialSocket(client, to, time.Minute, nil, func(s *Socket, err error) { dialed <- s }); !handled {
			t.Fatal("not handled")
		}
		s := <-dialed
		client.Close()
		if s != nil {
			t.Errorf("dialled %v, where nobody listens, and got a conn from %v", s.RemoteAddr(), s.LocalAddr())
			s.Abort()
			break
		}
	}
}

// TestErrorQueueIsNoFailure: EPOLLERR also tells of messages in a socket's error queue, here of a timestamp that was asked
// for. The socket is well.
func TestErrorQueueIsNoFailure(t *testing.T) {
	for _, r := range []*Relay{{}, {Portable: true}} {
		client, ra := tcpPair(t)
		rb, origin := tcpPair(t)
		raw, err := rb.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TIMESTAMPING, unix.SOF_TIMESTAMPING_TX_ACK|unix.SOF_TIMESTAMPING_SOFTWARE|unix.SOF_TIMESTAMPING_OPT_TSONLY)
		})
		if err != nil {
			t.Skip(err)
		}
		result := make(chan Result, 1)
		p := r.Start(ra, rb, nil, func(r Result) { result <- r })
		for range 5 {
			if !answers(client, origin, time.Second) {
				t.Error("no answer, portable:", r.Portable)
				break
			}
		}
		p.Abort(nil)
		if res := <-result; res.AToB.End != Canceled {
			t.Errorf("portable %v: %v, %v", r.Portable, res, res.Err())
		}
	}
}

// TestAcceptorOutlivesItsListener: an inbound closes its listener first and its Acceptor then. What comes between must
// not touch whatever has got the listener's descriptor.
func TestAcceptorOutlivesItsListener(t *testing.T) {
	ln := listenSockets(t)
	a, handled := AcceptSockets(ln, func(s *Socket) { s.Close() }, func(err error) { t.Error(err) })
	if !handled {
		t.Fatal("not handled")
	}
	was := ln.(*socketListener).fd
	ln.Close()
	client, ra := tcpPair(t)
	rb, origin := tcpPair(t)
	p := new(Relay).Start(ra, rb, nil, nil) // one of its descriptors is the listener's former one
	defer p.Abort(nil)
	a.Resume()
	a.Pause()
	a.Resume()
	if was == a.fd || !answers(client, origin, 2*time.Second) {
		t.Error("the pair has lost its events to an Acceptor whose listener is closed")
	}
	a.Close()
	a.Resume()
}

// TestClientsWakeNoPoller: a listener whose clients a loop accepts is in the loop's epoll only. In that of Go's poller, too,
// each client woke a thread, which found nobody to tell.
func TestClientsWakeNoPoller(t *testing.T) {
	ln := listenSockets(t)
	a, handled := AcceptSockets(ln, func(s *Socket) { s.Close() }, func(err error) { t.Error(err) })
	if !handled {
		t.Fatal("not handled")
	}
	defer a.Close()
	a.Resume()
	var st unix.Stat_t
	if err := unix.Fstat(a.fd, &st); err != nil {
		t.Fatal(err)
	}
	watching := func() (by int) {
		fds, _ := os.ReadDir("/proc/self/fd")
		for _, fd := range fds {
			info, _ := os.ReadFile("/proc/self/fdinfo/" + fd.Name()) // of an epoll: a line for each descriptor that is in it
			by += strings.Count(string(info), fmt.Sprintf(" ino:%x ", st.Ino))
		}
		return by
	}
	if got := watching(); got != loopCount() {
		t.Errorf("the listener is in %d epolls, with %d loops", got, loopCount())
	}
	accepted := make(chan struct{})
	go func() { // through Go's poller, as an inbound with a handshake does
		defer close(accepted)
		if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept of a closed listener: %v", err)
		}
	}()
	for deadline := time.Now().Add(10 * time.Second); watching() == loopCount(); {
		if time.Now().After(deadline) {
			t.Fatal("Accept waits, and the poller does not know: this test sees nothing")
		}
	}
	ln.Close()
	<-accepted
	if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept of a closed listener: %v", err)
	}
}
