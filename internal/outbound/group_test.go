package outbound

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/socks5"
	"github.com/sluice-proxy/sluice/relay"
)

// scripted is a member that answers as told.
type scripted struct {
	mu    sync.Mutex
	err   error         // nil: a conn
	takes time.Duration // for its answer; when ctx is over earlier, that is the answer
	dials int
}

func (s *scripted) set(err error, takes time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err, s.takes = err, takes
}

// count returns how many dials there were since the last count.
func (s *scripted) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.dials
	s.dials = 0
	return n
}

func (s *scripted) DialStream(ctx context.Context, _ proxy.Addr) (net.Conn, error) {
	s.mu.Lock()
	s.dials++
	err, takes := s.err, s.takes
	s.mu.Unlock()
	if takes > 0 {
		select {
		case <-time.After(takes):
		case <-ctx.Done():
			return nil, fmt.Errorf("no answer: %w", context.Cause(ctx))
		}
	}
	if err != nil {
		return nil, err
	}
	a, b := net.Pipe()
	b.Close()
	return a, nil
}

var (
	errDown    = ofHop(fmt.Errorf("proxy unreachable: %w", syscall.ECONNREFUSED))
	errRefused = ofOrigin(fmt.Errorf("origin: %w", syscall.ECONNREFUSED))
	errNoRoute = ofOrigin(fmt.Errorf("origin: %w", syscall.ENETUNREACH))
)

// lines is a log of messages.
type lines struct{ all []string }

func (l *lines) Write(p []byte) (int, error) {
	l.all = append(l.all, strings.TrimSpace(string(p)))
	return len(p), nil
}

func (l *lines) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
}

// groupOf returns a group of scripted members called a, b and so on, and their log.
func groupOf(policy Policy, members ...*scripted) (*Group, *lines) {
	log := new(lines)
	g := &Group{Name: "g", Policy: policy, Log: log.logger()}
	for i, m := range members {
		g.Members = append(g.Members, Member{string(rune('a' + i)), m})
	}
	return g, log
}

// dial dials through g as the engine does, and returns how many dials that took of each member.
func dial(t *testing.T, g *Group, members ...*scripted) (tries string, err error) {
	t.Helper()
	for _, m := range members {
		m.count()
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Second, context.DeadlineExceeded)
	defer cancel()
	c, err := g.DialStream(ctx, proxy.TCP("example.com", 80))
	if err == nil {
		c.Close()
	}
	for _, m := range members {
		tries += fmt.Sprint(m.count())
	}
	return tries, err
}

func TestFallback(t *testing.T) {
	for _, tt := range []struct {
		name   string
		err    error
		takes  time.Duration
		tries  string // the first dial
		again  string // the second
		reason proxy.Reason
	}{
		{"the first is good", nil, 0, "10", "10", proxy.Done},
		{"the origin refuses", errRefused, 0, "10", "10", proxy.Refused},
		{"the origin has no name", ofOrigin(&net.DNSError{IsNotFound: true}), 0, "10", "10", proxy.NoHost},
		{"the hop does not allow the origin", ofOrigin(syscall.EACCES), 0, "10", "10", proxy.Denied},
		{"the hop has no way to the origin", errNoRoute, 0, "11", "11", proxy.Done},
		{"the hop cannot be reached", errDown, 0, "11", "01", proxy.Done},
		{"the hop does not let us in", fmt.Errorf("password: %w", syscall.EACCES), 0, "11", "01", proxy.Done},
		{"the hop talks nonsense", errors.New("nonsense"), 0, "11", "01", proxy.Done},
		{"the hop's own hop says its origin refuses", ofHop(errRefused), 0, "11", "01", proxy.Done},
		{"the hop cannot do it", errors.ErrUnsupported, 0, "11", "11", proxy.Done},
		{"the hop breaks off", io.ErrUnexpectedEOF, 0, "11", "11", proxy.Done},
		{"the hop does not answer", nil, time.Hour, "11", "11", proxy.Done},
		{"the hop is slow", nil, 4 * time.Second, "10", "10", proxy.Done},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := &scripted{err: tt.err, takes: tt.takes}, &scripted{}
				g, _ := groupOf(Fallback, a, b)
				for i, want := range []string{tt.tries, tt.again} {
					tries, err := dial(t, g, a, b)
					if tries != want || proxy.ReasonOf(err) != tt.reason {
						t.Errorf("dial %d: %s tries, want %s: %v", i, tries, want, err)
					}
				}
			})
		})
	}
}

// TestDownAndUpWithoutChecks: one that is down is tried again after the interval, by one flow, and both are said once.
func TestDownAndUpWithoutChecks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &scripted{err: errDown}, &scripted{}
		g, log := groupOf(Fallback, a, b)
		expect := func(what, want string) {
			t.Helper()
			if tries, err := dial(t, g, a, b); tries != want || err != nil {
				t.Errorf("%s: %s tries, want %s: %v", what, tries, want, err)
			}
		}
		expect("it goes down", "11")
		expect("it is down", "01")
		time.Sleep(DefaultCheckInterval)
		expect("it may be up again", "11")
		expect("it is not", "01")
		a.set(nil, 0)
		expect("nobody looks", "01")
		time.Sleep(DefaultCheckInterval)
		expect("it is up", "10")
		expect("it stays up", "10")
		want := []string{
			`level=WARN msg="a way out is down" group=g member=a up=1/2 err="proxy unreachable: connection refused"`,
			`level=INFO msg="a way out is up again" group=g member=a up=2/2 after=1m0s`,
		}
		if strings.Join(log.all, "\n") != strings.Join(want, "\n") {
			t.Errorf("logged\n%s\nwant\n%s", strings.Join(log.all, "\n"), strings.Join(want, "\n"))
		}
	})
}

// TestOneFlowTriesAgain: while one flow finds out whether a member is up again that does not answer, the others do not wait for that.
func TestOneFlowTriesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &scripted{err: errDown}, &scripted{}
		g, _ := groupOf(Fallback, a, b)
		dial(t, g, a, b)
		a.set(nil, time.Hour)
		time.Sleep(DefaultCheckInterval)
		begin := time.Now()
		var all sync.WaitGroup
		var late atomic.Int32
		for range 10 {
			all.Go(func() {
				c, err := g.DialStream(t.Context(), proxy.TCP("example.com", 80))
				if err != nil {
					t.Error(err)
					return
				}
				c.Close()
				if time.Since(begin) > 0 {
					late.Add(1)
				}
			})
		}
		all.Wait()
		if n := a.count(); n != 1 || late.Load() != 1 {
			t.Errorf("%d dials through it, and %d flows waited; want 1 and 1", n, late.Load())
		}
	})
}

// TestSilenceIsDoubt: one destination that does not answer says little of the hop; three in a row do.
func TestSilenceIsDoubt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &scripted{takes: time.Hour}, &scripted{}
		g, _ := groupOf(Fallback, a, b)
		for i, want := range []string{"11", "11"} {
			if tries, _ := dial(t, g, a, b); tries != want {
				t.Errorf("dial %d: %s", i, tries)
			}
		}
		a.set(errRefused, 0) // an answer
		dial(t, g, a, b)
		a.set(nil, time.Hour)
		for i, want := range []string{"11", "11", "11", "01"} {
			begin := time.Now()
			if tries, _ := dial(t, g, a, b); tries != want {
				t.Errorf("after an answer, dial %d: %s", i, tries)
			}
			if took := time.Since(begin); want == "11" && took != 5*time.Second {
				t.Errorf("the first of two was waited for %v", took)
			}
		}
	})
}

// TestAllDown: belief is no reason to refuse.
func TestAllDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &scripted{err: errDown}, &scripted{err: errDown}
		g, _ := groupOf(Fallback, a, b)
		for range 2 {
			tries, err := dial(t, g, a, b)
			want := "outbound: group g: b: proxy unreachable: connection refused (before that, a: proxy unreachable: connection refused)"
			if tries != "11" || err == nil || err.Error() != want {
				t.Errorf("%s tries: %v", tries, err)
			}
		}
		b.set(nil, 0)
		if tries, err := dial(t, g, a, b); tries != "11" || err != nil {
			t.Errorf("%s tries: %v", tries, err)
		}
		if tries, err := dial(t, g, a, b); tries != "01" || err != nil {
			t.Errorf("%s tries: %v", tries, err)
		}
	})
}

// TestClientLeaves: no other member is tried for it, and the one that was is not to blame.
func TestClientLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &scripted{takes: time.Hour}, &scripted{}
		g, log := groupOf(Fallback, a, b)
		for range 2 * doubtsMost {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(time.Second, cancel)
			if _, err := g.DialStream(ctx, proxy.TCP("x", 1)); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}
		if n := b.count(); n != 0 || len(log.all) != 0 {
			t.Errorf("%d dials, %q", n, log.all)
		}
	})
}

func TestRoundRobin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, c := &scripted{}, &scripted{}, &scripted{}
		g, _ := groupOf(RoundRobin, a, b, c)
		run := func(n int) string {
			got := ""
			for range n {
				tries, err := dial(t, g, a, b, c)
				if err != nil {
					t.Error(err)
				}
				got += tries + " "
			}
			return got
		}
		if got := run(6); got != "100 010 001 100 010 001 " {
			t.Error(got)
		}
		b.set(errDown, 0)
		if got := run(2); got != "100 011 " {
			t.Error(got)
		}
		if got := run(4); strings.Count(got, "100 ") != 2 || strings.Count(got, "001 ") != 2 {
			t.Errorf("those that are up do not share alike: %s", got)
		}
	})
}

func TestLeastLatency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ms := time.Millisecond
		a, b, c := &scripted{takes: 50 * ms}, &scripted{takes: 20 * ms}, &scripted{takes: 100 * ms}
		g, log := groupOf(LeastLatency, a, b, c)
		g.Check, g.Keep = proxy.TCP("check", 80), true
		if tries, _ := dial(t, g, a, b, c); tries != "100" {
			t.Errorf("before the first check: %s", tries)
		}
		g.Start()
		defer g.Close()
		quiet := func() { // just after a round of checks: nobody but these reaches c
			for c.count(); c.count() == 0; time.Sleep(100 * ms) {
			}
			time.Sleep(time.Second)
		}
		expect := func(what, want string) {
			t.Helper()
			quiet()
			if tries, err := dial(t, g, a, b, c); tries != want || err != nil {
				t.Errorf("%s: %s tries, want %s: %v", what, tries, want, err)
			}
		}
		rounds := func(n int) { time.Sleep(time.Duration(n) * DefaultCheckInterval * 12 / 10) }
		expect("the quickest", "010")
		a.set(nil, 18*ms)
		rounds(20)
		expect("one is a little quicker", "010")
		a.set(nil, 5*ms)
		rounds(20)
		expect("one is clearly quicker", "100")
		a.set(errDown, 0)
		if tries, err := dial(t, g, a, b, c); tries != "110" || err != nil { // before a check finds out
			t.Errorf("it goes down: the next quickest: %s tries, want 110: %v", tries, err)
		}
		rounds(2)
		expect("it is down", "010")
		a.set(nil, 5*ms)
		rounds(2)
		expect("it is up again", "100")
		if len(log.all) != 2 {
			t.Errorf("%q", log.all)
		}
	})
}

// TestChecksWhileInUse: none before the first dial and none when there are no more dials; always with Keep.
func TestChecksWhileInUse(t *testing.T) {
	for _, keep := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			a, b := &scripted{}, &scripted{}
			g, _ := groupOf(Fallback, a, b)
			g.Check, g.Keep, g.Interval = proxy.TCP("check", 80), keep, 10*time.Second
			g.Start()
			defer g.Close()
			time.Sleep(95 * time.Second)
			if n := b.count(); keep != (n > 8) || !keep && n > 0 {
				t.Errorf("keep %v: %d checks while nobody uses it", keep, n)
			}
			dial(t, g, a, b)
			time.Sleep(95 * time.Second)
			if n := b.count(); keep != (n > 8) || !keep && n != 1 {
				t.Errorf("keep %v: %d checks after one dial", keep, n)
			}
			for range 95 {
				time.Sleep(time.Second)
				c, err := g.DialStream(t.Context(), proxy.TCP("x", 1))
				if err != nil {
					t.Fatal(err)
				}
				c.Close()
			}
			if n := b.count(); n < 8 || n > 11 {
				t.Errorf("keep %v: %d checks while it is used", keep, n)
			}
		})
	}
}

// TestChecksDecide: a hop that answers and gets nowhere is down; one that is refused gets there.
func TestChecksDecide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &scripted{err: errNoRoute}, &scripted{}
		g, log := groupOf(Fallback, a, b)
		g.Check, g.Interval = proxy.TCP("check", 80), 10*time.Second
		g.Start()
		defer g.Close()
		expect := func(what, want string) {
			t.Helper()
			synctest.Wait()
			if tries, err := dial(t, g, a, b); tries != want || err != nil {
				t.Errorf("%s: %s tries, want %s: %v", what, tries, want, err)
			}
		}
		dial(t, g, a, b) // begins the checks
		time.Sleep(time.Second)
		expect("no way to the place of the checks", "01")
		a.set(errRefused, 0)
		time.Sleep(12 * time.Second)
		a.set(nil, 0)
		expect("the place refuses", "10")

		// A dial without an answer has the checks look at once, and they time out.
		a.set(nil, time.Hour)
		expect("it hangs", "11")
		time.Sleep(6 * time.Second)
		expect("it was found to hang", "01")
		if len(log.all) != 3 {
			t.Errorf("%q", log.all)
		}
	})
}

// TestCloseEndsChecks also when one is under way, and when there are none.
func TestCloseEndsChecks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &scripted{takes: time.Hour}
		g, log := groupOf(Fallback, a)
		g.Close()
		g.Check, g.Keep = proxy.TCP("check", 80), true
		g.Start()
		g.Start() // several inbounds share a group
		synctest.Wait()
		g.Close()
		g.Close()
		if n := a.count(); len(log.all) != 0 || n != 1 {
			t.Errorf("%d checks, %q", n, log.all)
		}
		unused, _ := groupOf(Fallback, a)
		unused.Start()
		unused.Close()
	})
}

// packets is a member that carries datagrams.
type packets struct {
	scripted
	conn relay.PacketConn
}

func (p *packets) DialPackets(context.Context, proxy.Addr) (relay.PacketConn, error) {
	return p.conn, p.err
}

type nowhere struct{ relay.PacketConn }

func TestGroupDialPackets(t *testing.T) {
	a, b, c := &scripted{}, &packets{scripted: scripted{err: errDown}}, &packets{conn: nowhere{}}
	g := &Group{Name: "g", Members: []Member{{"a", a}, {"b", b}, {"c", c}}}
	if got, err := g.DialPackets(t.Context(), proxy.UDP("x", 53)); got != c.conn || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	if n := a.count(); n != 0 {
		t.Error("a stream was dialled")
	}
	refuses := &packets{scripted: scripted{err: fmt.Errorf("associate: %w", syscall.EACCES)}}
	picky := &Group{Name: "g", Members: []Member{{"a", refuses}, {"c", c}}}
	for range 2 * doubtsMost {
		if got, err := picky.DialPackets(t.Context(), proxy.UDP("x", 53)); got != c.conn || err != nil {
			t.Errorf("%v, %v", got, err)
		}
	}
	if _, up := picky.order(); up != 2 {
		t.Error("what refuses datagrams is down for streams")
	}
	none := &Group{Name: "g", Members: []Member{{"a", a}}}
	if _, err := none.DialPackets(t.Context(), proxy.UDP("x", 53)); proxy.ReasonOf(err) != proxy.Unsupported {
		t.Error(err)
	}
	if tries, err := dial(t, none, a); tries != "1" || err != nil {
		t.Errorf("what carries no datagrams is down for streams: %s, %v", tries, err)
	}
}

// silentBinder is a member that never says whether it listens.
type silentBinder struct{ scripted }

func (*silentBinder) Bind(ctx context.Context, _ proxy.Addr) (net.Listener, error) {
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

// TestGroupBinds: a group hands the wait for a stream on to a member that can, and its listener ends with the context, and not before.
func TestGroupBinds(t *testing.T) {
	proxytest.NoLeaks(t)
	for name, first := range map[string]proxy.Dialer{
		"streams only": &scripted{}, "refuses": &SOCKS5{Server: proxytest.Listen(t, "tcp", socks5Server(socks5.NotAllowed, "", nil)).Addr},
	} {
		g := &Group{Name: "g", Members: []Member{{"first", first}, {"direct", &Direct{BindAddr: netip.MustParseAddr("127.0.0.1")}}}}
		ctx, cancel := context.WithCancel(t.Context())
		ln, err := g.Bind(ctx, proxy.TCP("127.0.0.1", 9))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		came, err := ln.Accept()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		came.Close()
		c.Close()
		cancel()
		if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: after its context: %v", name, err)
		}
		ln.Close()
		if _, up := g.order(); up != 2 {
			t.Errorf("%s: what cannot wait for streams is down for others", name)
		}
	}
	none := &Group{Name: "g", Members: []Member{{"a", &scripted{}}}}
	if _, err := none.Bind(t.Context(), proxy.TCP("127.0.0.1", 9)); proxy.ReasonOf(err) != proxy.Unsupported {
		t.Error(err)
	}
}

// TestGroupBindGoesOnToTheNext: a member that does not answer has its share of the time only.
func TestGroupBindGoesOnToTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &Group{Name: "g", Members: []Member{{"silent", &silentBinder{}}, {"silent too", &silentBinder{}}}}
		ctx, cancel := context.WithTimeout(t.Context(), proxy.DefaultBindTimeout)
		defer cancel()
		begin := time.Now()
		_, err := g.Bind(ctx, proxy.TCP("192.0.2.1", 9))
		if took := time.Since(begin); proxy.ReasonOf(err) != proxy.Timeout || took != proxy.DefaultDialTimeout {
			t.Errorf("%v after %v", err, took)
		}
	})
}

// TestVerdicts: real hops and real destinations, and what their errors say.
func TestVerdicts(t *testing.T) {
	proxytest.NoLeaks(t)
	refused := proxy.TCP("127.0.0.1", 1) // no port that a listener below may be given
	answers := func(reply string) *proxytest.Origin {
		return proxytest.Listen(t, "tcp", func(c net.Conn) {
			io.ReadAtLeast(c, make([]byte, 1024), 3)
			io.WriteString(c, reply)
			proxytest.Sink(c)
		})
	}
	socks := func(code byte) *SOCKS5 {
		return &SOCKS5{Server: answers("\x05\x00\x05" + string(code) + "\x00\x01\x00\x00\x00\x00\x00\x00").Addr}
	}
	status := func(code int) *HTTP {
		return &HTTP{Server: answers(fmt.Sprintf("HTTP/1.1 %d %s\r\nContent-Length: 0\r\n\r\n", code, http.StatusText(code))).Addr}
	}
	silent := proxytest.Listen(t, "tcp", proxytest.Sink)
	over := func(d proxy.Dialer) *SOCKS5 { return &SOCKS5{Server: proxy.TCP("hop", 1), Via: d} }
	for _, tt := range []struct {
		name string
		d    proxy.Dialer
		dst  proxy.Addr
		want verdict
	}{
		{"direct, refused", &Direct{}, refused, final},
		{"direct, no name", &Direct{}, proxy.TCP("", 80), final},
		{"direct, IPv6 from IPv4", &Direct{BindAddr: refused.IP()}, proxy.TCP("::1", 80), unable},
		{"reject", Reject{}, refused, final},
		{"socks5, unreachable", &SOCKS5{Server: refused}, refused, broken},
		{"socks5, origin refuses", socks(5), refused, final},
		{"socks5, not allowed", socks(2), refused, final},
		{"socks5, no network", socks(3), refused, elsewhere},
		{"socks5, general failure", socks(1), refused, elsewhere},
		{"socks5, not one", answersSOCKS(t, "HTTP/1.1 400 Bad Request\r\n\r\n"), refused, broken},
		{"socks5, no way to say who we are", answersSOCKS(t, "\x05\xff"), refused, broken},
		{"socks5, breaks off", answersSOCKS(t, "\x05"), refused, doubtful},
		{"socks5, silent", &SOCKS5{Server: silent.Addr}, refused, doubtful},
		{"socks5, a Unix socket", &SOCKS5{Server: silent.Addr}, proxy.Addr{Network: "unix", Host: "/x"}, unable},
		{"http, unreachable", &HTTP{Server: refused}, refused, broken},
		{"http, 403", status(403), refused, final},
		{"http, 407", status(407), refused, broken},
		{"http, 503", status(503), refused, elsewhere},
		{"http, silent", &HTTP{Server: silent.Addr}, refused, doubtful},
		{"a hop behind one that it refuses", over(socks(5)), refused, broken},
		{"a group of one that refuses", &Group{Members: []Member{{"x", &Direct{}}}}, refused, final},
		{"a hop behind such a group", &SOCKS5{Server: refused, Via: &Group{Members: []Member{{"x", &Direct{}}}}}, refused, broken},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			if tt.want == doubtful {
				ctx, cancel = context.WithTimeoutCause(ctx, 100*time.Millisecond, context.DeadlineExceeded)
				defer cancel()
			}
			_, err := tt.d.DialStream(ctx, tt.dst)
			if got := verdictOf(err); got != tt.want {
				t.Errorf("verdict %d, want %d: %v", got, tt.want, err)
			}
		})
	}
}

// answersSOCKS returns the way over a server that says so to any greeting, and ends.
func answersSOCKS(t *testing.T, reply string) *SOCKS5 {
	return &SOCKS5{Server: proxytest.Listen(t, "tcp", func(c net.Conn) {
		c.Read(make([]byte, 1024))
		io.WriteString(c, reply)
	}).Addr}
}
