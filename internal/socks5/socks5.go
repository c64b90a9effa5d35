// Package socks5 speaks SOCKS version 5, RFC 1928, and its user name and password, RFC 1929: the
// messages, and nothing of what is done about them. It dials, listens and resolves nothing.
//
// A SOCKS client asks a server for a connection to somewhere else. The two talk in turns:
//
//	client                              server
//	greeting: methods that I can  →
//	                              ←     the method that I choose
//	user name and password        →     (with that method only, RFC 1929)
//	                              ←     accepted, or not
//	request: command, host, port  →
//	                              ←     reply: a code, and an address
//
// After the reply that says success the conn is the connection to the host, and belongs to the two
// ends alone: the protocol adds no byte to it. That is why both halves here, [Server.Handshake] and
// [Client.Handshake], read not one byte more than the messages have. What follows stays in the
// conn, which can be handed on bare, and a kernel can then carry it.
//
// The host is an IPv4 address, an IPv6 address or a name. A name is sent as it is and resolved by
// the server, so that a client learns nothing about it and needs no DNS.
//
// The server says why it could not connect by a code, [Reply]. It is an error that equals the errno
// that the failed connect would have had, so that a reason survives a chain of proxies.
package socks5

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"unicode/utf8"
)

const (
	version     = 5 // of SOCKS, RFC 1928
	authVersion = 1 // of the user name and password exchange, RFC 1929
)

// The methods of authentication, RFC 1928 section 3.
const (
	methodNone     = 0x00
	methodPassword = 0x02
	methodRefused  = 0xFF // "no acceptable methods"
)

// The types of an address, RFC 1928 section 5.
const (
	typeIPv4 = 1
	typeName = 3
	typeIPv6 = 4
)

// Command is what a client asks for, RFC 1928 section 4. A server may meet values that have no name here.
type Command byte

// The commands.
const (
	Connect      Command = 1 // a TCP connection to the address
	Bind         Command = 2 // a TCP connection from the address
	UDPAssociate Command = 3 // a relay of UDP datagrams, which come from the address
)

// String returns the command's name as RFC 1928 writes it.
func (c Command) String() string {
	switch c {
	case Connect:
		return "CONNECT"
	case Bind:
		return "BIND"
	case UDPAssociate:
		return "UDP ASSOCIATE"
	}
	return "command " + strconv.Itoa(int(c))
}

// Reply is the server's answer to a request, RFC 1928 section 6. As an error it equals, by
// [errors.Is], the errno that says the same.
type Reply byte

// The replies.
const (
	Succeeded          Reply = 0
	GeneralFailure     Reply = 1 // equals nothing
	NotAllowed         Reply = 2 // syscall.EACCES: refused by a rule
	NetworkUnreachable Reply = 3 // syscall.ENETUNREACH
	HostUnreachable    Reply = 4 // syscall.EHOSTUNREACH; also what servers say of names they cannot resolve
	ConnectionRefused  Reply = 5 // syscall.ECONNREFUSED
	TTLExpired         Reply = 6 // syscall.ETIMEDOUT
	CommandUnsupported Reply = 7 // syscall.EOPNOTSUPP, and so errors.ErrUnsupported
	AddressUnsupported Reply = 8 // syscall.EAFNOSUPPORT
)

var replies = [...]struct {
	text  string
	errno syscall.Errno
}{
	Succeeded:          {"succeeded", 0},
	GeneralFailure:     {"failed, for a reason that SOCKS has no code for", 0},
	NotAllowed:         {"not allowed by the proxy's rules", syscall.EACCES},
	NetworkUnreachable: {"network unreachable", syscall.ENETUNREACH},
	HostUnreachable:    {"host unreachable, or its name not found", syscall.EHOSTUNREACH},
	ConnectionRefused:  {"connection refused", syscall.ECONNREFUSED},
	TTLExpired:         {"timed out", syscall.ETIMEDOUT},
	CommandUnsupported: {"command not supported by the proxy", syscall.EOPNOTSUPP},
	AddressUnsupported: {"address type not supported by the proxy", syscall.EAFNOSUPPORT},
}

// Error returns what the reply says, in words.
func (r Reply) Error() string {
	text := "unknown answer"
	if int(r) < len(replies) {
		text = replies[r].text
	}
	return fmt.Sprintf("socks5: %s (reply %d)", text, byte(r))
}

// Is says whether target is the errno that r stands for, or an error that this errno equals.
func (r Reply) Is(target error) bool {
	if int(r) >= len(replies) || replies[r].errno == 0 {
		return false
	}
	errno := replies[r].errno
	return target == errno || errno.Is(target)
}

// ErrMalformed is wrapped by errors about a peer that does not keep to the protocol, or does not
// speak it at all.
var ErrMalformed = errors.New("socks5: malformed")

// authError says that client and server did not agree on who the client is.
// It equals [syscall.EACCES].
type authError string

func (e authError) Error() string      { return "socks5: " + string(e) }
func (authError) Is(target error) bool { return target == syscall.EACCES || syscall.EACCES.Is(target) }

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w "+format, append([]any{ErrMalformed}, args...)...)
}

// Addr is an address as the protocol has it: a host, which is a name or an IP address without
// brackets, and a port.
type Addr struct {
	Host string
	Port uint16
}

// String returns "host:port", with brackets around an IPv6 address.
func (a Addr) String() string { return net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port))) }

// normalHost returns host in the one form that it has inside this program, and says whether it can
// be a host at all. What is an IP address becomes its shortest text, without the brackets that some
// clients send, and as IPv4 where it is an IPv6 address that maps one.
func normalHost(host string) (string, bool) {
	bare := host
	if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") && strings.Contains(host, ":") {
		bare = host[1 : len(host)-1]
	}
	if bare == "" || len(bare) > 255 || !utf8.ValidString(bare) || strings.ContainsFunc(bare, notInHost) {
		return host, false
	}
	if ip, err := netip.ParseAddr(bare); err == nil {
		return ip.Unmap().String(), true
	}
	return host, bare == host
}

// notInHost says that r would make a name mean something else to whoever reads it next: a C
// string's end, another word, an URL's path, user or brackets.
func notInHost(r rune) bool { return r <= ' ' || r == 0x7F || strings.ContainsRune("/@[]", r) }

// appendAddr appends type, host and port, RFC 1928 section 5.
func appendAddr(b []byte, a Addr) ([]byte, error) {
	host, ok := normalHost(a.Host)
	if !ok {
		return nil, fmt.Errorf("socks5: %q is not a host that can be asked for", a.Host)
	}
	ip, err := netip.ParseAddr(host)
	switch {
	case err != nil:
		b = append(b, typeName, byte(len(host)))
		b = append(b, host...)
	case ip.Zone() != "":
		return nil, fmt.Errorf("socks5: %s: a proxy knows nothing of zones here: %w", host, errors.ErrUnsupported)
	default:
		b = appendIP(b, ip)
	}
	return binary.BigEndian.AppendUint16(b, a.Port), nil
}

func appendIP(b []byte, ip netip.Addr) []byte {
	if ip.Is4() {
		b = append(b, typeIPv4)
	} else {
		b = append(b, typeIPv6)
	}
	return append(b, ip.AsSlice()...)
}

// Both messages that hold an address, the request and the reply, have it behind three bytes:
// version, command or reply, reserved.
const (
	addrType = 3 // where its type stands
	addrHost = 4 // where its host begins, for a name by its length
)

// errAddrType is what readAddr returns for an address type that RFC 1928 does not have. How long
// such an address is nobody knows, so nothing can be read behind it.
var errAddrType = errors.New("socks5: unknown address type")

// readAddr reads the rest of a message that has an address behind its third byte. The host of the
// result is as it came: a name may be any bytes.
func (m *message) readAddr() (Addr, error) {
	if err := m.need(addrHost, shortest); err != nil {
		return Addr{}, err
	}
	begin, size := addrHost, 0
	switch t := m.buf[addrType]; t {
	case typeIPv4:
		size = 4
	case typeIPv6:
		size = 16
	case typeName:
		if err := m.need(addrHost+1, shortest); err != nil {
			return Addr{}, err
		}
		begin, size = addrHost+1, int(m.buf[addrHost])
	default:
		return Addr{}, fmt.Errorf("%w %d", errAddrType, t)
	}
	end := begin + size
	if err := m.need(end+2, end+2); err != nil {
		return Addr{}, err
	}
	host := string(m.buf[begin:end])
	if ip, ok := netip.AddrFromSlice(m.buf[begin:end]); ok && m.buf[addrType] != typeName {
		host = ip.Unmap().String()
	}
	return Addr{Host: host, Port: binary.BigEndian.Uint16(m.buf[end:])}, nil
}

// shortest is the length of the shortest request or reply: one with a name of no length. That much
// can be read at once without reading behind a message.
const shortest = addrHost + 1 + 0 + 2

// message collects one message from a conn, in few reads and without a byte of what follows it.
type message struct {
	r   io.Reader
	buf [3 + 2*255]byte // the longest is that of RFC 1929
	n   int             // bytes of the message that are in buf
}

// next begins a new message.
func (m *message) next() { m.n = 0 }

// need reads until at least atLeast bytes of the message are there, and at most atMost: the part of
// the message that is certain to come. A conn that ends within a message is io.ErrUnexpectedEOF, one
// that ends where a message would have begun is io.EOF.
func (m *message) need(atLeast, atMost int) error {
	if m.n >= atLeast {
		return nil
	}
	n, err := io.ReadAtLeast(m.r, m.buf[m.n:atMost], atLeast-m.n)
	m.n += n
	if err == io.EOF && m.n > 0 {
		return io.ErrUnexpectedEOF
	}
	return err
}
