package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// halfPipe is a net.Pipe end that can half-close: two pipes, one for each way.
type halfPipe struct {
	io.Reader
	r *io.PipeReader
	w *io.PipeWriter
}

func (p *halfPipe) Write(b []byte) (int, error) { return p.w.Write(b) }
func (p *halfPipe) CloseWrite() error           { return p.w.Close() }
func (p *halfPipe) Close() error {
	p.w.CloseWithError(io.ErrClosedPipe)
	return p.r.CloseWithError(io.ErrClosedPipe)
}
func (p *halfPipe) Abort() error {
	p.w.CloseWithError(errReset)
	return p.r.CloseWithError(errReset)
}

func newHalfPipe() (a, b *halfPipe) {
	r1, w1 := io.Pipe()
	r2, w2 := io.Pipe()
	return &halfPipe{r1, r1, w2}, &halfPipe{r2, r2, w1}
}

// joined starts a join of two halfPipes and returns the outer ends and the result.
func joined(r *Relay) (client, origin *halfPipe, result chan Result) {
	client, ra := newHalfPipe()
	rb, origin := newHalfPipe()
	result = make(chan Result, 1)
	go func() { result <- r.Join(context.Background(), ra, rb, nil) }()
	return client, origin, result
}

func read(t *testing.T, c io.Reader, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != want {
		t.Fatalf("read %q, %v; want %q", b, err, want)
	}
}

func TestIdleLimitRestartsWithEveryByteEitherWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, origin, result := joined(&Relay{Idle: time.Minute})
		start := time.Now()
		for range 5 {
			time.Sleep(50 * time.Second)
			io.WriteString(client, "x")
			read(t, origin, "x")
			time.Sleep(50 * time.Second)
			io.WriteString(origin, "y")
			read(t, client, "y")
		}
		res := <-result
		if got := time.Since(start); got != 500*time.Second+time.Minute {
			t.Errorf("ended after %v", got)
		}
		if res.AToB.End != Idle || res.BToA.End != Idle || !errors.Is(res.Err(), ErrIdle) || res.First != Neither {
			t.Error(res, res.Err())
		}
		if _, err := client.Read(make([]byte, 1)); err != errReset {
			t.Error("client saw", err, "and not an abort")
		}
	})
}

func TestHalfOpenLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, origin, result := joined(&Relay{})
		start := time.Now()
		client.CloseWrite()
		if b, err := io.ReadAll(origin); len(b) > 0 || err != nil {
			t.Fatal(b, err)
		}
		time.Sleep(DefaultHalfOpen - time.Second)
		io.WriteString(origin, "late")
		read(t, client, "late")
		res := <-result
		if got := time.Since(start); got != 2*DefaultHalfOpen-time.Second {
			t.Errorf("ended after %v", got)
		}
		if res.AToB.End != EOF || res.BToA.End != HalfOpen || !errors.Is(res.Err(), ErrHalfOpen) {
			t.Error(res, res.Err())
		}
	})
}

func TestHalfOpenIsNotLongerThanIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, _, result := joined(&Relay{Idle: time.Second})
		start := time.Now()
		client.CloseWrite()
		if res := <-result; res.BToA.End != HalfOpen || time.Since(start) != time.Second {
			t.Error(res, time.Since(start))
		}
	})
}

func TestNoLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, origin, result := joined(&Relay{Idle: -1, HalfOpen: -1})
		time.Sleep(1000 * time.Hour)
		client.CloseWrite()
		time.Sleep(1000 * time.Hour)
		origin.Close()
		if res := <-result; res.BToA.End == HalfOpen || res.Duration != 2000*time.Hour {
			t.Error(res)
		}
	})
}

func TestBytesForASlowReaderAreNotIdleness(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, origin, result := joined(&Relay{Idle: time.Minute})
		io.WriteString(client, "held") // the relay holds it: the origin does not read
		time.Sleep(time.Hour)
		read(t, origin, "held")
		start := time.Now()
		if res := <-result; res.AToB.End != Idle || time.Since(start) > 2*time.Minute {
			t.Error(res)
		}
	})
}

func TestConnWithoutHalfCloseIsClosedAfterTheLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, ra := newHalfPipe()
		rb, origin := net.Pipe() // has no CloseWrite
		result := make(chan Result, 1)
		go func() { result <- Join(context.Background(), ra, rb) }()
		client.CloseWrite()
		start := time.Now()
		if _, err := origin.Read(make([]byte, 1)); err != io.EOF || time.Since(start) != DefaultHalfOpen {
			t.Error("origin saw", err, "after", time.Since(start))
		}
		res := <-result
		if res.AToB.End != EOF || !errors.Is(res.AToB.Err, ErrNoHalfClose) || res.BToA.End != HalfOpen {
			t.Error(res, res.AToB.Err)
		}
	})
}

func TestCancelAbortsAfterGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, ra := newHalfPipe()
		rb, origin := newHalfPipe()
		result := make(chan Result, 1)
		ctx, cancel := context.WithCancelCause(context.Background())
		r := &Relay{Grace: time.Minute}
		go func() { result <- r.Join(ctx, ra, rb, nil) }()
		why := errors.New("why")
		cancel(why)
		time.Sleep(59 * time.Second)
		io.WriteString(client, "still")
		read(t, origin, "still")
		start := time.Now()
		res := <-result
		if time.Since(start) != time.Second || res.AToB.End != Canceled || res.Err() != why {
			t.Error(res, res.Err(), time.Since(start))
		}
		if _, err := origin.Read(make([]byte, 1)); err != errReset {
			t.Error("origin saw", err)
		}
	})
}

func TestStartAbort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, ra := newHalfPipe()
		rb, _ := newHalfPipe()
		result := make(chan Result, 1)
		p := new(Relay).Start(ra, rb, nil, func(res Result) { result <- res })
		synctest.Wait()
		p.Abort(nil)
		if res := <-result; res.First != Neither || res.Err() != context.Canceled {
			t.Error(res, res.Err())
		}
		p.Abort(nil) // does nothing
	})
}

// panicker panics in one of its methods.
type panicker struct {
	*halfPipe
	in string
}

func (p panicker) Read(b []byte) (int, error) {
	if p.in == "Read" {
		panic("read")
	}
	return p.halfPipe.Read(b)
}

func (p panicker) Write(b []byte) (int, error) {
	if p.in == "Write" {
		panic("write")
	}
	return p.halfPipe.Write(b)
}

func (p panicker) CloseWrite() error {
	if p.in == "CloseWrite" {
		panic("close-write")
	}
	return p.halfPipe.CloseWrite()
}

func (p panicker) Abort() error {
	p.halfPipe.Abort()
	if p.in == "Abort" {
		panic("abort")
	}
	return nil
}

func TestPanicEndsItsRelayOnly(t *testing.T) {
	for _, in := range []string{"Read", "Write", "CloseWrite", "Abort"} {
		t.Run(in, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, ra := newHalfPipe()
				rb, origin := newHalfPipe()
				ctx, cancel := context.WithCancel(context.Background())
				result := make(chan Result, 1)
				go func() { result <- Join(ctx, ra, panicker{rb, in}) }()
				go func() {
					io.WriteString(client, "x")
					client.CloseWrite()
				}()
				go io.Copy(io.Discard, origin)
				synctest.Wait()
				if in == "Abort" {
					cancel()
				}
				res := <-result
				if in != "Abort" && !errors.Is(res.Err(), ErrPanic) {
					t.Error(res, res.Err())
				}
				cancel()
				if _, err := client.Read(make([]byte, 1)); err != errReset {
					t.Error("client saw", err)
				}
			})
		})
	}
}

// lastBytes returns its bytes and its error in one Read.
type lastBytes struct {
	*halfPipe
	data string
	err  error
}

func (c *lastBytes) Read(b []byte) (int, error) {
	n := copy(b, c.data)
	c.data = c.data[n:]
	if c.data == "" {
		return n, c.err
	}
	return n, nil
}

func TestBytesThatComeWithAnErrorCount(t *testing.T) {
	for _, end := range []error{io.EOF, errReset} {
		synctest.Test(t, func(t *testing.T) {
			_, ra := newHalfPipe()
			rb, origin := newHalfPipe()
			result := make(chan Result, 1)
			go func() { result <- Join(context.Background(), &lastBytes{ra, "last words", end}, rb) }()
			b, err := io.ReadAll(origin)
			if string(b) != "last words" || (end == io.EOF) != (err == nil) {
				t.Errorf("%v: origin read %q, %v", end, b, err)
			}
			origin.Close()
			if res := <-result; res.AToB.Bytes != 10 {
				t.Error(res)
			}
		})
	}
}

// miser writes little at a time and says so, or breaks io.Writer's contract.
type miser struct {
	*halfPipe
	lie int // added to the count
}

func (c miser) Write(b []byte) (int, error) {
	n, err := c.halfPipe.Write(b[:1])
	return n + c.lie, err
}

func TestShortWrites(t *testing.T) {
	tests := []struct {
		lie  int
		want error
	}{{0, nil}, {-1, io.ErrShortWrite}, {100, errInvalidWrite}, {-2, errInvalidWrite}}
	for _, tt := range tests {
		synctest.Test(t, func(t *testing.T) {
			client, ra := newHalfPipe()
			rb, origin := newHalfPipe()
			result := make(chan Result, 1)
			go func() { result <- Join(context.Background(), ra, miser{rb, tt.lie}) }()
			go func() {
				io.WriteString(client, "abc")
				client.CloseWrite()
			}()
			b, _ := io.ReadAll(origin)
			origin.Close()
			client.Close()
			res := <-result
			if tt.want == nil && (string(b) != "abc" || res.AToB.Err != nil) || !errors.Is(res.AToB.Err, tt.want) {
				t.Errorf("lie %d: %q, %v, %v", tt.lie, b, res, res.AToB.Err)
			}
		})
	}
}

// see is a conn that wraps another, says it is transparent and has read ahead.
type see struct {
	io.ReadWriteCloser
	head string
}

func (s see) Unwrap() (io.ReadWriteCloser, []byte) { return s.ReadWriteCloser, []byte(s.head) }

func TestTransparentWrappersComeOff(t *testing.T) {
	client, ra := tcpPair(t)
	rb, origin := tcpPair(t)
	var st Stats
	result := make(chan Result, 1)
	inner := see{ra, "third "}
	go func() {
		result <- new(Relay).Join(context.Background(), see{WithHead(netConn{inner, ra}, []byte("second ")), "first "}, rb, &st)
	}()
	io.WriteString(client, "last")
	client.CloseWrite()
	if b, err := io.ReadAll(origin); string(b) != "first second third last" || err != nil {
		t.Errorf("origin read %q, %v", b, err)
	}
	origin.Close()
	if res := <-result; res.AToB.Bytes != int64(len("first second third last")) {
		t.Error(res)
	}
}

// netConn gives a wrapper the methods of the net.Conn below.
type netConn struct {
	see
	net.Conn
}

func (c netConn) Read(b []byte) (int, error)           { return c.see.Read(b) }
func (c netConn) Write(b []byte) (int, error)          { return c.see.Write(b) }
func (c netConn) Close() error                         { return c.see.Close() }
func (c netConn) Unwrap() (io.ReadWriteCloser, []byte) { return c.see.Unwrap() }

// shout embeds a TCP conn, and so has all its methods, and changes the bytes.
type shout struct{ *net.TCPConn }

func (s shout) Write(b []byte) (int, error) { return s.TCPConn.Write(bytes.ToUpper(b)) }
func (s shout) Read(b []byte) (int, error) {
	n, err := s.TCPConn.Read(b)
	copy(b, bytes.ToUpper(b[:n]))
	return n, err
}

func TestConnThatWrapsAndHidesIsNotBypassed(t *testing.T) {
	client, ra := tcpPair(t)
	rb, origin := tcpPair(t)
	var st Stats
	result := make(chan Result, 1)
	go func() { result <- new(Relay).Join(context.Background(), shout{ra}, rb, &st) }()
	io.WriteString(client, "up")
	client.CloseWrite()
	if b, err := io.ReadAll(origin); string(b) != "UP" || err != nil {
		t.Errorf("origin read %q, %v", b, err)
	}
	io.WriteString(origin, "down")
	origin.Close()
	if b, err := io.ReadAll(client); string(b) != "DOWN" || err != nil {
		t.Errorf("client read %q, %v", b, err)
	}
	<-result
	if st.Engine() != Copy {
		t.Error("engine", st.Engine())
	}
}

func TestResultString(t *testing.T) {
	res := Result{AToB: Direction{Bytes: 5}, BToA: Direction{Bytes: 7, End: Read, Err: errReset}, First: B, Duration: time.Second}
	if got := res.String(); !strings.Contains(got, "5 bytes eof") || !strings.Contains(got, "7 bytes read, first b, 1s") {
		t.Error(got)
	}
}

// TestDeadlinesSetBeforeDoNotCount: a handshake's deadline that the caller has left on the conn must not end the pair.
func TestDeadlinesSetBeforeDoNotCount(t *testing.T) {
	for name, c := range map[string]struct {
		portable bool
		wrap     func(net.Conn) io.ReadWriteCloser
	}{
		"kernel":   {false, func(c net.Conn) io.ReadWriteCloser { return c }},
		"portable": {true, func(c net.Conn) io.ReadWriteCloser { return c }},
		"wrapped":  {false, func(c net.Conn) io.ReadWriteCloser { return struct{ net.Conn }{c} }},
	} {
		t.Run(name, func(t *testing.T) {
			client, a := tcpPair(t)
			b, origin := tcpPair(t)
			a.SetDeadline(time.Unix(1, 0))
			b.SetDeadline(time.Unix(1, 0))
			result := make(chan Result, 1)
			r := &Relay{Portable: c.portable, HalfOpen: time.Second}
			go func() { result <- r.Join(t.Context(), c.wrap(a), c.wrap(b), nil) }()
			origin.SetDeadline(time.Now().Add(10 * time.Second))
			client.SetDeadline(time.Now().Add(10 * time.Second))
			io.WriteString(client, "ping")
			read(t, origin, "ping")
			io.WriteString(origin, "pong")
			read(t, client, "pong")
			client.Close()
			origin.Close()
			<-result
		})
	}
}

// A pair that only moves bytes has its two pumps, and nothing that waits beside them.
func TestStartedPairHasOnlyItsPumps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		before := runtime.NumGoroutine()
		client, ra := newHalfPipe()
		rb, origin := newHalfPipe()
		over := make(chan Result, 1)
		p := new(Relay).Start(ra, rb, nil, func(res Result) { over <- res })
		go io.WriteString(client, "hello")
		read(t, origin, "hello")
		synctest.Wait()
		if n := runtime.NumGoroutine() - before; n != 2 {
			t.Errorf("%d goroutines, want 2", n)
		}
		for range 2 * eventsMax {
			p.Abort(nil)
		}
		if res := <-over; res.AToB.End != Canceled || res.BToA.End != Canceled {
			t.Errorf("ended by %v and %v", res.AToB.End, res.BToA.End)
		}
		p.Abort(nil)
		synctest.Wait()
		if n := runtime.NumGoroutine() - before; n != 0 {
			t.Errorf("%d goroutines are left", n)
		}
	})
}
