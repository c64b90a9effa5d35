package relay

import (
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// faults are what may go wrong with a pair under way. Each plays one pair to its end and checks what both ends see.
var faults = []struct {
	name string
	play func(f *faulty, t *testing.T)
}{
	{"reset-mid-splice", (*faulty).resetMidSplice},
	{"stall-then-reset", (*faulty).stallThenReset},
	{"stall-then-read", (*faulty).stallThenRead},
	{"urgent-data", (*faulty).urgentData},
	{"close-at-the-switch", (*faulty).closeAtTheSwitch},
	{"abort", (*faulty).abortUnderWay},
}

// faulty is a pair that a fault is for.
type faulty struct {
	client, origin *net.TCPConn
	pair           *Pair
	stats          Stats
	result         chan Result
	n              int // which of the many it is
}

// faultCount is SLUICE_FAULTS, the number of each fault to play.
func faultCount(t *testing.T) int {
	s := os.Getenv("SLUICE_FAULTS")
	if s == "" {
		return 200
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestNothingIsLeftOfFaults plays many of each, and checks that no descriptor, goroutine or pipe stays.
func TestNothingIsLeftOfFaults(t *testing.T) {
	count := int64(faultCount(t))
	for _, fault := range faults {
		t.Run(fault.name, func(t *testing.T) {
			leaves := whatIsThere(t)
			var next atomic.Int64
			var workers sync.WaitGroup
			for range 4 {
				workers.Go(func() {
					for !t.Failed() {
						n := next.Add(1)
						if n > count {
							return
						}
						playFault(t, int(n), fault.play)
					}
				})
			}
			workers.Wait()
			leaves()
		})
	}
}

// whatIsThere returns a check that there is no more in the end.
func whatIsThere(t *testing.T) (check func()) {
	count := func() (fds, pipes int) {
		for _, to := range descriptors(t) {
			switch {
			case strings.HasPrefix(to, "pipe:"):
				pipes++
			case strings.HasPrefix(to, "socket:"):
				fds++
			}
		}
		return fds, pipes
	}
	wait(t, "the loops of earlier tests are gone", func() bool { return liveLoops() == 0 })
	goroutines := runtime.NumGoroutine()
	sockets, pipes := count()
	return func() {
		t.Helper()
		wait(t, "the loops end, for want of work", func() bool { return liveLoops() == 0 })
		wait(t, "the goroutines end", func() bool { return runtime.NumGoroutine() <= goroutines })
		if s, p := count(); s > sockets || p > pipes {
			t.Errorf("%d sockets and %d pipes, %d and %d before", s, p, sockets, pipes)
		}
	}
}

func liveLoops() int {
	loops.Lock()
	defer loops.Unlock()
	return len(loops.all)
}

func playFault(t *testing.T, n int, play func(*faulty, *testing.T)) {
	f := &faulty{n: n, result: make(chan Result, 1)}
	var ra, rb *net.TCPConn
	f.client, ra = dialPair(t)
	rb, f.origin = dialPair(t)
	if t.Failed() {
		return
	}
	defer Abort(f.client)
	defer Abort(f.origin)
	f.pair = new(Relay).Start(ra, rb, &f.stats, f.over)
	f.client.SetDeadline(time.Now().Add(time.Minute))
	f.origin.SetDeadline(time.Now().Add(time.Minute))
	play(f, t)
	f.client.SetLinger(0) // leaves no TIME_WAIT behind, which there would be tens of thousands of
	f.origin.SetLinger(0)
	f.client.Close()
	f.origin.Close()
	select {
	case <-f.result:
	case <-time.After(time.Minute):
		t.Error("the pair never ends")
	}
}

func (f *faulty) over(r Result) { f.result <- r }

// dialPair is tcpPair without a cleanup.
func dialPair(t *testing.T) (dialed, accepted *net.TCPConn) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Error(err)
		return nil, nil
	}
	defer ln.Close()
	d, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Error(err)
		return nil, nil
	}
	a, err := ln.Accept()
	if err != nil {
		t.Error(err)
		return nil, nil
	}
	return d.(*net.TCPConn), a.(*net.TCPConn)
}

// send writes zeros to c until it fails.
func (f *faulty) send(c *net.TCPConn, done *sync.WaitGroup) {
	defer done.Done()
	io.Copy(c, zeros{})
}

// mustBeReset reads c to its end, which must be a reset.
func mustBeReset(t *testing.T, who string, c *net.TCPConn) {
	if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%s saw %v", who, err)
	}
}

func (f *faulty) resetMidSplice(t *testing.T) {
	var sender sync.WaitGroup
	sender.Add(1)
	go f.send(f.origin, &sender)
	if _, err := io.CopyN(io.Discard, f.client, int64(256<<10+f.n%7*40_000)); err != nil {
		t.Error(err)
	}
	Abort(f.origin)
	mustBeReset(t, "client", f.client)
	sender.Wait()
}

func (f *faulty) stallThenReset(t *testing.T) {
	stuff(t, f.origin)
	Abort(f.client)
	mustBeReset(t, "origin", f.origin)
}

func (f *faulty) stallThenRead(t *testing.T) {
	sent := stuff(t, f.origin)
	f.origin.CloseWrite()
	if n, err := io.Copy(io.Discard, f.client); n != sent || err != nil {
		t.Errorf("read %d of %d, %v", n, sent, err)
	}
}

// stuff writes to c, whose peer does not read, until a write would block. What the kernel has queued by then is enough: it need not be all.
func stuff(t *testing.T, c *net.TCPConn) (sent int64) {
	raw, err := c.SyscallConn()
	if err != nil {
		t.Error(err)
		return 0
	}
	b := make([]byte, 64<<10)
	raw.Write(func(fd uintptr) bool {
		for sent < 4<<20 {
			n, err := unix.Write(int(fd), b)
			if err != nil {
				break
			}
			sent += int64(n)
		}
		return true
	})
	return sent
}

func (f *faulty) urgentData(t *testing.T) {
	const chunk = 200_000
	sent := make(chan error, 1)
	go func() { sent <- f.sendUrgent(chunk) }()
	n, err := io.Copy(io.Discard, f.origin)
	if err != nil || n < 2*chunk || n > 2*chunk+1 {
		t.Errorf("read %d of %d and an urgent byte, %v", n, 2*chunk, err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

// sendUrgent sends a byte out of band between two chunks.
func (f *faulty) sendUrgent(chunk int64) error {
	defer f.client.CloseWrite()
	if _, err := io.CopyN(f.client, zeros{}, chunk); err != nil {
		return err
	}
	raw, err := f.client.SyscallConn()
	if err != nil {
		return err
	}
	raw.Write(func(fd uintptr) bool { return unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) != unix.EAGAIN })
	_, err = io.CopyN(f.client, zeros{}, chunk)
	return err
}

// closeAtTheSwitch ends a direction about when it turns from copying to splicing, or back.
func (f *faulty) closeAtTheSwitch(t *testing.T) {
	size := int64(largeRead*spliceAfter + (f.n%31-15)*4096)
	if f.n%2 == 0 {
		size += 3 * 64 << 10
	}
	sent := make(chan error, 1)
	go func() {
		_, err := io.CopyN(f.origin, zeros{}, size)
		f.origin.CloseWrite()
		sent <- err
	}()
	if n, err := io.Copy(io.Discard, f.client); n != size || err != nil {
		t.Errorf("read %d of %d, %v", n, size, err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

func (f *faulty) abortUnderWay(t *testing.T) {
	var sender sync.WaitGroup
	sender.Add(1)
	go f.send(f.client, &sender)
	if _, err := io.CopyN(io.Discard, f.origin, int64(f.n%9*30_000+1)); err != nil {
		t.Error(err)
	}
	f.pair.Abort(nil)
	mustBeReset(t, "origin", f.origin)
	sender.Wait()
}

// TestPairsWithoutDescriptors starts pairs, and has them turn to bulk, while the process may open nothing:
// they are carried by the other engine, or without pipes. It has the process to itself: nothing here runs in parallel.
func TestPairsWithoutDescriptors(t *testing.T) {
	count := faultCount(t)
	leaves := whatIsThere(t)
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		t.Fatal(err)
	}
	none := lim
	none.Cur = 3
	for n := range count {
		client, ra := dialPair(t)
		rb, origin := dialPair(t)
		if t.Failed() {
			return
		}
		var st Stats
		result := make(chan Result, 1)
		over := func(r Result) { result <- r }
		late := n%2 == 0 // it is carried by the loop, and finds no pipe
		if late {
			new(Relay).Start(ra, rb, &st, over)
		}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
			t.Fatal(err)
		}
		if !late {
			new(Relay).Start(ra, rb, &st, over)
		}
		const size = 400_000
		go func() {
			io.CopyN(origin, zeros{}, size)
			origin.CloseWrite()
		}()
		got, err := io.Copy(io.Discard, client)
		if e := unix.Setrlimit(unix.RLIMIT_NOFILE, &lim); e != nil {
			t.Fatal(e)
		}
		if got != size || err != nil {
			t.Errorf("read %d of %d, %v", got, size, err)
		}
		if want := map[bool]Engine{true: Kernel, false: Copy}[late]; st.Engine() != want {
			t.Errorf("carried by %v, not %v", st.Engine(), want)
		}
		client.SetLinger(0)
		origin.SetLinger(0)
		client.Close()
		origin.Close()
		<-result
	}
	leaves()
}

// TestIdleAndStalledPairsDoNotSpin counts the processor time that they take. A loop that spins takes all there is.
func TestIdleAndStalledPairsDoNotSpin(t *testing.T) {
	for range 50 {
		_, origin, _, _, _ := started(t, &Relay{})
		stuff(t, origin) // nobody reads
		started(t, &Relay{})
	}
	time.Sleep(100 * time.Millisecond)
	const watch = 2 * time.Second
	before := processorTime(t)
	time.Sleep(watch)
	if took := processorTime(t) - before; took > watch/4 {
		t.Errorf("%v of processor time in %v", took, watch)
	}
}

func processorTime(t *testing.T) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
