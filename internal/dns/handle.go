package dns

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/miekg/dns"

	"github.com/sluice-proxy/sluice/internal/proxy"
)

// now returns the answer to q, which the client asks, that needs no waiting; nil where the resolver is to be asked.
func (h *Handler) now(q *question, client netip.AddrPort) []byte {
	if h.Mode == Fake {
		if m := h.fake(q, client); m != nil {
			return pack(m)
		}
		if !h.asksResolver() {
			return pack(q.withoutResolver())
		}
	}
	return nil
}

// enter takes one of the slots for questions to the resolver. Where there is none it waits, if it may: a datagram is
// lost rather than kept.
func (h *Handler) enter(ctx context.Context, wait bool) bool {
	select {
	case h.slots <- struct{}{}:
		return true
	default:
	}
	if h.crowded.begins() {
		h.log.Warn("too many DNS questions wait for the resolver", "most", questionsMax, "resolver", h.Resolver.HostPort())
	}
	if !wait {
		return false
	}
	select {
	case h.slots <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

func (h *Handler) leave() { <-h.slots }

// resolve returns the resolver's answer to q, or SERVFAIL; nil if ctx ended.
func (h *Handler) resolve(ctx context.Context, f proxy.Flow, q *question, network string) []byte {
	asking, cancel := context.WithTimeoutCause(ctx, h.timeout(), context.DeadlineExceeded)
	defer cancel()
	answer, err := h.up.ask(asking, f, q, network)
	switch {
	case err == nil && network == "udp":
		return fit(answer, q.size())
	case err == nil:
		return answer
	case ctx.Err() != nil || h.ctx.Err() != nil:
		return nil
	}
	if h.failing.begins() {
		h.log.Warn("the resolver did not answer", "resolver", h.Resolver.HostPort(),
			"reason", proxy.ReasonOf(err), "err", fmt.Errorf("dns: %w", err))
	}
	return pack(q.refusal(dns.RcodeServerFailure))
}

// pack returns m's bytes. There are always some: m has at most what was parsed, or is made here.
func pack(m *dns.Msg) []byte {
	b, err := m.Pack()
	if err != nil { // a question that cannot be written as it was read
		m.Question, m.Answer, m.Extra, m.Rcode = nil, nil, nil, dns.RcodeServerFailure
		b, _ = m.Pack()
	}
	return b
}
