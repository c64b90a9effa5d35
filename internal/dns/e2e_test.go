//go:build unix

package dns

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"

	"github.com/sluice-proxy/sluice/internal/inbound"
	"github.com/sluice-proxy/sluice/internal/outbound"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

// asked is where the clients of a server believe to ask. Nothing of it is ever sent there.
const asked = "192.0.2.53:53"

// server stands in for a TUN: it takes what comes at a port of loopback, over UDP and TCP, for flows to port 53 of a
// name server somewhere, and hands them to a handler.
type server struct {
	h       proxy.Handler
	ctx     context.Context
	packets *net.UDPConn
	streams net.Listener
	all     sync.WaitGroup

	mu       sync.Mutex
	sessions map[netip.AddrPort]*client
}

// startServer serves h until the test's end, and returns its port.
func startServer(t *testing.T, h proxy.Handler) (port string) {
	t.Helper()
	s := &server{h: h, sessions: make(map[netip.AddrPort]*client)}
	ctx, cancel := context.WithCancel(context.Background())
	s.ctx = ctx
	proxytest.Until(t, "a port that is free for both", s.listen)
	t.Cleanup(func() {
		cancel()
		s.packets.Close()
		s.streams.Close()
		s.all.Wait()
	})
	s.all.Go(s.servePackets)
	s.all.Go(s.serveStreams)
	_, port, _ = net.SplitHostPort(s.packets.LocalAddr().String())
	return port
}

// listen binds a port for UDP and the same for TCP, if it is free.
func (s *server) listen() bool {
	var err error
	if s.packets, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}); err != nil {
		return false
	}
	if s.streams, err = net.Listen("tcp", s.packets.LocalAddr().String()); err != nil {
		s.packets.Close()
	}
	return err == nil
}

func (s *server) servePackets() {
	b := make([]byte, 1<<16)
	for {
		n, from, err := s.packets.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		s.session(from).send(asked, bytes.Clone(b[:n]))
	}
}

// session returns the session of the client at from.
func (s *server) session(from netip.AddrPort) *client {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.sessions[from]
	if c == nil {
		c = newClient()
		s.sessions[from] = c
		s.all.Go(func() { s.serveSession(from, c) })
	}
	return c
}

func (s *server) serveSession(from netip.AddrPort, c *client) {
	s.all.Go(func() { s.answer(from, c) })
	f := flowTo(asked)
	f.Client = from
	s.h.HandlePackets(s.ctx, f, c)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, from)
}

func (s *server) answer(to netip.AddrPort, c *client) {
	for {
		select {
		case d := <-c.out:
			s.packets.WriteToUDPAddrPort(d.Data, to)
		case <-c.over:
			return
		}
	}
}

func (s *server) serveStreams() {
	for {
		c, err := s.streams.Accept()
		if err != nil {
			return
		}
		f := flowTo(asked)
		f.Dst.Network = "tcp"
		s.all.Go(func() { s.h.HandleStream(s.ctx, f, &pending{theirs: c, done: make(chan struct{})}) })
	}
}

// startUnbound starts a name server that knows the zone "lab", and returns its address.
func startUnbound(t *testing.T) proxy.Addr {
	t.Helper()
	proxytest.Need(t, "unbound", "dig")
	dir := t.TempDir()
	port := proxytest.FreePort(t)
	large := ""
	for i := range 40 {
		large += fmt.Sprintf("  local-data: 'large.lab. TXT \"%02d %s\"'\n", i, strings.Repeat("x", 60))
	}
	conf := fmt.Sprintf(`server:
  interface: 127.0.0.1@%d
  do-ip6: no
  chroot: ""
  username: ""
  directory: %q
  pidfile: ""
  use-syslog: no
  do-daemonize: no
  module-config: "iterator"
  local-zone: "." refuse
  local-zone: "lab." static
  local-data: "www.lab. A 192.0.2.80"
  local-data: "www.lab. AAAA 2001:db8::80"
  local-data: "lab. MX 10 mail.lab."
%sremote-control:
  control-enable: no
`, port, dir, large)
	file := filepath.Join(dir, "unbound.conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	a := proxy.UDP("127.0.0.1", port)
	proxytest.Start(t, a.HostPort(), "unbound", "-d", "-c", file)
	return a
}

// dig returns what dig prints.
func dig(t *testing.T, port string, args ...string) string {
	t.Helper()
	args = append([]string{"@127.0.0.1", "-p", port, "+tries=1", "+timeout=10"}, args...)
	out, err := exec.CommandContext(t.Context(), "dig", args...).CombinedOutput()
	if err != nil {
		t.Errorf("dig %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// plainUDP is a way out for datagrams to one place, and for streams.
type plainUDP struct{ outbound.Direct }

func (d *plainUDP) DialPackets(_ context.Context, dst proxy.Addr) (relay.PacketConn, error) {
	c, err := net.Dial("udp", dst.HostPort())
	if err != nil {
		return nil, err
	}
	return &plainConn{c, dst.Endpoint()}, nil
}

type plainConn struct {
	net.Conn
	peer relay.Endpoint
}

func (c *plainConn) ReadPacket(p *relay.Packet) error {
	n, err := c.Read(p.Grow(1 << 16))
	if err != nil {
		return err
	}
	p.Data, p.Endpoint = p.Data[:n], c.peer
	return nil
}

func (c *plainConn) WritePacket(p *relay.Packet) error {
	_, err := c.Write(p.Data)
	return err
}

// connectProxy starts an HTTP proxy, which carries no datagrams, and returns the way through it.
func connectProxy(t *testing.T) proxy.Dialer {
	t.Helper()
	s := &inbound.HTTP{Listener: inbound.Listener{Name: "http", Addr: proxy.TCP("127.0.0.1", 0)}}
	if err := s.Listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	e := &proxy.Engine{Router: proxy.Static{Name: "direct", Dialer: new(outbound.Direct)}}
	served := make(chan error)
	go func() { served <- s.Serve(context.Background(), e) }()
	t.Cleanup(func() { s.Close(); e.Abort(); <-served })
	addr := s.BoundAddr().(*net.TCPAddr)
	return &outbound.HTTP{Server: proxy.TCP("127.0.0.1", uint16(addr.Port))}
}

func TestDigByAResolver(t *testing.T) {
	for _, tt := range []struct {
		name string
		via  func(*testing.T) proxy.Dialer
	}{
		{"direct", func(*testing.T) proxy.Dialer { return new(plainUDP) }},
		{"through a proxy without datagrams", connectProxy},
	} {
		t.Run(tt.name, func(t *testing.T) {
			proxytest.NoLeaks(t)
			resolver := startUnbound(t)
			way := proxy.Static{Name: "way", Dialer: tt.via(t)}
			e := &proxy.Engine{Router: way}
			h := &Handler{names: names{fixed: true}, Next: e, Mode: Hijack, Router: way, Resolver: resolver}
			port := startServer(t, h)
			for _, args := range [][]string{nil, {"+tcp"}, {"+dnssec"}, {"+noedns"}, {"+tcp", "+keepopen"}} {
				if out := dig(t, port, append(args, "+short", "www.lab", "A", "www.lab", "AAAA", "lab", "MX")...); out !=
					"192.0.2.80\n2001:db8::80\n10 mail.lab.\n" {
					t.Errorf("dig %v:\n%s", args, out)
				}
			}
			if out := dig(t, port, "nothing.lab"); !strings.Contains(out, "status: NXDOMAIN") {
				t.Errorf("a name that is not there:\n%s", out)
			}
			if out := dig(t, port, "+ignore", "+bufsize=512", "large.lab", "TXT"); !strings.Contains(out, "flags: qr aa tc") {
				t.Errorf("too large a record:\n%s", out)
			}
			if out := dig(t, port, "large.lab", "TXT"); strings.Count(out, "\nlarge.lab.") != 40 ||
				!strings.Contains(out, "Truncated, retrying in TCP mode") {
				t.Errorf("too large a record, asked again over TCP:\n%s", out)
			}
			e.Abort()
			h.Abort()
		})
	}
}

func TestDigFake(t *testing.T) {
	proxytest.NoLeaks(t)
	resolver := startUnbound(t)
	h := &Handler{names: names{fixed: true}, Next: noHandler{t}, Router: proxy.Static{Dialer: connectProxy(t)},
		Resolver: resolver}
	port := startServer(t, h)
	for _, args := range [][]string{nil, {"+tcp"}, {"+tcp", "+keepopen"}, {"+dnssec", "+cookie"}} {
		out := dig(t, port, append(args, "+short", "www.lab", "A", "www.lab", "AAAA", "lab", "MX", "www.lab", "HTTPS",
			"-x", "198.18.0.16")...)
		if out != "198.18.0.16\nfd5c:1e7a:b3d2:198::10\n10 mail.lab.\nwww.lab.\n" {
			t.Errorf("dig %v:\n%s", args, out)
		}
	}
	if out := dig(t, port, "+norec", "WWW.lab"); !strings.Contains(out, "\nWWW.lab.\t\t1\tIN\tA\t198.18.0.16") {
		t.Errorf("dig:\n%s", out)
	}
	h.Abort()
}

// Many programs at once: none waits for another, and all get their own answers.
func TestManyQuestionsAtOnce(t *testing.T) {
	proxytest.NoLeaks(t)
	resolver := startUnbound(t)
	way := proxy.Static{Name: "way", Dialer: connectProxy(t)}
	h := &Handler{names: names{fixed: true}, Next: noHandler{t}, Mode: Hijack, Router: way, Resolver: resolver}
	port := startServer(t, h)
	var all sync.WaitGroup
	failed := make(chan error, 50)
	for i := range cap(failed) {
		all.Go(func() { failed <- askMany("127.0.0.1:"+port, i) })
	}
	all.Wait()
	for range cap(failed) {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
	h.Abort()
}

func askMany(server string, client int) error {
	c := dns.Client{Timeout: proxytest.Patience}
	conn, err := c.Dial(server)
	if err != nil {
		return err
	}
	defer conn.Close()
	for i := range 20 {
		q := newQuestion("www.lab.", dns.TypeA)
		if i%2 == 1 {
			q = newQuestion(fmt.Sprintf("h%d-%d.lab.", client, i), dns.TypeA)
		}
		m, _, err := c.ExchangeWithConn(q, conn)
		if err != nil {
			return err
		}
		want, rcode := "192.0.2.80", dns.RcodeSuccess
		if i%2 == 1 {
			want, rcode = "", dns.RcodeNameError
		}
		if dataOf(m) != want || m.Rcode != rcode || !slices.Equal(m.Question, q.Question) {
			return fmt.Errorf("client %d, question %d: %v", client, i, m)
		}
	}
	return nil
}
