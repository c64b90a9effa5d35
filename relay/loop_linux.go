package relay

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A loop waits for many sockets at a time with one epoll instance, edge-triggered. It carries pairs
// of kernel sockets (kernel_linux.go), which costs each of them no goroutine and no buffer while
// they are idle, and it watches sockets that others read and write for errors.
//
// All that belongs to a pair is touched by the loop's goroutine only, from its registration to its
// end. Other goroutines reach the loop through the fields that loop.mu guards.
type loop struct {
	epfd, wakefd int

	mu     sync.Mutex
	slots  []slot
	free   []uint32 // slots not in use
	fresh  []*kpair // registered since the last turn
	calls  []call
	closed bool

	// What follows belongs to the loop's goroutine.
	now    int64 // of this turn, since epoch
	timers timers
	ending []*kpair // pairs that settle or drain: looked at every drainPoll
	ready  []*kpair // pairs that have used up their turn and have more to do
	buf    *[largeSize]byte
	pipes  pipes
	batch  []happening
	events [256]unix.EpollEvent
}

// slot is what an epoll event names: by index and generation, so that an event that was
// on its way when its socket was closed finds nobody.
type slot struct {
	gen    uint32
	target target
}

// target is what a loop has registered.
type target interface {
	// event says what has happened to the socket of side s. It runs on the loop's goroutine and must not block.
	event(l *loop, s Side, events uint32)
}

type happening struct {
	target target
	side   Side
	events uint32
}

// call asks the loop to abort a pair.
type call struct {
	pair  *kpair
	gen   uint32
	cause error
}

// loops are the process's loops. They are made when there is work and end when there has been none for a while.
var loops struct {
	sync.Mutex
	all  []*loop
	next int
}

const (
	lingerTime  = time.Second // how long a loop without work stays
	busyWait    = 1           // ms: how long a loop that has just worked waits without giving its processor away
	pairEvents  = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLET
	watchEvents = unix.EPOLLET // errors are always told
)

var epoch = time.Now()

// clock returns nanoseconds since epoch.
func clock() int64 { return int64(time.Since(epoch)) }

// loopCount: the kernel does most of the work, and does it in the loop's own time; a loop for every
// two processors leaves room for it, and for the rest of the process.
func loopCount() int { return max(1, runtime.GOMAXPROCS(0)/2) }

// withLoop calls register with a live loop, whose lock is held.
func withLoop(register func(l *loop) error) error {
	loops.Lock()
	defer loops.Unlock()
	for range loopCount() + 1 {
		if len(loops.all) < loopCount() {
			l, err := newLoop()
			if err != nil {
				return err
			}
			loops.all = append(loops.all, l)
			go l.run()
		}
		loops.next++
		l := loops.all[loops.next%len(loops.all)]
		l.mu.Lock()
		if !l.closed {
			err := register(l)
			l.mu.Unlock()
			return err
		}
		l.mu.Unlock()
		removeLoop(l)
	}
	return unix.EAGAIN
}

// removeLoop takes l off the list, whose lock is held.
func removeLoop(l *loop) {
	for i, x := range loops.all {
		if x == l {
			loops.all = append(loops.all[:i], loops.all[i+1:]...)
			return
		}
	}
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

// register makes t known and returns its slot. The lock is held.
func (l *loop) register(t target) (index, gen uint32) {
	if n := len(l.free); n > 0 {
		index = l.free[n-1]
		l.free = l.free[:n-1]
	} else {
		index = uint32(len(l.slots))
		l.slots = append(l.slots, slot{})
	}
	l.slots[index].target = t
	return index, l.slots[index].gen
}

// unregister forgets a slot. The lock is held.
func (l *loop) unregister(index uint32) {
	l.slots[index].gen++
	l.slots[index].target = nil
	l.free = append(l.free, index)
}

// add has epoll report fd as the side s of the slot.
func (l *loop) add(fd int, events uint32, index, gen uint32, s Side) error {
	ev := unix.EpollEvent{Events: events, Fd: int32(index<<1 | uint32(s)), Pad: int32(gen)}
	return unix.EpollCtl(l.epfd, unix.EPOLL_CTL_ADD, fd, &ev)
}

// wake ends the loop's wait.
func (l *loop) wake() {
	one := [8]byte{1}
	unix.Write(l.wakefd, one[:]) // fails only if the counter is full: then it is awake
}

// run is the loop's goroutine.
func (l *loop) run() {
	var turn turn
	for {
		n := l.wait(&turn)
		l.now = clock()
		if l.collect(n, turn.slept) {
			break
		}
		turn.needed = turn.slept
		for i := range l.batch {
			h := &l.batch[i]
			h.target.event(l, h.side, h.events)
			h.target = nil
		}
		l.expire()
		l.pollEnding()
		l.runReady()
		turn.worked = n > 0
	}
	l.pipes.closeAll()
	unix.Close(l.epfd)
	unix.Close(l.wakefd)
}

// turn is what wait remembers.
type turn struct {
	worked bool // the last turn had events
	slept  bool // the wait slept through lingerTime
	needed bool // and yet the loop is needed: sockets are watched
}

// collect turns n epoll events into happenings and takes in what others have left. It reports
// whether the loop ends, which it does after an idle time without anything registered.
func (l *loop) collect(n int, idle bool) (end bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.batch = l.batch[:0]
	for i := range l.events[:n] {
		ev := &l.events[i]
		if ev.Fd < 0 {
			continue // woken; edge-triggered, so the counter need not be read
		}
		sl := &l.slots[uint32(ev.Fd)>>1]
		if sl.target == nil || sl.gen != uint32(ev.Pad) {
			continue
		}
		l.batch = append(l.batch, happening{sl.target, Side(ev.Fd & 1), ev.Events})
	}
	for i, p := range l.fresh {
		p.began(l)
		l.fresh[i] = nil
	}
	l.fresh = l.fresh[:0]
	for _, c := range l.calls {
		if sl := &l.slots[c.pair.index]; sl.gen == c.gen && sl.target == target(c.pair) {
			l.batch = append(l.batch, happening{target: &abortion{c.pair, c.cause}})
		}
	}
	clear(l.calls)
	l.calls = l.calls[:0]
	if idle && len(l.free) == len(l.slots) {
		l.closed = true
		return true
	}
	return false
}

// abortion carries a call to its turn.
type abortion struct {
	pair  *kpair
	cause error
}

func (a *abortion) event(l *loop, _ Side, _ uint32) {
	if !a.pair.gone {
		a.pair.do(l, a.pair.m.cancel(a.cause))
	}
}

// wait fills l.events and returns how many there are.
//
// A wait through a plain system call gives the processor back to Go's scheduler and has to get one again
// after it, at the price of up to two switches between threads for each message. So a loop that
// has just worked waits the first millisecond without the scheduler's knowledge; that is too short to hold up
// a garbage collection, and an idle loop does it once.
func (l *loop) wait(t *turn) int {
	timeout, mayEnd := l.timeout()
	t.slept = false
	if mayEnd && t.needed {
		return l.epoll(-1, false)
	}
	if len(l.ready) > 0 {
		return l.epoll(0, true)
	}
	if t.worked && runtime.GOMAXPROCS(0) > 1 {
		if n := l.epoll(min(timeout, busyWait), true); n > 0 || timeout <= busyWait {
			return n
		}
		timeout -= busyWait
	}
	n := l.epoll(timeout, false)
	t.slept = mayEnd && n == 0
	return n
}

// timeout returns the milliseconds to the next timer. mayEnd says that it is the lingering of a loop without pairs.
func (l *loop) timeout() (ms int, mayEnd bool) {
	if len(l.ending) > 0 {
		return int(drainPoll / time.Millisecond), false
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

// expire looks at the pairs whose limit may have run out.
func (l *loop) expire() {
	for {
		p, ok := l.timers.due(l.now)
		if !ok {
			return
		}
		p.timeUp(l)
	}
}

// pollEnding looks at the send queues of the pairs that settle or drain.
func (l *loop) pollEnding() {
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

// runReady gives the pairs that had used up their turn another one.
func (l *loop) runReady() {
	n := len(l.ready)
	for i := 0; i < n; i++ {
		p := l.ready[i]
		l.ready[i] = nil
		p.queued = false
		if !p.gone {
			p.flow(l, A)
		}
		if !p.gone {
			p.flow(l, B)
		}
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
func (s socket) watch(failed func()) (unwatch func()) {
	w := &watched{failed: failed}
	ok := false
	s.raw.Control(func(fd uintptr) { ok = withLoop(func(l *loop) error { return w.enter(l, int(fd)) }) == nil })
	if !ok {
		return func() {}
	}
	return func() { w.leave(s) }
}

func (w *watched) enter(l *loop, fd int) error {
	w.loop = l
	index, gen := l.register(w)
	w.index = index
	if err := l.add(fd, watchEvents, index, gen, A); err != nil {
		l.unregister(index)
		return err
	}
	return nil
}

func (w *watched) leave(s socket) {
	w.loop.mu.Lock()
	defer w.loop.mu.Unlock()
	if w.loop.closed {
		return
	}
	s.raw.Control(func(fd uintptr) { unix.EpollCtl(w.loop.epfd, unix.EPOLL_CTL_DEL, int(fd), nil) })
	w.loop.unregister(w.index)
	if len(w.loop.free) == len(w.loop.slots) {
		w.loop.wake() // it may end now
	}
}

// timers is a heap of pairs by their deadline.
type timers []*kpair

func (t timers) next() (deadline int64, ok bool) {
	if len(t) == 0 {
		return 0, false
	}
	return t[0].deadline, true
}

// due returns the first pair if its deadline has come. It stays in the heap.
func (t timers) due(now int64) (*kpair, bool) {
	if len(t) == 0 || t[0].deadline > now {
		return nil, false
	}
	return t[0], true
}

// set moves p to a deadline, entering it where it is not in the heap.
func (t *timers) set(p *kpair, deadline int64) {
	p.deadline = deadline
	if p.timer < 0 {
		p.timer = int32(len(*t))
		*t = append(*t, p)
	}
	if !t.up(int(p.timer)) {
		t.down(int(p.timer))
	}
}

// remove takes p out, if it is in.
func (t *timers) remove(p *kpair) {
	if p.timer < 0 {
		return
	}
	i, last := int(p.timer), len(*t)-1
	t.swap(i, last)
	(*t)[last] = nil
	*t = (*t)[:last]
	p.timer = -1
	if i < last && !t.up(i) {
		t.down(i)
	}
}

func (t timers) swap(i, j int) {
	t[i], t[j] = t[j], t[i]
	t[i].timer, t[j].timer = int32(i), int32(j)
}

func (t timers) up(i int) (moved bool) {
	for i > 0 {
		parent := (i - 1) / 2
		if t[parent].deadline <= t[i].deadline {
			break
		}
		t.swap(i, parent)
		i, moved = parent, true
	}
	return moved
}

func (t timers) down(i int) {
	for {
		child := 2*i + 1
		if child >= len(t) {
			return
		}
		if child+1 < len(t) && t[child+1].deadline < t[child].deadline {
			child++
		}
		if t[i].deadline <= t[child].deadline {
			return
		}
		t.swap(i, child)
		i = child
	}
}
