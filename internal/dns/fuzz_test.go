package dns

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"testing"

	"github.com/miekg/dns"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

// seedMessages adds messages of all kinds.
func seedMessages(f *testing.F) {
	for _, name := range []string{"example.com.", ".", "localhost.", `a\000b.\255.`, "16.0.18.198.in-addr.arpa.",
		"0.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.9.1.0.2.d.3.b.a.7.e.1.c.5.d.f.ip6.arpa."} {
		for _, typ := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypePTR, dns.TypeHTTPS, dns.TypeANY, dns.TypeMX} {
			q := newQuestion(name, typ)
			q.SetEdns0(1232, true)
			f.Add(mustPack(f, q))
		}
	}
	q := newQuestion("example.com.", dns.TypeA)
	f.Add(mustPack(f, addressed(q, "")))
	f.Add(mustPack(f, q)[:20])
	f.Add(mustPack(f, new(dns.Msg).SetUpdate("example.com.")))
	// A name that points to itself.
	f.Add([]byte("\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\xc0\x0c\x00\x01\x00\x01"))
	f.Add([]byte("\x00\x01\x01\x00\xff\xff\xff\xff\xff\xff\xff\xff"))
}

// FuzzQuestion gives any bytes to the handler, as a datagram and as a stream's message: what comes back is an answer
// with the same ID, or nothing.
func FuzzQuestion(f *testing.F) {
	seedMessages(f)
	f.Fuzz(func(t *testing.T, raw []byte) {
		if len(raw) > 65535 {
			return
		}
		h := &Handler{names: names{fixed: true}, Next: noHandler{t}}
		h.names.max = 2
		c := newClient()
		c.send("10.0.0.53:53", raw)
		last := newQuestion("last.example.", dns.TypeA)
		c.send("10.0.0.53:53", mustPack(t, last))
		end := serve(t, h, c, "10.0.0.53:53")
		var got []byte
		for {
			d := c.next(t)
			if m := mustUnpack(t, d.Data); m.Id == last.Id && len(m.Question) == 1 && m.Question[0] == last.Question[0] {
				break
			}
			got = d.Data
		}
		end()
		if got == nil {
			return
		}
		m := mustUnpack(t, got)
		if !m.Response || len(raw) < headerSize || m.Id != binary.BigEndian.Uint16(raw) || len(got) > 2*dns.MinMsgSize {
			t.Errorf("%x is the answer to %x", got, raw)
		}

		p := newPending()
		p.head = frame(raw)
		flow := flowTo("10.0.0.53:53")
		flow.Dst.Network = "tcp"
		go h.HandleStream(t.Context(), flow, p)
		answer, err := readMessage(bufio.NewReader(p.ours))
		if err != nil || binary.BigEndian.Uint16(answer) != binary.BigEndian.Uint16(got) {
			t.Errorf("over TCP: %x, %v", answer, err)
		}
		p.ours.Close()
		<-p.done
	})
}

// FuzzAnswer has a resolver answer with any bytes, by datagram and then in a stream: the client gets an answer to
// what it asked.
func FuzzAnswer(f *testing.F) {
	seedMessages(f)
	f.Add(bytes.Repeat([]byte{0x80}, 4000))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if len(raw) > 65535 {
			return
		}
		h := hijack(t, nil)
		h.Router = proxy.Static{Dialer: garbling{raw}}
		q := newQuestion("example.com.", dns.TypeTXT)
		c := newClient()
		c.send("10.0.0.53:53", mustPack(t, q))
		end := serve(t, h, c, "10.0.0.53:53")
		got := c.next(t).Data
		end()
		if binary.BigEndian.Uint16(got) != q.Id || got[2]&0x80 == 0 || len(got) > dns.MinMsgSize {
			t.Errorf("%x is the answer where the resolver says %x", got, raw)
		}
	})
}

// garbling is a way to a resolver whose answers are a fixed text behind the question's ID.
type garbling struct{ answer []byte }

func (g garbling) reply(q []byte) []byte {
	b := bytes.Clone(g.answer)
	copy(b, q[:2])
	return b
}

func (g garbling) DialPackets(context.Context, proxy.Addr) (relay.PacketConn, error) {
	return &garblingConn{client: newClient(), g: g, answers: make(chan datagram, 1)}, nil
}

// garblingConn answers once, and is closed then: there is no wait for more.
type garblingConn struct {
	*client
	g       garbling
	answers chan datagram
}

func (c *garblingConn) WritePacket(p *relay.Packet) error {
	c.answers <- datagram{p.Endpoint, c.g.reply(p.Data)}
	close(c.answers)
	return nil
}

func (c *garblingConn) ReadPacket(p *relay.Packet) error {
	select {
	case d, ok := <-c.answers:
		if !ok {
			return net.ErrClosed
		}
		copy(p.Grow(len(d.Data)), d.Data)
		p.Endpoint = d.Endpoint
		return nil
	case <-c.over:
		return net.ErrClosed
	}
}

func (g garbling) DialStream(context.Context, proxy.Addr) (net.Conn, error) {
	ours, theirs := net.Pipe()
	go g.serve(theirs)
	return ours, nil
}

func (g garbling) serve(c net.Conn) {
	defer c.Close()
	if q, err := readMessage(bufio.NewReader(c)); err == nil {
		c.Write(frame(g.reply(q)))
	}
}
