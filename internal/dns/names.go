package dns

import (
	"container/list"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"sync"
)

// Prefixes returns the ranges that fake addresses are of: 198.18.0.0/15, which RFC 2544 sets aside for measurements
// and nobody routes, and a range of unique local addresses (RFC 4193). They are to be routed to where the Handler's
// flows come from. The first 16 addresses of each never stand for a name: they are free for devices.
func Prefixes() (v4, v6 netip.Prefix) { return fake4, fake6 }

var (
	fake4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18}), 15)
	fake6 = netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0x5c, 0x1e, 0x7a, 0xb3, 0xd2, 0x01, 0x98}), 64)
)

const (
	namesMax  = 1 << 16 // names that have addresses at a time
	firstFake = 16      // of a range
)

// isFake says whether ip is of the ranges for fake addresses.
func isFake(ip netip.Addr) bool { return fake4.Contains(ip) || fake6.Contains(ip) }

// fakeIP4 and fakeIP6 return the addresses of the name with number i.
func fakeIP4(i int) netip.Addr {
	b := fake4.Addr().As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+firstFake+uint32(i))
	return netip.AddrFrom4(b)
}

func fakeIP6(i int) netip.Addr {
	b := fake6.Addr().As16()
	binary.BigEndian.PutUint64(b[8:], firstFake+uint64(i))
	return netip.AddrFrom16(b)
}

// numberOf returns the number of the name whose address ip would be; -1 where it is none.
func numberOf(ip netip.Addr) int {
	offset := uint64(0)
	switch {
	case fake4.Contains(ip):
		b, first := ip.As4(), fake4.Addr().As4()
		offset = uint64(binary.BigEndian.Uint32(b[:]) - binary.BigEndian.Uint32(first[:]))
	case fake6.Contains(ip):
		b := ip.As16()
		offset = binary.BigEndian.Uint64(b[8:])
	}
	if offset < firstFake || offset-firstFake >= namesMax {
		return -1
	}
	return int(offset - firstFake)
}

// names knows which names have which numbers: each name one, and each number one name at most. Where there are too
// many, the one that was used longest ago loses its number to the new one, unless it is held.
//
// The first number is random: an address that a program has kept from an earlier run is better one that is unknown
// than one of another name.
type names struct {
	max   int  // 0: namesMax
	fixed bool // the first number is 0, for tests

	mu     sync.Mutex
	byName map[string]*entry // nil before the first
	byNum  map[int]*entry
	start  int       // the first number
	unheld list.List // of *entry, used last first
}

type entry struct {
	name   string
	number int
	holds  int
	place  *list.Element // in unheld; nil while held
}

var errNamesFull = errors.New("dns: all fake addresses are in use")

// number returns the number of name, which is in lower case and without the last dot.
func (n *names) number(name string) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e := n.byName[name]; e != nil {
		n.used(e)
		return e.number, nil
	}
	if n.byName == nil {
		n.byName, n.byNum = make(map[string]*entry), make(map[int]*entry)
		if !n.fixed {
			n.start = rand.IntN(namesMax)
		}
	}
	limit := n.max
	if limit == 0 {
		limit = namesMax
	}
	e := &entry{name: name, number: (n.start + len(n.byNum)) % namesMax}
	if len(n.byNum) >= limit {
		oldest := n.unheld.Back()
		if oldest == nil {
			return 0, errNamesFull
		}
		old := n.unheld.Remove(oldest).(*entry)
		delete(n.byName, old.name)
		e.number = old.number
	}
	n.byName[name], n.byNum[e.number] = e, e
	e.place = n.unheld.PushFront(e)
	return e.number, nil
}

func (n *names) used(e *entry) {
	if e.place != nil {
		n.unheld.MoveToFront(e.place)
	}
}

// find returns the entry of the name that ip stands for, or nil. The lock is held.
func (n *names) find(ip netip.Addr) *entry {
	e := n.byNum[numberOf(ip)]
	if e != nil {
		n.used(e)
	}
	return e
}

// lookup returns the name that ip stands for.
func (n *names) lookup(ip netip.Addr) (string, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e := n.find(ip); e != nil {
		return e.name, true
	}
	return "", false
}

// hold is lookup, and keeps the name's number from being given to another until release.
func (n *names) hold(ip netip.Addr) (*entry, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	e := n.find(ip)
	if e == nil {
		return nil, false
	}
	if e.holds++; e.holds == 1 {
		n.unheld.Remove(e.place)
		e.place = nil
	}
	return e, true
}

// release undoes a hold.
func (n *names) release(e *entry) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e.holds--; e.holds == 0 {
		e.place = n.unheld.PushFront(e)
	}
}
