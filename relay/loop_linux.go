package relay

import (
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A loop waits for many sockets at a time with one epoll instance, edge-triggered. It carries pairs
// of kernel sockets (kernel_linux.go), which costs each of them no goroutine and no buffer while
// they are idle; it dials (dial_linux.go); and it watches sockets that others read and write for errors.
//
// All that belongs to a pair is touched by the loop's goroutine only, from its start to its
// end. Other goroutines reach the loop through the fields that loop.mu guards.
type loop struct {
	epfd, wakefd int

	mu     sync.Mutex
	slots  []slot
	free   []uint32 // slots not in use
	posted []posted // for the loop's next turn
	closed bool
	mail   atomic.Bool // something was posted
	asleep atomic.Bool // the loop waits, or is about to: who posts must wake it

	// What follows belongs to the loop's goroutine.
	now        int64 // of this turn, since epoch
	timers     timers
	ending     []*kpair // pairs that settle or drain: looked at every drainPoll
	nextEnding int64    // when they are next looked at
	slow       []*kpair // pairs that a rate holds back
	nextSlow   int64
	busyPoll   atomic.Int64 // how long to go on asking, in nanoseconds
	ready      []*kpair     // pairs that have used up their turn and have more to do
	cargoes    cargoes
	buffers    buffers
	pipes      pipes
	batch      []happening
	turn       []posted
	events     [256]unix.EpollEvent
}

// slot is what an epoll event names: by index and generation, so that an event that was
// on its way when its socket was closed finds nobody.
type slot struct {
	target target
	gen    uint32
	side   Side
}

// target is what a slot belongs to.
type target interface {
	// event says what has happened to the socket of side s. It runs on the loop's goroutine and must not block.
	event(l *loop, s Side, events uint32)
}

type happening struct {
	target target
	side   Side
	events uint32
}

// posted is work for the loop's goroutine.
type posted interface {
	inTurn(l *loop)
}

// loops are the process's loops. They are made when there is work and end when there has been none for a while.
var loops struct {
	sync.Mutex
	all  []*loop
	next int
}

const (
	lingerTime   = time.Second // how long a loop without work stays
	busyWait     = 1           // ms: how long a loop that has just worked waits without giving its processor away
	pairEvents   = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLET
	watchEvents  = unix.EPOLLET                       // errors are always told
	acceptEvents = unix.EPOLLIN | unix.EPOLLEXCLUSIVE // level-triggered
)

// loopCount: the kernel does most of the work, and does it in the loop's own time; a loop for every
// two processors leaves room for it, and for the rest of the process.
func loopCount() int { return max(1, runtime.GOMAXPROCS(0)/2) }

// withLoop calls do with a live loop, whose lock is held: the one that is wanted, if that lives, or else the next in turn.
func withLoop(want *loop, do func(l *loop) error) error {
	if want != nil && want.hold() {
		defer want.mu.Unlock()
		return do(want)
	}
	loops.Lock()
	defer loops.Unlock()
	if err := fillLoops(); err != nil {
		return err
	}
	loops.next++
	l := loops.all[loops.next%len(loops.all)]
	l.mu.Lock() // it lives: loops end under loops' lock
	defer l.mu.Unlock()
	return do(l)
}

// allLoops calls do with every loop, whose lock is held, up to the first error.
func allLoops(do func(l *loop) error) error {
	loops.Lock()
	defer loops.Unlock()
	if err := fillLoops(); err != nil {
		return err
	}
	for _, l := range loops.all {
		l.mu.Lock()
		err := do(l)
		l.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// fillLoops makes the loops that are missing. The list's lock is held.
func fillLoops() error {
	for len(loops.all) < loopCount() {
		l, err := newLoop()
		if err != nil {
			if len(loops.all) > 0 {
				return nil // those there are will do
			}
			return err
		}
		loops.all = append(loops.all, l)
		go l.run()
	}
	return nil
}

// hold locks the loop, and reports false if it has ended.
func (l *loop) hold() bool {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return false
	}
	return true
}

func newLoop() (*loop, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	wakefd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(epfd)
		return nil, err
	}
	l := &loop{epfd: epfd, wakefd: wakefd}
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: -1}
	if err := unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, wakefd, &ev); err != nil {
		unix.Close(epfd)
		unix.Close(wakefd)
		return nil, err
	}
	return l, nil
}

// register has epoll report fd to t, as its side s, and returns the slot. The lock is held.
func (l *loop) register(fd int, events uint32, t target, s Side) (index uint32, err error) {
	index = l.reserve(t, s)
	if err := l.add(fd, events, index); err != nil {
		l.unregister(index)
		return 0, err
	}
	return index, nil
}

// reserve returns a slot for t. The lock is held.
func (l *loop) reserve(t target, s Side) (index uint32) {
	if n := len(l.free); n > 0 {
		index = l.free[n-1]
		l.free = l.free[:n-1]
	} else {
		index = uint32(len(l.slots))
		l.slots = append(l.slots, slot{})
	}
	l.slots[index].target, l.slots[index].side = t, s
	return index
}

// add has epoll report fd to the slot. The lock is held.
func (l *loop) add(fd int, events uint32, index uint32) error {
	ev := unix.EpollEvent{Events: events, Fd: int32(index), Pad: int32(l.slots[index].gen)}
	return rawEpollAdd(l.epfd, fd, &ev)
}

// unregister forgets a slot. Closing its descriptor takes that out of epoll. The lock is held.
func (l *loop) unregister(index uint32) {
	l.slots[index].gen++
	l.slots[index].target = nil
	l.free = append(l.free, index)
	if len(l.free) == len(l.slots) {
		l.mail.Store(true)
		l.notify() // it may end now
	}
}

// post leaves work for the loop's next turn. The lock is held. The work is dropped if the loop has ended.
func (l *loop) post(p posted) {
	l.posted = append(l.posted, p)
	l.mail.Store(true)
	l.notify()
}

// notify ends the loop's wait, if it waits.
func (l *loop) notify() {
	if l.asleep.Load() {
		one := uint64(1)
		unix.Write(l.wakefd, (*[8]byte)(unsafe.Pointer(&one))[:]) // fails only if the counter is full: then it is awake
	}
}

// run is the loop's goroutine.
func (l *loop) run() {
	var wait waiting
	for {
		n := l.wait(&wait)
		l.now = clock()
		l.collect(n)
		if wait.slept && l.end() {
			break
		}
		wait.needed = wait.slept
		for i := range l.batch {
			h := &l.batch[i]
			h.target.event(l, h.side, h.events)
			h.target = nil
		}
		l.runTurn()
		if l.mail.Load() { // most often what these events have begun: it need not wait for a look at the others
			l.collect(0)
			l.runTurn()
		}
		l.expire()
		l.pollEnding()
		l.runSlow()
		l.runReady()
		wait.worked = n > 0
	}
	l.buffers.trim(0)
	l.pipes.trim()
	unix.Close(l.epfd)
	unix.Close(l.wakefd)
}

// runTurn does the work that was posted.
func (l *loop) runTurn() {
	for i, p := range l.turn {
		p.inTurn(l)
		l.turn[i] = nil
	}
}

// waiting is what wait remembers.
type waiting struct {
	worked bool // the last turn had events
	slept  bool // the wait slept through lingerTime
	needed bool // and yet the loop is needed: sockets are watched
}

// end ends the loop, if nothing is registered and nothing was posted. It reports whether it did.
func (l *loop) end() bool {
	loops.Lock()
	defer loops.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.turn) > 0 || l.mail.Load() || len(l.free) < len(l.slots) {
		return false
	}
	l.closed = true
	loops.all = slices.DeleteFunc(loops.all, func(x *loop) bool { return x == l })
	return true
}

// collect turns n epoll events into happenings and takes over what was posted.
func (l *loop) collect(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.batch = l.batch[:0]
	for i := range l.events[:n] {
		ev := &l.events[i]
		if ev.Fd < 0 {
			continue // woken; edge-triggered, so the counter need not be read
		}
		sl := &l.slots[ev.Fd]
		if sl.target != nil && sl.gen == uint32(ev.Pad) {
			l.batch = append(l.batch, happening{sl.target, sl.side, ev.Events})
		}
	}
	l.turn = append(l.turn[:0], l.posted...)
	clear(l.posted)
	l.posted = l.posted[:0]
	l.mail.Store(false)
}

// wait fills l.events and returns how many there are.
//
// A wait through a plain system call gives the processor back to Go's scheduler and has to get one again
// after it, at the price of up to two switches between threads for each message. So a loop that
// has just worked waits the first millisecond without the scheduler's knowledge; that is too short to hold up
// a garbage collection, and an idle loop does it once.
func (l *loop) wait(t *waiting) int {
	timeout, mayEnd := l.timeout()
	t.slept = false
	l.asleep.Store(true)
	defer l.asleep.Store(false)
	if len(l.ready) > 0 || l.mail.Load() {
		return l.epoll(0, true)
	}
	if mayEnd && t.needed {
		return l.epoll(-1, false)
	}
	if spin := l.busyPoll.Load(); spin > 0 && t.worked {
		for clock()-l.now <= spin {
			if n := l.epoll(0, true); n > 0 || l.mail.Load() {
				return n
			}
		}
	}
	if t.worked && runtime.GOMAXPROCS(0) > 1 {
		if n := l.epoll(min(timeout, busyWait), true); n > 0 || timeout <= busyWait {
			return n
		}
		timeout -= busyWait
	}
	l.buffers.trim(1)
	l.pipes.trim()
	n := l.epoll(timeout, false)
	t.slept = mayEnd && n == 0
	return n
}

// timeout returns the milliseconds to the next timer. mayEnd says that it is the lingering of a loop without pairs.
func (l *loop) timeout() (ms int, mayEnd bool) {
	if len(l.ending) > 0 || len(l.slow) > 0 {
		return int(min(drainPoll, throttleTick) / time.Millisecond), false
	}
	d, ok := l.timers.next()
	if !ok {
		return int(lingerTime / time.Millisecond), true
	}
	return int(min(max((d-clock()+1e6-1)/1e6, 0), 1<<30)), false
}

func (l *loop) epoll(timeout int, raw bool) int {
	call := unix.Syscall6
	if raw {
		call = unix.RawSyscall6
	}
	n, _, errno := call(unix.SYS_EPOLL_PWAIT, uintptr(l.epfd), uintptr(unsafe.Pointer(&l.events[0])),
		uintptr(len(l.events)), uintptr(timeout), 0, 0)
	if errno != 0 { // EINTR; nothing else can be wrong
		return 0
	}
	return int(n)
}

// expire calls back whose deadline has passed.
func (l *loop) expire() {
	for {
		t, ok := l.timers.due(l.now)
		if !ok {
			return
		}
		t.timeUp(l)
	}
}

// pollEnding looks at the send queues of the pairs that settle or drain.
func (l *loop) pollEnding() {
	if len(l.ending) == 0 || l.now < l.nextEnding {
		return
	}
	l.nextEnding = l.now + int64(drainPoll)
	keep := l.ending[:0]
	for _, p := range l.ending {
		if !p.gone {
			p.settle(l)
		}
		if !p.gone {
			keep = append(keep, p)
		}
	}
	clear(l.ending[len(keep):])
	l.ending = keep
}

// runSlow lets the pairs that a rate has held back go on.
func (l *loop) runSlow() {
	if len(l.slow) == 0 || l.now < l.nextSlow {
		return
	}
	l.nextSlow = l.now + int64(throttleTick)
	slow := l.slow
	l.slow = nil
	for _, p := range slow {
		p.slow = false
		p.flowBoth(l)
	}
}

// runReady gives the pairs that had used up their turn another one.
func (l *loop) runReady() {
	n := len(l.ready)
	for i := 0; i < n; i++ {
		p := l.ready[i]
		l.ready[i] = nil
		p.queued = false
		p.flowBoth(l)
	}
	l.ready = append(l.ready[:0], l.ready[n:]...)
}

// watched is a socket that others read and write, and that a loop watches for errors.
type watched struct {
	loop   *loop
	index  uint32
	fired  atomic.Bool
	failed func()
}

func (w *watched) event(_ *loop, _ Side, events uint32) {
	if events&unix.EPOLLERR != 0 && !w.fired.Swap(true) {
		w.failed()
	}
}

// watch calls failed, at most once, when the socket has an error, also where nobody reads from it or
// writes to it. failed must not block. A call may be under way when unwatch returns.
func (s below) watch(failed func()) (unwatch func()) {
	w := &watched{failed: failed}
	ok := false
	s.raw.Control(func(fd uintptr) {
		ok = withLoop(nil, func(l *loop) (err error) {
			w.loop = l
			w.index, err = l.register(int(fd), watchEvents, w, A)
			return err
		}) == nil
	})
	if !ok {
		return func() {}
	}
	return func() { w.leave(s) }
}

func (w *watched) leave(s below) {
	s.raw.Control(func(fd uintptr) { unix.EpollCtl(w.loop.epfd, unix.EPOLL_CTL_DEL, int(fd), nil) })
	w.loop.mu.Lock()
	defer w.loop.mu.Unlock()
	w.loop.unregister(w.index)
}
