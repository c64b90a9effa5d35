package relaytest

import (
	"context"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"
)

// wrong are the known ways to write a relay that is wrong, and what each fails at least. Between
// them they fail every scenario: one that nothing fails would prove nothing.
func wrong(t *testing.T) []wrongRelay {
	return []wrongRelay{
		{"waits for both", waitsForBoth, nil},
		{"closes both", closesBoth, nil},
		{"deadline on EOF", deadlineOnEOF, nil},
		{"half-closes only", halfCloses, nil},
		{"closes read", closesRead, nil},
		{"unwatched", unwatched, nil},
		{"drops on error", dropsOnError, nil},
		{"ignores write errors", ignoresWriteErrors, nil},
		{"unbounded", unbounded, nil},
		{"one at a time", oneAtATime, nil},
		{"origin at a time", originAtATime, nil},
		{"takes turns", takesTurns, nil},
		{"fills buffer", fillsBuffer, nil},
		{"truncates", truncates, nil},
		{"sniffs", sniffs, nil},
		{"aborts on EOF", abortsOnEOF, nil},
		{"nagles", nagles, nil},
		{"spins", spins, nil},
		{"shares a lock", sharesLock(), nil},
		{"leaks goroutines", leaksGoroutines(t), nil},
		{"leaks descriptors", leaksDescriptors(t), nil},
		{"never returns", neverReturns(t), nil},
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
var impatient = Options{Bytes: 1 << 20, Rounds: 40, Prompt: 500 * time.Millisecond, Timeout: 4 * time.Second}

func TestWrongRelaysFail(t *testing.T) {
	for _, w := range wrong(t) {
		for _, name := range w.fails {
			t.Run(w.name+"/"+name, func(t *testing.T) {
				i := slices.IndexFunc(Scenarios(), func(s Scenario) bool { return s.Name == name })
				if i < 0 {
					t.Fatal("no such scenario")
				}
				s := Scenarios()[i]
				if !s.Alone {
					t.Parallel()
				}
				v := Check(t.Context(), w.bed(), s, impatient)
				if v.Err == nil {
					t.Fatalf("it passes, with %q", v.Notes)
				}
				t.Log(v.Err)
			})
		}
	}
}

func TestEveryScenarioCanFail(t *testing.T) {
	can := make(map[string]bool)
	for _, w := range wrong(t) {
		for _, name := range w.fails {
			can[name] = true
		}
	}
	for _, s := range Scenarios() {
		if !can[s.Name] {
			t.Errorf("no wrong relay fails %s", s.Name)
		}
	}
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

// The origin, by the same mistake, first.
func originAtATime(a, b *net.TCPConn) { oneAtATime(b, a) }

// One goroutine and one buffer for both.
func takesTurns(a, b *net.TCPConn) {
	defer closeBoth(a, b)
	buf := make([]byte, 32<<10)
	for ended := 0; ended < 2; a, b = b, a {
		a.SetReadDeadline(time.Now().Add(time.Millisecond))
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
		buf := make([]byte, 32<<10)
		again := func(f func() (int, error)) (int, error) {
			for {
				if n, err := f(); n > 0 || !os.IsTimeout(err) {
					return n, err
				}
			}
		}
		for {
			n, err := again(func() (int, error) {
				src.SetReadDeadline(time.Now().Add(50 * time.Microsecond))
				return src.Read(buf)
			})
			for rest := buf[:n]; len(rest) > 0; {
				n, werr := again(func() (int, error) {
					dst.SetWriteDeadline(time.Now().Add(50 * time.Microsecond))
					return dst.Write(rest)
				})
				if werr != nil && !os.IsTimeout(werr) {
					return
				}
				rest = rest[n:]
			}
			if err != nil {
				dst.CloseWrite()
				return
			}
		}
	})
	closeBoth(a, b)
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

// A copy of the client's descriptor that nobody closes.
func leaksDescriptors(t *testing.T) func(a, b *net.TCPConn) {
	var mu sync.Mutex
	var left []*os.File
	t.Cleanup(func() {
		for _, f := range left {
			f.Close()
		}
	})
	return func(a, b *net.TCPConn) {
		if f, err := a.File(); err == nil {
			mu.Lock()
			left = append(left, f)
			mu.Unlock()
		}
		halfCloses(a, b)
		a.CloseWrite()
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
