package main

import (
	"encoding"
	"errors"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"github.com/sluice-proxy/sluice/internal/config"
)

// options are the flags of a command that serves one inbound. They are settings of a configuration
// under the same names.
type options struct {
	cfg         config.Config
	in          config.Inbound
	direct      config.Outbound // bind, interface, mark
	socks, http bool
	keep        bool
	printConfig bool
}

// addProxy adds the flags of proxies.
func (o *options) addProxy(fs *pflag.FlagSet) {
	fs.BoolVar(&o.socks, "socks", false, "SOCKS5 only")
	fs.BoolVar(&o.http, "http", false, "HTTP only")
	fs.Var((*wordValue)(&o.in.UsersFile), "users-file", "`file` with a name:password a line: who may use it")
	fs.Var((*wordValue)(&o.in.UsersEnv), "users-env", "environment `variable` that holds such lines")
	fs.BoolVar(&o.in.Open, "open", false, "anyone may use it, also on an address that others can reach")
	o.addPort(fs)
}

// addForward adds the flags of forwards.
func (o *options) addForward(fs *pflag.FlagSet) {
	fs.Var(&choiceValue{&o.in.SendProxy, config.SendProxyVersions}, "send-proxy",
		"tell DST the client's address by a PROXY header of `version` v1 or v2")
	o.addPort(fs)
}

// addPort adds the flags of what binds a port on this machine.
func (o *options) addPort(fs *pflag.FlagSet) {
	fs.BoolVar(&o.in.ReusePort, "reuse-port", false, "share the TCP port with other processes of this user that do so, too")
}

// addCapture adds the flags of transparent proxies.
func (o *options) addCapture(fs *pflag.FlagSet) {
	fs.BoolVar(&o.in.Setup, "setup", false, "set up the packet filter and the routing, and undo that at exit")
	fs.Var((*sourcesValue)(&o.in.From), "from",
		"with --setup: capture the traffic from this `source`, local (this machine, the default), an interface\n"+
			"or a network; repeat for more")
	fs.Var((*networksValue)(&o.in.Include), "include", "with --setup: capture only what is for this `network`; repeat for more")
	fs.Var((*networksValue)(&o.in.Exclude), "exclude", "with --setup: leave alone what is for this `network`; repeat for more")
}

// addShared adds the flags of all commands that serve one inbound.
func (o *options) addShared(fs *pflag.FlagSet) {
	fs.SortFlags = false
	o.addVia(fs)
	fs.Var((*networksValue)(&o.in.Allow), "allow", "let in clients from this `network` only; repeat for more")
	fs.Var((*networksValue)(&o.in.Deny), "deny", "refuse clients from this `network`; repeat for more")
	fs.IntVar(&o.in.MaxConns, "max-conns", 0, "at most `n` sessions at a time")
	o.addRates(fs)
	fs.BoolVar(&o.in.AcceptProxy, "accept-proxy", false, "clients begin with a PROXY header (v1 or v2)")
	fs.Var(&textValue{&o.in.Mode}, "mode", "permissions of the Unix socket at LISTEN, in `octal` (default 0600)")
	o.addDirect(fs)
	o.addLimits(fs)
	durationFlag(fs, &o.cfg.HandshakeTimeout, "handshake-timeout", config.DefaultHandshakeTimeout,
		"give a client this `time` to say what it wants")
	o.addRun(fs)
}

// addRun adds the flags of the process.
func (o *options) addRun(fs *pflag.FlagSet) {
	durationFlag(fs, &o.cfg.Grace, "grace", config.DefaultGrace, "on SIGTERM give sessions this `time` to end")
	durationFlag(fs, &o.cfg.BusyPoll, "busy-poll", config.DefaultBusyPoll,
		"look for more work for this `time` before sleeping, as in 50us: less delay for more CPU")
	o.cfg.Log = config.Log{Level: "info", Format: "auto"}
	addLog(fs, &o.cfg.Log, "")
	fs.BoolVar(&o.printConfig, "print-config", false, "print the configuration file that says the same, and exit")
}

// addVia adds the flags of the way out.
func (o *options) addVia(fs *pflag.FlagSet) {
	fs.StringArrayVar(&o.in.Via, "via", nil,
		"go through the proxy at `URL`, socks5://, http:// or https://[user@]host:port, or the SSH server at\n"+
			"ssh://[user@]host; repeat for a chain, first hop first")
	fs.BoolVar(&o.keep, "keep", false, "stay connected to SSH servers, also while nobody uses them")
}

// addRates adds the flags of what sessions may pass on.
func (o *options) addRates(fs *pflag.FlagSet) {
	fs.Var(&textValue{&o.in.RatePerSession}, "rate-per-session",
		"pass on at this `rate` at most, each way of each session (10MB is bytes a second)")
	fs.Var(&textValue{&o.in.Rate}, "rate", "the same `rate` for all sessions together, both ways added up")
	fs.Var(&textValue{&o.in.QuotaPerSession}, "quota-per-session",
		"abort a session of more than this `size`, both ways added up, as in 1GiB")
}

// addDirect adds the flags of connections that this machine makes.
func (o *options) addDirect(fs *pflag.FlagSet) {
	fs.Var(&textValue{&o.direct.Bind}, "bind", "connect from this local `address`")
	fs.Var((*wordValue)(&o.direct.Interface), "interface", "connect through this network `interface`")
	fs.IntVar(&o.direct.Mark, "mark", 0, "connect with this firewall `mark`")
}

// addLimits adds the flags of how long things may take.
func (o *options) addLimits(fs *pflag.FlagSet) {
	durationFlag(fs, &o.cfg.Idle, "idle", config.DefaultIdle, "end a session that is silent for this `time`; off: never")
	durationFlag(fs, &o.cfg.HalfOpen, "half-open", config.DefaultHalfOpen, "the same `time` once one side has ended; off: never")
	durationFlag(fs, &o.cfg.DialTimeout, "dial-timeout", config.DefaultDialTimeout, "give a destination this `time` to answer")
}

func durationFlag(fs *pflag.FlagSet, d *config.Duration, name string, value config.Duration, usage string) {
	*d = value
	fs.Var(&textValue{d}, name, usage)
}

// addLog adds the flags of the log.
func addLog(fs *pflag.FlagSet, l *config.Log, hint string) {
	fs.Var(&choiceValue{&l.Level, config.LogLevels}, "log-level",
		"`level` from which on to log: "+strings.Join(config.LogLevels, ", ")+hint)
	fs.Var(&choiceValue{&l.Format, config.LogFormats}, "log-format",
		"`format` of the log: "+strings.Join(config.LogFormats, ", ")+hint)
}

// proxyType is the inbound type that --socks and --http ask for.
func (o *options) proxyType() string {
	switch {
	case o.socks && !o.http:
		return "socks5"
	case o.http && !o.socks:
		return "http"
	}
	return "mixed"
}

// config returns the filled configuration with the one inbound that the flags describe, of type typ.
func (o *options) config(typ, listen, to string) (*config.Config, error) {
	c, in := o.wayOut()
	in.Type = typ
	if typ != "tun" {
		if err := in.Listen.UnmarshalText([]byte(listen)); err != nil {
			return nil, &config.Error{Path: "inbounds[0].listen", Err: err}
		}
	}
	if typ == "forward" || typ == "reverse" {
		if err := in.To.UnmarshalText([]byte(to)); err != nil {
			return nil, &config.Error{Path: "inbounds[0].to", Err: err}
		}
	}
	c.Inbounds = []config.Inbound{in}
	return c, c.Fill()
}

// wayOut returns a configuration without inbounds, and an inbound that has only its way out.
func (o *options) wayOut() (*config.Config, config.Inbound) {
	c, in := o.cfg, o.in
	if o.keep {
		in.Via = keepAll(in.Via)
	}
	if d := o.direct; d.Bind != "" || d.Interface != "" || d.Mark != 0 {
		d.Name, d.Type = "direct", "direct" // takes the place of the built-in one
		c.Outbounds = []config.Outbound{d}
		if len(in.Via) > 0 {
			in.Via = append([]string{"direct"}, in.Via...)
		}
	}
	return &c, in
}

// keepAll adds to the URLs of SSH servers that they are kept.
func keepAll(via []string) (kept []string) {
	for _, s := range via {
		if strings.HasPrefix(s, "ssh://") && !strings.Contains(s, "keep=") {
			sep := "?"
			if strings.Contains(s, "?") {
				sep = "&"
			}
			s += sep + "keep=true"
		}
		kept = append(kept, s)
	}
	return kept
}

// textValue is a flag that a text unmarshaler reads.
type textValue struct {
	v interface {
		encoding.TextUnmarshaler
		String() string
	}
}

func (t *textValue) Set(s string) error { return t.v.UnmarshalText([]byte(s)) }
func (t *textValue) String() string     { return t.v.String() }
func (t *textValue) Type() string       { return "value" }

// choiceValue is a flag that is one of a few words.
type choiceValue struct {
	p     *string
	known []string
}

func (c *choiceValue) Set(s string) error {
	if !slices.Contains(c.known, s) {
		return errors.New("it is one of " + strings.Join(c.known, ", "))
	}
	*c.p = s
	return nil
}

func (c *choiceValue) String() string { return *c.p }
func (c *choiceValue) Type() string   { return "word" }

// wordValue is a flag that may be left out but not be empty: --users-file "$UNSET" must not mean no users.
type wordValue string

func (w *wordValue) Set(s string) error {
	if s == "" {
		return errors.New("it is empty")
	}
	*w = wordValue(s)
	return nil
}

func (w *wordValue) String() string { return string(*w) }
func (w *wordValue) Type() string   { return "word" }

// networksValue is a flag that may be repeated, and whose values may be joined by commas.
type networksValue []config.Prefix

func (n *networksValue) Set(s string) error {
	for word := range strings.SplitSeq(s, ",") {
		var p config.Prefix
		if err := p.UnmarshalText([]byte(word)); err != nil {
			return err
		}
		*n = append(*n, p)
	}
	return nil
}

func (n *networksValue) String() string {
	var words []string
	for _, p := range *n {
		words = append(words, p.String())
	}
	return strings.Join(words, ",")
}

func (n *networksValue) Type() string { return "networks" }

// sourcesValue is a flag that may be repeated, and whose values may be joined by commas.
type sourcesValue []config.Source

func (v *sourcesValue) Set(s string) error {
	for word := range strings.SplitSeq(s, ",") {
		var from config.Source
		if err := from.UnmarshalText([]byte(word)); err != nil {
			return err
		}
		*v = append(*v, from)
	}
	return nil
}

func (v *sourcesValue) String() string {
	var words []string
	for _, s := range *v {
		words = append(words, s.String())
	}
	return strings.Join(words, ",")
}

func (v *sourcesValue) Type() string { return "sources" }
