package config

import (
	"encoding"
	"errors"
	"fmt"
	"net/url"
	"reflect"
	"slices"
	"strings"
)

// maxHops bounds a chain, so that outbounds that name each other many times stay finite.
const maxHops = 16

// hop is one proxy on the way, resolved.
type hop struct {
	label string // for the log: a name, or scheme://host:port
	out   *Outbound
}

// builtin are the outbounds that need no entry in outbounds. One with the same name takes its place.
var builtin = map[string]Outbound{
	"direct": {Name: "direct", Type: "direct"},
	"reject": {Name: "reject", Type: "reject"},
}

// resolve finds the outbound that an element of via means: one with that name, or one in URL form.
// Errors do not quote what may hold a password.
func (c *Config) resolve(s string) (hop, error) {
	if strings.Contains(s, "://") {
		o, err := parseHop(s)
		if err != nil {
			return hop{}, err
		}
		return hop{o.url(), o}, nil
	}
	names := []string{"direct", "reject"}
	for i := range c.Outbounds {
		o := &c.Outbounds[i]
		if o.Name == s {
			return hop{s, o}, nil
		}
		names = append(names, o.Name)
	}
	if o, ok := builtin[s]; ok {
		return hop{s, &o}, nil
	}
	if !isName(s) {
		return hop{}, fmt.Errorf("neither the name of an outbound nor a URL (as in %s)", hopExample)
	}
	return hop{}, fmt.Errorf("no outbound is called %s%s", s, didYouMean(s, names))
}

// notSockets are the types whose conns are not the kernel's sockets.
var notSockets = []string{"tun", "reverse", "ssh", "https"}

// OnlySockets says whether all conns that the sessions of c join are sockets of the kernel: no SSH, TLS or TUN is among them.
func (c *Config) OnlySockets() bool {
	var vias []string
	for i := range c.Inbounds {
		if slices.Contains(notSockets, c.Inbounds[i].Type) {
			return false
		}
		vias = append(vias, c.Inbounds[i].Via...)
	}
	for i := range c.Rules {
		vias = append(vias, c.Rules[i].Via...)
	}
	for i := range c.Outbounds {
		if slices.Contains(notSockets, c.Outbounds[i].Type) {
			return false
		}
		vias = append(append(vias, c.Outbounds[i].Via...), c.Outbounds[i].Members...)
	}
	return !slices.ContainsFunc(vias, func(s string) bool {
		h, err := c.resolve(s)
		return err != nil || slices.Contains(notSockets, h.out.Type)
	})
}

// url returns the server of o in URL form, without what is behind it.
func (o *Outbound) url() string {
	if o.Host != (SSHHost{}) {
		return o.Type + "://" + o.Host.String()
	}
	return o.Type + "://" + o.Server.String()
}

const hopExample = "socks5://host:port"

// parseHop reads an upstream proxy in URL form: type://[user@]host:port[?key=value&...]. The keys are
// those of the outbound type.
func parseHop(s string) (*Outbound, error) {
	u, err := url.Parse(s)
	if err != nil { // its text would quote s
		return nil, fmt.Errorf("not a URL of the form %s", hopExample)
	}
	t := outboundTypeOf(u.Scheme)
	if t == nil || !t.isHop() {
		return nil, fmt.Errorf("unknown kind of proxy %q%s", u.Scheme, didYouMean(u.Scheme, hopSchemes()))
	}
	o := &Outbound{Type: t.name}
	if u.User != nil {
		if _, ok := u.User.Password(); ok {
			return nil, fmt.Errorf("a password in a URL can be seen by everyone who lists processes or reads the file: "+
				"write %s://%s@%s?password-file=PATH or ?password-env=NAME", t.name, u.User.Username(), u.Host)
		}
		o.User = u.User.Username()
	}
	if p := strings.TrimSuffix(u.Path, "/"); p != "" || u.Fragment != "" || u.Opaque != "" {
		return nil, fmt.Errorf("nothing may follow host:port but ?key=value (as in %s)", hopExample)
	}
	server := encoding.TextUnmarshaler(&o.Server)
	if t.needs == "host" {
		server = &o.Host
	}
	if err := server.UnmarshalText([]byte(u.Host)); err != nil {
		return nil, err
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return nil, errors.New("what follows ? is not of the form key=value&key=value")
	}
	for key, values := range query {
		f, ok := fieldOf(reflect.ValueOf(o).Elem(), key)
		switch {
		case !ok || hasWord(key, outboundKeys, t.needs, "user via") || !t.has(key):
			known := slices.DeleteFunc(strings.Fields(t.takes), func(k string) bool { return k == "user" || k == "via" })
			return nil, fmt.Errorf("unknown key %q%s", key, didYouMean(key, known))
		case len(values) > 1:
			return nil, fmt.Errorf("%s is given twice", key)
		}
		if err := setText(f, values[0]); err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
	}
	if t.needsPassword() && o.User != "" && o.PasswordFile == "" && o.PasswordEnv == "" {
		return nil, fmt.Errorf("user %s has no password: add ?password-file=PATH or ?password-env=NAME", o.User)
	}
	return o, nil
}

// chain returns the hops of via with the hops that lead to each before it, first hop first.
func (c *Config) chain(via []string) ([]hop, error) { return c.chainAfter(nil, via, 0) }

func (c *Config) chainAfter(hops []hop, via []string, depth int) ([]hop, error) {
	for _, s := range via {
		h, err := c.resolve(s)
		if err != nil {
			return nil, err
		}
		if depth < maxHops { // deeper, the outer calls count more than maxHops
			if hops, err = c.chainAfter(hops, h.out.Via, depth+1); err != nil {
				return nil, err
			}
		}
		switch {
		case len(hops) == 0:
		case h.out.Type == "direct":
			return nil, fmt.Errorf("%s is a direct way and can only be the first hop", h.label)
		case h.out.Type == "group":
			return nil, fmt.Errorf("%s is a group and can only be the first hop: its members say how they are reached", h.label)
		}
		if hops = append(hops, h); len(hops) > maxHops {
			return nil, fmt.Errorf("more than %d hops", maxHops)
		}
	}
	return hops, nil
}

// isName says whether s can be the name of an inbound or outbound.
func isName(s string) bool {
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"
	return s != "" && len(s) <= 64 && strings.Trim(s, letters) == ""
}
