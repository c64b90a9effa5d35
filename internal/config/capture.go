package config

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/sluice-proxy/sluice/internal/capture"
	"github.com/sluice-proxy/sluice/internal/dns"
	"github.com/sluice-proxy/sluice/internal/inbound"
	"github.com/sluice-proxy/sluice/internal/proxy"
)

// Source says whose traffic is captured: local (this machine's), an interface's name, or a network.
type Source capture.Source

// UnmarshalText reads a source.
func (s *Source) UnmarshalText(text []byte) error {
	var network Prefix
	word := string(text)
	const longest = 15 // bytes of an interface's name
	switch err := network.UnmarshalText(text); {
	case word == "local":
		*s = Source{}
	case err == nil:
		*s = Source{Network: netip.Prefix(network)}
	case strings.ContainsAny(word, "/:") && strings.Trim(word, "0123456789abcdefABCDEF.:/") == "":
		return err // meant as a network
	case word == "" || len(word) > longest || strings.ContainsAny(word, "/: \t\n\"*"):
		return fmt.Errorf("%q is not local, the name of an interface or a network (as in 10.0.0.0/8)", word)
	default:
		*s = Source{Interface: word}
	}
	return nil
}

// MarshalText writes s as UnmarshalText reads it.
func (s Source) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// String returns the word for s.
func (s Source) String() string {
	switch {
	case s.Interface != "":
		return s.Interface
	case s.Network.IsValid():
		return s.Network.String()
	}
	return "local"
}

// checkCapture complains about what does not fit an inbound whose clients come without their knowledge.
func (in *Inbound) checkCapture(l *errorList, path string) {
	listen := proxy.Addr(in.Listen)
	if listen.Network != "" && listen.Network != "tcp" {
		l.add(path+".listen", "type %s listens at an IP address and port only", in.Type)
		return
	}
	if !in.Setup {
		for key, given := range map[string]bool{"from": len(in.From) > 0, "include": len(in.Include) > 0, "exclude": len(in.Exclude) > 0} {
			if given {
				l.add(path+"."+key, "is about the rules that %s makes, which is not given", l.spell("setup", "true"))
			}
		}
		return
	}
	if in.Type != "redirect" || listen.Network == "" {
		return
	}
	everywhere := listen.Host == "" || listen.IP().IsUnspecified()
	local := len(in.From) == 0
	for i, s := range in.From {
		if capture.Source(s).Local() {
			local = true
		} else if listen.IsLoopback() {
			l.add(fmt.Sprintf("%s.from[%d]", path, i), "traffic from %v is redirected to an address of the interface where it comes in, "+
				"and %v is not one: listen at :%d", s, listen, listen.Port)
		}
	}
	if local && !listen.IsLoopback() && !everywhere {
		l.add(path+".listen", "traffic of this machine is redirected to its loopback address: listen at %d, or at :%[1]d", listen.Port)
	}
}

// captureMark is what the connections are marked with that sluice makes, where an inbound captures traffic that they have to be told
// apart from; 0: none does.
func (c *Config) captureMark() int {
	if slices.ContainsFunc(c.Inbounds, func(in Inbound) bool { return in.Setup }) {
		return capture.Mark
	}
	return 0
}

// capture has the traffic brought to an inbound. Datagrams are only where there is a way out that can carry them: what cannot
// be proxied would otherwise be cut off, and names could not be looked up.
func (b *builder) capture(in *Inbound, part proxy.Inbound, way proxy.Dialer) {
	k := &capture.Capture{Include: prefixes(in.Include), Exclude: prefixes(in.Exclude)}
	for _, s := range in.From {
		k.From = append(k.From, capture.Source(s))
	}
	for i := range b.c.Outbounds {
		if m := b.c.Outbounds[i].Mark; m != 0 {
			k.Marks = append(k.Marks, uint32(m))
		}
	}
	switch p := part.(type) {
	case *inbound.Redirect:
		p.Capture = k
		b.kept = append(b.kept, undone{p})
	case *inbound.TProxy:
		mode, _, _ := dns.ParseMode(string(in.DNS))
		if k.DNS = mode != dns.Off; mode == dns.Fake {
			v4, v6 := dns.Prefixes()
			k.Fake = []netip.Prefix{v4, v6}
		}
		_, carries := way.(proxy.PacketDialer)
		if k.TProxy, k.UDP = true, carries || len(b.rules) > 0; !k.UDP && b.log != nil {
			b.log.Warn("UDP is left alone: the way out cannot carry it", "inbound", in.Name)
		}
		p.Capture, p.Mark = k, capture.Mark
		b.kept = append(b.kept, undone{p})
	}
}

// The captures of these two are set with their routes.

func redirect(_ *Inbound, l inbound.Listener, _ inbound.Users) proxy.Inbound {
	return &inbound.Redirect{Listener: l}
}

func tproxy(_ *Inbound, l inbound.Listener, _ inbound.Users) proxy.Inbound {
	return &inbound.TProxy{Listener: l}
}
