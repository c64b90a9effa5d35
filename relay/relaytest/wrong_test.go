package relaytest

import (
	"context"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
)

// wrong are the known ways to write a relay that is wrong, and what each fails at least. Between
// them they fail every scenario: one that nothing fails would prove nothing.
func wrong(t *testing.T) []wrongRelay {
	const up, down = "/from-client", "/from-origin"
	each := func(names ...string) (all []string) {
		for _, n := range names {
			all = append(all, n+up, n+down)
		}
		return all
	}
	return []wrongRelay{
		{"waits for both", waitsForBoth, each("half-close", "send-and-close")},
		{"closes both", closesBoth, append(each("half-close", "half-close-silence", "half-close-stalled", "early-response"),
			"simultaneous-close")},
		{"deadline on EOF", deadlineOnEOF, each("half-close-silence", "half-close-trickle", "half-close-stalled")},
		{"half-closes only", halfCloses, each("urgent", "reset-idle", "reset-sending", "reset-in-reply",
			"reset-after-reply", "reset-behind-data", "reset-after-half-close", "data-before-reset")},
		{"closes read", closesRead, each("reset-idle", "reset-sending")},
		{"unwatched", unwatched, each("reset-behind-data", "reset-after-half-close")},
		{"drops on error", dropsOnError, each("data-before-reset")},
		{"ignores write errors", ignoresWriteErrors, each("reset-receiving", "write-after-close",
			"early-response-close", "early-response-unread", "vanished")},
		{"unbounded", unbounded, each("backpressure")},
		{"one at a time", oneAtATime, []string{"bytes/both-ways", "origin-first", "bytes" + down}},
		{"takes turns", takesTurns, each("stalled-direction", "half-close")},
		{"fills buffer", fillsBuffer, append(each("one-byte-writes", "write-write-read"), "origin-first")},
		{"truncates", truncates, each("bytes", "send-and-close")},
		{"sniffs", sniffs, []string{"origin-first"}},
		{"aborts on EOF", abortsOnEOF, each("half-close", "send-and-close")},
		{"nagles", nagles, each("write-write-read")},
		{"spins", spins, []string{"cpu-half-closed", "cpu-stalled"}},
		{"shares a lock", sharesLock(), each("stalled-connection")},
		{"leaks goroutines", leaksGoroutines(t), []string{"mixed-endings"}},
		{"leaks descriptors", leaksDescriptors(t), []string{"mixed-endings"}},
		{"never returns", neverReturns(t), []string{"bytes" + up}},
	}
}

type wrongRelay struct {
	name  string
	join  func(client, origin *net.TCPConn)
	fails []string
}

func (w wrongRelay) bed() Bed {
	return Joined(TCP(), TCP(), func(_ context.Context, client, origin io.ReadWriteCloser) {
		w.join(client.(*net.TCPConn), origin.(*net.TCPConn))
	})
}

// impatient makes a hang a failure soon.
var impatient = Options{Bytes: 1 << 20, Rounds: 40, Prompt: 500 * time.Millisecond, Timeout: 3 * time.Second}

func TestWrongRelaysFail(t *testing.T) {
	scenarios := make(map[string]Scenario)
	can := make(map[string]bool)
	for _, s := range Scenarios() {
		scenarios[s.Name] = s
	}
	var runs []*run
	for _, w := range wrong(t) {
		r := &run{name: w.name, bed: w.bed(), options: impatient}
		runs = append(runs, r)
		for _, name := range w.fails {
			s, ok := scenarios[name]
			if !ok {
				t.Fatalf("there is no scenario %q", name)
			}
			can[name] = true
			if s.Alone {
				r.alone = append(r.alone, s)
			} else {
				r.together = append(r.together, s)
			}
		}
		r.verdicts = make([]Verdict, len(r.together))
	}
	for name, s := range scenarios {
		if !can[name] && s.LeftOut(runs[0].bed, impatient) == "" {
			t.Errorf("no wrong relay fails %s", name)
		}
	}
	var idle sync.WaitGroup
	idle.Go(func() { checkVanishedIdle(t) }) // which only waits
	playAll(t.Context(), runs)
	idle.Wait()
	for _, r := range runs {
		for _, s := range r.alone {
			r.verdicts = append(r.verdicts, Check(t.Context(), r.bed, s, Options{}))
		}
		for _, v := range r.verdicts {
			if v.Err == nil {
				t.Errorf("%q passes %s, with %q", r.name, v.Scenario.Name, v.Notes)
			} else {
				t.Logf("%q fails %s after %v: %v", r.name, v.Scenario.Name, v.Took.Round(time.Millisecond), v.Err)
			}
		}
	}
}

// checkVanishedIdle has a relay that asks idle connections whether their ends are there, which misses a
// machine that is not, and one that does not ask and never does.
func checkVanishedIdle(t *testing.T) {
	if err := repairable(); err != nil {
		t.Log("vanished-idle is not tested:", err)
		return
	}
	var plays []func()
	for _, from := range []string{"/from-client", "/from-origin"} {
		s := scenario(t, "vanished-idle"+from)
		play := func(join func(a, b *net.TCPConn), good bool) {
			v := Check(t.Context(), wrongRelay{join: join}.bed(), s, Options{Silence: 3 * time.Second})
			if (v.Err == nil) != good {
				t.Errorf("%s, with a good relay %v: %v", s.Name, good, v.Err)
			}
		}
		plays = append(plays, func() { play(halfCloses, true) }, func() { play(noKeepalive, false) })
	}
	atATime(plays)
}

// pair runs f for both directions and returns when both are over.
func pair(a, b *net.TCPConn, f func(dst, src *net.TCPConn)) {
	var both sync.WaitGroup
	both.Go(func() { f(a, b) })
	both.Go(func() { f(b, a) })
	both.Wait()
}

func closeBoth(a, b *net.TCPConn) {
	a.Close()
	b.Close()
}

func abortBoth(a, b *net.TCPConn) {
	a.SetLinger(0)
	b.SetLinger(0)
	closeBoth(a, b)
}

// The two copies that wait for each other.
func waitsForBoth(a, b *net.TCPConn) {
	pair(a, b, func(dst, src *net.TCPConn) { io.Copy(dst, src) })
	closeBoth(a, b)
}

// The four-line relay.
func closesBoth(a, b *net.TCPConn) {
	pair(a, b, func(dst, src *net.TCPConn) {
		io.Copy(dst, src)
		closeBoth(a, b)
	})
}

// Half-close, and then a deadline for the rest.
func deadlineOnEOF(a, b *net.TCPConn) {
	pair(a, b, func(dst, src *net.TCPConn) {
		io.Copy(dst, src)
		dst.CloseWrite()
		dst.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	})
	closeBoth(a, b)
}

// Half-close in both directions: what most of the better relays do.
func halfCloses(a, b *net.TCPConn) {
	pair(a, b, func(dst, src *net.TCPConn) {
		io.Copy(dst, src)
		dst.CloseWrite()
	})
	closeBoth(a, b)
}

// The same with the reading side shut as well.
func closesRead(a, b *net.TCPConn) {
	pair(a, b, func(dst, src *net.TCPConn) {
		io.Copy(dst, src)
		dst.CloseWrite()
		src.CloseRead()
	})
	closeBoth(a, b)
}

// Resets are passed on where a read or a write meets them, and only there.
func unwatched(a, b *net.TCPConn) {
	pair(a, b, func(dst, src *net.TCPConn) {
		if _, err := io.Copy(dst, struct{ io.Reader }{src}); err != nil {
			time.Sleep(20 * time.Millisecond)
			abortBoth(a, b)
			return
		}
		dst.CloseWrite()
	})
	closeBoth(a, b)
}

// Errors are watched, and end both sides at once.
func dropsOnError(a, b *net.TCPConn) {
	over := make(chan struct{})
	var watch sync.WaitGroup
	for _, c := range []*net.TCPConn{a, b} {
		watch.Go(func() {
			sock, _ := c.SyscallConn()
			for {
				select {
				case <-over:
					return
				case <-time.After(time.Millisecond):
				}
				if broken, _ := sockState(sock); broken {
					abortBoth(a, b)
					return
				}
			}
		})
	}
	pair(a, b, func(dst, src *net.TCPConn) {
		if _, err := io.Copy(struct{ io.Writer }{dst}, &slow{src}); err == nil {
			dst.CloseWrite()
		}
	})
	close(over)
	watch.Wait()
	closeBoth(a, b)
}

// slow reads 4 KiB at a time, and not at once.
type slow struct{ r io.Reader }

func (s *slow) Read(p []byte) (int, error) {
	time.Sleep(100 * time.Microsecond)
	return s.r.Read(p[:min(len(p), 4096)])
}

// A copy whose write errors are not looked at.
func ignoresWriteErrors(a, b *net.TCPConn) {
	pair(a, b, func(dst, src *net.TCPConn) {
		buf := make([]byte, 32<<10)
		for {
			n, err := src.Read(buf)
			dst.Write(buf[:n])
			if err != nil {
				dst.CloseWrite()
				return
			}
		}
	})
	closeBoth(a, b)
}

// Nobody asks whether the machines are still there.
func noKeepalive(a, b *net.TCPConn) {
	a.SetKeepAlive(false)
	b.SetKeepAlive(false)
	halfCloses(a, b)
}

// A queue between the reader and the writer.
func unbounded(a, b *net.TCPConn) {
	pair(a, b, func(dst, src *net.TCPConn) {
		var mu sync.Mutex
		var queue [][]byte
		more := sync.NewCond(&mu)
		var writer sync.WaitGroup
		writer.Go(func() {
			for {
				mu.Lock()
				for len(queue) == 0 {
					more.Wait()
				}
				b := queue[0]
				queue = queue[1:]
				mu.Unlock()
				if b == nil {
					dst.CloseWrite()
					return
				}
				if _, err := dst.Write(b); err != nil {
					src.Close()
				}
			}
		})
		for err := error(nil); err == nil; {
			var n int
			b := make([]byte, 32<<10)
			n, err = src.Read(b)
			mu.Lock()
			queue = append(queue, b[:n])
			if err != nil {
				queue = append(queue, nil)
			}
			mu.Unlock()
			more.Signal()
		}
		writer.Wait()
	})
	closeBoth(a, b)
}

// One direction after the other.
func oneAtATime(a, b *net.TCPConn) {
	io.Copy(b, a)
	b.CloseWrite()
	io.Copy(a, b)
	closeBoth(a, b)
}

// One goroutine and one buffer for both.
func takesTurns(a, b *net.TCPConn) {
	defer closeBoth(a, b)
	buf := make([]byte, 256<<10)
	for ended := 0; ended < 2; a, b = b, a {
		a.SetReadDeadline(time.Now().Add(200 * time.Microsecond))
		n, err := a.Read(buf)
		if _, werr := b.Write(buf[:n]); werr != nil {
			return
		}
		switch {
		case err == nil || os.IsTimeout(err):
			ended = 0
		case err == io.EOF:
			b.CloseWrite()
			ended++
		default:
			return
		}
	}
}

// Bytes wait until there are many.
func fillsBuffer(a, b *net.TCPConn) {
	pair(a, b, func(dst, src *net.TCPConn) {
		buf := make([]byte, 4096)
		for {
			n, err := io.ReadFull(src, buf)
			dst.Write(buf[:n])
			if err != nil {
				dst.CloseWrite()
				return
			}
		}
	})
	closeBoth(a, b)
}

// A write is taken to write no more than a part of a large read.
func truncates(a, b *net.TCPConn) {
	pair(a, b, func(dst, src *net.TCPConn) {
		buf := make([]byte, 32<<10)
		for {
			n, err := src.Read(buf)
			dst.Write(buf[:min(n, 30<<10)])
			if err != nil {
				dst.CloseWrite()
				return
			}
		}
	})
	closeBoth(a, b)
}

// The protocol is guessed from the client's first byte.
func sniffs(a, b *net.TCPConn) {
	var first [1]byte
	a.Read(first[:])
	b.Write(first[:])
	halfCloses(a, b)
}

// Every end is a reset.
func abortsOnEOF(a, b *net.TCPConn) {
	pair(a, b, func(dst, src *net.TCPConn) {
		io.Copy(dst, src)
		dst.SetLinger(0)
		dst.Close()
	})
	closeBoth(a, b)
}

// Segments are held back.
func nagles(a, b *net.TCPConn) {
	a.SetNoDelay(false)
	b.SetNoDelay(false)
	halfCloses(a, b)
}

// It asks again and again.
func spins(a, b *net.TCPConn) {
	pair(a, b, func(dst, src *net.TCPConn) {
		in, _ := src.SyscallConn()
		out, _ := dst.SyscallConn()
		buf := make([]byte, 32<<10)
		for {
			n, err := again(in, buf, syscall.Read)
			for rest := buf[:max(n, 0)]; err == nil && len(rest) > 0; rest = rest[max(n, 0):] {
				n, err = again(out, rest, syscall.Write)
			}
			if err != nil || n == 0 {
				dst.CloseWrite()
				return
			}
		}
	})
	closeBoth(a, b)
}

func again(c syscall.RawConn, p []byte, f func(int, []byte) (int, error)) (n int, err error) {
	for err = syscall.EAGAIN; err == syscall.EAGAIN; {
		if cerr := c.Control(func(fd uintptr) { n, err = f(int(fd), p) }); cerr != nil {
			return 0, cerr
		}
	}
	return n, err
}

// One lock for all connections.
func sharesLock() func(a, b *net.TCPConn) {
	var mu sync.Mutex
	return func(a, b *net.TCPConn) {
		pair(a, b, func(dst, src *net.TCPConn) {
			buf := make([]byte, 32<<10)
			for {
				n, err := src.Read(buf)
				mu.Lock()
				dst.Write(buf[:n])
				mu.Unlock()
				if err != nil {
					dst.CloseWrite()
					return
				}
			}
		})
		closeBoth(a, b)
	}
}

// A goroutine for each connection that waits for what never comes.
func leaksGoroutines(t *testing.T) func(a, b *net.TCPConn) {
	var left sync.WaitGroup
	never := make(chan struct{})
	t.Cleanup(left.Wait)
	t.Cleanup(func() { close(never) })
	return func(a, b *net.TCPConn) {
		left.Go(func() { <-never })
		halfCloses(a, b)
	}
}

// A pipe for each connection, for splice, that is never given back.
func leaksDescriptors(t *testing.T) func(a, b *net.TCPConn) {
	var mu sync.Mutex
	var left []*os.File
	t.Cleanup(func() {
		for _, f := range left {
			f.Close()
		}
	})
	return func(a, b *net.TCPConn) {
		if r, w, err := os.Pipe(); err == nil {
			mu.Lock()
			left = append(left, r, w)
			mu.Unlock()
		}
		halfCloses(a, b)
	}
}

// It does not return when both ends have gone.
func neverReturns(t *testing.T) func(a, b *net.TCPConn) {
	never := make(chan struct{})
	t.Cleanup(func() { close(never) })
	return func(a, b *net.TCPConn) {
		halfCloses(a, b)
		<-never
	}
}
