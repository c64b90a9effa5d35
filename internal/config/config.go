// Package config holds the settings of the whole program: what a file says and what the flags of a
// command say end up in the same [Config], are checked by the same code, and become the same parts.
//
// A Config comes into being in three steps. [Load] or [ReadFile] reads YAML (or a command fills the
// struct from its flags); [Config.Fill] sets defaults and reports all that is wrong, each complaint
// with its place; [Config.Build] makes inbounds and their routes of it. Only Build touches anything
// outside: it reads the files and environment variables that hold secrets. Nothing here listens or
// dials.
//
// What types of inbounds and outbounds there are is said by two tables in types.go.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/sluice-proxy/sluice/internal/dns"
	"github.com/sluice-proxy/sluice/internal/outbound"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/sshlink"
	"github.com/sluice-proxy/sluice/relay"
)

// The defaults that Fill sets. Those for idle connections are the relay's.
const (
	DefaultDialTimeout      = Duration(10 * time.Second)
	DefaultHandshakeTimeout = Duration(10 * time.Second)
	DefaultGrace            = Duration(30 * time.Second)
	DefaultBusyPoll         = Off
	DefaultIdle             = Duration(relay.DefaultIdle)
	DefaultHalfOpen         = Duration(relay.DefaultHalfOpen)
	DefaultCheckInterval    = Duration(outbound.DefaultCheckInterval)
)

// Settings that are one of a few words.
var (
	LogLevels         = []string{"debug", "info", "warn", "error"}
	LogFormats        = []string{"auto", "text", "json"}
	SendProxyVersions = []string{"v1", "v2"}
	GroupPolicies     = []string{"fallback", "round-robin", "least-latency"}
	RuleProtocols     = []string{"tcp", "udp"}
)

// Config is the settings of one process. The zero value is what an empty file says; Fill makes it
// complete.
type Config struct {
	Log Log `yaml:"log"`

	Idle             Duration `yaml:"idle"`              // limit on silence of an open session
	HalfOpen         Duration `yaml:"half-open"`         // limit on silence once one side has ended
	DialTimeout      Duration `yaml:"dial-timeout"`      // to reach a destination, all hops together
	HandshakeTimeout Duration `yaml:"handshake-timeout"` // for a client to say what it wants
	Grace            Duration `yaml:"grace"`             // for sessions to end after a stop was asked for
	BusyPoll         Duration `yaml:"busy-poll"`         // how long to look for more work before sleeping

	Inbounds  []Inbound  `yaml:"inbounds"`
	Outbounds []Outbound `yaml:"outbounds"`
	Rules     []Rule     `yaml:"rules"` // the first that matches decides; none: the via of the inbound

	src    source
	prompt sshlink.Prompt
	ways   bool // it is for ways out only, and needs no inbounds
}

// Ask has passwords, passphrases and unknown host keys asked at p, by what Build makes from then on.
// Without it, or with nil, nobody is asked.
func (c *Config) Ask(p sshlink.Prompt) { c.prompt = p }

// Log says what is logged and how.
type Log struct {
	Level  string `yaml:"level"`  // one of LogLevels
	Format string `yaml:"format"` // one of LogFormats
}

// Inbound is one place to listen at. Which of its fields apply depends on Type: see [InboundTypes].
type Inbound struct {
	Name        string   `yaml:"name"` // default: type and listen; of a tun, that of its device, default: sluice0
	Type        string   `yaml:"type"`
	Listen      Listen   `yaml:"listen"`
	Mode        FileMode `yaml:"mode"`         // permissions of the Unix socket; default: 0600
	To          Dst      `yaml:"to"`           // destination of a forward
	SendProxy   string   `yaml:"send-proxy"`   // one of SendProxyVersions: begin with a PROXY header towards To
	AcceptProxy bool     `yaml:"accept-proxy"` // clients begin with a PROXY header
	ReusePort   bool     `yaml:"reuse-port"`   // share the port with other processes
	Via         []string `yaml:"via"`          // names of outbounds or URLs, first hop first
	UsersFile   string   `yaml:"users-file"`   // lines of name:password
	UsersEnv    string   `yaml:"users-env"`    // the variable that holds such lines
	Open        bool     `yaml:"open"`         // anyone may use it, on a public address too
	Setup       bool     `yaml:"setup"`        // bring the traffic here, by rules of the packet filter
	From        []Source `yaml:"from"`         // whose traffic; empty: this machine's
	Include     []Prefix `yaml:"include"`      // destinations that are taken in; empty: all
	Exclude     []Prefix `yaml:"exclude"`      // destinations that are not
	Allow       []Prefix `yaml:"allow"`        // clients let in; empty: all
	Deny        []Prefix `yaml:"deny"`         // clients refused although allowed
	MaxConns    int      `yaml:"max-conns"`    // sessions at a time; 0: no limit

	Netns string `yaml:"netns"` // network namespace of a tun; empty: the program's
	MTU   int    `yaml:"mtu"`   // of its device
	DNS   DNS    `yaml:"dns"`   // what becomes of DNS questions that a tun or tproxy takes

	RatePerSession  Rate `yaml:"rate-per-session"`  // what each direction of a session may pass on; 0: no limit
	Rate            Rate `yaml:"rate"`              // what all sessions may pass on, both directions; 0: no limit
	QuotaPerSession Size `yaml:"quota-per-session"` // what a session may pass on, both directions; 0: no limit
}

// Outbound is one way out. Which of its fields apply depends on Type: see [OutboundTypes].
type Outbound struct {
	Name         string   `yaml:"name"`
	Type         string   `yaml:"type"`
	Server       Dst      `yaml:"server"`
	User         string   `yaml:"user"`
	PasswordFile string   `yaml:"password-file"`
	PasswordEnv  string   `yaml:"password-env"`
	CAFile       string   `yaml:"ca-file"`       // PEM certificates to trust in place of the system's
	ServerName   string   `yaml:"server-name"`   // the name on the server's certificate; default: server's host
	Bind         IP       `yaml:"bind"`          // local address of the connections
	Interface    string   `yaml:"interface"`     // network interface of the connections
	Mark         int      `yaml:"mark"`          // firewall mark of the connections
	Host         SSHHost  `yaml:"host"`          // of SSH: a name, or an alias of ssh-config
	IdentityFile string   `yaml:"identity-file"` // of SSH: the private key to offer first
	KnownHosts   string   `yaml:"known-hosts"`   // of SSH: the file of host keys, in place of the user's
	SSHConfig    string   `yaml:"ssh-config"`    // of SSH: the file with settings, in place of the user's and the system's; none: no file
	Keep         bool     `yaml:"keep"`          // of SSH: stay connected; of a group: check also while nobody uses it
	Via          []string `yaml:"via"`           // how the server is reached, first hop first
	Members      []string `yaml:"members"`       // of a group: names of outbounds or URLs
	Policy       string   `yaml:"policy"`        // of a group: one of GroupPolicies
	Check        Dst      `yaml:"check"`         // of a group: what members are made to connect to
	Interval     Duration `yaml:"interval"`      // of a group: between checks
}

// Off is the Duration of a limit that is switched off. It is written off, or 0.
const Off = Duration(-1)

// Duration is a limit in time, written as in 2h4m or 30s. The zero value is one that was not given.
type Duration time.Duration

// UnmarshalText reads what [time.ParseDuration] reads, and off.
func (d *Duration) UnmarshalText(text []byte) error {
	if string(text) == "off" {
		*d = Off
		return nil
	}
	v, err := time.ParseDuration(string(text))
	switch {
	case err != nil:
		return fmt.Errorf("%q is not a duration (as in 90s, 4m, 2h30m, off)", text)
	case v < 0:
		return fmt.Errorf("%q is negative (write off for no limit)", text)
	case v == 0:
		*d = Off
	default:
		*d = Duration(v)
	}
	return nil
}

// MarshalText writes d as UnmarshalText reads it.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// String returns d in its shortest form: 2h4m, not 2h4m0s.
func (d Duration) String() string {
	if d < 0 {
		return "off"
	}
	s := strings.ReplaceAll(time.Duration(d).String(), "µ", "u")
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// Limit returns d as the limit of a relay: negative where it is off.
func (d Duration) Limit() time.Duration { return time.Duration(d) }

// Wait returns d as a time to wait: zero where it is off.
func (d Duration) Wait() time.Duration { return max(0, time.Duration(d)) }

// Listen is a place to listen at, in the words of [proxy.ParseListen].
type Listen proxy.Addr

// UnmarshalText reads a place to listen at.
func (l *Listen) UnmarshalText(text []byte) (err error) {
	*(*proxy.Addr)(l), err = proxy.ParseListen(string(text))
	return bare(err)
}

// MarshalText writes l as UnmarshalText reads it.
func (l Listen) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// String returns l in full: an address that was left out is there.
func (l Listen) String() string { return proxy.Addr(l).String() }

// FileMode is the permissions of a file, written in octal. Zero is one that was not given.
type FileMode fs.FileMode

// UnmarshalText reads permissions as in 0660.
func (m *FileMode) UnmarshalText(text []byte) error {
	v, err := strconv.ParseUint(strings.TrimPrefix(string(text), "0o"), 8, 32)
	if err != nil || v == 0 || v > 0o777 {
		return fmt.Errorf("%q is not the permissions of a file in octal (as in 0660)", text)
	}
	*m = FileMode(v)
	return nil
}

// MarshalText writes m as UnmarshalText reads it.
func (m FileMode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// String returns m in octal, with a leading zero; empty where it was not given.
func (m FileMode) String() string {
	if m == 0 {
		return ""
	}
	return fmt.Sprintf("%#o", uint32(m))
}

// Dst is an address to connect to, in the words of [proxy.ParseDst].
type Dst proxy.Addr

// UnmarshalText reads an address to connect to.
func (d *Dst) UnmarshalText(text []byte) (err error) {
	*(*proxy.Addr)(d), err = proxy.ParseDst(string(text))
	return bare(err)
}

// MarshalText writes d as UnmarshalText reads it.
func (d Dst) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// String returns d in full.
func (d Dst) String() string { return proxy.Addr(d).String() }

// bare drops the package's name from an error of package proxy: the place in the file or the
// flag's name stands before it.
func bare(err error) error {
	if err == nil {
		return nil
	}
	return errors.New(strings.TrimPrefix(err.Error(), "proxy: "))
}

// SSHHost is an SSH server, written as host or host:port. Without a port, and for a host that is an
// alias, it is what the files of ssh_config(5) say.
type SSHHost struct {
	Name string
	Port uint16 // 0: as the files say
}

// UnmarshalText reads a server.
func (h *SSHHost) UnmarshalText(text []byte) error {
	if i := bytes.LastIndexByte(text, '@'); i >= 0 { // what is before it may have a password
		return fmt.Errorf("%q: the user stands by itself, as user", "..."+string(text[i:]))
	}
	a, err := sshlink.ParseHost(string(text))
	*h = SSHHost{a.Host, a.Port}
	return err
}

// MarshalText writes h as UnmarshalText reads it.
func (h SSHHost) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// String returns h, with its port where it has one.
func (h SSHHost) String() string {
	if h.Port != 0 {
		return proxy.TCP(h.Name, h.Port).HostPort()
	}
	return h.Name
}

// IP is an IP address, and empty where there is none.
type IP string

// UnmarshalText reads an address, with a zone where it is link-local.
func (a *IP) UnmarshalText(text []byte) error {
	v, err := netip.ParseAddr(string(text))
	if err != nil {
		return fmt.Errorf("%q is not an IP address", text)
	}
	*a = IP(v.Unmap().String())
	return nil
}

// String returns a, or the empty string.
func (a IP) String() string { return string(a) }

// Addr returns a as an address, or the zero value.
func (a IP) Addr() netip.Addr {
	v, _ := netip.ParseAddr(string(a))
	return v
}

// Prefix is a network, written as in 10.0.0.0/8, or one address.
type Prefix netip.Prefix

// UnmarshalText reads a network or an address.
func (p *Prefix) UnmarshalText(text []byte) error {
	s := string(text)
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		a = a.Unmap()
		*p = Prefix(netip.PrefixFrom(a, a.BitLen()))
		return nil
	}
	v, err := netip.ParsePrefix(s)
	if err != nil {
		return fmt.Errorf("%q is not a network (as in 10.0.0.0/8) or an IP address", s)
	}
	if v.Addr().Is4In6() {
		return fmt.Errorf("%q is an IPv4 network in IPv6 form: write it as IPv4", s)
	}
	if v != v.Masked() {
		return fmt.Errorf("%q has bits behind the prefix: write %v, or %v for one address", s, v.Masked(), v.Addr())
	}
	*p = Prefix(v)
	return nil
}

// MarshalText writes p as UnmarshalText reads it.
func (p Prefix) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// String returns p, always with its length.
func (p Prefix) String() string { return netip.Prefix(p).String() }

// DNS says what becomes of DNS questions, in the words of [dns.ParseMode]. Empty is one that was not given.
type DNS string

// UnmarshalText reads what dns.ParseMode reads.
func (d *DNS) UnmarshalText(text []byte) error {
	if _, _, err := dns.ParseMode(string(text)); err != nil {
		return errors.New(strings.TrimPrefix(err.Error(), "dns: "))
	}
	*d = DNS(text)
	return nil
}

// MarshalText writes d as UnmarshalText reads it.
func (d DNS) MarshalText() ([]byte, error) { return []byte(d), nil }

// String returns d as it is written.
func (d DNS) String() string { return string(d) }

// Error is one thing that is wrong with a Config.
type Error struct {
	File string // empty for settings that come from flags
	Line int    // from 1; 0 where there is none
	Path string // as in inbounds[2].listen; empty where the whole file is meant
	Err  error
}

// Error returns "file:line: path: cause".
func (e *Error) Error() string {
	var b strings.Builder
	switch {
	case e.File != "" && e.Line > 0:
		fmt.Fprintf(&b, "%s:%d: ", e.File, e.Line)
	case e.File != "":
		fmt.Fprintf(&b, "%s: ", e.File)
	}
	if e.Path != "" {
		fmt.Fprintf(&b, "%s: ", e.Path)
	}
	b.WriteString(e.Err.Error())
	return b.String()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// source remembers where a Config came from.
type source struct {
	file  string         // as it was named; empty for flags
	dir   string         // relative paths are relative to it
	lines map[string]int // path → line, for all that the file holds
}

// errorList collects complaints of one Config.
type errorList struct {
	src  *source
	errs []*Error
}

// add complains about what stands at path. Where there is nothing at path, its line is that of what it
// should be in.
func (l *errorList) add(path, format string, args ...any) {
	l.addAt(l.src.line(path), path, format, args...)
}

// addAt is add for what stands on a line that is known.
func (l *errorList) addAt(line int, path, format string, args ...any) {
	l.errs = append(l.errs, &Error{l.src.file, line, path, fmt.Errorf(format, args...)})
}

// line returns the line of what stands at path, or of what it should be in.
func (s *source) line(path string) int {
	for {
		if n, ok := s.lines[path]; ok || path == "" {
			return n
		}
		path = path[:max(0, strings.LastIndexAny(path, ".["))]
	}
}

// has says whether the file says something at path, right or wrong.
func (s *source) has(path string) bool { _, ok := s.lines[path]; return ok }
