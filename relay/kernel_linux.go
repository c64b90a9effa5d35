package relay

import (
	"io"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The kernel engine: pairs of bare TCP or Unix sockets, carried by a loop. A direction copies through
// the one buffer of its loop; when several reads in a row were large, it turns to splice(2)
// through a pipe. It owns a buffer or a pipe only while it holds bytes that its destination does
// not take.

// kpair is a pair under the kernel engine. It is the loop's from its start on.
type kpair struct {
	m     machine
	sides [2]kside
	ways  [2]kway // by source

	relay *Relay
	stats *Stats
	gov   *governor // nil: no limits on its bytes
	done  func(Result)
	loop  *loop

	queued bool // stands in loop.ready
	slow   bool // stands in loop.slow
	gone   bool // over: nothing of it may be touched
	limit  limit
	timer
	marks [2]uint32 // before the first turn: the events that came before; while settling: the send queues when last seen
	start int64     // all times as clock tells them
	last  int64     // when a byte last moved, or the limit last changed
}

// kside is one socket.
type kside struct {
	fd        int32
	slot      uint32
	tcp       bool
	readable  bool // a read may yield bytes, an end or an error
	writable  bool // a write may succeed
	ending    bool // its end or an error was signalled: read until it comes
	urgent    bool // urgent data was signalled: splice would stop at its mark
	keepalive bool // it is to have keepalive, once it has lived a while
}

// kway is one direction.
type kway struct {
	*cargo       // what it holds; nil while that is nothing
	full   uint8 // large reads in a row, copying; small ones, splicing
	splice bool
}

// cargo is what a direction holds, and what it holds that in.
type cargo struct {
	head   []byte           // what a handshake has read too much, first to be written
	buf    *[largeSize]byte // may be there without held bytes, until release
	off, n int32            // held bytes are buf[off:n]
	pipe   *pipe            // holds pipe.n bytes
}

const (
	spliceAfter   = 2        // large reads in a row that make a direction splice
	largeRead     = 32 << 10 // a read of so much is large: what a window of 64 KiB, the first that most kernels offer, lets through
	copyAfter     = 4        // small splices in a row that make it copy again
	smallSplice   = 16 << 10 // a splice of less is small
	turnBytes     = 1 << 20  // what a direction may move before others have their turn
	minSplicePipe = 64 << 10
)

// startKernel has a loop carry the pair where both conns are kernel sockets. Otherwise, and where
// the kernel gives no descriptors, handled is false and nothing was done.
func startKernel(r *Relay, st *Stats, a, b io.ReadWriteCloser, heads [2][]byte, done func(Result)) (_ *Pair, handled bool) {
	if r.Portable || !isSocket(a) || !isSocket(b) {
		return nil, false
	}
	if a == b { // an echo; a Socket cannot be locked, nor registered, twice
		return nil, false
	}
	conns := [2]io.ReadWriteCloser{a, b}
	sockets := [2]*Socket{asSocket(a), asSocket(b)}
	st.setEngine(Kernel)
	p := &kpair{m: newMachine(), relay: r, stats: st, gov: newGovernor(r), done: done, start: clock()}
	for s, head := range heads {
		if p.gov != nil {
			head = head[:p.gov.charge(Side(s), len(head))] // beyond the quota; the next byte to come ends the pair
		}
		if len(head) > 0 {
			p.ways[s].cargo = &cargo{head: head}
		}
	}
	if sockets[A] == nil || sockets[B] == nil || p.enter(sockets) != nil {
		st.setEngine(None)
		for i, s := range sockets {
			if s != nil && s != conns[i] {
				s.Close()
			}
		}
		return nil, false
	}
	for i, s := range sockets {
		if s != conns[i] {
			conns[i].Close() // the loop has a descriptor of its own
		}
	}
	return &Pair{p}, true
}

// isSocket says whether c is a stream socket of the kernel and nothing else: a wrapper that embeds
// one may see and change bytes.
func isSocket(c io.ReadWriteCloser) bool {
	switch c.(type) {
	case *net.TCPConn, *net.UnixConn, *Socket:
		return true
	}
	return false
}

// asSocket returns c as a Socket, duplicating its descriptor where Go's poller has it. The conn can be closed then,
// and its own descriptor leaves the poller with it. It is nil if that fails, or c is used as a conn already.
func asSocket(c io.ReadWriteCloser) *Socket {
	s, ok := c.(*Socket)
	if ok {
		if s.isConn() {
			return nil
		}
		return s
	}
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		return nil
	}
	_, tcp := c.(*net.TCPConn)
	cerr := raw.Control(func(fd uintptr) {
		if !tcp {
			if typ, terr := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TYPE); terr != nil || typ != unix.SOCK_STREAM {
				err = unix.EPROTOTYPE
				return
			}
		}
		var n int
		if flags, ferr := unix.FcntlInt(fd, unix.F_GETFL, 0); ferr == nil && flags&unix.O_NONBLOCK == 0 {
			unix.SetNonblock(int(fd), true) // File().Fd() makes it a blocking one
		}
		if n, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0); err == nil {
			s = &Socket{fd: n, tcp: tcp}
		}
	})
	if err != nil || cerr != nil {
		return nil
	}
	if tcp {
		rawNoDelay(s.fd)
		// A close that lingers would hold the loop up.
		unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{})
	}
	return s
}

// enter takes both sockets over, from now on the loop's alone. On an error nothing was taken.
func (p *kpair) enter(sockets [2]*Socket) error {
	for _, s := range sockets {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.fd < 0 {
			return net.ErrClosed
		}
	}
	home := sockets[A].loop // a socket that was watched or dialled has one already
	if home == nil {
		home = sockets[B].loop
	}
	fresh := false // A was registered here
	return withLoop(home, func(l *loop) error {
		for i, s := range sockets {
			switch {
			case s.loop == nil:
				index, err := l.register(s.fd, pairEvents, s, A)
				if err != nil {
					if i == 1 && fresh {
						sockets[A].leaveLocked()
					}
					return err
				}
				s.loop, s.slot = l, index
				fresh = true
			case s.loop != l: // only if somebody has dialled for another client
				return unix.EXDEV
			}
		}
		p.loop = l
		if spin := int64(min(p.relay.BusyPoll, busyPollMax)); spin > l.busyPoll.Load() {
			l.busyPoll.Store(spin)
		}
		for i, s := range sockets {
			p.sides[i] = kside{fd: int32(s.fd), slot: s.slot, tcp: s.tcp, writable: true, keepalive: s.keepalive}
			sl := &l.slots[s.slot]
			sl.target, sl.side = p, Side(i)
			p.marks[i] = s.seen
			s.fd, s.loop, s.told = -1, nil, nil
			s.given, s.side = p, Side(i)
		}
		l.post(p)
		return nil
	})
}

// busyPollMax bounds Relay.BusyPoll.
const busyPollMax = time.Millisecond

// keepaliveAfter returns how old the pair is when its sockets get keepalive, where they have none: those of short connections
// never need it. It differs, as the time of the first probe counts from then.
func (p *kpair) keepaliveAfter() int64 {
	return int64(5*time.Second) + int64(p.sides[A].fd)*7919%5000*int64(time.Millisecond)
}

// inTurn is the loop's first touch of the pair.
func (p *kpair) inTurn(l *loop) {
	if p.gone {
		return // an event came first, and was the last
	}
	p.last = l.now
	p.limit = p.m.limit()
	p.setTimer(l)
	for s := A; s <= B && !p.gone; s++ { // what the sockets had to say before
		seen := p.marks[s]
		p.marks[s] = 0
		p.event(l, s, seen)
	}
	p.flowBoth(l) // and what a handshake has read too much
}

// abortPair asks the loop to abort the pair.
func (p *kpair) abortPair(cause error) {
	l := p.loop
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		l.post(&abortion{p, cause})
	}
}

// abortion carries an abort to the loop.
type abortion struct {
	pair  *kpair
	cause error
}

func (a *abortion) inTurn(l *loop) {
	if !a.pair.gone {
		a.pair.do(l, a.pair.m.cancel(a.cause))
	}
}

// event takes in what epoll says of a socket.
func (p *kpair) event(l *loop, s Side, events uint32) {
	if p.gone {
		return
	}
	k := &p.sides[s]
	if events&unix.EPOLLERR != 0 && p.m.failure(s) == nil {
		if err := failureOf(int(k.fd), k.tcp); err != nil {
			p.do(l, p.m.connErr(s, err))
			if p.gone {
				return
			}
		}
	}
	k.note(events)
	if events&(unix.EPOLLOUT|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		if p.flow(l, s.other()); p.gone {
			return
		}
	}
	if k.readable {
		p.flow(l, s)
	}
}

// note remembers what events say.
func (k *kside) note(events uint32) {
	if events&unix.EPOLLPRI != 0 {
		k.urgent = true
	}
	if events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		k.ending = true
		k.readable = true
	}
	if events&unix.EPOLLIN != 0 {
		k.readable = true
	}
	if events&(unix.EPOLLOUT|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		k.writable = true
	}
}

// failureOf takes a socket's error; nil where the event was of something else.
func failureOf(fd int, tcp bool) error {
	n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	switch {
	case err != nil:
		return err
	case n != 0:
		return syscall.Errno(n)
	case tcp && tcpState(fd) == unix.BPF_TCP_CLOSE:
		return errReset
	}
	return nil
}

// flow moves what can be moved from s to its peer.
func (p *kpair) flow(l *loop, s Side) {
	src, dst, w := &p.sides[s], &p.sides[s.other()], &p.ways[s]
	for moved := 0; p.m.way[s] == flowing && p.m.phase < draining; {
		if w.holds() {
			n, err := p.deliver(w, dst)
			moved += n
			p.count(l, s, n)
			if err != nil {
				p.do(l, p.m.writeErr(s, err))
				return
			}
			if w.holds() {
				return // until dst is writable
			}
		}
		if !src.readable {
			break
		}
		if moved >= turnBytes {
			if !p.queued {
				p.queued = true
				l.ready = append(l.ready, p)
			}
			break
		}
		limit, probe := turnBytes, false
		if p.gov != nil {
			if limit, probe = p.gov.allowed(s, turnBytes, l.now); limit == 0 {
				p.throttle(l)
				break
			}
		}
		n, err := p.take(l, s, w, src, moved, limit)
		if p.gov != nil && !probe {
			p.gov.charge(s, n) // the quota is exact: both directions have one goroutine
		}
		switch {
		case n > 0 && probe:
			w.release(l)
			p.do(l, p.m.exceeded())
			return
		case n > 0:
		case err == unix.EAGAIN || err == unix.EINTR:
		case err == nil:
			w.release(l)
			p.do(l, p.m.eof(s))
			return
		default:
			w.release(l)
			p.do(l, p.m.readErr(s, err))
			return
		}
	}
	w.release(l)
}

// flowBoth moves what can be moved either way.
func (p *kpair) flowBoth(l *loop) {
	for s := A; s <= B && !p.gone; s++ {
		p.flow(l, s)
	}
}

// throttle has the pair go on a little later.
func (p *kpair) throttle(l *loop) {
	if !p.slow {
		p.slow = true
		l.slow = append(l.slow, p)
	}
}

// take reads at most limit bytes from src into what the way holds. n = 0 without an error is the end.
func (p *kpair) take(l *loop, s Side, w *kway, src *kside, moved, limit int) (n int, err error) {
	if w.cargo == nil {
		w.cargo = l.cargoes.get()
	}
	if w.splice && !src.urgent {
		if w.pipe == nil {
			w.pipe = l.pipes.get()
		}
		if w.pipe != nil {
			return p.takeSplice(l, s, w, src, moved, limit)
		}
	}
	return p.takeCopy(l, s, w, src, limit)
}

func (p *kpair) takeCopy(l *loop, s Side, w *kway, src *kside, limit int) (n int, err error) {
	if w.buf == nil {
		if w.buf = l.buffers.get(); w.buf == nil {
			return 0, unix.ENOMEM
		}
	}
	b := w.buf[:min(limit, len(w.buf))]
	n, err = rawRead(int(src.fd), b)
	switch {
	case n >= largeRead:
		if w.full++; w.full >= spliceAfter && !src.urgent {
			p.setSplice(s, true)
		}
	case n > 0 && n < len(b): // not just as much as is allowed
		w.full = 0
	}
	switch {
	case n > 0 && n < len(b):
		// TCP gives all it has. What comes later is a new event, and so is an end, but for one that was told already.
		if src.tcp && !src.ending && !src.urgent {
			src.readable = false
		}
	case err == unix.EAGAIN:
		src.readable = false
	}
	w.off, w.n = 0, int32(n)
	return n, err
}

func (p *kpair) takeSplice(l *loop, s Side, w *kway, src *kside, moved, limit int) (n int, err error) {
	n, err = w.pipe.fill(int(src.fd), limit)
	switch {
	case err == unix.EAGAIN && moved > 0:
		src.readable = false
	case err == unix.EAGAIN, err == unix.EINVAL, n == 0 && err == nil:
		// Readable, and yet there is nothing to splice; or it looks like the end. The mark of urgent data may
		// stand in the way, with more behind it: a read can tell.
		if n, err = p.takeCopy(l, s, w, src, limit); n > 0 {
			p.setSplice(s, false)
		}
	case n > 0 && n < min(smallSplice, limit):
		if w.full++; w.full >= copyAfter {
			p.setSplice(s, false)
		}
	case n > 0:
		w.full = 0
	}
	return n, err
}

func (p *kpair) setSplice(s Side, on bool) {
	p.ways[s].splice, p.ways[s].full = on, 0
	p.stats.setSplicing(s, on)
}

// deliver writes what the way holds, as far as dst takes it now.
func (p *kpair) deliver(w *kway, dst *kside) (total int, err error) {
	for w.holds() && dst.writable {
		var n int
		switch {
		case len(w.head) > 0:
			if n, err = rawWrite(int(dst.fd), w.head); n > 0 {
				w.head = w.head[n:]
			}
		case w.off < w.n:
			if n, err = rawWrite(int(dst.fd), w.buf[w.off:w.n]); n > 0 {
				w.off += int32(n)
			}
		default:
			n, err = w.pipe.drain(int(dst.fd))
		}
		switch {
		case n > 0:
			total += n
		case err == unix.EAGAIN:
			dst.writable = false
		case err == unix.EINTR:
		case err == nil:
			return total, io.ErrShortWrite
		default:
			return total, err
		}
	}
	return total, nil
}

func (w *kway) holds() bool {
	c := w.cargo
	return c != nil && (c.off < c.n || len(c.head) > 0 || c.pipe != nil && c.pipe.n > 0)
}

// release drops what the way holds, if anything, and gives its buffer and pipe back to the loop.
func (w *kway) release(l *loop) {
	if w.cargo == nil {
		return
	}
	if w.buf != nil {
		l.buffers.put(w.buf)
	}
	if w.pipe != nil {
		l.pipes.put(w.pipe)
	}
	l.cargoes.put(w.cargo)
	w.cargo = nil
}

func (p *kpair) count(l *loop, s Side, n int) {
	if n > 0 {
		p.stats.moved[s].Add(int64(n))
		p.last = l.now
	}
}

// do carries out what the machine asks for, in the order of the constants.
func (p *kpair) do(l *loop, act action) {
	for s := A; s <= B; s++ {
		if act.has(stopA, s) {
			p.ways[s].release(l)
		}
	}
	for s := A; s <= B; s++ {
		if act.has(endA, s) {
			if err := rawShutdown(int(p.sides[s].fd)); err != nil {
				p.do(l, p.m.connErr(s, err))
				return
			}
		}
	}
	for s := A; s <= B; s++ {
		if act.has(drainA, s) {
			p.ways[s.other()].release(l)
			if n, ok := unsent(int(p.sides[s].fd)); !ok || n == 0 {
				act |= p.m.drained()
			}
		}
	}
	if p.m.phase == over {
		p.end(l, act)
		return
	}
	if lim := p.m.limit(); lim != p.limit {
		p.limit, p.last = lim, l.now
		if lim == limitSettle {
			p.beginSettle(l)
		} else {
			p.setTimer(l)
		}
	} else if act&(drainA|drainB) != 0 {
		p.last = l.now
	}
}

// end closes both sockets and gives everything back.
func (p *kpair) end(l *loop, act action) {
	for s := A; s <= B; s++ {
		p.ways[s].release(l)
		fd := int(p.sides[s].fd)
		if act.has(abortA, s) {
			rawAbort(fd)
		} else {
			rawClose(fd)
		}
	}
	l.timers.remove(p)
	p.gone = true
	l.mu.Lock()
	l.unregister(p.sides[A].slot)
	l.unregister(p.sides[B].slot)
	l.mu.Unlock()
	if p.done != nil {
		p.done(result(&p.m, p.stats, time.Duration(clock()-p.start)))
	}
}

func (p *kpair) at() *timer { return &p.timer }

// setTimer enters the pair's next deadline into the loop's timers.
func (p *kpair) setTimer(l *loop) {
	d := int64(p.relay.length(p.limit))
	switch {
	case p.limit == limitSettle:
		return
	case p.sides[A].keepalive || p.sides[B].keepalive:
		if k := p.keepaliveAfter(); d <= 0 || p.start+k < p.last+d {
			l.timers.set(p, p.start+k)
			return
		}
	case d <= 0:
		l.timers.remove(p)
		return
	}
	l.timers.set(p, p.last+d)
}

// timeUp is called when the timer ran out; bytes may have moved since it was set.
func (p *kpair) timeUp(l *loop) {
	if l.now-p.start >= p.keepaliveAfter() {
		for s := range p.sides {
			p.sides[s].keepAlive()
		}
	}
	if d := int64(p.relay.length(p.limit)); d <= 0 || p.last+d > l.now {
		p.setTimer(l)
		return
	}
	for s := A; s <= B; s++ { // what waits for a slow reader is no silence
		if n, _ := unsent(int(p.sides[s].fd)); n > 0 || p.ways[s].holds() || p.slow {
			p.last = l.now
			p.setTimer(l)
			return
		}
	}
	p.do(l, p.m.expired())
}

func (p *kpair) beginSettle(l *loop) {
	l.timers.remove(p)
	l.ending = append(l.ending, p)
}

// settle looks at a pair that is ending: whether the side that drains has drained, and whether anything moves.
func (p *kpair) settle(l *loop) {
	for s := A; s <= B; s++ {
		n, ok := unsent(int(p.sides[s].fd))
		if p.m.phase == draining && p.m.drain == s && (!ok || n == 0) {
			p.do(l, p.m.drained())
			return
		}
		if uint32(n) != p.marks[s] {
			p.marks[s], p.last = uint32(n), l.now
		}
	}
	if l.now-p.last >= int64(settle) {
		p.do(l, p.m.expired())
	}
}
