package dns

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strings"

	"github.com/miekg/dns"
)

// The sizes of datagrams.
const (
	headerSize = 12
	plainSize  = 512  // what an answer may have that is not told otherwise, RFC 1035 section 4.2.1
	ownSize    = 1232 // what we say that we take
)

// fakeTTL is how long, in seconds, a program may keep a fake address, which may come to stand for another name.
const fakeTTL = 1

// question is a message from a client.
type question struct {
	raw []byte
	msg *dns.Msg
}

// parse reads a message from a client. Where it is nothing to be answered both are nil; where it is wrong there is an
// answer that says so.
func parse(raw []byte) (*question, *dns.Msg) {
	if len(raw) < headerSize || raw[2]&0x80 != 0 {
		return nil, nil // an answer, or noise
	}
	q := &question{raw: raw, msg: new(dns.Msg)}
	if q.msg.Unpack(raw) != nil {
		bad := new(dns.Msg)
		bad.Id = binary.BigEndian.Uint16(raw)
		bad.Opcode = int(raw[2]>>3) & 0xf
		bad.Response, bad.RecursionAvailable, bad.Rcode = true, true, dns.RcodeFormatError
		return nil, bad
	}
	switch m := q.msg; {
	case m.Opcode != dns.OpcodeQuery:
		return nil, q.refusal(dns.RcodeNotImplemented)
	case len(m.Question) != 1:
		return nil, q.refusal(dns.RcodeFormatError)
	case m.Question[0].Qtype == dns.TypeAXFR || m.Question[0].Qtype == dns.TypeIXFR:
		return nil, q.refusal(dns.RcodeRefused) // the answer would be more than one message
	}
	return q, nil
}

// refusal returns an answer without records.
func (q *question) refusal(rcode int) *dns.Msg {
	m := new(dns.Msg)
	m.SetRcode(q.msg, rcode) // takes the ID, and the first question as it was written
	m.RecursionAvailable, m.Compress = true, true
	if opt := q.msg.IsEdns0(); opt != nil {
		m.SetEdns0(ownSize, opt.Do())
	}
	return m
}

// size is how large an answer in a datagram may be.
func (q *question) size() int {
	if opt := q.msg.IsEdns0(); opt != nil {
		return max(plainSize, int(opt.UDPSize()))
	}
	return plainSize
}

// fit returns an answer of at most so many bytes, which says that it is truncated where it had to be.
func fit(answer []byte, size int) []byte {
	if len(answer) <= size {
		return answer
	}
	var m dns.Msg
	if m.Unpack(answer) == nil {
		m.Compress = true
		m.Truncate(size)
		if b, err := m.Pack(); err == nil && len(b) <= size {
			return b
		}
	}
	return headerOf(answer, 0x02)
}

// headerOf returns the header of a message alone, with flags added to its third byte.
func headerOf(msg []byte, flags byte) []byte {
	b := make([]byte, headerSize)
	copy(b, msg[:4])
	b[2] |= flags
	return b
}

// fake returns the answer to q, which the client asks, that needs no resolver; or nil.
func (h *Handler) fake(q *question, client netip.AddrPort) *dns.Msg {
	if opt := q.msg.IsEdns0(); opt != nil && opt.Version() != 0 {
		return q.refusal(dns.RcodeBadVers)
	}
	asked := q.msg.Question[0]
	if asked.Qclass != dns.ClassINET {
		return nil
	}
	switch asked.Qtype {
	case dns.TypeA, dns.TypeAAAA, dns.TypeANY, dns.TypeHTTPS, dns.TypeSVCB:
		return h.fakeHost(q, asked, client)
	case dns.TypePTR:
		return h.fakeReverse(q, asked)
	}
	return nil
}

// fakeHost answers for a name's addresses. HTTPS and SVCB records would hold addresses and keys that go past the
// name's: there are none.
func (h *Handler) fakeHost(q *question, asked dns.Question, client netip.AddrPort) *dns.Msg {
	m := q.refusal(dns.RcodeSuccess)
	name, ok := hostName(asked.Name)
	last := name[strings.LastIndexByte(name, '.')+1:]
	var ip4, ip6 netip.Addr
	switch {
	case last == "localhost": // RFC 6761 section 6.3
		ip4, ip6 = netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()
	case asked.Name == "." || last == "arpa": // the latter for NAT64, which is not to be inferred (RFC 7050)
		return m
	case !ok, last == "invalid", strings.Trim(last, "0123456789") == "", name == canary:
		m.Rcode = dns.RcodeNameError
		return m
	case asked.Qtype == dns.TypeHTTPS || asked.Qtype == dns.TypeSVCB:
		return m
	default:
		i, err := h.names.number(name, client)
		if err != nil {
			if h.full.begins() {
				h.log.Warn("a name got no address", "err", err, "name", name, "client", client.Addr(),
					"hint", "an address is used again only when it was not used for "+nameKept.String())
			}
			m.Rcode = dns.RcodeServerFailure
			return m
		}
		ip4 = fakeIP4(i)
		if !h.NoIPv6 {
			ip6 = fakeIP6(i)
		}
	}
	header := dns.RR_Header{Name: asked.Name, Class: dns.ClassINET, Ttl: fakeTTL}
	if asked.Qtype == dns.TypeA || asked.Qtype == dns.TypeANY {
		header.Rrtype = dns.TypeA
		m.Answer = append(m.Answer, &dns.A{Hdr: header, A: net.IP(ip4.AsSlice())})
	}
	if (asked.Qtype == dns.TypeAAAA || asked.Qtype == dns.TypeANY) && ip6.IsValid() {
		header.Rrtype = dns.TypeAAAA
		m.Answer = append(m.Answer, &dns.AAAA{Hdr: header, AAAA: net.IP(ip6.AsSlice())})
	}
	return m
}

// canary is the name by whose absence Firefox knows that it is not to ask servers of its own.
const canary = "use-application-dns.net"

// hostName returns a name as proxies take it: in lower case, without the last dot. It says whether it can be a
// host's; names of DNS may hold any byte.
func hostName(s string) (string, bool) {
	s = strings.ToLower(strings.TrimSuffix(s, "."))
	if s == "" || len(s) > 253 {
		return s, false
	}
	for _, c := range []byte(s) {
		if !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '.') {
			return s, false
		}
	}
	return s, true
}

// fakeReverse answers for the names of fake addresses.
func (h *Handler) fakeReverse(q *question, asked dns.Question) *dns.Msg {
	ip := reverseIP(asked.Name)
	if !isFake(ip) {
		return nil
	}
	name, ok := h.names.peek(ip)
	if !ok {
		return q.refusal(dns.RcodeNameError)
	}
	m := q.refusal(dns.RcodeSuccess)
	header := dns.RR_Header{Name: asked.Name, Rrtype: dns.TypePTR, Class: dns.ClassINET, Ttl: fakeTTL}
	m.Answer = []dns.RR{&dns.PTR{Hdr: header, Ptr: name + "."}}
	return m
}

// reverseIP returns the address that a name below in-addr.arpa or ip6.arpa stands for; the zero Addr for others.
func reverseIP(name string) netip.Addr {
	name = strings.ToLower(name)
	if s, ok := strings.CutSuffix(name, ".in-addr.arpa."); ok {
		parts := strings.Split(s, ".")
		if len(parts) != 4 {
			return netip.Addr{}
		}
		ip, _ := netip.ParseAddr(parts[3] + "." + parts[2] + "." + parts[1] + "." + parts[0])
		return ip
	}
	s, ok := strings.CutSuffix(name, ".ip6.arpa.")
	if !ok || len(s) != 63 {
		return netip.Addr{}
	}
	var b strings.Builder // the digits come last first, with dots between
	for i := len(s) - 1; i >= 0; i -= 2 {
		if b.Len()%5 == 4 {
			b.WriteByte(':')
		}
		b.WriteByte(s[i])
	}
	ip, _ := netip.ParseAddr(b.String())
	return ip
}

// withoutResolver answers what only a resolver could: that there is nothing, which programs take better than a
// failure.
func (q *question) withoutResolver() *dns.Msg {
	switch asked := q.msg.Question[0]; {
	case asked.Qclass != dns.ClassINET:
		return q.refusal(dns.RcodeNotImplemented)
	case asked.Qtype == dns.TypePTR:
		return q.refusal(dns.RcodeNameError)
	}
	return q.refusal(dns.RcodeSuccess)
}
