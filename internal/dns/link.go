package dns

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"

	"github.com/miekg/dns"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

// link is one way to the resolver: a session of datagrams, or a stream. Any number of questions are under way on it,
// with IDs of its own.
type link struct {
	u       *upstream
	network string // "udp" or "tcp"
	inbound string // for the router

	ctx    context.Context // ends with the link
	cancel context.CancelFunc
	queue  chan []byte // to be sent; never full, as it has place for all that wait
	done   chan struct{}

	mu      sync.Mutex
	waiting map[uint16]*waiting
	total   int  // questions so far
	heard   int  // answers so far
	retired bool // takes no more questions, and ends when none waits
	ended   bool
}

// waiting is a question that waits for its answer.
type waiting struct {
	id     uint16 // on the link
	q      *question
	heard  int         // of the link, when it was asked
	result chan result // has place for one
	again  bool        // the link has ended, and may have been old; set before the result
}

type result struct {
	answer []byte
	err    error
}

var errLinkOver = errors.New("dns: the way to the resolver has ended")

func newLink(u *upstream, network, inbound string) *link {
	l := &link{
		u: u, network: network, inbound: inbound,
		queue:   make(chan []byte, questionsMax),
		done:    make(chan struct{}),
		waiting: make(map[uint16]*waiting),
	}
	l.ctx, l.cancel = context.WithCancel(u.h.ctx)
	return l
}

// questions returns how many wait, and whether the link takes more.
func (l *link) questions() (n int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.waiting), !l.ended && !l.retired && len(l.waiting) < questionsMax
}

// put asks q, and returns nil where the link takes no more, or has taken most questions; 0: any number.
func (l *link) put(q *question, most int) *waiting {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended || l.retired || len(l.waiting) >= questionsMax || most > 0 && l.total >= most {
		return nil
	}
	w := &waiting{q: q, heard: l.heard, result: make(chan result, 1)}
	for taken := true; taken; {
		var id [2]byte
		rand.Read(id[:])
		w.id = binary.BigEndian.Uint16(id[:])
		_, taken = l.waiting[w.id]
	}
	msg := append([]byte(nil), q.raw...)
	binary.BigEndian.PutUint16(msg, w.id)
	select {
	case l.queue <- msg:
	default:
		return nil // those who gave up left their questions there
	}
	l.waiting[w.id] = w
	l.total++
	return w
}

// wait returns the answer to w, with the ID of the client's question.
func (l *link) wait(ctx context.Context, w *waiting) ([]byte, error) {
	select {
	case r := <-w.result:
		return r.answer, r.err
	case <-ctx.Done():
	}
	l.mu.Lock()
	if l.waiting[w.id] == w {
		delete(l.waiting, w.id)
	}
	silent := l.heard == w.heard
	l.mu.Unlock()
	if silent && errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
		l.retire() // it may be dead
	} else {
		l.endIfIdle()
	}
	return nil, fmt.Errorf("dns: no answer over %s: %w", l.network, context.Cause(ctx))
}

// retire has the link end when nothing waits any more.
func (l *link) retire() {
	l.mu.Lock()
	l.retired = true
	l.mu.Unlock()
	l.endIfIdle()
}

func (l *link) endIfIdle() {
	l.mu.Lock()
	idle := l.retired && len(l.waiting) == 0
	l.mu.Unlock()
	if idle {
		l.end(errLinkOver)
	}
}

// end ends the link: what waits fails with err.
func (l *link) end(err error) {
	l.mu.Lock()
	l.ended = true
	old := l.heard > 0
	l.mu.Unlock()
	l.fail(err, old)
	l.cancel()
}

// fail ends all that waits.
func (l *link) fail(err error, again bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, w := range l.waiting {
		w.again = again
		w.result <- result{err: err}
		delete(l.waiting, id)
	}
}

// failOne ends what waits under an ID.
func (l *link) failOne(id uint16, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if w := l.waiting[id]; w != nil {
		w.result <- result{err: err}
		delete(l.waiting, id)
	}
}

// run dials, and receives until the link's end.
func (l *link) run() {
	defer close(l.done)
	defer l.u.forget(l)
	defer l.u.h.recovered()
	defer l.end(errLinkOver) // after a panic
	c, err := l.dial()
	if err != nil {
		l.end(err)
		return
	}
	stop := context.AfterFunc(l.ctx, func() { c.Close() })
	var sender sync.WaitGroup
	sender.Go(func() { l.send(c) })
	l.end(l.receive(c))
	stop()
	c.Close()
	sender.Wait()
}

// messages is a conn that carries DNS messages.
type messages interface {
	send(msg []byte) error
	receive() ([]byte, error) // the message is the caller's
	Close() error
}

// dial opens the way to the resolver.
func (l *link) dial() (messages, error) {
	h := l.u.h
	ctx, cancel := context.WithTimeoutCause(l.ctx, h.timeout(), context.DeadlineExceeded)
	defer cancel()
	dst := proxy.Addr{Network: l.network, Host: h.Resolver.Host, Port: h.Resolver.Port}
	name, d := h.Router.Route(proxy.Flow{Inbound: l.inbound, Dst: dst})
	if l.network == "tcp" {
		c, err := d.DialStream(ctx, dst)
		if err != nil {
			return nil, err
		}
		return &streamMessages{Conn: c, r: bufio.NewReader(c)}, nil
	}
	p, ok := d.(proxy.PacketDialer)
	if !ok {
		return nil, fmt.Errorf("dns: %s carries no datagrams: %w", name, errors.ErrUnsupported)
	}
	c, err := p.DialPackets(ctx, dst)
	if err != nil {
		return nil, err
	}
	return &packetMessages{PacketConn: c, to: dst.Endpoint()}, nil
}

// send sends what is queued.
func (l *link) send(c messages) {
	for {
		select {
		case <-l.ctx.Done():
			return
		case msg := <-l.queue:
			err := c.send(msg)
			switch {
			case err == nil:
			case l.network == "tcp" || errors.Is(err, net.ErrClosed):
				l.end(err)
				return
			default:
				l.failOne(binary.BigEndian.Uint16(msg), err)
			}
		}
	}
}

// receive takes answers until there are no more, and returns why.
func (l *link) receive(c messages) error {
	for {
		msg, err := c.receive()
		if err == nil {
			l.answer(msg)
			l.endIfIdle()
		} else if unreachable, ok := errors.AsType[*relay.UnreachableError](err); ok {
			l.fail(unreachable, false)
		} else {
			return err
		}
	}
}

// answer gives an answer to who waits for it. What nobody waits for, or is no answer to the question that has its ID,
// is dropped.
func (l *link) answer(msg []byte) {
	if len(msg) < headerSize || msg[2]&0x80 == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	w := l.waiting[binary.BigEndian.Uint16(msg)]
	if w == nil || !answers(msg, w.q.msg.Question[0]) {
		return
	}
	l.heard++
	delete(l.waiting, w.id)
	binary.BigEndian.PutUint16(msg, w.q.msg.Id)
	w.result <- result{answer: msg}
}

// answers says whether msg is about q. Failures may leave the question out.
func answers(msg []byte, q dns.Question) bool {
	if binary.BigEndian.Uint16(msg[4:]) == 0 {
		return msg[3]&0xf != dns.RcodeSuccess
	}
	name, end, err := dns.UnpackDomainName(msg, headerSize)
	return err == nil && len(msg) >= end+4 && strings.EqualFold(name, q.Name) &&
		binary.BigEndian.Uint16(msg[end:]) == q.Qtype && binary.BigEndian.Uint16(msg[end+2:]) == q.Qclass
}

// streamMessages is DNS over TCP.
type streamMessages struct {
	net.Conn
	r *bufio.Reader
}

func (c *streamMessages) send(msg []byte) error {
	_, err := c.Write(frame(msg))
	return err
}

func (c *streamMessages) receive() ([]byte, error) { return readMessage(c.r) }

// packetMessages is DNS over UDP.
type packetMessages struct {
	relay.PacketConn
	to relay.Endpoint
}

func (c *packetMessages) send(msg []byte) error {
	return c.WritePacket(&relay.Packet{Endpoint: c.to, Data: msg})
}

// receive drops what is not from the resolver, as far as that can be told: where it has a name, any address may be
// its.
func (c *packetMessages) receive() ([]byte, error) {
	var p relay.Packet
	defer p.Free()
	for {
		if err := c.ReadPacket(&p); err != nil {
			return nil, err
		}
		if p.Endpoint.SamePlace(c.to) || p.Endpoint.Port == c.to.Port && (p.Endpoint.Name != "" || c.to.Name != "") {
			return append([]byte(nil), p.Data...), nil
		}
	}
}
