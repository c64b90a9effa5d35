package config

import (
	"reflect"
	"slices"
	"strings"

	"github.com/sluice-proxy/sluice/internal/inbound"
	"github.com/sluice-proxy/sluice/internal/proxy"
)

// inboundTypes is the table of inbound types. A new one is a file in package inbound and a line here.
var inboundTypes = []inboundType{
	{"forward", forward, "to", portKeys + " send-proxy"},
	{"socks5", socks5, "", portKeys + " " + usersKeys},
	{"http", httpProxy, "", portKeys + " " + usersKeys},
	{"mixed", mixed, "", portKeys + " " + usersKeys},
	{"reverse", reverse, "to via", ""},
	{"redirect", redirect, "", captureKeys},
	{"tproxy", tproxy, "", captureKeys + " dns"},
	{"tun", tun, "", "netns include exclude mtu dns"},
}

// outboundTypes is the table of outbound types. A new one is a file in package outbound and a line
// here. Those that have a server are also the schemes of the URLs in via.
var outboundTypes = []outboundType{
	{"direct", direct, "", "bind interface mark"},
	{"socks5", socks5Out, "server", serverKeys},
	{"http", httpOut, "server", serverKeys},
	{"https", httpsOut, "server", serverKeys + " ca-file server-name"},
	{"ssh", sshOut, "host", serverKeys + " identity-file known-hosts ssh-config keep"},
	{"reject", reject, "", ""},
	{"group", group, "members", "policy check interval keep"},
}

// The keys that several types share.
const (
	inboundKeys  = "name type via rate-per-session rate quota-per-session" // every inbound
	listenKeys   = "listen mode accept-proxy allow deny max-conns"         // every inbound that clients connect to
	portKeys     = "reuse-port"                                            // whatever binds a port here
	usersKeys    = "users-file users-env open"                             // every proxy
	captureKeys  = "setup from include exclude"                            // what traffic is brought to without its knowledge
	outboundKeys = "name type"                                             // every outbound
	serverKeys   = "user password-file password-env via"                   // every upstream proxy
)

type inboundType struct {
	name  string
	build func(in *Inbound, l inbound.Listener, users inbound.Users) proxy.Inbound
	needs string // keys that must be given, beside listen where clients connect to it
	takes string // keys that may be given, beside inboundKeys
}

// outboundBuilder makes the dialer that o describes, which reaches its server through via (nil: directly).
type outboundBuilder func(b *builder, o *Outbound, via proxy.Dialer) (proxy.Dialer, error)

type outboundType struct {
	name  string
	build outboundBuilder
	needs string
	takes string
}

// isHop says whether the type has a server, and so can be written as a URL.
func (t *outboundType) isHop() bool { return t.needs == "server" || t.needs == "host" }

// needsPassword says whether a user is nobody without a password. SSH has keys.
func (t *outboundType) needsPassword() bool { return t.name != "ssh" }

// isProxy says whether the client chooses the destination.
func (t *inboundType) isProxy() bool { return t.has("open") }

// isFar says whether it listens at the last hop, and not on this machine.
func (t *inboundType) isFar() bool { return hasWord("via", t.needs) }

// isTransparent says whether clients come to it without their knowledge.
func (t *inboundType) isTransparent() bool { return t.has("setup") }

// listens says whether clients connect to it. Otherwise it takes packets out of a device.
func (t *inboundType) listens() bool { return !t.has("netns") }

// wants returns the keys that must be given.
func (t *inboundType) wants() string {
	if !t.listens() {
		return t.needs
	}
	return "listen " + t.needs
}

func (t *inboundType) has(key string) bool {
	return hasWord(key, inboundKeys, t.needs, t.takes) || hasWord(key, listenKeys) && t.listens()
}

func (t *outboundType) has(key string) bool {
	return hasWord(key, outboundKeys, t.needs, t.takes)
}

func hasWord(word string, lists ...string) bool {
	return slices.ContainsFunc(lists, func(l string) bool { return slices.Contains(strings.Fields(l), word) })
}

func isFar(name string) bool {
	t := inboundTypeOf(name)
	return t != nil && t.isFar()
}

// inboundTypeOf returns the line of the table, or nil.
func inboundTypeOf(name string) *inboundType {
	i := slices.IndexFunc(inboundTypes, func(t inboundType) bool { return t.name == name })
	if i < 0 {
		return nil
	}
	return &inboundTypes[i]
}

// outboundTypeOf returns the line of the table, or nil.
func outboundTypeOf(name string) *outboundType {
	i := slices.IndexFunc(outboundTypes, func(t outboundType) bool { return t.name == name })
	if i < 0 {
		return nil
	}
	return &outboundTypes[i]
}

// InboundTypes returns the names of the types of inbounds.
func InboundTypes() []string {
	var names []string
	for _, t := range inboundTypes {
		names = append(names, t.name)
	}
	return names
}

// OutboundTypes returns the names of the types of outbounds.
func OutboundTypes() []string {
	var names []string
	for _, t := range outboundTypes {
		names = append(names, t.name)
	}
	return names
}

// hopSchemes returns the types whose hops can be written as URLs.
func hopSchemes() []string {
	var names []string
	for _, t := range outboundTypes {
		if t.isHop() {
			names = append(names, t.name)
		}
	}
	return names
}

// checkKeys complains about keys of v, a struct at path, that are needed and not given, or given
// though the type called name does not take them.
func checkKeys(l *errorList, path, name string, v reflect.Value, needs string, has func(string) bool) {
	for _, key := range keysOf(v.Type()) {
		f, _ := fieldOf(v, key)
		at := path + "." + key
		switch {
		case hasWord(key, needs) && f.IsZero() && !l.src.has(at):
			l.add(at, "missing")
		case !has(key) && (!f.IsZero() || l.src.has(at)):
			l.add(at, "does not apply to type %s", name)
		}
	}
}
