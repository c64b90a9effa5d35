package config

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
)

// maxBusyPoll is where the relay cuts: longer, a sleep costs less than it delays.
const maxBusyPoll = Duration(time.Millisecond)

// Fill sets what was not given to its default and checks the whole. The error joins one [*Error] for
// each thing that is wrong. Load has called it already; it may be called again.
func (c *Config) Fill() error {
	l := errorList{src: &c.src}
	c.fill(&l)
	if len(l.errs) > 0 {
		return l.join()
	}
	return nil
}

// fill is the one place where defaults are set and settings are checked.
func (c *Config) fill(l *errorList) {
	setDefault(&c.Log.Level, "info")
	setDefault(&c.Log.Format, "auto")
	oneOf(l, "log.level", c.Log.Level, LogLevels)
	oneOf(l, "log.format", c.Log.Format, LogFormats)
	setDefault(&c.Idle, DefaultIdle)
	setDefault(&c.HalfOpen, DefaultHalfOpen)
	setDefault(&c.DialTimeout, DefaultDialTimeout)
	setDefault(&c.HandshakeTimeout, DefaultHandshakeTimeout)
	setDefault(&c.Grace, DefaultGrace)
	setDefault(&c.BusyPoll, DefaultBusyPoll)
	if c.DialTimeout < 0 {
		l.add("dial-timeout", "cannot be switched off: a destination that never answers would hold its client for ever")
	}
	if c.HandshakeTimeout < 0 {
		l.add("handshake-timeout", "cannot be switched off: clients that never say what they want would pile up")
	}
	if c.BusyPoll > maxBusyPoll {
		l.add("busy-poll", "%v is too long: %v at most, and 50us is a good value", c.BusyPoll, maxBusyPoll)
	}

	if len(c.Inbounds) == 0 && !l.src.has("inbounds") && !c.ways {
		l.add("inbounds", "missing: nothing to listen at")
	}
	sound := c.fillOutbounds(l)
	names, places, networks := map[string]int{}, map[proxy.Addr]int{}, map[string]int{}
	for i := range c.Inbounds {
		in, path := &c.Inbounds[i], fmt.Sprintf("inbounds[%d]", i)
		c.fillInbound(l, in, path, sound)
		if in.Name == "" && in.Type == "tun" {
			in.nameDevice(names)
		} else if in.Name == "" && in.Type != "" {
			in.Name = in.defaultName()
			if _, taken := names[in.Name]; taken {
				in.Name = fmt.Sprintf("%s#%d", in.Name, i)
			}
		}
		unique(l, names, in.Name, path+".name", i)
		if in.Type == "tun" {
			if first, taken := networks[in.Netns]; taken {
				l.add(path+".netns", "inbounds[%d] takes the traffic of that network already: one tun for each", first)
			} else {
				networks[in.Netns] = i
			}
		}
		if a := proxy.Addr(in.Listen); !isFar(in.Type) && (a.Network == "unix" || a.Port != 0) {
			if first, taken := places[a]; taken {
				l.add(path+".listen", "%v is taken by inbounds[%d]", a, first)
			} else {
				places[a] = i
			}
		}
	}
	c.fillRules(l, sound)
}

// defaultName is the name of an inbound that has none. It is no [isName], so it never takes one.
func (in *Inbound) defaultName() string { return in.Type + "@" + in.Listen.String() }

func (c *Config) fillInbound(l *errorList, in *Inbound, path string, outboundsSound bool) {
	checkName(l, path, in.Name, strings.HasPrefix(in.Name, in.defaultName()))
	t := inboundTypeOf(in.Type)
	if !checkType(l, path, in.Type, t != nil, InboundTypes()) {
		return
	}
	checkKeys(l, path, t.name, reflect.ValueOf(in).Elem(), t.wants(), t.has)
	if !t.listens() {
		c.fillTUN(l, in, path)
	}
	if in.SendProxy != "" && t.has("send-proxy") {
		oneOf(l, path+".send-proxy", in.SendProxy, SendProxyVersions)
	}
	c.fillDatagrams(l, in, path, t)
	if in.MaxConns < 0 {
		l.add(path+".max-conns", "%d is negative (remove the key for no limit)", in.MaxConns)
	}
	if t.isFar() && (in.Mode != 0 || l.src.has(path+".mode")) {
		l.add(path+".mode", "does not apply to type %s", t.name)
	} else if in.Mode != 0 && in.Listen.Network != "unix" && in.Listen.Network != "" {
		l.add(path+".mode", "is for Unix sockets (listen: unix:///path)")
	}
	if (t.isFar() || t.isTransparent()) && in.AcceptProxy {
		l.add(path+".accept-proxy", "does not apply to type %s", t.name)
	}
	if in.ReusePort && in.Listen.Network != "" && in.Listen.Network != "tcp" && t.has("reuse-port") {
		l.add(path+".reuse-port", "is for TCP ports, and %v is none", proxy.Addr(in.Listen))
	}
	if t.isTransparent() {
		in.checkCapture(l, path)
	}
	if t.has("dns") { // of a tun, fillTUN has set it
		setDefault(&in.DNS, "off")
	}
	users := in.UsersFile != "" || in.UsersEnv != "" || l.src.has(path+".users-file") || l.src.has(path+".users-env")
	switch listen := proxy.Addr(in.Listen); {
	case !t.isProxy():
	case in.UsersFile != "" && in.UsersEnv != "":
		l.add(path+".users-env", "one of users-file and users-env, not both")
	case users && in.Open:
		l.add(path+".open", "contradicts the list of users: remove one")
	case listen.Network != "" && !listen.IsLoopback() && !users && !in.Open:
		l.add(path+".listen", "a proxy on %v is open to everyone who can reach this machine: "+
			"give %s (lines of name:password), or %s if that is meant, or listen on loopback",
			listen, l.spell("users-file", ""), l.spell("open", "true"))
	}
	if c.checkVia(l, path+".via", in.Via) && outboundsSound {
		hops, err := c.chain(in.Via)
		switch {
		case err != nil:
			l.add(path+".via", "%w", err)
		case in.Listen.Network == "udp" && streamsOnly(hops) != "":
			l.add(path+".via", "%s carries streams only, and %v takes datagrams in", streamsOnly(hops), in.Listen)
		case t.isFar() && len(hops) > 0 && hops[len(hops)-1].out.Type != "ssh":
			l.add(path+".via", "type %s listens at an SSH server, which must be the last hop (as in ssh://host)", t.name)
		case t.isFar():
		case c.leadsBack(hops, proxy.Addr(in.Listen)):
			l.add(path+".via", "leads back to %v, where this inbound listens: each connection would make another", in.Listen)
		case isDirect(hops) && len(c.Rules) == 0 && comesTo(proxy.Addr(in.To), proxy.Addr(in.Listen)):
			l.add(path+".to", "is where this inbound listens: each connection would make another")
		}
	}
}

// leadsBack says whether the first proxy of the hops, or of a group's member, is what listens at listen. The others are where that leads.
func (c *Config) leadsBack(hops []hop, listen proxy.Addr) bool {
	if len(hops) > 1 && isDirect(hops[:1]) {
		hops = hops[1:]
	}
	if len(hops) == 0 {
		return false
	}
	first := hops[0].out
	return comesTo(proxy.Addr(first.Server), listen) || slices.ContainsFunc(first.Members, func(m string) bool {
		way, err := c.chain([]string{m})
		return err == nil && c.leadsBack(way, listen)
	})
}

// isDirect says whether there is no proxy among the hops.
func isDirect(hops []hop) bool {
	return len(hops) == 0 || len(hops) == 1 && hops[0].out.Type == "direct"
}

// comesTo says whether who connects to dst comes to a listener at listen, as far as their texts tell.
func comesTo(dst, listen proxy.Addr) bool {
	if dst.Network != listen.Network || dst.Port != listen.Port || dst.Host == "" || dst.Network != "unix" && dst.Port == 0 {
		return false
	}
	ip, at := hostIP(dst), hostIP(listen)
	switch {
	case dst.Host == listen.Host:
		return true
	case !ip.IsValid() || listen.Network == "unix":
		return false
	case listen.Host == "" || at == netip.IPv6Unspecified():
		return ip.IsLoopback()
	case at == netip.IPv4Unspecified():
		return ip.IsLoopback() && ip.Is4()
	}
	return ip == at
}

// hostIP returns the address that the host of a is, 127.0.0.1 for localhost; the zero Addr for another name.
func hostIP(a proxy.Addr) netip.Addr {
	if a.Host == "localhost" {
		return netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	return a.IP().Unmap()
}

// fillDatagrams checks what is about datagrams. The place to listen at decides whether a forward carries them, so its destination
// need not say so again.
func (c *Config) fillDatagrams(l *errorList, in *Inbound, path string, t *inboundType) {
	isUDP := in.Listen.Network == "udp"
	switch {
	case !isUDP && in.To.Network == "udp":
		l.add(path+".to", "%v takes datagrams, and %v streams: listen at udp:// as well", in.To, in.Listen)
	case !isUDP:
	case t.name != "forward":
		l.add(path+".listen", "type %s takes streams in, and udp:// is for type forward", t.name)
	case in.To.Network == "unix":
		l.add(path+".to", "%v takes no datagrams", in.To)
	case in.To.Network == "tcp":
		in.To.Network = "udp"
	}
	if isUDP && in.SendProxy != "" {
		l.add(path+".send-proxy", "does not apply to datagrams")
	}
	if isUDP && in.AcceptProxy {
		l.add(path+".accept-proxy", "does not apply to datagrams")
	}
}

// streamsOnly returns the first of the hops that carries no datagrams, or nothing.
func streamsOnly(hops []hop) string {
	for _, h := range hops {
		if slices.Contains([]string{"http", "https", "ssh"}, h.out.Type) {
			return h.label
		}
	}
	return ""
}

// fillOutbounds says whether chains over the outbounds can be followed.
func (c *Config) fillOutbounds(l *errorList) bool {
	before := len(l.errs)
	names := map[string]int{}
	for i := range c.Outbounds {
		o, path := &c.Outbounds[i], fmt.Sprintf("outbounds[%d]", i)
		if o.Name == "" && !l.src.has(path+".name") {
			l.add(path+".name", "missing")
		}
		checkName(l, path, o.Name, false)
		unique(l, names, o.Name, path+".name", i)
		t := outboundTypeOf(o.Type)
		if !checkType(l, path, o.Type, t != nil, OutboundTypes()) {
			continue
		}
		checkKeys(l, path, t.name, reflect.ValueOf(o).Elem(), t.needs, t.has)
		if err := o.check(l.src.has(path+".password-file") || l.src.has(path+".password-env")); err != nil {
			l.add(path, "%w", err)
		}
		if o.Mark < 0 || int64(o.Mark) > 1<<32-1 {
			l.add(path+".mark", "%d is not a number from 0 to 0xffffffff", o.Mark)
		}
		c.checkVia(l, path+".via", o.Via)
		if t.name == "group" {
			c.fillGroup(l, o, path)
		}
	}
	c.checkCycles(l)
	if len(l.errs) > before {
		return false
	}
	for i := range c.Outbounds {
		if _, err := c.chain([]string{c.Outbounds[i].Name}); err != nil {
			l.add(fmt.Sprintf("outbounds[%d].via", i), "%w", err)
		}
		for _, m := range c.Outbounds[i].Members {
			if _, err := c.chain([]string{m}); err != nil {
				l.add(fmt.Sprintf("outbounds[%d].members", i), "%w", err)
			}
		}
	}
	return len(l.errs) == before
}

// check reports what is wrong with o beside its keys. It is used for hops in URL form, too.
func (o *Outbound) check(hasPassword bool) error {
	hasPassword = hasPassword || o.PasswordFile != "" || o.PasswordEnv != ""
	switch {
	case o.PasswordFile != "" && o.PasswordEnv != "":
		return fmt.Errorf("one of password-file and password-env, not both")
	case o.User != "" && !hasPassword && outboundTypeOf(o.Type).needsPassword():
		return fmt.Errorf("user %s has no password: give password-file or password-env", o.User)
	case o.User == "" && hasPassword && o.Server != (Dst{}):
		return fmt.Errorf("a password without a user")
	case len(o.User) > 255:
		return fmt.Errorf("user is longer than 255 bytes")
	case o.Server.Network == "unix" && o.Type == "https" && o.ServerName == "":
		return fmt.Errorf("a Unix socket has no name that a certificate could have: give server-name")
	case o.Server.Network == "unix" && len(o.Via) > 0:
		return fmt.Errorf("a Unix socket cannot be reached through a proxy: remove via")
	}
	return nil
}

// checkVia complains about each hop that is none and says whether there was nothing to complain about.
func (c *Config) checkVia(l *errorList, path string, via []string) bool {
	before := len(l.errs)
	for i, s := range via {
		if s == "" && l.src.has(fmt.Sprintf("%s[%d]", path, i)) {
			continue // complained about
		}
		h, err := c.resolve(s)
		if err == nil && strings.Contains(s, "://") {
			err = h.out.check(false)
		}
		if err != nil {
			l.add(fmt.Sprintf("%s[%d]", path, i), "%w", err)
		}
	}
	return len(l.errs) == before
}

// checkCycles complains once about each circle of outbounds that are reached through each other.
func (c *Config) checkCycles(l *errorList) {
	index := map[string]int{}
	for i := range c.Outbounds {
		if _, taken := index[c.Outbounds[i].Name]; !taken {
			index[c.Outbounds[i].Name] = i
		}
	}
	key := func(i int) string {
		if len(c.Outbounds[i].Members) > 0 {
			return "members"
		}
		return "via"
	}
	const open, closed = 1, 2
	state := make([]int, len(c.Outbounds))
	var way []string
	var visit func(i int)
	visit = func(i int) {
		state[i] = open
		way = append(way, c.Outbounds[i].Name)
		for _, s := range append(slices.Clone(c.Outbounds[i].Via), c.Outbounds[i].Members...) {
			j, ok := index[s]
			switch {
			case !ok || s == "":
			case state[j] == open:
				circle := append(slices.Clone(way[slices.Index(way, s):]), s)
				l.add(fmt.Sprintf("outbounds[%d].%s", i, key(i)), "goes in a circle: %s", strings.Join(circle, " via "))
			case state[j] == 0:
				visit(j)
			}
		}
		way = way[:len(way)-1]
		state[i] = closed
	}
	for i := range c.Outbounds {
		if state[i] == 0 && c.Outbounds[i].Name != "" {
			visit(i)
		}
	}
}

// spell writes a setting as it is given: key or key: value in a file, --key as a flag.
func (l *errorList) spell(key, value string) string {
	switch {
	case l.src.file == "":
		return "--" + key
	case value != "":
		return key + ": " + value
	}
	return key
}

func setDefault[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

func oneOf(l *errorList, path, value string, known []string) {
	if !slices.Contains(known, value) {
		l.add(path, "%q is not one of %s", value, strings.Join(known, ", "))
	}
}

func checkType(l *errorList, path, name string, known bool, types []string) bool {
	switch path += ".type"; {
	case known:
		return true
	case name != "":
		l.add(path, "unknown type %q%s", name, didYouMean(name, types))
	case !l.src.has(path):
		l.add(path, "missing (one of %s)", strings.Join(types, ", "))
	}
	return false
}

func checkName(l *errorList, path, name string, isDefault bool) {
	if name != "" && !isDefault && !isName(name) {
		l.add(path+".name", "not a name: up to 64 letters, digits and . _ -")
	}
}

func unique(l *errorList, names map[string]int, name, path string, i int) {
	if first, taken := names[name]; name != "" && taken {
		l.add(path, "%s is the name of entry %d, too", name, first)
	} else {
		names[name] = i
	}
}
