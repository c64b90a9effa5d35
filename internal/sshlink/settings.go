package sshlink

import (
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The defaults of settings that OpenSSH leaves to the system, or has off.
const (
	DefaultAliveInterval  = 15 * time.Second
	DefaultAliveCountMax  = 3
	DefaultConnectTimeout = 15 * time.Second
)

// Settings are how a server is reached and verified, and who we are there: ssh_config(5).
type Settings struct {
	HostName              string
	Port                  uint16
	User                  string
	IdentityFiles         []string // private keys
	CertificateFiles      []string // beside those that lie by their keys
	IdentitiesOnly        bool     // of the agent's keys, only those that IdentityFiles has
	IdentityAgent         string   // the agent's socket; empty or none: no agent
	ProxyJump             []string // hops on the way, first one first, each as in [user@]host[:port]
	UserKnownHosts        []string // the first is where accepted keys are remembered
	GlobalKnownHosts      []string
	HostKeyAlias          string // the name in known_hosts, if not HostName
	StrictHostKeyChecking string // yes, ask, accept-new, or no, which is accept-new here
	HashKnownHosts        bool
	AliveInterval         time.Duration // 0: the server is not asked whether it is there
	AliveCountMax         int
	ConnectTimeout        time.Duration // for the connection, and then for the handshake
	Warnings              []string      // what in the files could not be followed

	explicitKeys bool   // IdentityFiles were given, not found
	alias        string // what the user calls the host
}

// Env is what settings depend on beside files.
type Env struct {
	Home   string                           // where ~ is; empty: nothing is read from there
	Lookup func(name string) (string, bool) // environment variables; nil: none
	User   string                           // who runs this; empty: unknown
}

// SystemEnv returns the Env of this process. A nil lookup is [os.LookupEnv].
func SystemEnv(lookup func(string) (string, bool)) Env {
	if lookup == nil {
		lookup = os.LookupEnv
	}
	e := Env{Lookup: lookup}
	u, err := user.Current()
	if err == nil {
		e.Home, e.User = u.HomeDir, u.Username
	}
	if home, ok := lookup("HOME"); ok && home != "" {
		e.Home = home
	}
	return e
}

func (e Env) get(name string) string {
	if e.Lookup == nil {
		return ""
	}
	v, _ := e.Lookup(name)
	return v
}

// SystemConfig is the configuration file of the machine.
const SystemConfig = "/etc/ssh/ssh_config"

// ConfigFiles returns the files that ssh(1) would read: the user's, then the machine's.
func (e Env) ConfigFiles() []string {
	if e.Home == "" {
		return []string{SystemConfig}
	}
	return []string{filepath.Join(e.Home, ".ssh", "config"), SystemConfig}
}

// Asked is what was asked for beside the files. Its zero values leave it to those.
type Asked struct {
	Host         string // a name, or an alias in the files
	Port         uint16
	User         string
	IdentityFile string // offered first
	KnownHosts   string // in place of the user's files
}

// ReadSettings returns the settings for a host: what was asked for, then what the files say, the first
// one first, then defaults. Files that are not there are passed over. An error names the file and the line.
func ReadSettings(files []string, env Env, a Asked) (Settings, error) {
	r := &configReader{host: a.Host, user: a.User, env: env, values: make(map[string][]value)}
	for _, f := range files {
		if err := r.read(f); err != nil {
			return Settings{}, err
		}
	}
	return r.settings(a)
}

func (r *configReader) settings(a Asked) (Settings, error) {
	s := Settings{alias: a.Host, Warnings: r.warnings}
	x := expander{env: r.env, host: a.Host, alias: a.Host}
	var err error
	try := func(e error) {
		if err == nil {
			err = e
		}
	}
	s.HostName = strings.ToLower(a.Host)
	if v, ok := r.first("hostname"); ok {
		var e error
		s.HostName, e = x.expand(v, "%h")
		try(e)
	}
	x.host = s.HostName
	s.Port = a.Port
	if v, ok := r.first("port"); ok && s.Port == 0 {
		n, _ := strconv.ParseUint(v.text, 10, 16) // checked as it was read
		s.Port = uint16(n)
	}
	if s.Port == 0 {
		s.Port = 22
	}
	x.port = s.Port
	s.User = a.User
	if v, ok := r.first("user"); ok && s.User == "" {
		s.User = v.text
	}
	if s.User == "" {
		s.User = r.env.User
	}
	x.user = s.User

	files := func(key string) (all []string) {
		for _, v := range r.values[key] {
			if strings.EqualFold(v.text, "none") {
				continue
			}
			f, e := x.path(v)
			try(e)
			all = append(all, f)
		}
		return all
	}
	s.IdentityFiles = files("identityfile")
	s.explicitKeys = len(r.values["identityfile"]) > 0
	if a.IdentityFile != "" {
		f, e := x.path(value{text: a.IdentityFile})
		try(e)
		s.IdentityFiles, s.explicitKeys = append([]string{f}, s.IdentityFiles...), true
	}
	if !s.explicitKeys && r.env.Home != "" {
		for _, name := range []string{"id_rsa", "id_ecdsa", "id_ed25519"} {
			s.IdentityFiles = append(s.IdentityFiles, filepath.Join(r.env.Home, ".ssh", name))
		}
	}
	s.CertificateFiles = files("certificatefile")
	s.IdentitiesOnly = r.yes("identitiesonly")
	s.HashKnownHosts = r.yes("hashknownhosts")
	s.IdentityAgent = r.env.get("SSH_AUTH_SOCK")
	if v, ok := r.first("identityagent"); ok {
		switch {
		case v.text == "none":
			s.IdentityAgent = ""
		case v.text == "SSH_AUTH_SOCK":
		case strings.HasPrefix(v.text, "$") && !strings.HasPrefix(v.text, "${"):
			s.IdentityAgent = r.env.get(v.text[1:])
		default:
			var e error
			s.IdentityAgent, e = x.path(v)
			try(e)
		}
	}
	s.UserKnownHosts = files("userknownhostsfile")
	if _, given := r.first("userknownhostsfile"); !given && r.env.Home != "" {
		dir := filepath.Join(r.env.Home, ".ssh")
		s.UserKnownHosts = []string{filepath.Join(dir, "known_hosts"), filepath.Join(dir, "known_hosts2")}
	}
	if a.KnownHosts != "" {
		f, e := x.path(value{text: a.KnownHosts})
		try(e)
		s.UserKnownHosts = []string{f}
	}
	s.GlobalKnownHosts = files("globalknownhostsfile")
	if _, given := r.first("globalknownhostsfile"); !given {
		s.GlobalKnownHosts = []string{"/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2"}
	}
	if v, ok := r.first("hostkeyalias"); ok {
		s.HostKeyAlias = v.text
	}
	s.StrictHostKeyChecking = "ask"
	if v, ok := r.first("stricthostkeychecking"); ok {
		s.StrictHostKeyChecking = strings.ToLower(v.text)
	}
	s.AliveInterval, s.AliveCountMax, s.ConnectTimeout = DefaultAliveInterval, DefaultAliveCountMax, DefaultConnectTimeout
	if v, ok := r.first("serveraliveinterval"); ok {
		s.AliveInterval = seconds(v.text)
	}
	if v, ok := r.first("serveralivecountmax"); ok {
		s.AliveCountMax, _ = strconv.Atoi(v.text)
	}
	if v, ok := r.first("connecttimeout"); ok && seconds(v.text) > 0 {
		s.ConnectTimeout = seconds(v.text)
	}
	jump, jumps := r.first("proxyjump")
	command, commands := r.first("proxycommand")
	switch {
	case jumps && !strings.EqualFold(jump.text, "none") && (!commands || jump.order < command.order):
		s.ProxyJump = strings.Split(jump.text, ",")
	case commands && !strings.EqualFold(command.text, "none") && (!jumps || command.order < jump.order):
		try(command.errorf("ProxyCommand is not supported: reach the server by ProxyJump, or through other hops"))
	}
	return s, err
}

// keyName is the name by which known_hosts knows the server.
func (s *Settings) keyName() string {
	if s.HostKeyAlias != "" {
		return s.HostKeyAlias
	}
	return strings.ToLower(s.HostName)
}

// explicit says whether the key file at path was asked for, so that it is missed if it is not there.
func (s *Settings) explicit(path string) bool {
	return s.explicitKeys && slices.Contains(s.IdentityFiles, path)
}

// sshArgs is how ssh(1) is told to go to the server.
func (s *Settings) sshArgs() string {
	var b strings.Builder
	if s.Port != 22 {
		fmt.Fprintf(&b, "-p %d ", s.Port)
	}
	name := s.alias
	if name == "" {
		name = s.HostName
	}
	return b.String() + name
}

// ParseHost reads [user@]host[:port], as it stands in ProxyJump; ssh:// may stand before it.
func ParseHost(text string) (a Asked, err error) {
	rest := strings.TrimPrefix(strings.TrimSpace(text), "ssh://")
	if i := strings.LastIndexByte(rest, '@'); i >= 0 {
		a.User, rest = rest[:i], rest[i+1:]
	}
	a.Host = rest
	if host, port, e := net.SplitHostPort(rest); e == nil {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return Asked{}, fmt.Errorf("%q: port %q is not a number from 1 to 65535", text, port)
		}
		a.Host, a.Port = host, uint16(n)
	}
	a.Host = strings.TrimSuffix(strings.TrimPrefix(a.Host, "["), "]")
	if a.Host == "" || strings.HasPrefix(a.Host, "-") || strings.ContainsAny(a.Host, " \t\r\n/@\x00") {
		return Asked{}, fmt.Errorf("%q is not of the form [user@]host[:port]", text)
	}
	return a, nil
}
