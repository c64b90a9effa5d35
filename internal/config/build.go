package config

import (
	"cmp"
	"crypto/tls"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"slices"
	"strings"

	"github.com/sluice-proxy/sluice/internal/inbound"
	"github.com/sluice-proxy/sluice/internal/netstack"
	"github.com/sluice-proxy/sluice/internal/outbound"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/route"
	"github.com/sluice-proxy/sluice/relay"
)

// Bound is an inbound with its way out, ready to listen.
type Bound struct {
	Name    string
	Inbound proxy.Inbound
	Router  proxy.Router
	Relay   relay.Relay // how its sessions are relayed

	// Front returns the handler that the inbound is served with, in front of next, which carries its sessions. Call
	// it when the inbound listens. If the handler has a method Abort(), call that when the inbound is closed. Nil: next is served.
	Front func(next proxy.Handler) proxy.Handler

	kept []kept // of all Bounds: they may share them
}

// kept is a part of the way out that does something between sessions.
type kept interface {
	Start() error
	Close() error
}

// Start begins to connect what is to be connected always, and to check what is to be checked. Call it once traffic may flow.
func (b *Bound) Start() error {
	for _, k := range b.kept {
		if err := k.Start(); err != nil {
			return err
		}
	}
	return nil
}

// Close ends what the way out keeps up between sessions. Call it when the sessions of all
// Bounds are over.
func (b *Bound) Close() {
	for _, k := range slices.Backward(b.kept) {
		k.Close()
	}
}

// Build makes the parts that c describes. It fills c, and reads the files and environment variables
// with secrets; a nil lookupEnv finds none. log, which may be nil, is where the parts write.
func (c *Config) Build(log *slog.Logger, lookupEnv func(string) (string, bool)) ([]Bound, error) {
	b, err := c.builder(log, lookupEnv)
	if err != nil {
		return nil, err
	}
	var bounds []Bound
	for i := range c.Inbounds {
		bounds = append(bounds, b.inbound(&c.Inbounds[i], fmt.Sprintf("inbounds[%d]", i)))
	}
	if len(b.errs.errs) > 0 {
		return nil, b.errs.join()
	}
	for i := range bounds {
		bounds[i].kept = b.kept
	}
	return bounds, nil
}

// Way makes the way out of clients that the caller takes in itself, which in speaks of: its Via, rates and quota. The Bound has
// no Inbound. c needs none either; for the rest Way is as Build.
func (c *Config) Way(in Inbound, log *slog.Logger, lookupEnv func(string) (string, bool)) (Bound, error) {
	c.ways = true
	b, err := c.builder(log, lookupEnv)
	if err != nil {
		return Bound{}, err
	}
	const path = "inbounds[0].via"
	way := Bound{Name: in.Name, Relay: b.relay(&in)}
	if c.checkVia(&b.errs, path, in.Via) {
		way.Router = b.route(in.Via, path)
	}
	if len(b.errs.errs) > 0 {
		return Bound{}, b.errs.join()
	}
	way.kept = b.kept
	return way, nil
}

// builder returns one for a c that is filled and whose outbounds can be built.
func (c *Config) builder(log *slog.Logger, lookupEnv func(string) (string, bool)) (*builder, error) {
	if err := c.Fill(); err != nil {
		return nil, err
	}
	if lookupEnv == nil {
		lookupEnv = func(string) (string, bool) { return "", false }
	}
	b := &builder{
		c:       c,
		secrets: secrets{dir: c.src.dir, lookupEnv: lookupEnv, files: map[string][]byte{}},
		errs:    errorList{src: &c.src},
		dialers: map[dialerKey]proxy.Dialer{},
		mark:    cmp.Or(c.tunMark(), c.captureMark()),
	}
	if b.mark != 0 {
		b.first = b.direct(&Outbound{})
	}
	b.member = func(s string) (proxy.Static, error) { return b.way([]string{s}) }
	for _, groups := range []bool{false, true} { // also those that nobody uses; what is wrong is said once, where it stands
		for i := range c.Outbounds {
			o := &c.Outbounds[i]
			if (o.Type == "group") != groups {
				continue
			}
			if _, err := outboundTypeOf(o.Type).build(b, o, nil); err != nil {
				b.errs.add(fmt.Sprintf("outbounds[%d]", i), "%w", err)
			}
		}
		if len(b.errs.errs) > 0 {
			return nil, b.errs.join()
		}
	}
	b.kept, b.dialers = nil, map[dialerKey]proxy.Dialer{} // nobody uses those
	b.log = log                                           // nothing is said of them
	b.buildRules()
	return b, nil
}

type builder struct {
	c       *Config
	secrets secrets
	errs    errorList
	log     *slog.Logger
	dialers map[dialerKey]proxy.Dialer
	kept    []kept // those that were made, what leads to another before it
	rules   []route.Rule
	member  func(string) (proxy.Static, error) // way, of a group's member: the table of types cannot name what reads it
	owners  route.Owners                       // nil where no rule asks for them
	mark    int                                // of connections that do not say another
	first   proxy.Dialer                       // what reaches the first hop; nil: a zero outbound.Direct
}

// dialerKey tells hops apart: those that are the same share what they keep open.
type dialerKey struct {
	settings string
	via      proxy.Dialer
}

// dialer returns the one that build makes of o and via.
func (b *builder) dialer(o *Outbound, via proxy.Dialer, build outboundBuilder) (proxy.Dialer, error) {
	key := dialerKey{fmt.Sprintf("%+v", *o), via}
	if d, ok := b.dialers[key]; ok {
		return d, nil
	}
	d, err := build(b, o, via)
	if err == nil {
		b.dialers[key] = d
	}
	return d, err
}

func (b *builder) inbound(in *Inbound, path string) Bound {
	l := inbound.Listener{
		Name:             in.Name,
		Addr:             proxy.Addr(in.Listen),
		Mode:             fs.FileMode(in.Mode),
		Allow:            prefixes(in.Allow),
		Deny:             prefixes(in.Deny),
		MaxConns:         in.MaxConns,
		AcceptProxy:      in.AcceptProxy,
		ReusePort:        in.ReusePort,
		HandshakeTimeout: b.c.HandshakeTimeout.Wait(),
		Log:              b.log,
	}
	var users inbound.Users
	if in.UsersFile != "" || in.UsersEnv != "" {
		key := ".users-file"
		if in.UsersFile == "" {
			key = ".users-env"
		}
		var errs []error
		users, errs = b.secrets.users(in.UsersFile, in.UsersEnv)
		for _, err := range errs {
			b.errs.add(path+key, "%w", err)
		}
	}
	t := inboundTypeOf(in.Type)
	part, way := t.build(in, l, users), b.route(in.Via, path+".via")
	bound := Bound{Name: in.Name, Inbound: part, Router: way, Relay: b.relay(in)}
	if r, ok := part.(*inbound.Reverse); ok {
		if s, ok := way.Dialer.(*outbound.SSH); ok {
			r.Link = s.Link
		}
		bound.Router = b.route(nil, path+".via") // to its destination
	} else if len(b.rules) > 0 {
		bound.Router = &route.Router{Rules: b.rules, Default: way, Owners: b.owners}
	}
	if in.Setup {
		b.capture(in, part, way.Dialer)
	}
	switch t := part.(type) {
	case *netstack.TUN:
		b.tun(in, t, &bound)
	case *inbound.TProxy:
		b.names(in, &bound, t.HasIPv6)
	}
	return bound
}

// relay returns the settings for the relays of an inbound.
func (b *builder) relay(in *Inbound) relay.Relay {
	r := relay.Relay{
		Idle:     b.c.Idle.Limit(),
		HalfOpen: b.c.HalfOpen.Limit(),
		Rate:     int64(in.RatePerSession),
		Quota:    int64(in.QuotaPerSession),
		BusyPoll: b.c.BusyPoll.Wait(),
	}
	if in.Rate > 0 {
		r.Shared = relay.NewLimiter(int64(in.Rate))
	}
	return r
}

// route returns the way that via describes, and complains at path where it cannot.
func (b *builder) route(via []string, path string) proxy.Static {
	if len(via) == 0 {
		via = []string{"direct"}
	}
	way, err := b.way(via)
	if err != nil {
		b.errs.add(path, "%w", err)
	}
	return way
}

// way builds the chain of hops, each dialled through the one before.
func (b *builder) way(via []string) (proxy.Static, error) {
	hops, err := b.c.chain(via)
	if err != nil { // Fill has followed it
		return proxy.Static{}, err
	}
	d := b.first // nil: direct
	var labels []string
	for _, h := range hops {
		labels = append(labels, h.label)
		if d, err = b.dialer(h.out, d, outboundTypeOf(h.out.Type).build); err != nil {
			return proxy.Static{}, fmt.Errorf("%s: %w", h.label, err) // a URL: named ones are known to be good
		}
	}
	return proxy.Static{Name: strings.Join(labels, ","), Dialer: d}, nil
}

func forward(in *Inbound, l inbound.Listener, _ inbound.Users) proxy.Inbound {
	version := map[string]int{"v1": 1, "v2": 2}[in.SendProxy]
	return &inbound.Forward{Listener: l, To: proxy.Addr(in.To), SendProxy: version}
}

func socks5(_ *Inbound, l inbound.Listener, users inbound.Users) proxy.Inbound {
	return &inbound.SOCKS5{Listener: l, Users: users}
}

func httpProxy(_ *Inbound, l inbound.Listener, users inbound.Users) proxy.Inbound {
	return &inbound.HTTP{Listener: l, Users: users}
}

func mixed(_ *Inbound, l inbound.Listener, users inbound.Users) proxy.Inbound {
	return &inbound.Mixed{Listener: l, Users: users}
}

func reverse(in *Inbound, l inbound.Listener, _ inbound.Users) proxy.Inbound {
	return &inbound.Reverse{Listener: l, To: proxy.Addr(in.To)} // its link is set with its route
}

func direct(b *builder, o *Outbound, _ proxy.Dialer) (proxy.Dialer, error) { return b.direct(o), nil }

func (b *builder) direct(o *Outbound) *outbound.Direct {
	d := &outbound.Direct{BindAddr: o.Bind.Addr(), Interface: o.Interface, Mark: cmp.Or(o.Mark, b.mark)}
	if b.log == nil {
		return d
	}
	if err := d.Try(); err != nil {
		b.log.Warn("nothing can be connected this way as things are", "outbound", o.Name, "err", err)
	}
	return d
}

func socks5Out(b *builder, o *Outbound, via proxy.Dialer) (proxy.Dialer, error) {
	password, err := b.password(o)
	return &outbound.SOCKS5{Server: proxy.Addr(o.Server), User: o.User, Password: password, Via: via}, err
}

func httpOut(b *builder, o *Outbound, via proxy.Dialer) (proxy.Dialer, error) {
	password, err := b.password(o)
	return &outbound.HTTP{Server: proxy.Addr(o.Server), User: o.User, Password: password, Via: via}, err
}

func httpsOut(b *builder, o *Outbound, via proxy.Dialer) (proxy.Dialer, error) {
	settings := &tls.Config{ServerName: o.ServerName, MinVersion: tls.VersionTLS12}
	if settings.ServerName == "" {
		settings.ServerName = o.Server.Host
	}
	if o.CAFile != "" {
		var err error
		if settings.RootCAs, err = b.secrets.roots(o.CAFile); err != nil {
			return nil, fmt.Errorf("ca-file: %w", err)
		}
	}
	password, err := b.password(o)
	return &outbound.HTTP{
		Server: proxy.Addr(o.Server), User: o.User, Password: password, TLS: settings, Via: via,
	}, err
}

func reject(*builder, *Outbound, proxy.Dialer) (proxy.Dialer, error) { return &outbound.Reject{}, nil }

// password reads the password of o, where it has a user.
func (b *builder) password(o *Outbound) (string, error) {
	if o.User == "" {
		return "", nil
	}
	return b.secret(o)
}

// secret reads the password of o.
func (b *builder) secret(o *Outbound) (string, error) {
	p, err := b.secrets.password(o.PasswordFile, o.PasswordEnv)
	if err != nil && o.PasswordFile != "" {
		return "", fmt.Errorf("password-file: %w", err)
	}
	if err != nil {
		return "", fmt.Errorf("password-env: %w", err)
	}
	return p, nil
}

func prefixes(list []Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range list {
		out = append(out, netip.Prefix(p))
	}
	return out
}
