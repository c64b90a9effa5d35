package route

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/gaissmai/bart"

	"github.com/sluice-proxy/sluice/internal/proxy"
)

// Targets is a set of destination hosts: networks, and names. The zero value is empty. Adding is not for several
// goroutines at a time.
//
//	10.0.0.0/8      the addresses of a network
//	192.0.2.7       one address
//	example.com     this name and no other
//	.example.com    this name and all below it
//	*.example.com   all names below it
//
// Names are compared without regard to case and to a dot at their end. Nothing is resolved: a network
// does not hold a name that resolves to one of its addresses, and a name does not hold the address that it
// resolves to. A host that is an IPv4 address in a form that only the C library knows (127.1, 0x7f000001) is
// that address. The unspecified address, 0.0.0.0 or ::, is loopback as well, since who connects to it comes there.
type Targets struct {
	networks bart.Lite
	names    map[string]scope
	size     int
}

// scope says which names an entry stands for.
type scope uint8

const (
	itself     scope = 1 << iota // the name
	underneath                   // the names below it
)

// Size returns how many entries were added.
func (t *Targets) Size() int { return t.size }

// Add adds what s says.
func (t *Targets) Add(s string) error { return t.add(strings.ToLower(s)) }

func (t *Targets) add(s string) error {
	if p, ok, err := parseNetwork(s); ok {
		if err == nil {
			t.networks.Insert(p)
			t.size++
		}
		return err
	}
	name, what := s, itself
	if rest, ok := strings.CutPrefix(s, "*."); ok {
		name, what = rest, underneath
	} else if rest, ok := strings.CutPrefix(s, "."); ok {
		name, what = rest, itself|underneath
	}
	name = strings.TrimSuffix(name, ".")
	if err := checkName(s, name); err != nil {
		return err
	}
	if t.names == nil {
		t.names = make(map[string]scope)
	}
	t.names[name] |= what
	t.size++
	return nil
}

// maxListErrors is how many complaints about one list are worth reading.
const maxListErrors = 10

// AddList adds a list: one entry a line, # begins a comment. The errors say place:line, and are all
// that is wrong with it, or the first of many.
func (t *Targets) AddList(place string, data []byte) []error {
	text := strings.ToLower(strings.TrimPrefix(string(data), "\uFEFF"))
	var errs []error
	line, before := 0, t.size
	for text != "" {
		var entry string
		entry, text, _ = strings.Cut(text, "\n")
		line++
		entry, _, _ = strings.Cut(entry, "#")
		if entry = strings.TrimSpace(entry); entry == "" {
			continue
		}
		if err := t.add(entry); err != nil {
			if errs = append(errs, fmt.Errorf("%s:%d: %w", place, line, err)); len(errs) == maxListErrors {
				errs = append(errs, fmt.Errorf("%s: more lines may be wrong", place))
				break
			}
		}
	}
	if len(errs) == 0 && t.size == before {
		errs = append(errs, fmt.Errorf("%s: nothing in it", place))
	}
	return errs
}

// Contains says whether the host is in t: an IP address or a name.
func (t *Targets) Contains(name string) bool {
	var h host
	h.set(proxy.TCP(name, 0))
	return t.contains(&h)
}

func (t *Targets) contains(h *host) bool {
	if h.ip.IsValid() {
		return t.networks.Contains(h.ip) || h.ip.IsUnspecified() && t.networks.Contains(loopback(h.ip))
	}
	if len(t.names) == 0 {
		return false
	}
	name := h.name[:h.length]
	if t.names[string(name)]&itself != 0 {
		return true
	}
	for i, c := range name {
		if c == '.' && t.names[string(name[i+1:])]&underneath != 0 {
			return true
		}
	}
	return false
}

// loopback returns the loopback address of the family of ip.
func loopback(ip netip.Addr) netip.Addr {
	if ip.Is4() {
		return netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	return netip.IPv6Loopback()
}

// host is a destination in the form that Targets compares.
type host struct {
	ip     netip.Addr // invalid for a name
	name   [255]byte  // in lower case, without the dot at its end
	length int        // 0 for what no entry stands for
}

func (h *host) set(a proxy.Addr) {
	s := a.Host
	if a.Network == "unix" || len(s) > len(h.name)+1 {
		return
	}
	if s = strings.TrimSuffix(s, "."); len(s) > len(h.name) {
		return
	}
	if isNumeric(s) {
		if ip, err := netip.ParseAddr(s); err == nil {
			h.ip = ip.Unmap().WithZone("")
			return
		}
		if h.ip = atonIPv4(s); h.ip.IsValid() {
			return
		}
	}
	for i := range len(s) {
		c := s[i]
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		h.name[i] = c
	}
	h.length = len(s)
}

// isNumeric says whether s may be an IP address. Parsing what cannot be one would allocate an error.
func isNumeric(s string) bool {
	if strings.IndexByte(s, ':') >= 0 {
		return true
	}
	last := s[strings.LastIndexByte(s, '.')+1:]
	return last != "" && '0' <= last[0] && last[0] <= '9'
}

// atonIPv4 reads what inet_aton(3) reads beside the usual form: fewer than four numbers, the last of which fills the
// rest, in octal and hexadecimal as well. A resolver that is the C library's takes them for addresses.
func atonIPv4(s string) netip.Addr {
	var v uint64
	for n := 1; ; n++ {
		part, rest, more := strings.Cut(s, ".")
		if part == "" || strings.IndexByte(part, '_') >= 0 || part[0] == '+' || hasWordPrefix(part) {
			return netip.Addr{}
		}
		x, err := strconv.ParseUint(part, 0, 32)
		switch {
		case err != nil || n > 4 || more && x > 255:
			return netip.Addr{}
		case more:
			v |= x << (8 * (4 - n))
		case x >= 1<<(8*(5-n)):
			return netip.Addr{}
		default:
			v |= x
			return netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)})
		}
		s = rest
	}
}

// hasWordPrefix says whether s is a number in a form of Go that C does not have.
func hasWordPrefix(s string) bool {
	return len(s) > 1 && s[0] == '0' && strings.IndexByte("bBoO", s[1]) >= 0
}

// parseNetwork reads a network or an address. ok says whether s is meant as one.
func parseNetwork(s string) (p netip.Prefix, ok bool, err error) {
	if a, err := netip.ParseAddr(s); err == nil {
		if a.Zone() != "" {
			return p, true, fmt.Errorf("%q: zones cannot be told apart here: leave %%%s out", s, a.Zone())
		}
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), true, nil
	}
	if !strings.Contains(s, "/") || strings.Contains(s, "://") {
		return p, false, nil
	}
	p, err = netip.ParsePrefix(s)
	switch {
	case err != nil:
		return p, true, fmt.Errorf("%q is not a network (as in 10.0.0.0/8)", s)
	case p.Addr().Is4In6():
		return p, true, fmt.Errorf("%q is an IPv4 network in IPv6 form: write it as IPv4", s)
	case p != p.Masked():
		return p, true, fmt.Errorf("%q has bits behind the prefix: write %v, or %v for one address", s, p.Masked(), p.Addr())
	}
	return p, true, nil
}

// checkName says what is wrong with name, which stands in the entry s. The text of an error does not hold all of a long
// entry: it may come from any file.
func checkName(s, name string) error {
	if len(s) > 60 {
		s = s[:57] + "..."
	}
	last := name[strings.LastIndexByte(name, '.')+1:]
	switch {
	case strings.Contains(s, "://"):
		return fmt.Errorf("%q is a URL: write its host alone", s)
	case strings.ContainsAny(s, " \t"):
		return fmt.Errorf("%q is more than one word: a line of a list is one name or network (the names of a hosts file, without addresses)", s)
	case strings.Contains(s, "*"):
		if s == "*" {
			return errors.New(`"*" is everything: leave the condition out`)
		}
		if strings.Contains(name, "*") {
			return fmt.Errorf("%q: a * can only stand for all in front of a name (as in *.example.com)", s)
		}
	case strings.Contains(s, ":"):
		return fmt.Errorf("%q is no name and no IP address (a port has a condition of its own)", s)
	case last != "" && strings.Trim(last, "0123456789") == "" || atonIPv4(name).IsValid():
		return fmt.Errorf("%q is no IP address, and no name ends in a number", s)
	}
	if len(name) > 253 {
		return fmt.Errorf("%q is longer than a name can be", s)
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 {
			return fmt.Errorf("%q is not a name (as in example.com, .example.com, *.example.com)", s)
		}
		for i := range len(label) {
			switch c := label[i]; {
			case c >= 0x80:
				return fmt.Errorf("%q: write names with other than ASCII letters as they are asked for (xn--...)", s)
			case 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_':
			default:
				return fmt.Errorf("%q is not a name (as in example.com, .example.com, *.example.com)", s)
			}
		}
	}
	return nil
}
