package relay

import (
	"net"
	"net/netip"
	"strconv"
	"sync"
)

// Endpoint is where a datagram goes to or comes from: an IP address, or a name that the far end resolves, and a
// port. It is comparable.
type Endpoint struct {
	IP   netip.Addr // the zero Addr where Name stands for it
	Name string
	Port uint16
}

// EndpointOf returns the endpoint at ap, an IPv4 address always as such.
func EndpointOf(ap netip.AddrPort) Endpoint { return Endpoint{IP: ap.Addr().Unmap(), Port: ap.Port()} }

// AddrPort returns e's address and port; the zero AddrPort where it has a name.
func (e Endpoint) AddrPort() netip.AddrPort {
	if !e.IP.IsValid() {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(e.IP, e.Port)
}

// SamePlace says whether e and f are one place. Zones of addresses are not compared: who has been told a zone by its name may be
// answered from the same by its number.
func (e Endpoint) SamePlace(f Endpoint) bool {
	e.IP, f.IP = e.IP.WithZone(""), f.IP.WithZone("")
	return e == f
}

// Host returns the address or the name.
func (e Endpoint) Host() string {
	if e.IP.IsValid() {
		return e.IP.String()
	}
	return e.Name
}

// String returns "host:port", or "[address]:port" for IPv6.
func (e Endpoint) String() string { return net.JoinHostPort(e.Host(), strconv.Itoa(int(e.Port))) }

// PacketConn is one end of a relay of datagrams. One goroutine reads from it and one writes to it, and Close, from
// any goroutine, frees both.
//
// At the client's end of a relay ReadPacket returns what the client has sent, with the place that it is for, and WritePacket
// sends to the client, with the place that it is from. At the origin's end WritePacket sends to a place, and ReadPacket
// returns what a place has sent. So datagrams between one client and any number of places take one pair of PacketConns.
type PacketConn interface {
	// ReadPacket waits for a datagram and stores it in p, whose Data and Endpoint are then set. It takes the memory for
	// it by p.Grow, or hands over a packet of its own by assigning it, only when the datagram is there: who waits holds none. The caller calls p.Free. An
	// error that is an [*UnreachableError] is about one place; any other is the end.
	ReadPacket(p *Packet) error
	// WritePacket sends p and keeps nothing of it. It may wait for the kernel to take the datagram, and not for the peer.
	// An error is about this datagram, which is lost, and nothing else, unless it is [net.ErrClosed].
	WritePacket(p *Packet) error
	// Close releases the conn. It may be called twice.
	Close() error
}

// BatchReader is a PacketConn that often has more than one datagram.
type BatchReader interface {
	// ReadMore is ReadPacket for those that are there already: it fills ps as far as they go, and returns how many they were. It
	// does not wait, and leaves errors to ReadPacket.
	ReadMore(ps []Packet) int
}

// BatchWriter is a PacketConn that several datagrams cost less than each by itself.
type BatchWriter interface {
	// WritePackets is WritePacket for each of ps in turn, up to the first error: that is about ps[n].
	WritePackets(ps []Packet) (n int, err error)
}

// Refuser is a PacketConn of a client that can be told that a datagram of its could not be delivered, as by ICMP.
type Refuser interface {
	// Refuse says so of datagrams to e. It does not block.
	Refuse(e Endpoint, err error)
}

// Dropper is a PacketConn that keeps what has come until it is read, and drops what it has no room for.
type Dropper interface {
	// Dropped returns how many datagrams it has dropped.
	Dropped() int64
}

// Switch is a PacketConn of the origin's end that knows of several ways out.
type Switch interface {
	PacketConn
	// Way returns the conn by which datagrams to e go; nil for the Switch itself. One that it has not returned before is the relay's from
	// now on, which reads from it, too, and closes it. An error refuses the datagram. Way may block until Close; one goroutine calls it.
	Way(e Endpoint) (PacketConn, error)
}

// UnreachableError says that datagrams to a place do not arrive, as far as an ICMP message tells. Others still may.
type UnreachableError struct {
	To  Endpoint // the zero Endpoint where that is not known
	Err error    // as syscall.ECONNREFUSED
}

// Error returns the place and the cause.
func (e *UnreachableError) Error() string {
	return "relay: datagram to " + e.To.String() + ": " + e.Err.Error()
}

// Unwrap returns the cause.
func (e *UnreachableError) Unwrap() error { return e.Err }

// Packet is a datagram. The zero Packet is an empty one without memory. It must not be copied while both copies are in use.
type Packet struct {
	Endpoint Endpoint
	Data     []byte

	small *[packetSmall]byte // one of them is what Data is in, or none is
	large *[packetLarge]byte
}

// The sizes of a packet's memory. The large one holds any datagram; there is none of more than 65 535 bytes.
const (
	packetSmall = 2 << 10
	packetLarge = 64 << 10
)

var (
	smallPackets = sync.Pool{New: func() any { return new([packetSmall]byte) }}
	largePackets = sync.Pool{New: func() any { return new([packetLarge]byte) }}
)

// Grow gives p new memory for n bytes, at most 65 536, and returns it: Data is all of it, to be cut to what is
// used. What p held is gone.
func (p *Packet) Grow(n int) []byte {
	p.Free()
	if n <= packetSmall {
		p.small = smallPackets.Get().(*[packetSmall]byte)
		p.Data = p.small[:n]
	} else {
		p.large = largePackets.Get().(*[packetLarge]byte)
		p.Data = p.large[:n]
	}
	return p.Data
}

// PacketMemory returns how much memory a packet has that was grown to n bytes.
func PacketMemory(n int) int64 {
	if n <= packetSmall {
		return packetSmall
	}
	return packetLarge
}

// Free gives p's memory back; Data is nil then. It may be called twice.
func (p *Packet) Free() {
	if p.small != nil {
		smallPackets.Put(p.small)
	}
	if p.large != nil {
		largePackets.Put(p.large)
	}
	p.small, p.large, p.Data = nil, nil, nil
}
