package main

import (
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/sluice-proxy/sluice/internal/config"
	"github.com/sluice-proxy/sluice/internal/proxy"
)

// announce says on standard output what the one service does, and a command that tries it.
func (p *program) announce(c *config.Config, services []*service) {
	in, at := c.Inbounds[0], services[0].addr()
	var line string
	switch in.Type {
	case "forward":
		line = fmt.Sprintf("Forwarding %s to %s", show(at), in.To)
	case "reverse":
		line = fmt.Sprintf("Forwarding %s there to %s", show(at), in.To)
	case "tun":
		line = "All traffic of this machine goes into " + at.String()
		if in.Netns != "" {
			line = fmt.Sprintf("All traffic of network namespace %s goes into %s", in.Netns, in.Name)
		}
		if len(in.Include) > 0 {
			line = strings.Replace(line, "All traffic", "Traffic", 1)
		}
	case "socks5":
		line = "SOCKS5 proxy on " + show(at)
	case "http":
		line = "HTTP proxy on " + show(at)
	default:
		line = "SOCKS5 and HTTP proxy on " + show(at)
	}
	var hops []string
	for _, h := range in.Via {
		h, _, _ = strings.Cut(h, "?")
		hops = append(hops, h)
	}
	if len(hops) > 0 {
		line += " via " + strings.Join(hops, ", ")
	}
	try := tryIt(in, at)
	if in.Type == "tun" {
		try = tryTUN(in)
	}
	if try != "" {
		line += "\nTry it:  " + try
	}
	fmt.Fprintln(p.stdout, line) // at once, for who waits for the first line
}

// tryIt returns a command to copy, or nothing.
func tryIt(in config.Inbound, at net.Addr) string {
	var host netip.AddrPort
	switch at := at.(type) {
	case *net.TCPAddr:
		host = at.AddrPort()
	case *net.UDPAddr:
		host = at.AddrPort()
	default:
		return ""
	}
	if a := host.Addr().Unmap(); a.IsUnspecified() {
		host = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), host.Port())
	} else {
		host = netip.AddrPortFrom(a, host.Port())
	}
	user := ""
	if in.UsersFile != "" || in.UsersEnv != "" {
		user = "--proxy-user NAME " // curl asks for the password
	}
	switch in.Type {
	case "mixed", "socks5":
		return fmt.Sprintf("curl -x socks5h://%v %shttps://example.com/", host, user)
	case "http":
		return fmt.Sprintf("curl -x http://%v %shttps://example.com/", host, user)
	case "forward":
		if in.To.Network == "udp" {
			if in.To.Port == 53 {
				return fmt.Sprintf("dig @%v -p %d example.com", host.Addr(), host.Port())
			}
			return ""
		}
		if in.To.Port == 80 {
			return fmt.Sprintf("curl -H 'Host: %s' http://%v/", in.To.Host, host)
		}
	}
	return ""
}

// tryTUN is tryIt for what takes in all that its network sends, or only a part that we know too little of.
func tryTUN(in config.Inbound) string {
	switch {
	case len(in.Include) > 0:
		return ""
	case in.Netns != "":
		return "ip netns exec " + in.Netns + " curl https://example.com/"
	}
	return "curl https://example.com/"
}

// show returns an address as people write it.
func show(a net.Addr) string {
	switch a := a.(type) {
	case *net.TCPAddr:
		if a.IP.IsUnspecified() {
			return fmt.Sprintf(":%d (all addresses)", a.Port)
		}
	case *net.UDPAddr:
		if a.IP.IsUnspecified() {
			return fmt.Sprintf("udp://:%d (all addresses)", a.Port)
		}
		return "udp://" + a.String()
	case *net.UnixAddr:
		return proxy.Addr{Network: "unix", Host: a.Name}.String()
	}
	if a.Network() == "unix" {
		return proxy.Addr{Network: "unix", Host: a.String()}.String()
	}
	return a.String()
}
