package dns

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
)

const (
	streamsMax      = 8               // to the resolver; some answer the questions of one in turn
	rotateAfter     = 256             // questions over one session of datagrams, whose port may be guessed
	datagramsWait   = 2 * time.Second // before a question is asked over TCP, too
	noDatagramsTime = time.Minute     // before datagrams are tried again
)

// upstream asks the resolver. The links to it are shared by all flows, and are there while there are flows.
type upstream struct {
	h *Handler

	mu      sync.Mutex
	flows   int
	links   []*link   // all whose goroutines run
	udp     *link     // the one for new questions
	tcpOnly time.Time // no datagrams before
}

// acquire announces a flow of questions.
func (u *upstream) acquire() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.flows++
}

// release ends a flow, all of whose questions are over. With the last the links end.
func (u *upstream) release() {
	u.mu.Lock()
	u.flows--
	var links []*link
	if u.flows == 0 {
		links, u.links, u.udp = u.links, nil, nil
	}
	u.mu.Unlock()
	for _, l := range links {
		l.end(errLinkOver)
	}
	for _, l := range links {
		<-l.done
	}
}

// ask returns the resolver's answer to q, with q's ID.
func (u *upstream) ask(ctx context.Context, f proxy.Flow, q *question, network string) ([]byte, error) {
	if !u.h.asksResolver() {
		return nil, errNoResolver
	}
	if network != "udp" || u.isTCPOnly() {
		return u.overTCP(ctx, f, q)
	}
	answer, err := u.overUDP(ctx, f, q)
	if err == nil || ctx.Err() != nil {
		return answer, err
	}
	answer, tcpErr := u.overTCP(ctx, f, q)
	switch {
	case tcpErr == nil:
		u.useTCP(err)
	case errors.Is(err, errors.ErrUnsupported):
		return nil, tcpErr
	default:
		return nil, fmt.Errorf("%w; over TCP: %w", err, tcpErr)
	}
	return answer, nil
}

func (u *upstream) isTCPOnly() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return time.Now().Before(u.tcpOnly)
}

// useTCP remembers that TCP did what datagrams could not.
func (u *upstream) useTCP(err error) {
	u.mu.Lock()
	first := u.tcpOnly.IsZero()
	u.tcpOnly = time.Now().Add(noDatagramsTime)
	u.mu.Unlock()
	if first {
		u.h.log.Info("datagrams do not reach the resolver: asking it over TCP", "resolver", u.h.Resolver.HostPort(),
			"reason", proxy.ReasonOf(err), "err", err)
	}
}

// overUDP asks by datagram. It gives up while there is time to ask over TCP.
func (u *upstream) overUDP(ctx context.Context, f proxy.Flow, q *question) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, min(datagramsWait, u.h.timeout()/2), context.DeadlineExceeded)
	defer cancel()
	return u.over(ctx, f, q, u.datagrams)
}

func (u *upstream) overTCP(ctx context.Context, f proxy.Flow, q *question) ([]byte, error) {
	return u.over(ctx, f, q, u.stream)
}

// tries is how often a question is asked whose link ends, as a server may end any at any time (RFC 7766 section
// 6.2.4).
const tries = 3

// over asks by a link that choose returns.
func (u *upstream) over(ctx context.Context, f proxy.Flow, q *question,
	choose func(proxy.Flow, *question) (*link, *waiting)) (answer []byte, err error) {
	for range tries {
		l, w := choose(f, q)
		answer, err = l.wait(ctx, w)
		if err == nil || ctx.Err() != nil || !w.again {
			break
		}
	}
	return answer, err
}

// datagrams puts q to the link for datagrams.
func (u *upstream) datagrams(f proxy.Flow, q *question) (*link, *waiting) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.udp != nil {
		if w := u.udp.put(q, rotateAfter); w != nil {
			return u.udp, w
		}
		u.udp.retire()
	}
	l, w := u.open("udp", f, q)
	u.udp = l
	return l, w
}

// stream puts q to the stream with the fewest questions, or to a new one rather than behind others.
func (u *upstream) stream(f proxy.Flow, q *question) (*link, *waiting) {
	u.mu.Lock()
	defer u.mu.Unlock()
	var least *link
	streams, fewest := 0, 0
	for _, l := range u.links {
		n, ok := l.questions()
		if l.network != "tcp" || !ok {
			continue
		}
		if streams++; least == nil || n < fewest {
			least, fewest = l, n
		}
	}
	if least != nil && (fewest == 0 || streams >= streamsMax) {
		if w := least.put(q, 0); w != nil {
			return least, w
		}
	}
	return u.open("tcp", f, q)
}

// open starts a link, and puts its first question to it. The lock is held.
func (u *upstream) open(network string, f proxy.Flow, q *question) (*link, *waiting) {
	l := newLink(u, network, f.Inbound)
	u.links = append(u.links, l)
	w := l.put(q, 0)
	go l.run()
	return l, w
}

// forget takes a link out whose goroutine ends.
func (u *upstream) forget(l *link) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if i := slices.Index(u.links, l); i >= 0 {
		u.links = slices.Delete(u.links, i, i+1)
	}
	if u.udp == l {
		u.udp = nil
	}
}
