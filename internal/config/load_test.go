package config

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// loadEvery loads the fixture that sets every key.
func loadEvery(t *testing.T) *Config {
	t.Helper()
	c, err := ReadFile("testdata/every.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestFixtureSetsEveryField keeps testdata/every.yaml, and with it the other tests, complete.
func TestFixtureSetsEveryField(t *testing.T) {
	c := loadEvery(t)
	var check func(path string, values []reflect.Value)
	check = func(path string, values []reflect.Value) {
		typ := values[0].Type()
		for i := range typ.NumField() {
			if !typ.Field(i).IsExported() {
				continue
			}
			name := path + typ.Field(i).Name
			if typ.Field(i).Tag.Get("yaml") == "" {
				t.Errorf("%s has no key", name)
			}
			set := false
			var below []reflect.Value
			for _, v := range values {
				f := v.Field(i)
				set = set || !f.IsZero()
				switch {
				case f.Kind() == reflect.Struct && f.Type() == reflect.TypeFor[Log]():
					below = append(below, f)
				case f.Kind() == reflect.Slice && f.Type().Elem().Kind() == reflect.Struct && !reflect.PointerTo(f.Type().Elem()).Implements(reflect.TypeFor[encoding.TextUnmarshaler]()):
					for j := range f.Len() {
						below = append(below, f.Index(j))
					}
				}
			}
			if !set {
				t.Errorf("testdata/every.yaml does not set %s", name)
			}
			if below != nil {
				check(name+".", below)
			}
		}
	}
	check("Config.", []reflect.Value{reflect.ValueOf(*c)})
	for _, n := range InboundTypes() {
		if !strings.Contains(read(t, "testdata/every.yaml"), "type: "+n+"\n") {
			t.Errorf("testdata/every.yaml has no inbound of type %s", n)
		}
	}
}

// TestRoundTrip prints what was loaded and loads what was printed.
func TestRoundTrip(t *testing.T) {
	c := loadEvery(t)
	var out bytes.Buffer
	if err := c.Print(&out); err != nil {
		t.Fatal(err)
	}
	again, err := Load("testdata/again.yaml", out.Bytes())
	if err != nil {
		t.Fatalf("%v\nin:\n%s", err, &out)
	}
	c.src, again.src = source{}, source{}
	if !reflect.DeepEqual(c, again) {
		t.Errorf("printed and loaded again it differs:\n%+v\n%+v\nprinted:\n%s", c, again, &out)
	}
}

func TestValues(t *testing.T) {
	c := loadEvery(t)
	var printed bytes.Buffer
	if err := c.Print(&printed); err != nil {
		t.Fatal(err)
	}
	for _, check := range []struct{ name, got, want string }{
		{"idle", c.Idle.String(), "1h30m"},
		{"half-open", c.HalfOpen.String(), "off"},
		{"half-open limit", c.HalfOpen.Limit().String(), "-1ns"},
		{"grace 0", c.Grace.Wait().String(), "0s"},
		{"busy-poll", c.BusyPoll.String(), "50us"}, // not the Greek letter
		{"rate-per-session", c.Inbounds[0].RatePerSession.String(), "10MB/s"},
		{"rate", c.Inbounds[0].Rate.String(), "100MiB/s"},
		{"quota-per-session", c.Inbounds[0].QuotaPerSession.String(), "1GiB"},
		{"listen 8080", c.Inbounds[0].Listen.String(), "127.0.0.1:8080"},
		{"an address among networks", c.Inbounds[0].Allow[1].String(), "192.0.2.7/32"},
		{"default name", c.Inbounds[1].Name, "socks5@:1080"},
		{"to 5432", c.Inbounds[4].To.String(), "127.0.0.1:5432"},
		{"port 0", c.Inbounds[5].Listen.String(), "127.0.0.1:0"},
		{"bind", c.Outbounds[2].Bind.Addr().String(), "10.0.0.5"},
	} {
		if check.got != check.want {
			t.Errorf("%s: %s, want %s", check.name, check.got, check.want)
		}
	}
	if c.Outbounds[2].Mark != 7 || c.Inbounds[0].MaxConns != 1000 {
		t.Errorf("mark %d and max-conns %d, want 7 and 1000", c.Outbounds[2].Mark, c.Inbounds[0].MaxConns)
	}
	if strings.Contains(printed.String(), "@") {
		t.Errorf("a default name was printed:\n%s", &printed)
	}
}

func TestDefaults(t *testing.T) {
	c, err := Load("a.yaml", []byte("inbounds: [{type: mixed, listen: 1080}]"))
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Log:              Log{Level: "info", Format: "auto"},
		Idle:             Duration(2*time.Hour + 4*time.Minute),
		HalfOpen:         Duration(4 * time.Minute),
		DialTimeout:      Duration(10 * time.Second),
		HandshakeTimeout: Duration(10 * time.Second),
		Grace:            Duration(30 * time.Second),
		BusyPoll:         Off,
		Inbounds: []Inbound{{Name: "mixed@127.0.0.1:1080", Type: "mixed",
			Listen: Listen{Network: "tcp", Host: "127.0.0.1", Port: 1080}}},
	}
	c.src = source{}
	if !reflect.DeepEqual(*c, want) {
		t.Errorf("got  %+v\nwant %+v", *c, want)
	}
}

// The place to listen at says that a forward is one of datagrams.
func TestForwardOfDatagrams(t *testing.T) {
	for _, to := range []string{"192.0.2.1:53", "udp://192.0.2.1:53"} {
		c, err := Load("a.yaml", []byte("inbounds: [{type: forward, listen: 'udp://53', to: '"+to+"'}, {type: mixed, listen: 53}]"))
		if err != nil {
			t.Fatal(err)
		}
		if in := c.Inbounds[0]; in.To.String() != "udp://192.0.2.1:53" || in.Name != "forward@udp://127.0.0.1:53" {
			t.Errorf("%+v", in)
		}
	}
}

// TestErrors loads files that are wrong. Each line of a file says in a comment what is wrong with it;
// complaints that belong to no line in particular are in more.
func TestErrors(t *testing.T) {
	for _, test := range []struct{ name, file, more string }{
		{"empty", "", "s.yaml: inbounds: missing: nothing to listen at"},
		{"comment only", "# nothing\n", "s.yaml: inbounds: missing: nothing to listen at"},
		{"not keys", "- 1", "s.yaml:1: expected keys with values, found a list\ns.yaml:1: inbounds: missing: nothing to listen at"},
		{"syntax", "log: {level: info\n", "s.yaml:1: could not find flow mapping end token '}'"},
		{"tab", "log:\n\tlevel: info\n", "s.yaml:2: found character '\t' that cannot start any token"},
		{"documents", "idle: 1s\n---\nidle: 2s\n", "s.yaml: more than one document (---) in the file"},
		{"IPv6 without quotes", "inbounds:\n- type: mixed\n  listen: [::1]:1080\n",
			`s.yaml:3: value is not allowed in this context (an IPv6 address needs quotes, as in "[::1]:1080")`},
		{"anchor", "idle: &x 1s # idle: anchors, aliases and tags (& * << !) are not supported: text that begins with one of these needs quotes\n" +
			"inbounds: [{type: mixed, listen: 1}]\n", ""},
		{"merge", "inbounds:\n- type: mixed\n  listen: 1\n  <<: {open: true} # inbounds[0]: a key must be a plain word\n", ""},
		{"top level", `
log: debug           # log: expected keys with values, found "debug"
idel: 4m             # idel: unknown key (did you mean idle?)
idle: 4              # idle: "4" is not a duration (as in 90s, 4m, 2h30m, off)
half-open: -4m       # half-open: "-4m" is negative (write off for no limit)
dial-timeout: 0      # dial-timeout: cannot be switched off: a destination that never answers would hold its client for ever
handshake-timeout: off # handshake-timeout: cannot be switched off: clients that never say what they want would pile up
grace: [1s]          # grace: expected one value, found a list
grace: 1s            # grace: given twice: first on line 8
busy-poll: 5ms       # busy-poll: 5ms is too long: 1ms at most, and 50us is a good value
inbounds:            # inbounds: has no value: give one or remove the key
`, ""},
		{"datagrams", `
inbounds:
- type: mixed
  listen: udp://1080 # inbounds[0].listen: type mixed takes streams in, and udp:// is for type forward
- type: forward
  listen: 1
  to: udp://192.0.2.1:53 # inbounds[1].to: udp://192.0.2.1:53 takes datagrams, and 127.0.0.1:1 streams: listen at udp:// as well
- type: forward
  listen: udp://1
  to: unix:///run/x # inbounds[2].to: unix:///run/x takes no datagrams
  mode: 0660        # inbounds[2].mode: is for Unix sockets (listen: unix:///path)
  send-proxy: v1    # inbounds[2].send-proxy: does not apply to datagrams
  accept-proxy: true # inbounds[2].accept-proxy: does not apply to datagrams
- type: forward
  listen: udp://2
  to: 192.0.2.1:53
  via: ["socks5://10.0.0.1:1", "http://10.0.0.2:2"] # inbounds[3].via: http://10.0.0.2:2 carries streams only, and udp://127.0.0.1:2 takes datagrams in
`, ""},
		{"log", `
log:
  level: loud  # log.level: "loud" is not one of debug, info, warn, error
  format: xml  # log.format: "xml" is not one of auto, text, json
inbounds: [{type: mixed, listen: 1}]
`, ""},
		{"inbounds", `
inbounds:
- type: sock5       # inbounds[0].type: unknown type "sock5" (did you mean socks5?)
- listen: 1         # inbounds[1].type: missing (one of forward, socks5, http, mixed, reverse, redirect, tproxy, tun)
- type: forward     # inbounds[2].listen: missing # inbounds[2].to: missing
  open: true        # inbounds[2].open: does not apply to type forward
  max-conns: -1     # inbounds[2].max-conns: -1 is negative (remove the key for no limit)
- type: forward
  listen: localhost # inbounds[3].listen: address "localhost": missing port (as in localhost:80)
  to: 0             # inbounds[3].to: address "0": port 0 cannot be connected to
  send-proxy: v3    # inbounds[3].send-proxy: "v3" is not one of v1, v2
  accept-proxy: yes # inbounds[3].accept-proxy: "yes" is neither true nor false
  mode: 0888        # inbounds[3].mode: "0888" is not the permissions of a file in octal (as in 0660)
  max-conns: many   # inbounds[3].max-conns: "many" is not a whole number
- type: http
  name: a b         # inbounds[4].name: not a name: up to 64 letters, digits and . _ -
  listen: 1080
  to: 80            # inbounds[4].to: does not apply to type http
  mode: 0660        # inbounds[4].mode: is for Unix sockets (listen: unix:///path)
  send-proxy: v1    # inbounds[4].send-proxy: does not apply to type http
- type: http
  name: x
  listen: 127.0.0.1:1080 # inbounds[5].listen: 127.0.0.1:1080 is taken by inbounds[4]
  allow: 10.0.0.0/8 # inbounds[5].allow: expected a list (as in [10.0.0.0/8]), found "10.0.0.0/8"
  deny: []          # inbounds[5].deny: the list is empty: give a value or remove the key
  rate: 10Mbit      # inbounds[5].rate: "10Mbit" is not a rate in bytes a second (a whole number with a unit, as in 500kB, 10MB, 1GiB)
  rate-per-session: 0MB/s # inbounds[5].rate-per-session: "0MB/s" is not more than zero (leave it out for no limit)
  quota-per-session: 1GB/s # inbounds[5].quota-per-session: "1GB/s" is not a size (a whole number with a unit, as in 500kB, 10MB, 1GiB)
- type: http
  name: x           # inbounds[6].name: x is the name of entry 5, too
  reuse-port: maybe # inbounds[6].reuse-port: "maybe" is neither true nor false
  listen: 1081
  allow:
  - 10.0.0.1/8      # inbounds[6].allow[0]: "10.0.0.1/8" has bits behind the prefix: write 10.0.0.0/8, or 10.0.0.1 for one address
  - ten             # inbounds[6].allow[1]: "ten" is not a network (as in 10.0.0.0/8) or an IP address
  - "::ffff:10.0.0.0/104" # inbounds[6].allow[2]: "::ffff:10.0.0.0/104" is an IPv4 network in IPv6 form: write it as IPv4
`, ""},
		{"shared ports", `
inbounds:
- {type: forward, listen: 80, to: 81, reuse-port: true}
- type: forward
  listen: 80 # inbounds[1].listen: 127.0.0.1:80 is taken by inbounds[0]
  to: 81
  reuse-port: true
- type: socks5
  listen: unix:///run/x
  reuse-port: true # inbounds[2].reuse-port: is for TCP ports, and unix:///run/x is none
- type: reverse
  listen: 9000
  to: 81
  via: [ssh://h]
  reuse-port: true # inbounds[3].reuse-port: does not apply to type reverse
`, ""},
		{"open proxies", `
inbounds:
- type: mixed
  listen: :1080       # inbounds[0].listen: a proxy on :1080 is open to everyone who can reach this machine: give users-file (lines of name:password), or open: true if that is meant, or listen on loopback
- type: socks5
  listen: 10.0.0.1:1080 # inbounds[1].listen: a proxy on 10.0.0.1:1080 is open to everyone who can reach this machine: give users-file (lines of name:password), or open: true if that is meant, or listen on loopback
- type: http
  listen: "[::]:1080" # inbounds[2].listen: a proxy on [::]:1080 is open to everyone who can reach this machine: give users-file (lines of name:password), or open: true if that is meant, or listen on loopback
- type: http
  listen: :1082
  open: true          # inbounds[3].open: contradicts the list of users: remove one
  users-file: users
- type: http
  listen: :1083
  users-file: users
  users-env: USERS    # inbounds[4].users-env: one of users-file and users-env, not both
- type: http
  listen: :1084
  users-file: ""      # inbounds[5].users-file: is empty: give a value or remove the key
- {type: http, listen: localhost:1085}
- {type: http, listen: unix:///run/x}
- {type: forward, listen: :80, to: 81}
`, ""},
		{"via", `
inbounds:
- type: mixed
  listen: 1
  via: corp              # inbounds[0].via: expected a list (as in [corp]), found "corp"
- type: mixed
  listen: 2
  via:
  - crop                 # inbounds[1].via[0]: no outbound is called crop (did you mean corp?)
  - bob:secret@corp:1    # inbounds[1].via[1]: neither the name of an outbound nor a URL (as in socks5://host:port)
  - socks5://bob:secret@corp:1 # inbounds[1].via[2]: a password in a URL can be seen by everyone who lists processes or reads the file: write socks5://bob@corp:1?password-file=PATH or ?password-env=NAME
  - socks5://bob:se/cret@corp:1 # inbounds[1].via[3]: not a URL of the form socks5://host:port
  - socks5h://corp:1     # inbounds[1].via[4]: unknown kind of proxy "socks5h" (did you mean socks5?)
  - http://corp          # inbounds[1].via[5]: address "corp": missing port (as in corp:80)
  - http://corp:1/path   # inbounds[1].via[6]: nothing may follow host:port but ?key=value (as in socks5://host:port)
  - http://corp:1?ca-file=x # inbounds[1].via[7]: unknown key "ca-file" (known: password-file, password-env)
  - https://corp:1?ca-file=x&ca-file=y # inbounds[1].via[8]: ca-file is given twice
  - socks5://bob@corp:1  # inbounds[1].via[9]: user bob has no password: add ?password-file=PATH or ?password-env=NAME
  - http://corp:1?password-env=P # inbounds[1].via[10]: a password without a user
  - {name: corp}         # inbounds[1].via[11]: expected one value, found keys with values
  - direct://            # inbounds[1].via[12]: unknown kind of proxy "direct" (known: socks5, http, https, ssh)
- type: mixed
  listen: 3
  via: [corp, direct]    # inbounds[2].via: direct is a direct way and can only be the first hop
- {type: mixed, listen: 4, via: [direct, corp]}
- {type: mixed, listen: 5, via: [reject]}
- type: mixed
  listen: 6
  via: [corp,corp,corp,corp,corp,corp,corp,corp,corp,corp,corp,corp,corp,corp,corp,corp,corp] # inbounds[5].via: more than 16 hops
outbounds:
- {name: corp, type: http, server: corp:3128}
`, ""},
		{"outbounds", `
inbounds: [{type: mixed, listen: 1}]
outbounds:
- type: socks        # outbounds[0].name: missing # outbounds[0].type: unknown type "socks" (did you mean socks5?)
- name: a            # outbounds[1].type: missing (one of direct, socks5, http, https, ssh, reject, group)
- name: a            # outbounds[2].name: a is the name of entry 1, too # outbounds[2].server: missing
  type: http
- name: b
  type: direct
  server: x:1        # outbounds[3].server: does not apply to type direct
  bind: here         # outbounds[3].bind: "here" is not an IP address
- name: c
  type: direct
  mark: -1           # outbounds[4].mark: -1 is not a number from 0 to 0xffffffff
- name: d            # outbounds[5]: one of password-file and password-env, not both
  type: socks5
  server: x:1
  user: bob
  password-file: x
  password-env: x
  password: secret   # outbounds[5].password: secrets do not stand in the configuration: use password-file or password-env
- name: e            # outbounds[6]: user bob has no password: give password-file or password-env
  type: socks5
  server: x:1
  user: bob
- name: e/e          # outbounds[7].name: not a name: up to 64 letters, digits and . _ -
  type: reject
  via: [a]           # outbounds[7].via: does not apply to type reject
- name: f            # outbounds[8]: a Unix socket cannot be reached through a proxy: remove via
  type: http
  server: unix:///run/x
  via: [d]
- {name: g, type: https, server: "unix:///run/y"} # outbounds[9]: a Unix socket has no name that a certificate could have: give server-name
`, ""},
		{"circles", `
inbounds: [{type: mixed, listen: 1, via: [a]}]
outbounds:
- {name: a, type: http, server: "x:1", via: [b, c]}
- {name: b, type: http, server: "x:1", via: [b]} # outbounds[1].via: goes in a circle: b via b
- {name: c, type: http, server: "x:1", via: [a]} # outbounds[2].via: goes in a circle: a via c via a
`, ""},
		{"groups", `
inbounds: [{type: mixed, listen: 1, via: [g]}]
outbounds:
- {name: a, type: http, server: "x:1"}
- {name: g, type: group, members: [a, direct, "socks5://b:1"], check: "x:80"}
- name: empty          # outbounds[2].members: missing
  type: group
- name: h
  type: group
  members: [aa, h]     # outbounds[3].members[0]: no outbound is called aa (did you mean a?) # outbounds[3].members: goes in a circle: h via h
  policy: random       # outbounds[3].policy: "random" is not one of fallback, round-robin, least-latency
  interval: 10ms       # outbounds[3].interval: 10ms is too short: 100ms at least
  check: udp://x:53    # outbounds[3].check: udp://x:53 cannot be connected to through every member: give host:port
  via: [a]             # outbounds[3].via: does not apply to type group
- name: i
  type: group
  members: [g]
  policy: least-latency # outbounds[4].policy: least-latency needs check: a host:port to which the members' latency is measured
  interval: off        # outbounds[4].interval: off is too short: 100ms at least
  keep: true           # outbounds[4].keep: is of no use without check
`, ""},
		{"groups in chains", `
inbounds:
- type: mixed
  listen: 1
  via: [a, g]          # inbounds[0].via: g is a group and can only be the first hop: its members say how they are reached
- {type: mixed, listen: 2, via: [g, a]}
outbounds:
- {name: a, type: http, server: "x:1"}
- {name: g, type: group, members: [a, h]}
- {name: h, type: group, members: [direct]}
`, ""},
		{"capture", `
inbounds:
- {type: redirect, listen: 1, setup: true, from: [lan0]} # inbounds[0].from[0]: traffic from lan0 is redirected to an address of the interface where it comes in, and 127.0.0.1:1 is not one: listen at :1
- {type: redirect, listen: "10.0.0.1:2", setup: true} # inbounds[1].listen: traffic of this machine is redirected to its loopback address: listen at 2, or at :2
- {type: redirect, listen: "10.0.0.1:3", setup: true, from: [lan0]}
- {type: tproxy, listen: 4, include: [10.0.0.0/8]} # inbounds[3].include: is about the rules that setup: true makes, which is not given
- {type: tproxy, listen: "unix:///run/x"} # inbounds[4].listen: type tproxy listens at an IP address and port only
- {type: tproxy, listen: 5, setup: true, from: ["10.0.0.1/8", "x/y", "interface-of-lan"]} # inbounds[5].from[0]: "10.0.0.1/8" has bits behind the prefix: write 10.0.0.0/8, or 10.0.0.1 for one address # inbounds[5].from[1]: "x/y" is not local, the name of an interface or a network (as in 10.0.0.0/8) # inbounds[5].from[2]: "interface-of-lan" is not local, the name of an interface or a network (as in 10.0.0.0/8)
- {type: tproxy, listen: 6, accept-proxy: true} # inbounds[6].accept-proxy: does not apply to type tproxy
- {type: socks5, listen: 7, setup: true} # inbounds[7].setup: does not apply to type socks5
`, ""},
		{"rules", `
inbounds:
- {name: web, type: mixed, listen: 1}
- {name: far, type: reverse, listen: 1, to: 2, via: [ssh://x]}
rules:
- to: .corp.example    # rules[0].to: expected a list (as in [.corp.example]), found ".corp.example"
  via: [direct]
- to: [10.0.0.1/8]     # rules[1].to[0]: "10.0.0.1/8" has bits behind the prefix: write 10.0.0.0/8, or 10.0.0.1 for one address
  via: [dircet]        # rules[1].via[0]: no outbound is called dircet (did you mean direct?)
- port: [80, 90-80]    # rules[2].port[1]: "90-80" ends before it begins # rules[2].via: missing: where such flows go (as in [direct], [reject], or the name of an outbound)
  protocol: icmp       # rules[2].protocol: "icmp" is not one of tcp, udp
  process: ["a b/c"]   # rules[2].process[0]: "a b/c" is neither a program's name or path, nor uid:NUMBER, nor cgroup:/PATH
- inbound: [wbe]       # rules[3].inbound[0]: no inbound is called wbe (known: web, far)
  from: [ten]          # rules[3].from[0]: "ten" is not a network (as in 10.0.0.0/8) or an IP address
  use: direct          # rules[3].use: unknown key (did you mean user?)
  via: [direct]
- inbound: [far]       # rules[4].inbound[0]: far is of type reverse, which goes to one destination from here
  via: [direct]
- via: [reject]
- to: [*.internal]     # rules[6].to[0]: anchors, aliases and tags (& * << !) are not supported: text that begins with one of these needs quotes # rules[6]: is never reached: rules[5] matches every flow
  via: [direct]
`, ""},
		{"rules that are never reached", `
inbounds: [{type: mixed, listen: 1}]
rules:
- {to: [a.example], port: [1], via: [direct]}
- {to: [a.example], port: [1, 2], via: [direct]}
- {to: [a.example], port: [1], via: [reject]} # rules[2]: is never reached: rules[0] has the same conditions
- via: [reject]
- {port: [1], via: [direct]} # rules[4]: is never reached: rules[3] matches every flow
`, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			var want []string
			for i, line := range strings.Split(test.file, "\n") {
				for _, complaint := range strings.Split(line, " # ")[1:] {
					want = append(want, "s.yaml:"+strconv.Itoa(i+1)+": "+strings.TrimSpace(complaint))
				}
			}
			if test.more != "" {
				want = strings.Split(test.more, "\n")
			}
			_, err := Load("s.yaml", []byte(test.file))
			if err == nil {
				t.Fatal("no error")
			}
			got := strings.Split(err.Error(), "\n")
			for _, w := range want {
				if !slices.Contains(got, w) {
					t.Errorf("missing: %s", w)
				}
			}
			for _, g := range got {
				if !slices.Contains(want, g) {
					t.Errorf("not expected: %s", g)
				}
			}
		})
	}
}

// TestErrorsInOrder: the complaints come in the order of the file, whichever step found them.
func TestErrorsInOrder(t *testing.T) {
	_, err := Load("s.yaml", []byte("inbounds:\n- type: x\n  listen: y\n- type: z\nfoo: 1\n"))
	want := "s.yaml:2: inbounds[0].type: unknown type \"x\" (known: forward, socks5, http, mixed, reverse, redirect, tproxy, tun)\n" +
		"s.yaml:3: inbounds[0].listen: address \"y\": missing port (as in y:80)\n" +
		"s.yaml:4: inbounds[1].type: unknown type \"z\" (known: forward, socks5, http, mixed, reverse, redirect, tproxy, tun)\n" +
		"s.yaml:5: foo: unknown key (known: log, idle, half-open, dial-timeout, handshake-timeout, grace, busy-poll, inbounds, outbounds, rules)"
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
}

// TestByteOrderMark: files that an editor on Windows has saved mean what they say.
func TestByteOrderMark(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"users.txt": "alice:x\r\n",
		"s.yaml":    "inbounds:\r\n- type: socks5\r\n  listen: 1080\r\n  users-file: users.txt\r\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("\ufeff"+text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := ReadFile(filepath.Join(dir, "s.yaml")); err != nil {
		t.Fatal(err)
	}
	s := secrets{dir: dir, files: map[string][]byte{}}
	if users, errs := s.users("users.txt", ""); len(errs) > 0 || users["alice"] != "x" {
		t.Errorf("%q, %v", users, errs)
	}
}

func TestReadFileMissing(t *testing.T) {
	if _, err := ReadFile("testdata/none.yaml"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v, want one that says the file is missing", err)
	}
}

func FuzzLoad(f *testing.F) {
	f.Add([]byte(read(f, "testdata/every.yaml")))
	f.Add([]byte("inbounds:\n- {type: mixed, listen: 1, via: [a]}\noutbounds:\n- {name: a, type: http, server: 'x:1', via: [a, a]}"))
	f.Add([]byte("a: &a [*a, <<: *a]\n? b\n: !!str c\n--- |\n d"))
	f.Add([]byte("inbounds: [{type: mixed, listen: 1, via: ['http://a@b:1?password-file=c']}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 4096 {
			t.Skip("the parser is slow on deep nesting")
		}
		c, err := Load("f.yaml", data)
		if err != nil {
			if err.Error() == "" {
				t.Error("an error without a text")
			}
			return
		}
		var out bytes.Buffer
		if err := c.Print(&out); err != nil {
			t.Fatal(err)
		}
		again, err := Load("f.yaml", out.Bytes())
		if err != nil {
			t.Fatalf("%v\nin what was printed:\n%s", err, &out)
		}
		c.src, again.src = source{}, source{}
		if !reflect.DeepEqual(c, again) {
			t.Errorf("printed and loaded again it differs:\n%+v\n%+v", c, again)
		}
	})
}

func read(t testing.TB, name string) string {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// TestLoops checks that an inbound whose connections would all come back to it is refused, and no other.
func TestLoops(t *testing.T) {
	const (
		forward = "inbounds: [{type: forward, listen: %q, to: %q}]"
		proxied = "inbounds: [{type: mixed, listen: %q, open: true, via: [%q]}]"
		chained = "inbounds: [{type: forward, listen: %q, to: %q, via: [\"ssh://h\", \"socks5://127.0.0.1:8080\"]}]"
		grouped = "inbounds: [{type: mixed, listen: %q, open: true, via: [g]}]\n" +
			"outbounds: [{name: g, type: group, members: [direct, x]}, {name: x, type: socks5, server: %q}]"
	)
	for _, tt := range []struct {
		form, listen, to string
		loop             bool
	}{
		{forward, "8080", "8080", true}, {forward, "8080", "localhost:8080", true}, {forward, ":8080", "127.0.0.2:8080", true},
		{forward, "0.0.0.0:8080", "127.0.0.1:8080", true}, {forward, "[::]:8080", "[::1]:8080", true}, {forward, "[::ffff:127.0.0.1]:1", "1", true},
		{forward, "udp://8080", "8080", true}, {forward, "unix:///a", "unix:///a", true}, {forward, "10.0.0.1:80", "10.0.0.1:80", true},
		{forward, "8080", "8081", false}, {forward, "8080", "127.0.0.2:8080", false}, {forward, "8080", "[::1]:8080", false},
		{forward, "0.0.0.0:8080", "[::1]:8080", false}, {forward, ":8080", "example.com:8080", false}, {forward, "0", "1", false},
		{forward, "unix:///a", "unix:///b", false},
		{proxied, "1080", "socks5://127.0.0.1:1080", true}, {proxied, ":1080", "http://localhost:1080", true},
		{proxied, "1080", "socks5://127.0.0.1:1081", false}, {proxied, ":1080", "socks5://10.0.0.1:1080", false},
		{chained, "8080", "127.0.0.1:8080", false}, {grouped, "1080", "127.0.0.1:1080", true}, {grouped, "1080", "127.0.0.1:1081", false},
	} {
		_, err := Load("f.yaml", fmt.Appendf(nil, tt.form, tt.listen, tt.to))
		if got := err != nil && strings.Contains(err.Error(), "each connection would make another"); got != tt.loop || err != nil && !got {
			t.Errorf("%s to %s: %v", tt.listen, tt.to, err)
		}
	}
}

// TestDepthIsBounded checks that a small file does not take all memory: the parser's need grew by kilobytes with each bracket.
func TestDepthIsBounded(t *testing.T) {
	for _, s := range []string{"[", "{a: ", "- ", "a: !b "} {
		_, err := Load("f.yaml", []byte(strings.Repeat(s, 20000)))
		if err == nil || err.Error() != "f.yaml:1: lists and keys in each other, more than 32 deep" {
			t.Errorf("%q: %.200v", s, err)
		}
	}
}
