package relay

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// started joins two TCP pairs by Start and returns the outer ends.
func started(t *testing.T, r *Relay) (client, origin *net.TCPConn, st *Stats, p *Pair, result chan Result) {
	t.Helper()
	client, ra := tcpPair(t)
	rb, origin := tcpPair(t)
	result = make(chan Result, 1)
	st = new(Stats)
	p = r.Start(ra, rb, st, func(res Result) { result <- res })
	return client, origin, st, p, result
}

// wait polls until cond holds.
func wait(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("still not: ", what)
		}
	}
}

// descriptors returns what the process's descriptors are open on.
func descriptors(t *testing.T) map[string]string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	m := make(map[string]string)
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			m[e.Name()] = to
		}
	}
	return m
}

func countFDs(t *testing.T, kind string) (n int) {
	for _, to := range descriptors(t) {
		if strings.HasPrefix(to, kind) {
			n++
		}
	}
	return n
}

func TestKernelEngineHoldsNothingWhileIdle(t *testing.T) {
	client, origin, st, _, result := started(t, &Relay{})
	sockets := countFDs(t, "socket:")
	if st.Engine() != Kernel {
		t.Fatal("engine", st.Engine())
	}
	const size = 8 << 20
	var sent atomic.Int64
	done := make(chan error, 1)
	go func() {
		for chunk := make([]byte, 64<<10); sent.Load() < size; {
			n, err := origin.Write(chunk)
			if sent.Add(int64(n)); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	// It waits for the reader until nothing goes on: what has piled up is more than a read takes.
	for before := int64(0); before == 0 || before != sent.Load(); time.Sleep(30 * time.Millisecond) {
		before = sent.Load()
	}
	n, buf, spliced := 0, make([]byte, 256<<10), false
	for n < size {
		m, err := client.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		n += m
		_, s := st.Splicing()
		spliced = spliced || s
	}
	if !spliced {
		t.Error("never spliced")
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	wait(t, "all counted", func() bool { _, bToA := st.Bytes(); return bToA == size })
	// Idle now: the loop may keep a pipe or two for all its pairs, the pair has none.
	wait(t, "pipes given back", func() bool { return countFDs(t, "pipe:") <= 2*pipesKept+2 })
	if got := countFDs(t, "socket:"); got != sockets {
		t.Errorf("%d sockets, %d before", got, sockets)
	}
	client.Close()
	origin.Close()
	if res := <-result; res.Err() != nil {
		t.Error(res, res.Err())
	}
	wait(t, "loop gone", func() bool { return countFDs(t, "anon_inode:[eventpoll]") <= 1 })
}

func TestKernelLimits(t *testing.T) {
	t.Run("idle", func(t *testing.T) {
		client, origin, _, _, result := started(t, &Relay{Idle: time.Second})
		start := time.Now()
		for range 7 {
			time.Sleep(200 * time.Millisecond)
			io.WriteString(client, "x")
			read(t, origin, "x")
		}
		res := <-result
		if d := time.Since(start); d < 2300*time.Millisecond {
			t.Error("ended after", d)
		}
		if res.AToB.End != Idle || res.First != Neither || !errors.Is(res.Err(), ErrIdle) {
			t.Error(res, res.Err())
		}
		if _, err := client.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Error("client saw", err)
		}
	})
	t.Run("half-open", func(t *testing.T) {
		client, origin, _, _, result := started(t, &Relay{HalfOpen: 100 * time.Millisecond})
		origin.CloseWrite()
		res := <-result
		if res.BToA.End != EOF || res.AToB.End != HalfOpen || res.First != B {
			t.Error(res)
		}
		if b, err := io.ReadAll(client); len(b) > 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Error("client saw", b, err)
		}
	})
	t.Run("stalled-is-not-idle", func(t *testing.T) {
		client, origin, st, _, result := started(t, &Relay{Idle: 50 * time.Millisecond})
		sent := fill(t, client)
		time.Sleep(300 * time.Millisecond) // many times the limit; nothing moves, and all is held
		if n, err := io.CopyN(io.Discard, origin, sent); n != sent || err != nil {
			t.Errorf("read %d of %d, %v", n, sent, err)
		}
		if up, _ := st.Bytes(); up != sent {
			t.Errorf("counted %d of %d", up, sent)
		}
		if res := <-result; res.AToB.End != Idle {
			t.Error(res)
		}
	})
}

// fill writes to c until nothing more is taken for a while, and returns how much was.
func fill(t *testing.T, c *net.TCPConn) (sent int64) {
	t.Helper()
	b := make([]byte, 64<<10)
	for {
		c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		n, err := c.Write(b)
		sent += int64(n)
		if err != nil {
			c.SetWriteDeadline(time.Time{})
			return sent
		}
	}
}

func TestKernelStalledReadersOfAllKinds(t *testing.T) {
	// More stalled directions than there are pipes: the rest copy, and none loses a byte.
	const pairs = pipesMax + 6
	var wg sync.WaitGroup
	for range pairs {
		client, origin, _, _, result := started(t, &Relay{})
		wg.Go(func() {
			client.SetWriteBuffer(64 << 10)
			origin.SetReadBuffer(64 << 10)
			const size = 8 << 20
			go func() {
				io.CopyN(client, zeros{}, size)
				client.CloseWrite()
			}()
			time.Sleep(300 * time.Millisecond) // let it stall
			if n, err := io.Copy(io.Discard, origin); n != size || err != nil {
				t.Errorf("read %d, %v", n, err)
			}
			origin.Close()
			if res := <-result; res.Err() != nil {
				t.Error(res.Err())
			}
		})
	}
	wg.Wait()
}

type random struct{ src *rand.ChaCha8 }

func newRandom(seed uint64) random {
	return random{rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)})}
}
func (r random) Read(b []byte) (int, error) { return r.src.Read(b) }

func TestKernelStartAbort(t *testing.T) {
	client, origin, _, p, result := started(t, &Relay{})
	why := errors.New("why")
	io.WriteString(client, "x")
	read(t, origin, "x")
	p.Abort(why)
	if res := <-result; res.Err() != why || res.AToB.End != Canceled {
		t.Error(res)
	}
	for _, c := range []net.Conn{client, origin} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Error("saw", err)
		}
	}
	p.Abort(nil) // does nothing
}

func TestKernelJoinGrace(t *testing.T) {
	client, ra := tcpPair(t)
	rb, origin := tcpPair(t)
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan Result, 1)
	go func() { result <- (&Relay{Grace: 10 * time.Second}).Join(ctx, ra, rb, nil) }()
	cancel()
	io.WriteString(client, "still")
	read(t, origin, "still")
	client.Close()
	origin.Close()
	if res := <-result; res.Err() != nil {
		t.Error(res, res.Err())
	}
}

func TestTakenConnCannotBeMisused(t *testing.T) {
	_, ra := tcpPair(t)
	rb, _ := tcpPair(t)
	p := new(Relay).Start(ra, rb, nil, nil)
	defer p.Abort(nil)
	if _, err := ra.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Error("write to a conn that was given away:", err)
	}
}

func TestResetContext(t *testing.T) {
	t.Run("reset", func(t *testing.T) {
		client, accepted := tcpPair(t)
		ctx, stop := ResetContext(context.Background(), WithHead(accepted, []byte("x")))
		defer stop()
		io.WriteString(client, "early data")
		client.CloseWrite() // Neither cancels
		select {
		case <-ctx.Done():
			t.Fatal("cancelled by a half-close")
		case <-time.After(3 * watchDelay):
		}
		client.SetLinger(0)
		client.Close()
		select {
		case <-ctx.Done():
			if err := context.Cause(ctx); !errors.Is(err, syscall.ECONNRESET) {
				t.Error("cause", err)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("not cancelled by a reset")
		}
	})
	t.Run("stopped", func(t *testing.T) {
		client, accepted := tcpPair(t)
		ctx, stop := ResetContext(context.Background(), accepted)
		time.Sleep(2 * watchDelay) // so that the watch has begun
		stop()
		stop()
		if context.Cause(ctx) != context.Canceled {
			t.Error(context.Cause(ctx))
		}
		io.WriteString(client, "x")
		read(t, accepted, "x") // the conn is as it was
	})
	wait(t, "loop gone", func() bool { return countFDs(t, "anon_inode:[eventpoll]") <= 1 })
}

func TestUrgentDataDoesNotTruncate(t *testing.T) {
	client, origin, st, _, result := started(t, &Relay{})
	const chunk = 1 << 20
	go func() {
		for range 4 {
			io.CopyN(client, zeros{}, chunk)
			raw, _ := client.SyscallConn()
			raw.Write(func(fd uintptr) bool {
				return unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) != unix.EAGAIN
			})
		}
		client.CloseWrite()
	}()
	n, err := io.Copy(io.Discard, origin)
	if err != nil || n < 4*chunk || n > 4*chunk+4 {
		t.Errorf("read %d of %d and at most 4 urgent bytes, %v", n, 4*chunk, err)
	}
	origin.Close()
	if res := <-result; res.Err() != nil {
		t.Error(res, res.Err(), st)
	}
}

// TestSchedules lets random histories happen on many pairs: sizes, pauses, stalls and endings on
// both sides. Every byte that a cleanly ended direction carried must arrive, and every pair ends.
// SLUICE_SCHEDULES sets how long it runs.
func TestSchedules(t *testing.T) {
	d := 3 * time.Second
	if s := os.Getenv("SLUICE_SCHEDULES"); s != "" {
		var err error
		if d, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	leaves := whatIsThere(t)
	end := time.Now().Add(d)
	var wg sync.WaitGroup
	var rounds atomic.Int64
	for w := range uint64(8) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, w))
			for i := 0; time.Now().Before(end) && !t.Failed(); i++ {
				if err := schedule(t, rng); err != nil {
					t.Errorf("worker %d, round %d: %v", w, i, err)
				}
				rounds.Add(1)
			}
		})
	}
	wg.Wait()
	leaves()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	t.Logf("%d schedules; %d KiB in the heap", rounds.Load(), m.HeapAlloc>>10)
	if m.HeapAlloc > 64<<20 {
		t.Error("the heap has grown")
	}
}

// player is one end of a schedule: it sends a number of bytes in pieces, with pauses, and then ends in its way.
type player struct {
	c       *net.TCPConn
	send    int
	ending  int    // 0 half-close, 1 close once all was read, 2 reset
	sum     []byte // of what was sent
	got     []byte // of what was read
	n       int64
	readErr error
	sendErr error // then the reset has shown itself here, and the reader sees an end
}

func schedule(t *testing.T, rng *rand.Rand) error {
	client, ra := dialPair(t)
	rb, origin := dialPair(t)
	if t.Failed() {
		return nil
	}
	defer client.Close()
	defer origin.Close()
	r := &Relay{Portable: rng.IntN(3) == 0}
	if rng.IntN(2) == 0 {
		small := 1 << (15 + rng.IntN(4)) // less, and the kernels wait for each other's window updates
		ra.SetReadBuffer(small)
		rb.SetWriteBuffer(small)
	}
	result := make(chan Result, 1)
	r.Start(ra, rb, nil, func(res Result) { result <- res })
	ends := [2]*player{}
	for i, c := range []*net.TCPConn{client, origin} {
		size := rng.IntN(1 << (4 + rng.IntN(19)))
		ends[i] = &player{c: c, send: size}
		if rng.IntN(5) == 0 {
			ends[i].ending = 2
		} else {
			ends[i].ending = rng.IntN(2)
		}
	}
	var wg sync.WaitGroup
	for _, p := range ends {
		read := make(chan struct{})
		seeds := [2]uint64{rng.Uint64(), rng.Uint64()}
		wg.Go(func() { p.read(rand.New(rand.NewPCG(seeds[0], 0))); close(read) })
		wg.Go(func() { p.write(rand.New(rand.NewPCG(seeds[1], 0)), read) })
	}
	wg.Wait()
	client.Close()
	origin.Close()
	var res Result
	select {
	case res = <-result:
	case <-time.After(20 * time.Second):
		return fmt.Errorf("pair did not end: %+v %+v", ends[0], ends[1])
	}
	reset := ends[0].ending == 2 || ends[1].ending == 2
	for i, p := range ends {
		peer := ends[1-i]
		if p.readErr == nil && p.sendErr == nil && !bytes.Equal(p.got, peer.sum) {
			return fmt.Errorf("end %d: a clean end after %d of %d bytes, or other bytes (%v)", i, p.n, peer.send, res)
		}
		if !reset && (p.readErr != nil || p.sendErr != nil) {
			return fmt.Errorf("end %d: %v, and nobody had reset (%v)", i, errors.Join(p.readErr, p.sendErr), res)
		}
	}
	return nil
}

func (p *player) write(rng *rand.Rand, readDone <-chan struct{}) {
	h := sha256.New()
	src := newRandom(rng.Uint64())
	b := make([]byte, 1<<17)
	for left := p.send; left > 0; {
		n := min(left, 1+rng.IntN(1<<(1+rng.IntN(17))))
		src.Read(b[:n])
		h.Write(b[:n])
		if _, err := p.c.Write(b[:n]); err != nil {
			p.sendErr = err
			break
		}
		left -= n
		if rng.IntN(20) == 0 {
			time.Sleep(time.Duration(rng.IntN(3000)) * time.Microsecond)
		}
	}
	p.sum = h.Sum(nil)
	switch p.ending {
	case 0:
		p.c.CloseWrite()
	case 1:
		p.c.CloseWrite()
		<-readDone
		p.c.Close()
	case 2:
		p.c.SetLinger(0)
		p.c.Close()
	}
}

func (p *player) read(rng *rand.Rand) {
	h := sha256.New()
	b := make([]byte, 1<<(8+rng.IntN(10)))
	for {
		n, err := p.c.Read(b)
		h.Write(b[:n])
		p.n += int64(n)
		if err != nil {
			if err != io.EOF {
				p.readErr = err
			}
			break
		}
		if rng.IntN(50) == 0 {
			time.Sleep(time.Duration(rng.IntN(5000)) * time.Microsecond)
		}
	}
	p.got = h.Sum(nil)
}
