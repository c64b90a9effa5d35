package relaytest

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// toy is a relay that dials. With a handshake, the client says "TO host:port\n", and it answers "YES\n"
// or "NO\n". Its fields are faults.
type toy struct {
	handshake bool

	oneRead     bool // a handshake comes in one read
	swallows    bool // what comes behind the handshake is dropped
	noIPv6      bool
	endsCleanly bool // a client whose dial failed sees a clean end
	yesFirst    bool // says yes before it has dialled
	dropsEarly  bool // does not keep what comes while it dials
	neverEnds   bool // a dial goes on when the client has left
	leaks       bool // a pipe for each client

	ln     net.Listener
	origin string
	all    sync.WaitGroup
	mu     sync.Mutex
	left   []*os.File
}

// start runs it until the end of the test and returns its bed.
func (r *toy) start(t *testing.T) *Dialed {
	listen := func() net.Listener {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return ln
	}
	origin := listen()
	r.ln, r.origin = listen(), origin.Addr().String()
	r.all.Go(r.serve)
	t.Cleanup(func() {
		r.ln.Close()
		origin.Close()
		r.all.Wait()
		for _, f := range r.left {
			f.Close()
		}
	})
	bed := &Dialed{Origin: origin, Connect: To("tcp", r.ln.Addr().String()), Meter: InProcess()}
	if r.handshake {
		bed.Handshake = func(rw io.ReadWriter, origin net.Addr) error {
			fmt.Fprintf(rw, "TO ")
			fmt.Fprintf(rw, "%v\n", origin)
			answer, err := readLine(rw)
			if err == nil && answer != "YES" {
				err = fmt.Errorf("the relay says %q", answer)
			}
			return err
		}
	}
	return bed
}

func readLine(r io.Reader) (string, error) {
	var line []byte
	for b := make([]byte, 1); ; line = append(line, b[0]) {
		if _, err := io.ReadFull(r, b); err != nil || b[0] == '\n' {
			return string(line), err
		}
	}
}

func (r *toy) serve() {
	for {
		c, err := r.ln.Accept()
		if err != nil {
			return
		}
		r.all.Go(func() { r.client(c.(*net.TCPConn)) })
	}
}

func (r *toy) client(c *net.TCPConn) {
	if r.leaks {
		if a, b, err := os.Pipe(); err == nil {
			r.mu.Lock()
			r.left = append(r.left, a, b)
			r.mu.Unlock()
		}
	}
	to := r.origin
	if r.handshake {
		var err error
		if to, err = r.asked(c); err != nil || r.noIPv6 && strings.HasPrefix(to, "[") {
			c.Close()
			return
		}
	}
	if r.yesFirst {
		c.Write([]byte("YES\n"))
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if !r.neverEnds {
		go r.watch(ctx, cancel, c)
	}
	if r.dropsEarly {
		c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		io.CopyN(io.Discard, c, 1)
		c.SetReadDeadline(time.Time{})
	}
	var d net.Dialer
	o, err := d.DialContext(ctx, "tcp", to)
	switch {
	case err != nil && r.endsCleanly:
		c.Close()
		return
	case err != nil && r.handshake:
		c.Write([]byte("NO\n"))
		c.Close()
		return
	case err != nil:
		c.SetLinger(0)
		c.Close()
		return
	}
	if r.handshake && !r.yesFirst {
		c.Write([]byte("YES\n"))
	}
	halfCloses(c, o.(*net.TCPConn))
}

func (r *toy) asked(c net.Conn) (string, error) {
	var line string
	var err error
	switch {
	case r.oneRead:
		b := make([]byte, 100)
		n, _ := c.Read(b) // which is not the whole of it, now and then
		if !strings.HasSuffix(string(b[:n]), "\n") {
			m, _ := c.Read(b[n:])
			n += m
		}
		line = strings.TrimSuffix(string(b[:n]), "\n")
	case r.swallows:
		line, err = bufio.NewReader(c).ReadString('\n')
	default:
		line, err = readLine(c)
	}
	to, ok := strings.CutPrefix(strings.TrimSpace(line), "TO ")
	if !ok {
		return "", fmt.Errorf("a client says %q: %v", line, err)
	}
	return to, nil
}

func (r *toy) watch(ctx context.Context, cancel context.CancelFunc, c *net.TCPConn) {
	sock, _ := c.SyscallConn()
	for ctx.Err() == nil {
		if broken, _ := sockState(sock); broken {
			cancel()
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// Each scenario about dialing fails on a relay with the fault that it is for, and passes without it.
func TestDialScenarios(t *testing.T) {
	if why := absences(); why != "" {
		t.Skip(why)
	}
	o := Options{Connections: 40, Prompt: 500 * time.Millisecond, Timeout: 8 * time.Second}
	var plays, alone []func()
	for name, faults := range map[string][]*toy{
		"handshake-bytewise": {{handshake: true, oneRead: true}},
		"early-data":         {{handshake: true, swallows: true}},
		"ipv6":               {{handshake: true, noIPv6: true}},
		"origin-refused":     {{endsCleanly: true}, {handshake: true, yesFirst: true}},
		"origin-silent":      {{handshake: true, yesFirst: true}},
		"origin-late":        {{dropsEarly: true}},
		"dial-abandoned":     {{neverEnds: true}, {handshake: true, neverEnds: true}},
		"port-scan":          {{leaks: true}},
	} {
		s := scenario(t, name)
		check := func(r *toy, good bool) func() {
			bed := r.start(t)
			return func() {
				v := Check(t.Context(), bed, s, o)
				if (v.Err == nil) != good {
					t.Errorf("%s: a good relay: %v, with a handshake: %v: %v", name, good, r.handshake, v.Err)
				}
			}
		}
		checks := &plays
		if name == "port-scan" { // which counts the descriptors of the process
			checks = &alone
		}
		for _, handshake := range []bool{false, true} {
			if r := (&toy{handshake: handshake}); handshake || s.LeftOut(&Dialed{Origin: new(net.TCPListener)}, o) == "" {
				*checks = append(*checks, check(r, true))
			}
		}
		for _, fault := range faults {
			*checks = append(*checks, check(fault, false))
		}
	}
	atATime(plays)
	for _, play := range alone {
		play()
	}
}

func scenario(t *testing.T, name string) Scenario {
	t.Helper()
	for _, s := range Scenarios() {
		if s.Name == name {
			return s
		}
	}
	t.Fatalf("there is no scenario %q", name)
	return Scenario{}
}

// above is a conn above TCP, as one by TLS is.
type above struct{ net.Conn }

func (a above) NetConn() net.Conn { return a.Conn }

// A client that gives up resets its connection, also where that is beneath the conn that Connect has returned.
func TestDialAbandonedAboveTCP(t *testing.T) {
	if why := absences(); why != "" {
		t.Skip(why)
	}
	bed := new(toy).start(t)
	connect := bed.Connect
	bed.Connect = func(ctx context.Context) (net.Conn, error) {
		c, err := connect(ctx)
		return above{c}, err
	}
	if v := Check(t.Context(), bed, scenario(t, "dial-abandoned"), Options{}); v.Err != nil {
		t.Error(v.Err)
	}
}

// A relay that dials for a client that the bed has given up must not have its connection taken for the next client's.
func TestLateDialIsNobodys(t *testing.T) {
	listen := func() net.Listener {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		return ln
	}
	front, origin := listen(), listen()
	bed := &Dialed{Origin: origin, Connect: To("tcp", front.Addr().String())}
	dial := func(say string) {
		if c, err := front.Accept(); err == nil {
			t.Cleanup(func() { c.Close() })
		}
		c, err := net.Dial("tcp", origin.Addr().String())
		if err != nil {
			t.Error(err)
			return
		}
		t.Cleanup(func() { c.Close() })
		io.WriteString(c, say)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := bed.Open(ctx); err == nil {
		t.Fatal("opened without a relay")
	}
	dial("old")
	var relay sync.WaitGroup
	relay.Go(func() { dial("new") })
	p, err := bed.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Client.Close()
	defer p.Origin.Close()
	got := make([]byte, 3)
	if _, err := io.ReadFull(p.Origin, got); err != nil || string(got) != "new" {
		t.Errorf("the origin's end of the new connection reads %q, %v", got, err)
	}
	relay.Wait()
}

// Events tell what the ends did and saw, in that order, and nothing of what the scenario does to clean up.
func TestTrace(t *testing.T) {
	var mu sync.Mutex
	var events []Event
	o := Options{Trace: func(e Event) {
		mu.Lock()
		defer mu.Unlock()
		if e.Kind != Opened {
			events = append(events, e)
		}
	}}
	if v := Check(t.Context(), Direct(TCP()), scenario(t, "reset-idle/from-client"), o); v.Err != nil {
		t.Fatal(v.Err)
	}
	slices.SortStableFunc(events, func(a, b Event) int { return cmp.Compare(a.At, b.At) })
	var got []string
	for _, e := range events {
		got = append(got, fmt.Sprintf("%s %v %d", e.End(), e.Kind, e.Bytes))
	}
	const want = "client sends 4; origin gets 4; origin sends 4; client gets 4; client resets 0; origin sees a reset 0"
	if s := strings.Join(got, "; "); s != want {
		t.Errorf("got  %s\nwant %s", s, want)
	}
}

// CheckAll gives each verdict once and in order, and plays again by itself what has failed in haste.
func TestCheckAll(t *testing.T) {
	bed := Joined(TCP(), TCP(), func(_ context.Context, client, origin io.ReadWriteCloser) {
		closesBoth(client.(*net.TCPConn), origin.(*net.TCPConn))
	})
	o := impatient
	o.Only = "half-close/"
	told := make(map[string]int)
	verdicts := CheckAll(t.Context(), bed, o, func(v Verdict) { told[v.Scenario.Name]++ })
	var names, want []string
	for _, v := range verdicts {
		names = append(names, v.Scenario.Name)
		if told[v.Scenario.Name] != 1 {
			t.Errorf("%s was told %d times", v.Scenario.Name, told[v.Scenario.Name])
		}
		switch {
		case strings.HasPrefix(v.Scenario.Name, "half-close") && v.Err == nil:
			t.Errorf("%s passes", v.Scenario.Name)
		case v.Err != nil && strings.Contains(v.Reason(), "127.0.0.1"):
			t.Errorf("%s: %s", v.Scenario.Name, v.Reason())
		}
	}
	for _, s := range Scenarios() {
		if strings.Contains(s.Name, o.Only) {
			want = append(want, s.Name)
		}
	}
	if strings.Join(names, " ") != strings.Join(want, " ") {
		t.Errorf("got  %s\nwant %s", names, want)
	}
	o.Only = "handshake"
	if v := CheckAll(t.Context(), bed, o, nil); len(v) != 1 || v[0].LeftOut == "" {
		t.Errorf("a relay without a handshake: %+v", v)
	}
}
