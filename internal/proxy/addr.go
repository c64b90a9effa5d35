package proxy

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/sluice-proxy/sluice/relay"
)

// Addr is a destination or a listening place: a TCP or UDP host and port, or the path of a Unix
// socket. Names are not resolved. Addr is comparable; the zero Addr is no address.
type Addr struct {
	Network string // "tcp", "udp" or "unix"
	Host    string // an IP address, a name, or the path of a Unix socket; empty: all addresses (listening only)
	Port    uint16 // 0 for "unix"
}

// TCP returns the TCP address of host (a name or an IP address without brackets) and port.
func TCP(host string, port uint16) Addr { return Addr{Network: "tcp", Host: host, Port: port} }

// UDP returns the UDP address of host (a name or an IP address without brackets) and port.
func UDP(host string, port uint16) Addr { return Addr{Network: "udp", Host: host, Port: port} }

// Endpoint returns the host and port of a, for datagrams.
func (a Addr) Endpoint() relay.Endpoint {
	if ip := a.IP(); ip.IsValid() {
		return relay.Endpoint{IP: ip.Unmap(), Port: a.Port}
	}
	return relay.Endpoint{Name: a.Host, Port: a.Port}
}

// String returns "host:port", "udp://host:port" or "unix://path": what [ParseDst] and [ParseListen] read.
func (a Addr) String() string {
	switch a.Network {
	case "":
		return ""
	case "unix":
		return "unix://" + a.Host
	case "tcp":
		return a.HostPort()
	}
	return a.Network + "://" + a.HostPort()
}

// HostPort returns "host:port" as [net.Dial] takes it; for a Unix socket its path.
func (a Addr) HostPort() string {
	if a.Network == "unix" {
		return a.Host
	}
	return net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port)))
}

// IP returns the address where Host is one, and the zero value where it is a name.
func (a Addr) IP() netip.Addr {
	if a.Network == "unix" {
		return netip.Addr{}
	}
	ip, _ := netip.ParseAddr(a.Host)
	return ip
}

// IsLoopback says whether only this machine can reach a listener at a.
func (a Addr) IsLoopback() bool {
	return a.Network == "unix" || a.Host == "localhost" || a.IP().Unmap().IsLoopback()
}

// ParseDst reads a destination: "host:port", "[v6]:port", "tcp://host:port", "udp://host:port" or "unix:///path".
// A bare port is one on this machine: "3000" is 127.0.0.1:3000.
func ParseDst(s string) (Addr, error) {
	a, err := parseAddr(s)
	if err == nil && a.Network != "unix" && a.Host == "" {
		return Addr{}, fmt.Errorf("proxy: address %q: missing host", s)
	}
	if err == nil && a.Network != "unix" && a.Port == 0 {
		return Addr{}, fmt.Errorf("proxy: address %q: port 0 cannot be connected to", s)
	}
	return a, err
}

// ParseListen reads a place to listen at: "8080" is that port on loopback, ":8080" is it on all
// addresses, and "10.0.0.1:8080", "udp://5353" or "unix:///path" are what they say. Port 0 lets the kernel choose.
func ParseListen(s string) (Addr, error) { return parseAddr(s) }

func parseAddr(s string) (Addr, error) {
	network, rest, ok := strings.Cut(s, "://")
	if !ok {
		network, rest = "tcp", s
	}
	if i := strings.LastIndexByte(rest, '@'); i >= 0 && network != "unix" { // what is before it may be a secret
		return Addr{}, fmt.Errorf("proxy: address %q: an address has no user or password", "..."+rest[i:])
	}
	switch network {
	case "unix":
		if rest == "" {
			return Addr{}, fmt.Errorf("proxy: address %q: missing path", s)
		}
		if len(rest) > 107 || strings.ContainsRune(rest, 0) {
			return Addr{}, fmt.Errorf("proxy: address %q: not a path a Unix socket can have (107 bytes at most)", s)
		}
		return Addr{Network: "unix", Host: rest}, nil
	case "tcp", "udp":
	default:
		return Addr{}, fmt.Errorf("proxy: address %q: unknown scheme %q (tcp://, udp:// or unix://)", s, network)
	}
	host, port := "", rest
	switch {
	case rest == "":
		return Addr{}, fmt.Errorf("proxy: address %q: empty", s)
	case isDigits(rest):
		host = "127.0.0.1"
	default:
		var err error
		if host, port, err = net.SplitHostPort(rest); err != nil {
			if !strings.Contains(rest, ":") {
				return Addr{}, fmt.Errorf("proxy: address %q: missing port (as in %s:80)", s, rest)
			}
			if _, ipErr := netip.ParseAddr(rest); ipErr == nil {
				i := strings.LastIndexByte(rest, ':')
				if _, ipErr := netip.ParseAddr(rest[:i]); ipErr == nil && isDigits(rest[i+1:]) {
					return Addr{}, fmt.Errorf("proxy: address %q: an IPv6 address stands in brackets (as in [%s]:%s, or [%s]:80)",
						s, rest[:i], rest[i+1:], rest)
				}
				return Addr{}, fmt.Errorf("proxy: address %q: missing port (as in [%s]:80)", s, rest)
			}
			return Addr{}, fmt.Errorf("proxy: address %q: not of the form host:port or [ipv6]:port", s)
		}
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || !isDigits(port) {
		return Addr{}, fmt.Errorf("proxy: address %q: port %q is not a number from 0 to 65535", s, port)
	}
	if strings.ContainsAny(host, " \t\r\n/@\x00") || len(host) > 255 {
		return Addr{}, fmt.Errorf("proxy: address %q: %q is not a host name", s, host)
	}
	return Addr{Network: network, Host: host, Port: uint16(n)}, nil
}

func isDigits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

// ClientNetwork returns what the client at ip counts as where each may have a share and no more: its IPv4 address, or in IPv6 the
// network of 64 bits, in which a host may have any number of addresses. It is the zero Prefix for who has no address.
func ClientNetwork(ip netip.Addr) netip.Prefix {
	ip = ip.Unmap()
	bits := 32
	if ip.Is6() {
		bits = 64
	}
	network, _ := ip.Prefix(bits) // fails for the zero Addr only
	return network
}

// IsHost says whether a can be a place at another host: no machine's own loopback, and nothing that is for many.
func IsHost(a netip.AddrPort) bool {
	ip := a.Addr()
	return ip.IsValid() && !ip.IsUnspecified() && !ip.IsMulticast() && !ip.IsLoopback() &&
		ip != netip.AddrFrom4([4]byte{255, 255, 255, 255}) && a.Port() != 0
}
