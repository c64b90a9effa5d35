// Package dns answers the DNS questions of programs whose traffic is taken as packets or redirected, so that the
// names they ask for go the way of their traffic.
//
// A program that uses a proxy gives it a name. One that does not know of the proxy asks a name server first, and then
// connects to an address: what the proxy sees has no name any more, and the question may have gone a way that cannot
// answer it, or that was not to see it. A [Handler] stands between an inbound and the engine, takes the flows to
// port 53, and does one of two things.
//
// With [Fake] no question for an address leaves the machine: each name gets an address of its own out of a range
// that is used for nothing else, and a flow to that address becomes a flow to the name. So the last hop resolves it.
//
// With [Hijack] all questions go to one resolver, whoever was asked, by the way out that the router chooses for it.
// Where that carries no datagrams, they go over TCP. Names are resolved there, and flows go to addresses, as
// without a proxy.
package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
)

// Port is the port that flows to are taken for DNS, over UDP and TCP.
const Port = 53

// DefaultTimeout is how long a question may take; then the answer is SERVFAIL.
const DefaultTimeout = proxy.DefaultDialTimeout

// Mode is what becomes of DNS questions.
type Mode uint8

// The modes.
const (
	Fake   Mode = iota // addresses that stand for names
	Hijack             // to the Resolver
	Off                // nothing: they are flows like others
)

// ParseMode reads a setting: "fake", "fake,RESOLVER", "RESOLVER" (which is [Hijack]), or "off". A resolver is an IP
// address, with port 53 unless it says another: "1.1.1.1", "10.0.0.1:5353", "2606:4700:4700::1111", "[::1]:5353".
// The empty setting is "fake".
func ParseMode(s string) (Mode, proxy.Addr, error) {
	mode, word := Hijack, s
	switch kind, rest, more := strings.Cut(s, ","); {
	case s == "" || s == "fake":
		return Fake, proxy.Addr{}, nil
	case s == "off":
		return Off, proxy.Addr{}, nil
	case more && kind == "fake":
		mode, word = Fake, rest
	}
	ap, err := netip.ParseAddrPort(word)
	if ip, ipErr := netip.ParseAddr(word); ipErr == nil {
		ap, err = netip.AddrPortFrom(ip, Port), nil
	}
	if err != nil || ap.Port() == 0 || ap.Addr().IsUnspecified() {
		return 0, proxy.Addr{}, fmt.Errorf("dns: %q is neither fake, off, nor the IP address of a resolver", s)
	}
	return mode, proxy.UDP(ap.Addr().Unmap().String(), ap.Port()), nil
}

// Handler is a [proxy.Handler] that answers DNS questions, and hands all else on. Set its fields before the first
// flow. It must not be copied, and serves one inbound.
type Handler struct {
	Next proxy.Handler // takes the other flows
	Mode Mode

	// Resolver is asked in Hijack. In Fake it may be zero: then only what needs none is answered.
	Resolver proxy.Addr
	// Router chooses the way to the Resolver, by a Flow without a client: the questions of all share it.
	// nil: none is asked.
	Router proxy.Router

	NoIPv6  bool          // Fake: names have no IPv6 address, for clients that have no way to one
	Timeout time.Duration // for a question; 0: DefaultTimeout
	Log     *slog.Logger  // nil: silent

	once  sync.Once
	log   *slog.Logger
	ctx   context.Context // ends with Abort
	abort context.CancelFunc
	slots chan struct{} // questions that the resolver is asked, at a time
	names names
	up    upstream

	queued atomic.Int64 // bytes in the queues of all lanes
	lanes  atomic.Int64 // of all sessions, but for one of each

	unknown, crowded, full, failing, scattered episode
}

var _ proxy.NowHandler = (*Handler)(nil)

// questionsMax is how many questions wait for the resolver at a time. More are dropped, or for a stream not read.
const questionsMax = 1024

func (h *Handler) begin() {
	h.once.Do(func() {
		h.ctx, h.abort = context.WithCancel(context.Background())
		h.slots = make(chan struct{}, questionsMax)
		h.log = h.Log
		if h.log == nil {
			h.log = slog.New(slog.DiscardHandler)
		}
		h.up.h = h
	})
}

// Abort ends the DNS flows and answers no further question. Call it when the inbound is closed: who cannot connect
// any more needs no names. Flows to names go on. It does not wait.
func (h *Handler) Abort() {
	h.begin()
	h.abort()
}

// NameOf returns the name that the address ip stands for, if it does.
func (h *Handler) NameOf(ip netip.Addr) (name string, ok bool) {
	if h.Mode != Fake {
		return "", false
	}
	return h.names.lookup(ip, netip.AddrPort{})
}

// HandleStream implements [proxy.Handler]. In Fake, a stream to port 53 is accepted, and its questions answered; in
// Hijack it goes to the resolver as it is.
func (h *Handler) HandleStream(ctx context.Context, f proxy.Flow, p proxy.Pending) {
	h.begin()
	switch f, kind := h.translate(f, p); kind {
	case isDNS:
		h.serveStream(ctx, f, p)
	case isUnknown:
		p.Reject(h.unknownAddress(f.Dst.IP()))
		p.Done()
	default:
		h.Next.HandleStream(ctx, f, p)
	}
}

// HandleStreamNow implements [proxy.NowHandler]: it takes what Next takes, and leaves DNS to HandleStream.
func (h *Handler) HandleStreamNow(ctx context.Context, f proxy.Flow, p proxy.Pending) bool {
	h.begin()
	next, ok := h.Next.(proxy.NowHandler)
	if !ok {
		return false
	}
	f, kind := h.translate(f, p)
	return kind == isOther && next.HandleStreamNow(ctx, f, p)
}

// kind is what a flow or datagram is.
type kind uint8

const (
	isOther   kind = iota // for Next
	isDNS                 // questions, to be answered here
	isUnknown             // to a fake address that stands for no name
)

// translate returns f as Next is to see it.
func (h *Handler) translate(f proxy.Flow, p proxy.Pending) (proxy.Flow, kind) {
	if _, awaits := p.(proxy.Expectant); awaits || h.Mode == Off {
		return f, isOther
	}
	if f.Dst.Port == Port {
		if h.Mode == Fake {
			return f, isDNS
		}
		f.Dst = proxy.TCP(h.Resolver.Host, h.Resolver.Port)
		return f, isOther
	}
	if h.Mode != Fake || !isFake(f.Dst.IP()) {
		return f, isOther
	}
	name, ok := h.names.lookup(f.Dst.IP(), f.Client)
	if !ok {
		return f, isUnknown
	}
	f.Dst.Host = name
	return f, isOther
}

// errUnknown is why a flow to a fake address is refused that no name has.
var errUnknown = &unknownError{}

type unknownError struct{}

func (*unknownError) Error() string        { return "dns: the address stands for no name" }
func (*unknownError) Is(target error) bool { return target == syscall.EHOSTUNREACH }

// unknownAddress returns the error for a flow to ip, and logs it.
func (h *Handler) unknownAddress(ip netip.Addr) error {
	if h.unknown.begins() {
		h.log.Warn("refused flows to an address that stands for no name",
			"addr", ip,
			"hint", "the program has kept it from an earlier run, or for very long; it is to resolve the name again")
	}
	return errUnknown
}

// An episode is a time of trouble, which is logged once: when it begins.
type episode struct {
	mu   sync.Mutex
	last time.Time
}

// episodeGap is how long it must have been quiet for trouble to be a new episode.
const episodeGap = 10 * time.Second

// begins is called at each trouble and says whether a new episode begins with it.
func (e *episode) begins() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	defer func() { e.last = now }()
	return e.last.IsZero() || now.Sub(e.last) >= episodeGap
}

func (h *Handler) timeout() time.Duration {
	if h.Timeout == 0 {
		return DefaultTimeout
	}
	return h.Timeout
}

// recovered is deferred by goroutines of this package: a panic costs one session, as one in an inbound's does.
func (h *Handler) recovered() {
	if v := recover(); v != nil {
		h.log.Error("panic in a session of names", "panic", v, "stack", string(debug.Stack()))
	}
}

// asksResolver says whether there is one to ask.
func (h *Handler) asksResolver() bool { return h.Router != nil && h.Resolver != proxy.Addr{} }

var errNoResolver = fmt.Errorf("dns: no resolver is set: %w", errors.ErrUnsupported)
