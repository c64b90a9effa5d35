package dns

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

func TestParseMode(t *testing.T) {
	for _, tt := range []struct {
		s    string
		mode Mode
		at   proxy.Addr
	}{
		{"", Fake, proxy.Addr{}},
		{"fake", Fake, proxy.Addr{}},
		{"off", Off, proxy.Addr{}},
		{"1.1.1.1", Hijack, proxy.UDP("1.1.1.1", 53)},
		{"10.0.0.1:5353", Hijack, proxy.UDP("10.0.0.1", 5353)},
		{"2606:4700:4700::1111", Hijack, proxy.UDP("2606:4700:4700::1111", 53)},
		{"[::1]:5353", Hijack, proxy.UDP("::1", 5353)},
		{"::ffff:10.0.0.1", Hijack, proxy.UDP("10.0.0.1", 53)},
		{"fake,9.9.9.9", Fake, proxy.UDP("9.9.9.9", 53)},
	} {
		mode, at, err := ParseMode(tt.s)
		if err != nil || mode != tt.mode || at != tt.at {
			t.Errorf("ParseMode(%q) = %v, %v, %v", tt.s, mode, at, err)
		}
	}
	for _, s := range []string{"Fake", "dns.example.com", "1.1.1.1:", "1.1.1.1:0", "0.0.0.0", "off,1.1.1.1", "fake,",
		"fake,off"} {
		if mode, at, err := ParseMode(s); err == nil {
			t.Errorf("ParseMode(%q) = %v, %v, want an error", s, mode, at)
		}
	}
}

// ask returns the handler's answer to one question in a session of its own.
func ask(t *testing.T, h *Handler, q *dns.Msg) *dns.Msg {
	t.Helper()
	c := newClient()
	over := make(chan struct{})
	go func() { h.HandlePackets(t.Context(), flowTo("10.0.0.53:53"), c); close(over) }()
	c.send("10.0.0.53:53", mustPack(t, q))
	got := c.next(t)
	c.Close()
	<-over
	if got.Endpoint != endpoint("10.0.0.53:53") {
		t.Errorf("the answer is from %v", got.Endpoint)
	}
	return mustUnpack(t, got.Data)
}

func newQuestion(name string, typ uint16) *dns.Msg { return new(dns.Msg).SetQuestion(name, typ) }

func TestFakeAnswers(t *testing.T) {
	h := &Handler{names: names{fixed: true}, Next: noHandler{t}}
	for _, tt := range []struct {
		name  string
		typ   uint16
		rcode int
		want  string // the answers' data
	}{
		{"example.com.", dns.TypeA, dns.RcodeSuccess, "198.18.0.16"},
		{"example.com.", dns.TypeAAAA, dns.RcodeSuccess, "fd5c:1e7a:b3d2:198::10"},
		{"EXample.com.", dns.TypeA, dns.RcodeSuccess, "198.18.0.16"},
		{"example.org.", dns.TypeA, dns.RcodeSuccess, "198.18.0.17"},
		{"example.com.", dns.TypeANY, dns.RcodeSuccess, "198.18.0.16 fd5c:1e7a:b3d2:198::10"},
		{"example.com.", dns.TypeHTTPS, dns.RcodeSuccess, ""},
		{"_dns.resolver.arpa.", dns.TypeSVCB, dns.RcodeSuccess, ""},
		{"example.com.", dns.TypeMX, dns.RcodeSuccess, ""},
		{"example.com.", dns.TypeTXT, dns.RcodeSuccess, ""},
		{"wiki.", dns.TypeA, dns.RcodeSuccess, "198.18.0.18"},
		{"server.corp.local.", dns.TypeA, dns.RcodeSuccess, "198.18.0.19"},
		{"my_host.example.com.", dns.TypeA, dns.RcodeSuccess, "198.18.0.20"},
		{"localhost.", dns.TypeA, dns.RcodeSuccess, "127.0.0.1"},
		{"app.localhost.", dns.TypeAAAA, dns.RcodeSuccess, "::1"},
		{"nothing.invalid.", dns.TypeA, dns.RcodeNameError, ""},
		{"10.0.0.1.", dns.TypeA, dns.RcodeNameError, ""},
		{`a\ b.example.com.`, dns.TypeA, dns.RcodeNameError, ""},
		{`a/b.example.com.`, dns.TypeA, dns.RcodeNameError, ""},
		{`a\.b.example.com.`, dns.TypeA, dns.RcodeNameError, ""},
		{"use-application-dns.net.", dns.TypeA, dns.RcodeNameError, ""},
		{"ipv4only.arpa.", dns.TypeAAAA, dns.RcodeSuccess, ""},
		{".", dns.TypeA, dns.RcodeSuccess, ""},
		{".", dns.TypeNS, dns.RcodeSuccess, ""},
		{"16.0.18.198.in-addr.arpa.", dns.TypePTR, dns.RcodeSuccess, "example.com."},
		{"1.1.19.198.in-addr.arpa.", dns.TypePTR, dns.RcodeNameError, ""},
		{"1.0.18.198.in-addr.arpa.", dns.TypePTR, dns.RcodeNameError, ""},
		{"1.1.1.1.in-addr.arpa.", dns.TypePTR, dns.RcodeNameError, ""},
		{"0.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.9.1.0.2.d.3.b.a.7.e.1.c.5.d.f.ip6.arpa.", dns.TypePTR,
			dns.RcodeSuccess, "example.com."},
		{"example.com.", dns.TypeAXFR, dns.RcodeRefused, ""},
	} {
		q := newQuestion(tt.name, tt.typ)
		m := ask(t, h, q)
		if m.Id != q.Id || !m.Response || !m.RecursionAvailable || !m.RecursionDesired || m.Truncated ||
			m.AuthenticatedData || len(m.Question) != 1 || m.Question[0] != q.Question[0] {
			t.Errorf("%s %s: the header or question of the answer:\n%v", tt.name, dns.TypeToString[tt.typ], m)
		}
		if got := dataOf(m); m.Rcode != tt.rcode || got != tt.want {
			t.Errorf("%s %s: %s %q, want %s %q", tt.name, dns.TypeToString[tt.typ],
				dns.RcodeToString[m.Rcode], got, dns.RcodeToString[tt.rcode], tt.want)
		}
		for _, rr := range m.Answer {
			if hdr := rr.Header(); hdr.Name != tt.name || hdr.Ttl != 1 {
				t.Errorf("%s %s: record %v", tt.name, dns.TypeToString[tt.typ], rr)
			}
		}
	}
}

func TestFakeWithoutIPv6(t *testing.T) {
	h := &Handler{names: names{fixed: true}, Next: noHandler{t}, NoIPv6: true}
	if m := ask(t, h, newQuestion("example.com.", dns.TypeAAAA)); m.Rcode != dns.RcodeSuccess || len(m.Answer) != 0 {
		t.Errorf("AAAA: %v", m)
	}
	if m := ask(t, h, newQuestion("example.com.", dns.TypeA)); dataOf(m) != "198.18.0.16" {
		t.Errorf("A: %v", m)
	}
}

func TestHeadersAreEchoed(t *testing.T) {
	h := &Handler{names: names{fixed: true}, Next: noHandler{t}}
	q := newQuestion("eXAmple.com.", dns.TypeA)
	q.RecursionDesired, q.CheckingDisabled = false, true
	q.SetEdns0(4096, true)
	m := ask(t, h, q)
	opt := m.IsEdns0()
	if m.RecursionDesired || !m.CheckingDisabled || opt == nil || !opt.Do() || opt.Version() != 0 ||
		m.Question[0].Name != "eXAmple.com." {
		t.Errorf("answer:\n%v", m)
	}
	if m := ask(t, h, newQuestion("example.com.", dns.TypeA)); m.IsEdns0() != nil {
		t.Errorf("an answer with EDNS to a question without:\n%v", m)
	}
	q.IsEdns0().SetVersion(1)
	if m := ask(t, h, q); m.Rcode != dns.RcodeBadVers || m.IsEdns0() == nil || len(m.Answer) != 0 {
		t.Errorf("EDNS version 1: %v", m)
	}
}

func TestBadQuestions(t *testing.T) {
	h := &Handler{names: names{fixed: true}, Next: noHandler{t}}
	update := new(dns.Msg).SetUpdate("example.com.")
	if m := ask(t, h, update); m.Rcode != dns.RcodeNotImplemented || m.Opcode != dns.OpcodeUpdate || m.Id != update.Id {
		t.Errorf("update: %v", m)
	}
	none := newQuestion("example.com.", dns.TypeA)
	none.Question = nil
	if m := ask(t, h, none); m.Rcode != dns.RcodeFormatError || m.Id != none.Id {
		t.Errorf("no question: %v", m)
	}
	two := newQuestion("example.com.", dns.TypeA)
	two.Question = append(two.Question, two.Question[0])
	if m := ask(t, h, two); m.Rcode != dns.RcodeFormatError || m.Id != two.Id {
		t.Errorf("two questions: %v", m)
	}
	chaos := newQuestion("version.bind.", dns.TypeTXT)
	chaos.Question[0].Qclass = dns.ClassCHAOS
	if m := ask(t, h, chaos); m.Rcode != dns.RcodeNotImplemented {
		t.Errorf("chaos: %v", m)
	}

	c := newClient()
	defer serve(t, h, c, "10.0.0.53:53")()
	whole := mustPack(t, newQuestion("example.com.", dns.TypeA))
	answer := bytes.Clone(whole)
	answer[2] |= 0x80
	for _, noise := range [][]byte{nil, {1}, whole[:11], answer} {
		c.send("10.0.0.53:53", noise)
	}
	c.send("10.0.0.53:53", whole[:20])
	if m := mustUnpack(t, c.next(t).Data); m.Rcode != dns.RcodeFormatError || m.Id != whole16(whole) {
		t.Errorf("a question that is cut off, after noise: %v", m)
	}
}

func whole16(b []byte) uint16 { return uint16(b[0])<<8 | uint16(b[1]) }

func TestAddressesOfNumbers(t *testing.T) {
	for _, i := range []int{0, 1, 255, namesMax - 1} {
		if numberOf(fakeIP4(i)) != i || numberOf(fakeIP6(i)) != i || !isFake(fakeIP4(i)) || !isFake(fakeIP6(i)) {
			t.Errorf("%d: %v %v", i, fakeIP4(i), fakeIP6(i))
		}
	}
	for _, s := range []string{"198.18.0.0", "198.18.0.15", "198.19.0.16", "198.19.255.255", "fd5c:1e7a:b3d2:198::f",
		"fd5c:1e7a:b3d2:198:8000::10", "198.20.0.1", "10.0.0.1", "::1", "fd5c:1e7a:b3d2:199::10"} {
		if i := numberOf(netip.MustParseAddr(s)); i != -1 {
			t.Errorf("%s is the address of number %d", s, i)
		}
	}
	if numberOf(netip.Addr{}) != -1 {
		t.Error("the zero Addr has a number")
	}
}

// fakeOf returns the address that h gives name.
func fakeOf(t *testing.T, h *Handler, name string) netip.Addr {
	t.Helper()
	m := ask(t, h, newQuestion(dns.Fqdn(name), dns.TypeA))
	ip, err := netip.ParseAddr(dataOf(m))
	if err != nil {
		t.Fatalf("%s: %v", name, m)
	}
	return ip
}

func TestStreamsToFakeAddressesGoToNames(t *testing.T) {
	next := new(proxytest.RecordingHandler)
	h := &Handler{names: names{fixed: true}, Next: next}
	ip := fakeOf(t, h, "Example.com")
	for _, dst := range []netip.Addr{ip, fakeIP6(numberOf(ip)), netip.MustParseAddr("192.0.2.1")} {
		p := newPending()
		f := flowTo(netip.AddrPortFrom(dst, 443).String())
		f.Dst.Network, f.Local = "tcp", netip.AddrPortFrom(dst, 443)
		go h.HandleStream(t.Context(), f, p)
		p.talk(t, "ping")
	}
	want := []proxy.Addr{proxy.TCP("example.com", 443), proxy.TCP("example.com", 443), proxy.TCP("192.0.2.1", 443)}
	for i, f := range next.Flows() {
		if f.Dst != want[i] || f.Client.Port() != 4000 || !f.Local.IsValid() {
			t.Errorf("flow %d: %+v", i, f)
		}
	}
	if name, ok := h.NameOf(ip); !ok || name != "example.com" {
		t.Errorf("NameOf: %q %v", name, ok)
	}
}

func TestStreamToForgottenAddressIsRejected(t *testing.T) {
	var log bytes.Buffer
	h := &Handler{names: names{fixed: true}, Next: noHandler{t}, Log: slog.New(slog.NewTextHandler(&log, nil))}
	for range 3 {
		p := newPending()
		f := flowTo("198.18.7.7:443")
		f.Dst.Network = "tcp"
		h.HandleStream(t.Context(), f, p)
		<-p.done
		if !errors.Is(p.rejected, syscall.EHOSTUNREACH) || proxy.ReasonOf(p.rejected) != proxy.HostUnreachable {
			t.Errorf("rejected with %v", p.rejected)
		}
	}
	if n := strings.Count(log.String(), "\n"); n != 1 {
		t.Errorf("%d lines in the log:\n%s", n, &log)
	}
}

func TestOffIsTransparent(t *testing.T) {
	next := new(proxytest.RecordingHandler)
	h := &Handler{names: names{fixed: true}, Next: next, Mode: Off}
	c := newClient()
	over := serve(t, h, c, "10.0.0.53:53")
	c.send("10.0.0.53:53", []byte("x"))
	if p := c.next(t); string(p.Data) != "x" {
		t.Errorf("got %q", p.Data)
	}
	over()
	p := newPending()
	f := flowTo("198.18.0.16:53")
	f.Dst.Network = "tcp"
	go h.HandleStream(t.Context(), f, p)
	p.talk(t, "ping")
	for _, f := range next.Flows() {
		if f.Dst.Host != "10.0.0.53" && f.Dst.Host != "198.18.0.16" {
			t.Errorf("flow to %v", f.Dst)
		}
	}
}

// What follows is for all tests of the package.

func flowTo(dst string) proxy.Flow {
	ap := netip.MustParseAddrPort(dst)
	return proxy.Flow{Inbound: "tun", Client: netip.MustParseAddrPort("10.9.0.2:4000"), Local: ap,
		Dst: proxy.UDP(ap.Addr().String(), ap.Port())}
}

func endpoint(s string) relay.Endpoint { return relay.EndpointOf(netip.MustParseAddrPort(s)) }

func mustPack(t testing.TB, m *dns.Msg) []byte {
	t.Helper()
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func mustUnpack(t testing.TB, b []byte) *dns.Msg {
	t.Helper()
	m := new(dns.Msg)
	if err := m.Unpack(b); err != nil {
		t.Fatalf("%v in %x", err, b)
	}
	return m
}

// dataOf returns what the answers of m say, joined.
func dataOf(m *dns.Msg) string {
	var all []string
	for _, rr := range m.Answer {
		all = append(all, strings.TrimPrefix(rr.String(), rr.Header().String()))
	}
	return strings.Join(all, " ")
}

// datagram is one that a client sent or got.
type datagram struct {
	relay.Endpoint
	Data []byte
}

// client is the conn of a client, whose other end the test holds.
type client struct {
	in, out chan datagram
	over    chan struct{}
	once    sync.Once

	mu      sync.Mutex
	refused map[relay.Endpoint]error
}

func newClient() *client {
	return &client{in: make(chan datagram, 1000), out: make(chan datagram, 2000), over: make(chan struct{}),
		refused: make(map[relay.Endpoint]error)}
}

func (c *client) send(to string, data []byte) { c.in <- datagram{endpoint(to), data} }

func (c *client) next(t testing.TB) datagram {
	t.Helper()
	select {
	case d := <-c.out:
		return d
	case <-time.After(proxytest.Patience):
		t.Fatal("no datagram came")
		return datagram{}
	}
}

func (c *client) ReadPacket(p *relay.Packet) error {
	select {
	case <-c.over:
		return net.ErrClosed
	default:
	}
	select {
	case d := <-c.in:
		copy(p.Grow(len(d.Data)), d.Data)
		p.Endpoint = d.Endpoint
		return nil
	case <-c.over:
		return net.ErrClosed
	}
}

func (c *client) WritePacket(p *relay.Packet) error {
	select {
	case c.out <- datagram{p.Endpoint, bytes.Clone(p.Data)}:
		return nil
	case <-c.over:
		return net.ErrClosed
	}
}

func (c *client) Close() error {
	c.once.Do(func() { close(c.over) })
	return nil
}

func (c *client) Refuse(e relay.Endpoint, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refused[e] = err
}

func (c *client) refusal(e relay.Endpoint) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.refused[e]
}

// serve has h handle c, whose first datagram goes to dst. The function that it returns closes c and waits for the
// session's end.
func serve(t testing.TB, h *Handler, c *client, dst string) (end func()) {
	return serveConn(t, h, c, dst)
}

func serveConn(t testing.TB, h *Handler, c relay.PacketConn, dst string) (end func()) {
	over := make(chan struct{})
	ctx := t.Context()
	go func() { h.HandlePackets(ctx, flowTo(dst), c); close(over) }()
	return func() { c.Close(); <-over }
}

// noHandler is a Next that must not be called.
type noHandler struct{ t testing.TB }

func (n noHandler) HandleStream(_ context.Context, f proxy.Flow, p proxy.Pending) {
	n.t.Errorf("a stream to %v came through", f.Dst)
	p.Reject(errors.ErrUnsupported)
	p.Done()
}

func (n noHandler) HandlePackets(_ context.Context, f proxy.Flow, c relay.PacketConn) {
	n.t.Errorf("datagrams to %v came through", f.Dst)
	c.Close()
}

// pending is a stream whose client's end the test holds.
type pending struct {
	ours, theirs net.Conn
	head         []byte
	rejected     error
	done         chan struct{}
}

func newPending() *pending {
	p := &pending{done: make(chan struct{})}
	p.ours, p.theirs = net.Pipe()
	return p
}

func (p *pending) Accept() (net.Conn, []byte, error) { return p.theirs, p.head, nil }
func (p *pending) Reject(err error)                  { p.rejected = err; p.theirs.Close() }
func (p *pending) Done()                             { close(p.done) }

// talk sends s, wants it back, and closes.
func (p *pending) talk(t testing.TB, s string) {
	t.Helper()
	p.ours.SetDeadline(time.Now().Add(proxytest.Patience))
	if _, err := p.ours.Write([]byte(s)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, len(s))
	if _, err := p.ours.Read(b); err != nil || string(b) != s {
		t.Fatalf("got %q, %v", b, err)
	}
	p.ours.Close()
	<-p.done
}

// What a program has kept from an earlier run must not lead to another name.
func TestAddressesOfTwoRunsDiffer(t *testing.T) {
	seen := make(map[netip.Addr]bool)
	for range 3 {
		seen[fakeOf(t, &Handler{Next: noHandler{t}}, "example.com")] = true
	}
	if len(seen) == 1 {
		t.Errorf("three handlers gave their first name the same address: %v", seen)
	}
}
