package dns

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

// resolver is a way out behind which there is nothing but a resolver, that the test scripts.
type resolver struct {
	answer    func(q *dns.Msg, network string) *dns.Msg // nil: no answer. It may sleep
	udpErr    error                                     // no datagrams
	tcpErr    error
	perStream int  // answers after which a stream is closed; 0: any number
	inTurn    bool // the questions of a stream are answered one after the other

	mu      sync.Mutex
	flows   []proxy.Flow
	dials   []proxy.Addr
	clients []*client
	asked   []string // network and name
}

func (r *resolver) Route(f proxy.Flow) (string, proxy.Dialer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.flows = append(r.flows, f)
	return "lab", r
}

func (r *resolver) DialPackets(_ context.Context, dst proxy.Addr) (relay.PacketConn, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dials = append(r.dials, dst)
	if r.udpErr != nil {
		return nil, r.udpErr
	}
	c := &askedConn{newClient(), r}
	r.clients = append(r.clients, c.client)
	return c, nil
}

// askedConn is the sluice's end of a session of datagrams with the resolver.
type askedConn struct {
	*client
	r *resolver
}

func (c *askedConn) WritePacket(p *relay.Packet) error {
	from, q := p.Endpoint, new(dns.Msg)
	if err := q.Unpack(p.Data); err != nil {
		return err
	}
	go func() {
		if b := c.r.reply(q, "udp"); b != nil {
			c.in <- datagram{from, b}
		}
	}()
	return nil
}

func (r *resolver) DialStream(_ context.Context, dst proxy.Addr) (net.Conn, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dials = append(r.dials, dst)
	if r.tcpErr != nil {
		return nil, r.tcpErr
	}
	ours, theirs := net.Pipe()
	go r.serve(theirs)
	return ours, nil
}

func (r *resolver) serve(c net.Conn) {
	defer c.Close()
	var out sync.Mutex
	in := bufio.NewReader(c)
	for n := 0; r.perStream == 0 || n < r.perStream; n++ {
		b, err := readMessage(in)
		q := new(dns.Msg)
		if err != nil || q.Unpack(b) != nil {
			return
		}
		answer := func() {
			if b := r.reply(q, "tcp"); b != nil {
				out.Lock()
				defer out.Unlock()
				c.Write(frame(b))
			}
		}
		if r.inTurn || r.perStream > 0 {
			answer()
		} else {
			go answer()
		}
	}
}

func (r *resolver) reply(q *dns.Msg, network string) []byte {
	r.mu.Lock()
	r.asked = append(r.asked, network+" "+q.Question[0].Name)
	r.mu.Unlock()
	answer := addressed
	if r.answer != nil {
		answer = r.answer
	}
	m := answer(q, network)
	if m == nil {
		return nil
	}
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

// addressed says that every name has the same address.
func addressed(q *dns.Msg, _ string) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	m.RecursionAvailable = true
	header := dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 300}
	m.Answer = []dns.RR{&dns.A{Hdr: header, A: net.IPv4(192, 0, 2, 1)}}
	return m
}

func (r *resolver) asks(network string) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.asked {
		if strings.HasPrefix(s, network) {
			n++
		}
	}
	return n
}

func (r *resolver) dialed(network string) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range r.dials {
		if a.Network == network {
			n++
		}
	}
	return n
}

func hijack(t testing.TB, r *resolver) *Handler {
	return &Handler{names: names{fixed: true}, Next: noHandler{t}, Mode: Hijack, Router: r,
		Resolver: proxy.UDP("192.0.2.53", 53)}
}

func TestHijackAsksTheResolver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := new(resolver)
		h := hijack(t, r)
		q := newQuestion("EXample.com.", dns.TypeA)
		q.SetEdns0(4096, true)
		m := ask(t, h, q)
		if m.Id != q.Id || m.Question[0] != q.Question[0] || dataOf(m) != "192.0.2.1" {
			t.Errorf("answer:\n%v", m)
		}
		if len(r.flows) != 1 || r.flows[0] != (proxy.Flow{Inbound: "tun", Dst: proxy.UDP("192.0.2.53", 53)}) {
			t.Errorf("routed %+v", r.flows)
		}
		if len(r.dials) != 1 || r.dials[0] != proxy.UDP("192.0.2.53", 53) {
			t.Errorf("dialled %v", r.dials)
		}
		select {
		case <-r.clients[0].over:
		default:
			t.Error("the session with the resolver outlives the last of the clients")
		}
	})
}

func TestFakeAsksTheResolverForTheRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &resolver{answer: func(q *dns.Msg, _ string) *dns.Msg {
			m := new(dns.Msg).SetReply(q)
			header := dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeMX, Class: dns.ClassINET}
			m.Answer = []dns.RR{&dns.MX{Hdr: header, Mx: "mail.example."}}
			return m
		}}
		h := hijack(t, r)
		h.Mode = Fake
		if m := ask(t, h, newQuestion("example.com.", dns.TypeMX)); dataOf(m) != "0 mail.example." {
			t.Errorf("MX: %v", m)
		}
		if m := ask(t, h, newQuestion("example.com.", dns.TypeA)); dataOf(m) != "198.18.0.16" {
			t.Errorf("A: %v", m)
		}
		if m := ask(t, h, newQuestion("example.com.", dns.TypeHTTPS)); len(m.Answer) != 0 {
			t.Errorf("HTTPS: %v", m)
		}
		if n := r.asks("udp"); n != 1 {
			t.Errorf("the resolver was asked %d times", n)
		}
	})
}

func TestQuestionsGoOverTCPWhereThereAreNoDatagrams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		r := &resolver{udpErr: fmt.Errorf("lab: %w", errors.ErrUnsupported)}
		h := hijack(t, r)
		h.Log = slog.New(slog.NewTextHandler(&log, nil))
		c := newClient()
		end := serve(t, h, c, "10.0.0.53:53")
		for range 10 {
			c.send("10.0.0.53:53", mustPack(t, newQuestion("example.com.", dns.TypeA)))
			if m := mustUnpack(t, c.next(t).Data); dataOf(m) != "192.0.2.1" {
				t.Errorf("answer: %v", m)
			}
		}
		if r.dialed("udp") != 1 || r.dialed("tcp") != 1 || r.asks("tcp") != 10 {
			t.Errorf("dialled %v, asked %v", r.dials, r.asked)
		}
		if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), "over TCP") {
			t.Errorf("log:\n%s", &log)
		}

		// Datagrams are tried again in time.
		r.mu.Lock()
		r.udpErr = nil
		r.mu.Unlock()
		end()
		time.Sleep(noDatagramsTime)
		ask(t, h, newQuestion("example.com.", dns.TypeA))
		if r.asks("udp") != 1 {
			t.Errorf("asked %v", r.asked)
		}
	})
}

// streamsOnly is a router whose dialer has no DialPackets.
type streamsOnly struct{ r *resolver }

func (s streamsOnly) Route(f proxy.Flow) (string, proxy.Dialer) {
	_, d := s.r.Route(f)
	return "lab", struct{ proxy.Dialer }{d}
}

func TestDialerOfStreamsOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := new(resolver)
		h := hijack(t, r)
		h.Router = streamsOnly{r}
		if m := ask(t, h, newQuestion("example.com.", dns.TypeA)); dataOf(m) != "192.0.2.1" || r.asks("tcp") != 1 {
			t.Errorf("answer: %v", m)
		}
	})
}

func TestLostDatagramsGoOverTCP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &resolver{answer: func(q *dns.Msg, network string) *dns.Msg {
			if network == "udp" {
				return nil
			}
			return addressed(q, network)
		}}
		h := hijack(t, r)
		for i, want := range []time.Duration{datagramsWait, 0} { // the second knows
			start := time.Now()
			if m := ask(t, h, newQuestion("example.com.", dns.TypeA)); dataOf(m) != "192.0.2.1" {
				t.Errorf("answer: %v", m)
			}
			if took := time.Since(start); took != want {
				t.Errorf("question %d took %v, want %v", i, took, want)
			}
		}
	})
}

func TestSilentResolverIsAFailureInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		r := &resolver{answer: func(*dns.Msg, string) *dns.Msg { return nil }}
		h := hijack(t, r)
		h.Timeout = 3 * time.Second
		h.Log = slog.New(slog.NewTextHandler(&log, nil))
		for range 3 {
			start := time.Now()
			q := newQuestion("eXample.com.", dns.TypeA)
			m := ask(t, h, q)
			if m.Rcode != dns.RcodeServerFailure || m.Id != q.Id || m.Question[0] != q.Question[0] {
				t.Errorf("answer: %v", m)
			}
			if took := time.Since(start); took != 3*time.Second {
				t.Errorf("it took %v", took)
			}
		}
		if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), "reason=timeout") {
			t.Errorf("log:\n%s", &log)
		}
	})
}

func TestResolverThatCannotBeReached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		r := &resolver{udpErr: errors.ErrUnsupported, tcpErr: fmt.Errorf("lab: %w", syscall.ECONNREFUSED)}
		h := hijack(t, r)
		h.Log = slog.New(slog.NewTextHandler(&log, nil))
		start := time.Now()
		m := ask(t, h, newQuestion("example.com.", dns.TypeA))
		if m.Rcode != dns.RcodeServerFailure || time.Since(start) != 0 {
			t.Errorf("after %v: %v", time.Since(start), m)
		}
		if !strings.Contains(log.String(), "reason=refused") {
			t.Errorf("log:\n%s", &log)
		}
	})
}

func TestNoResolverIsAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &Handler{names: names{fixed: true}, Next: noHandler{t}, Mode: Hijack}
		if m := ask(t, h, newQuestion("example.com.", dns.TypeA)); m.Rcode != dns.RcodeServerFailure {
			t.Errorf("answer: %v", m)
		}
	})
}

func TestSlowQuestionHoldsUpNoOther(t *testing.T) {
	for _, network := range []string{"udp", "tcp"} {
		t.Run(network, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := &resolver{inTurn: true, answer: func(q *dns.Msg, network string) *dns.Msg {
					if strings.HasPrefix(q.Question[0].Name, "slow") {
						time.Sleep(time.Second)
					}
					return addressed(q, network)
				}}
				if network == "tcp" {
					r.udpErr = errors.ErrUnsupported
				}
				h := hijack(t, r)
				c := newClient()
				defer serve(t, h, c, "10.0.0.53:53")()
				start := time.Now()
				for i := range 4 {
					c.send("10.0.0.53:53", mustPack(t, newQuestion(fmt.Sprintf("slow%d.example.", i), dns.TypeA)))
				}
				for i := range 20 {
					synctest.Wait()
					c.send("10.0.0.53:53", mustPack(t, newQuestion(fmt.Sprintf("fast%d.example.", i), dns.TypeA)))
				}
				for range 20 {
					if m := mustUnpack(t, c.next(t).Data); !strings.HasPrefix(m.Question[0].Name, "fast") {
						t.Errorf("an answer to %s", m.Question[0].Name)
					}
				}
				if took := time.Since(start); took != 0 {
					t.Errorf("the fast ones took %v", took)
				}
				for range 4 {
					if m := mustUnpack(t, c.next(t).Data); dataOf(m) != "192.0.2.1" {
						t.Errorf("a slow one: %v", m)
					}
				}
				if n := r.dialed("tcp"); n > streamsMax {
					t.Errorf("%d streams", n)
				}
			})
		})
	}
}

func TestResolverThatClosesItsStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &resolver{udpErr: errors.ErrUnsupported, perStream: 1}
		h := hijack(t, r)
		c := newClient()
		defer serve(t, h, c, "10.0.0.53:53")()
		for i := range 100 {
			c.send("10.0.0.53:53", mustPack(t, newQuestion(fmt.Sprintf("h%d.example.", i), dns.TypeA)))
			if i%3 == 0 {
				synctest.Wait()
			}
		}
		for range 100 {
			if m := mustUnpack(t, c.next(t).Data); m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeServerFailure {
				t.Errorf("answer: %v", m)
			}
		}
	})
}

// A question on a stream that the resolver has just ended is asked again.
func TestStreamThatEndedIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &resolver{udpErr: errors.ErrUnsupported, perStream: 1}
		h := hijack(t, r)
		c := newClient()
		defer serve(t, h, c, "10.0.0.53:53")()
		for range 20 {
			c.send("10.0.0.53:53", mustPack(t, newQuestion("example.com.", dns.TypeA)))
			if m := mustUnpack(t, c.next(t).Data); dataOf(m) != "192.0.2.1" {
				t.Errorf("answer: %v", m)
			}
		}
	})
}

func TestLargeAnswersAreTruncated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &resolver{udpErr: errors.ErrUnsupported, answer: func(q *dns.Msg, _ string) *dns.Msg {
			m := new(dns.Msg).SetReply(q)
			for range 100 {
				m.Answer = append(m.Answer, &dns.TXT{Txt: []string{strings.Repeat("x", 30)},
					Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET}})
			}
			if q.IsEdns0() != nil {
				m.SetEdns0(1232, false)
			}
			return m
		}}
		h := hijack(t, r)
		for _, size := range []uint16{0, 100, 1232, 4096, 65535} {
			q := newQuestion("example.com.", dns.TypeTXT)
			if size > 0 {
				q.SetEdns0(size, false)
			}
			m := ask(t, h, q)
			m.Compress = true
			whole := size == 65535
			if m.Truncated == whole || m.Id != q.Id || m.Question[0] != q.Question[0] || (m.IsEdns0() != nil) != (size > 0) ||
				m.Len() > max(512, int(size)) || (len(m.Answer) == 100) != whole {
				t.Errorf("for %d bytes: %d bytes, %d answers, truncated %v", size, m.Len(), len(m.Answer), m.Truncated)
			}
		}
	})
}

func TestForgedAnswersAreDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &resolver{answer: func(*dns.Msg, string) *dns.Msg { return nil }}
		h := hijack(t, r)
		c := newClient()
		defer serve(t, h, c, "10.0.0.53:53")()
		r.answer = func(q *dns.Msg, _ string) *dns.Msg {
			good := addressed(q, "")
			for _, forge := range []func(*dns.Msg){
				func(m *dns.Msg) { m.Id++ },
				func(m *dns.Msg) { m.Response = false },
				func(m *dns.Msg) { m.Question[0].Name = "other.example." },
				func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAAAA },
				func(m *dns.Msg) { m.Question = nil },
			} {
				bad := addressed(q, "")
				bad.Answer[0].(*dns.A).A = net.IPv4(6, 6, 6, 6)
				forge(bad)
				r.clients[0].in <- datagram{endpoint("192.0.2.53:53"), mustPack(t, bad)}
			}
			bad := addressed(q, "")
			bad.Answer[0].(*dns.A).A = net.IPv4(6, 6, 6, 6)
			r.clients[0].in <- datagram{endpoint("203.0.113.6:53"), mustPack(t, bad)}
			r.clients[0].in <- datagram{endpoint("192.0.2.53:5353"), mustPack(t, bad)}
			r.clients[0].in <- datagram{endpoint("192.0.2.53:53"), nil}
			return good
		}
		c.send("10.0.0.53:53", mustPack(t, newQuestion("example.com.", dns.TypeA)))
		if m := mustUnpack(t, c.next(t).Data); dataOf(m) != "192.0.2.1" {
			t.Errorf("answer: %v", m)
		}
	})
}

func TestSessionsWithTheResolverChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := new(resolver)
		h := hijack(t, r)
		c := newClient()
		defer serve(t, h, c, "10.0.0.53:53")()
		for range 2*rotateAfter + 1 {
			c.send("10.0.0.53:53", mustPack(t, newQuestion("example.com.", dns.TypeA)))
			c.next(t)
		}
		synctest.Wait()
		if n := r.dialed("udp"); n != 3 {
			t.Errorf("%d sessions for %d questions", n, 2*rotateAfter+1)
		}
		for i, old := range r.clients[:2] {
			select {
			case <-old.over:
			default:
				t.Errorf("session %d is still there", i)
			}
		}
	})
}

func TestUnreachableResolverFailsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := hijack(t, nil)
		h.Router = proxy.Static{Dialer: refusing{}}
		start := time.Now()
		m := ask(t, h, newQuestion("example.com.", dns.TypeA))
		if m.Rcode != dns.RcodeServerFailure || time.Since(start) != 0 {
			t.Errorf("after %v: %v", time.Since(start), m)
		}
	})
}

// refusing is a way out to a machine that has no such port.
type refusing struct{}

func (refusing) DialStream(context.Context, proxy.Addr) (net.Conn, error) {
	return nil, syscall.ECONNREFUSED
}
func (refusing) DialPackets(context.Context, proxy.Addr) (relay.PacketConn, error) {
	return &refusingConn{client: newClient(), sent: make(chan relay.Endpoint, 10)}, nil
}

type refusingConn struct {
	*client
	sent chan relay.Endpoint
}

func (c *refusingConn) WritePacket(p *relay.Packet) error { c.sent <- p.Endpoint; return nil }
func (c *refusingConn) ReadPacket(*relay.Packet) error {
	select {
	case e := <-c.sent:
		return &relay.UnreachableError{To: e, Err: syscall.ECONNREFUSED}
	case <-c.over:
		return net.ErrClosed
	}
}

func TestQuestionsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		r := &resolver{answer: func(q *dns.Msg, network string) *dns.Msg {
			time.Sleep(time.Second)
			return addressed(q, network)
		}}
		h := hijack(t, r)
		h.Log = slog.New(slog.NewTextHandler(&log, nil))
		c := newClient()
		defer serve(t, h, c, "10.0.0.53:53")()
		for range questionsMax + 100 {
			c.send("10.0.0.53:53", mustPack(t, newQuestion("example.com.", dns.TypeA)))
			synctest.Wait()
		}
		time.Sleep(2 * time.Second)
		if n := len(c.out); n != questionsMax {
			t.Errorf("%d answers, want %d", n, questionsMax)
		}
		if n := strings.Count(log.String(), "\n"); n != 1 {
			t.Errorf("log:\n%s", &log)
		}
		for range len(c.out) {
			<-c.out
		}
		c.send("10.0.0.53:53", mustPack(t, newQuestion("example.com.", dns.TypeA)))
		time.Sleep(2 * time.Second)
		if len(c.out) != 1 {
			t.Error("there is no answer after the crowd")
		}
	})
}

func TestAbortEndsWaitingQuestions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &resolver{answer: func(*dns.Msg, string) *dns.Msg { return nil }}
		h := hijack(t, r)
		c := newClient()
		c.send("10.0.0.53:53", mustPack(t, newQuestion("example.com.", dns.TypeA)))
		time.AfterFunc(time.Second, h.Abort)
		start := time.Now()
		h.HandlePackets(t.Context(), flowTo("10.0.0.53:53"), c)
		if took := time.Since(start); took != time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

func TestClientThatLeavesWaitsForNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &resolver{answer: func(*dns.Msg, string) *dns.Msg { return nil }}
		h := hijack(t, r)
		h.Mode = Fake
		query := mustPack(t, newQuestion("example.com.", dns.TypeTXT))
		start := time.Now()
		c := newClient()
		end := serve(t, h, c, "10.0.0.53:53")
		c.send("10.0.0.53:53", query)
		p, _ := streamTo(t, h)
		p.ours.Write(append(frame(query), 0))
		synctest.Wait()
		end()
		p.ours.Close()
		<-p.done
		if took := time.Since(start); took != 0 {
			t.Errorf("it took %v", took)
		}
	})
}

// broken is a way out that panics.
type broken struct{}

func (broken) DialStream(context.Context, proxy.Addr) (net.Conn, error) { panic("broken") }

func TestPanicOfAWayOutIsAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		h := hijack(t, nil)
		h.Router = proxy.Static{Dialer: broken{}}
		h.Log = slog.New(slog.NewTextHandler(&log, nil))
		if m := ask(t, h, newQuestion("example.com.", dns.TypeA)); m.Rcode != dns.RcodeServerFailure {
			t.Errorf("answer: %v", m)
		}
		if !strings.Contains(log.String(), "panic=broken") {
			t.Errorf("log:\n%s", &log)
		}
	})
}
