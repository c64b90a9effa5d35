//go:build unix

package sshlink

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

const exampleConfig = `
# comments, and odd spacing
Include conf.d/a*.conf
Host=bastion   # a comment
	HostName bastion.example.com
	Port = 2222
	User "bob"
Host web? !web9 *.int
    User carol
    ProxyJump bastion,ann@hop2:2200
    IdentityFile ~/.ssh/%r-key
    IdentityFile "/keys/with space"
    CertificateFile /keys/%h-cert.pub
    Include conf.d/web.conf
Match host bastion.example.com user bob
    ServerAliveInterval 7
    ServerAliveCountMax 9
Match originalhost direct !user root
    ConnectTimeout 21
    ProxyJump none
Host *
    User nobody
    StrictHostKeyChecking accept-new
    UserKnownHostsFile ~/kh1 "~/kh2"
    IdentitiesOnly yes
    HashKnownHosts yes
    ForwardAgent no
    SomethingNew with values
`

const includedConfig = `Host inc direct
    HostName %h.example.com
    IdentityAgent ${SOCK}
    HostKeyAlias known-as
`

// exampleHome is a home directory with the example in it.
func exampleHome(t testing.TB) Env {
	t.Helper()
	home := t.TempDir()
	os.MkdirAll(filepath.Join(home, ".ssh", "conf.d"), 0o700)
	proxytest.WriteFile(t, filepath.Join(home, ".ssh", "config"), exampleConfig)
	proxytest.WriteFile(t, filepath.Join(home, ".ssh", "conf.d", "a.conf"), includedConfig)
	proxytest.WriteFile(t, filepath.Join(home, ".ssh", "conf.d", "web.conf"), "Host other\n  Port 1\nHost *\n  Port 443\n")
	return Env{Home: home, User: "me", Lookup: func(name string) (string, bool) {
		return map[string]string{"SOCK": "/run/agent"}[name], name == "SOCK"
	}}
}

func TestSettings(t *testing.T) {
	env := exampleHome(t)
	get := func(host string) Settings {
		t.Helper()
		s, err := ReadSettings(env.ConfigFiles()[:1], env, Asked{Host: host})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	b := get("bastion")
	if b.HostName != "bastion.example.com" || b.Port != 2222 || b.User != "bob" || b.AliveInterval != 7*time.Second ||
		b.AliveCountMax != 9 || !b.IdentitiesOnly || !b.HashKnownHosts || b.StrictHostKeyChecking != "accept-new" {
		t.Errorf("bastion: %+v", b)
	}
	w := get("web1")
	if w.User != "carol" || !slices.Equal(w.ProxyJump, []string{"bastion", "ann@hop2:2200"}) || w.Port != 443 ||
		!slices.Equal(w.IdentityFiles, []string{env.Home + "/.ssh/carol-key", "/keys/with space"}) ||
		!slices.Equal(w.CertificateFiles, []string{"/keys/web1-cert.pub"}) ||
		!slices.Equal(w.UserKnownHosts, []string{env.Home + "/kh1", env.Home + "/kh2"}) {
		t.Errorf("web1: %+v", w)
	}
	if s := get("web9"); s.User != "nobody" || len(s.ProxyJump) != 0 {
		t.Errorf("web9: %+v", s)
	}
	d := get("direct")
	if d.HostName != "direct.example.com" || d.IdentityAgent != "/run/agent" || d.HostKeyAlias != "known-as" ||
		d.ConnectTimeout != 21*time.Second || d.AliveInterval != DefaultAliveInterval {
		t.Errorf("direct: %+v", d)
	}
	s, err := ReadSettings(nil, env, Asked{Host: "h", Port: 9, User: "u", IdentityFile: "~/k", KnownHosts: "/kh"})
	if err != nil || s.Port != 9 || s.User != "u" || !slices.Equal(s.IdentityFiles, []string{env.Home + "/k"}) ||
		!slices.Equal(s.UserKnownHosts, []string{"/kh"}) {
		t.Errorf("asked: %+v, %v", s, err)
	}
}

// TestSettingsAgreeWithSSH compares what we read with what ssh -G says.
func TestSettingsAgreeWithSSH(t *testing.T) {
	proxytest.Need(t, "ssh")
	env := exampleHome(t)
	config := filepath.Join(env.Home, "config") // ssh -G knows no other home than the real one
	text := strings.NewReplacer("~/", env.Home+"/", "conf.d/", filepath.Join(env.Home, ".ssh/conf.d")+"/",
		"SomethingNew with values\n", "\n").Replace(exampleConfig)
	proxytest.WriteFile(t, config, text)
	for _, host := range []string{"bastion", "BASTION", "web1", "web9", "web10", "a.int", "direct", "inc", "other", "bastion.example.com"} {
		s, err := ReadSettings([]string{config}, env, Asked{Host: host})
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("ssh", "-G", "-F", config, host)
		cmd.Env = append(os.Environ(), "SOCK=/run/agent")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		theirs := make(map[string][]string)
		for line := range strings.Lines(string(out)) {
			key, v, _ := strings.Cut(strings.TrimSpace(line), " ")
			theirs[key] = append(theirs[key], v)
		}
		same := func(key string, ours ...string) {
			t.Helper()
			if want := theirs[key]; !slices.Equal(want, ours) && !(len(ours) == 1 && ours[0] == "" && len(want) == 0) {
				t.Errorf("%s: %s is %q, for ssh %q", host, key, ours, want)
			}
		}
		same("hostname", s.HostName)
		same("port", fmt.Sprint(s.Port))
		same("user", s.User)
		same("proxyjump", strings.Join(s.ProxyJump, ","))
		same("userknownhostsfile", strings.Join(s.UserKnownHosts, " "))
		same("hostkeyalias", s.HostKeyAlias)
		same("identitiesonly", map[bool]string{true: "yes", false: "no"}[s.IdentitiesOnly])
		if theirs["serveraliveinterval"][0] != "0" {
			same("serveraliveinterval", fmt.Sprint(s.AliveInterval.Seconds()))
		}
		if theirs["connecttimeout"][0] != "none" {
			same("connecttimeout", fmt.Sprint(s.ConnectTimeout.Seconds()))
		}
		if s.explicitKeys {
			same("identityfile", len2(s.IdentityFiles, theirs["identityfile"])...)
		}
	}
}

// len2 returns ours with the tokens that ssh -G leaves as they are.
func len2(ours, theirs []string) []string {
	ours = slices.Clone(ours)
	for i := range ours {
		if i < len(theirs) && strings.Contains(theirs[i], "%r") {
			ours[i] = strings.Replace(ours[i], "carol", "%r", 1)
		}
	}
	return ours
}

func TestMalformedSettings(t *testing.T) {
	dir := t.TempDir()
	env := Env{Home: dir, User: "me"}
	file := filepath.Join(dir, "config")
	for text, want := range map[string]string{
		"\nPort\n":                               ":2: Port has no value",
		"Port x":                                 `:1: Port: port "x" is not a number`,
		"Port 0":                                 "port",
		"Host":                                   ":1: Host has no value",
		"Host a\nUser \"b":                       ":2: a quote is not closed",
		"Host zzz\n  Port 99999":                 ":2: Port", // also where it does not apply
		"Match":                                  "Match has no value",
		"Match nonsense x":                       `unknown criterion "nonsense"`,
		"Match host":                             "host has no value",
		"Match all user x":                       "all stands alone",
		"IdentitiesOnly perhaps":                 "neither yes nor no",
		"ServerAliveInterval -1":                 "is not a time",
		"StrictHostKeyChecking maybe":            "is not one of",
		"User a b":                               "more than one value",
		"IdentityFile %Z":                        ":1: unknown token %Z",
		"HostName %p":                            ":1: %p cannot stand here",
		"IdentityFile ${NOT_SET}":                "NOT_SET is not set",
		"ProxyCommand nc %h %p":                  ":1: ProxyCommand is not supported",
		"Include " + file:                        "too deep",
		"Include " + filepath.Join(dir, "inner"): filepath.Join(dir, "inner") + ":3: Port",
	} {
		proxytest.WriteFile(t, file, text+"\n")
		proxytest.WriteFile(t, filepath.Join(dir, "inner"), "# one\n\nPort none\n")
		_, err := ReadSettings([]string{file}, env, Asked{Host: "h"})
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), dir) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
	for _, text := range []string{"", "# x", "Host h\n\nHost g", "ProxyJump j\nProxyCommand nc", "ProxyCommand none", "Unknown\n",
		"Match exec \"false\"\n  Port 1"} {
		proxytest.WriteFile(t, file, text)
		if s, err := ReadSettings([]string{file}, env, Asked{Host: "h"}); err != nil || s.Port != 22 {
			t.Errorf("%q: %+v, %v", text, s, err)
		}
	}
	s, _ := ReadSettings([]string{file}, env, Asked{Host: "h"})
	if proxytest.WriteFile(t, file, "Match exec x\nPort 7"); len(s.Warnings) != 1 {
		t.Errorf("warnings: %q", s.Warnings)
	}
	if _, err := ReadSettings([]string{filepath.Join(dir, "absent")}, env, Asked{Host: "h"}); err != nil {
		t.Error(err)
	}
}

func TestParseHost(t *testing.T) {
	for text, want := range map[string]Asked{
		"h": {Host: "h"}, "u@h": {Host: "h", User: "u"}, "u@h:1": {Host: "h", User: "u", Port: 1}, "::1": {Host: "::1"},
		"[::1]:22": {Host: "::1", Port: 22}, "ssh://a@b@h:2": {Host: "h", User: "a@b", Port: 2}, " h ": {Host: "h"},
	} {
		if got, err := ParseHost(text); got != want || err != nil {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "u@", "h:0", "h:x", "-oProxyCommand=x", "a b", "h:99999", "h/x"} {
		if got, err := ParseHost(text); err == nil {
			t.Errorf("%q: %+v", text, got)
		}
	}
}

func FuzzSettings(f *testing.F) {
	f.Add(exampleConfig, "bastion")
	f.Add(includedConfig, "inc")
	f.Add("Match exec x\nHost \\\"a\"", "h")
	f.Add("IdentityFile ${X}%%%h$", "h")
	f.Fuzz(func(t *testing.T, text, host string) {
		if strings.Contains(strings.ToLower(text), "include") {
			return // it would read what is on this machine
		}
		r := &configReader{host: host, values: make(map[string][]value)}
		if err := r.parse("file", text, true, 0); err != nil {
			if !strings.HasPrefix(err.Error(), "file:") {
				t.Errorf("no place in %v", err)
			}
			return
		}
		if s, err := r.settings(Asked{Host: host}); err == nil && (s.Port == 0 || s.AliveCountMax < 1 || s.AliveInterval < 0) {
			t.Errorf("%q: %+v", text, s)
		}
	})
}

func TestMatchPattern(t *testing.T) {
	for _, tt := range []struct {
		p, s string
		want bool
	}{
		{"*", "", true}, {"", "", true}, {"", "a", false}, {"a?c", "abc", true}, {"a?c", "ac", false}, {"*.b", "a.b", true},
		{"a*b*c", "axxbyyc", true}, {"a*b*c", "axxbyy", false}, {"**a**", "a", true}, {"?", "", false},
	} {
		if got := matchPattern(tt.p, tt.s); got != tt.want {
			t.Errorf("%q matches %q: %v", tt.p, tt.s, got)
		}
	}
}
