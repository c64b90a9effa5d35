//go:build unix

package config

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/sluice-proxy/sluice/internal/inbound"
	"github.com/sluice-proxy/sluice/internal/outbound"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// sshHome makes a home directory with a configuration of ssh.
func sshHome(t *testing.T, config string) map[string]string {
	t.Helper()
	home := t.TempDir()
	os.Mkdir(filepath.Join(home, ".ssh"), 0o700)
	writeFile(t, filepath.Join(home, ".ssh"), "config", config)
	return map[string]string{"HOME": home}
}

func dialerOf(b Bound) proxy.Dialer { return b.Router.(proxy.Static).Dialer }

func TestSSHHops(t *testing.T) {
	env := sshHome(t, "Host bastion\n  HostName b.example.com\n  User ann\n  Port 2200\n")
	bounds := build(t, t.TempDir(), `
inbounds:
- {type: socks5, listen: 1, via: ["ssh://bastion"]}
- {type: socks5, listen: 2, via: ["ssh://bastion"]}
- {type: socks5, listen: 3, via: ["ssh://bob@bastion:22?identity-file=~/key&keep=true"]}
- {type: reverse, listen: 9000, to: 3000, via: [named]}
- {type: reverse, listen: 9000, to: 3001, via: [named]} # at another place than this machine
outbounds:
- {name: named, type: ssh, host: bastion, ssh-config: none}
`, env)
	one, two := dialerOf(bounds[0]).(*outbound.SSH), dialerOf(bounds[1]).(*outbound.SSH)
	if one != two {
		t.Error("two inbounds do not share the link to one server")
	}
	if s := one.Link.Settings; s.HostName != "b.example.com" || s.User != "ann" || s.Port != 2200 || one.Link.Keep {
		t.Errorf("bastion: %+v", s)
	}
	three := dialerOf(bounds[2]).(*outbound.SSH).Link
	if s := three.Settings; s.User != "bob" || s.Port != 22 || !three.Keep || s.IdentityFiles[0] != env["HOME"]+"/key" {
		t.Errorf("bob: %+v", s)
	}
	r := bounds[3].Inbound.(*inbound.Reverse)
	if r.Link.Settings.HostName != "bastion" || r.Link != bounds[4].Inbound.(*inbound.Reverse).Link || r.To != proxy.TCP("127.0.0.1", 3000) {
		t.Errorf("reverse: %+v", r)
	}
	if _, ok := dialerOf(bounds[3]).(*outbound.Direct); !ok {
		t.Errorf("reverse dials by %T", dialerOf(bounds[3]))
	}
}

func TestSSHErrors(t *testing.T) {
	env := sshHome(t, "Host ok\n\nHost *\n  Port none\n")
	for file, want := range map[string]string{
		"- {type: socks5, listen: 1, via: ['ssh://h']}":                                    ".ssh/config:4: Port",
		"- {type: socks5, listen: 1, via: ['ssh://a:b@h']}":                                "password in a URL",
		"- {type: socks5, listen: 1, via: ['ssh://h?ca-file=x']}":                          `unknown key "ca-file"`,
		"- {type: socks5, listen: 1, via: ['ssh://h?ssh-config=/absent']}":                 "ssh-config:",
		"- {type: socks5, listen: 1, via: ['ssh://h?ssh-config=none&password-env=UNSET']}": "UNSET is not set",
		"- {type: socks5, listen: 1, via: ['ssh://']}":                                     "not of the form",
		"- {type: reverse, listen: 1, to: 2}":                                              "inbounds[0].via: missing",
		"- {type: reverse, listen: 1, to: 2, via: [direct]}":                               "must be the last hop",
		"- {type: reverse, listen: 1, to: 2, via: ['ssh://h'], accept-proxy: true}":        "accept-proxy: does not apply",
		"- {type: reverse, listen: 1, to: 2, via: ['ssh://h'], mode: 0600}":                "mode: does not apply",
	} {
		c, err := Load("s.yaml", []byte("inbounds:\n"+file+"\n"))
		if err == nil {
			_, err = c.Build(nil, func(k string) (string, bool) { v, ok := env[k]; return v, ok })
		}
		if err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "s.yaml:2: ") {
			t.Errorf("%s: %v, want %s", file, err, want)
		}
	}
}

// TestProxyJump goes through two jump hosts that the configuration of ssh names, and through the same
// ones as hops.
func TestProxyJump(t *testing.T) {
	proxytest.NoLeaks(t)
	servers := []*proxytest.SSHD{proxytest.StartSSHD(t), proxytest.StartSSHD(t), proxytest.StartSSHD(t)}
	var config strings.Builder
	for i, s := range servers {
		fmt.Fprintf(&config, "Host s%d\n  HostName %s\n  Port %d\n  IdentityFile %s\n  UserKnownHostsFile %s\n  User root\n",
			i, s.Addr.Host, s.Addr.Port, s.UserKey, s.KnownHosts)
	}
	config.WriteString("Host jumping\n  HostName 127.0.0.1\n  ProxyJump s0,s1\n")
	fmt.Fprintf(&config, "  Port %d\n  IdentityFile %s\n  UserKnownHostsFile %s\n  User root\n",
		servers[2].Addr.Port, servers[2].UserKey, servers[2].KnownHosts)
	config.WriteString("Host circle\n  ProxyJump circle\n")
	env := sshHome(t, config.String())
	origin := proxytest.Listen(t, "tcp", proxytest.AfterEOF(func(b []byte) []byte { return append(b, " back"...) }))
	bounds := build(t, t.TempDir(), `
inbounds:
- {type: socks5, listen: 1, via: ["ssh://jumping"]}
- {type: socks5, listen: 2, via: ["ssh://s0", "ssh://s1", "ssh://s2"]}
`, env)
	defer func() {
		for i := range bounds {
			bounds[i].Close()
		}
	}()
	for _, b := range bounds {
		ctx, cancel := context.WithTimeout(context.Background(), proxytest.Patience)
		defer cancel()
		c, err := dialerOf(b).DialStream(ctx, origin.Addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, "there and")
		c.(interface{ CloseWrite() error }).CloseWrite()
		if got, err := io.ReadAll(c); string(got) != "there and back" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		if _, err := dialerOf(b).DialStream(ctx, proxy.TCP("127.0.0.1", proxytest.FreePort(t))); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Error(err)
		}
	}
	c, err := Load("s.yaml", []byte("inbounds: [{type: socks5, listen: 1, via: ['ssh://circle']}]"))
	if err == nil {
		_, err = c.Build(nil, func(k string) (string, bool) { v, ok := env[k]; return v, ok })
	}
	if err == nil || !strings.Contains(err.Error(), "circle") {
		t.Errorf("a host that is its own jump host: %v", err)
	}
}

// TestSSHHostKeepsSecrets checks that a password which somebody writes in front of a host is not in the error.
func TestSSHHostKeepsSecrets(t *testing.T) {
	for _, s := range []string{"me:secret@h", "ssh://me:secret@h:22", "me:secret@h:no", "me:secret@"} {
		if err := new(SSHHost).UnmarshalText([]byte(s)); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", s, err)
		}
	}
}
