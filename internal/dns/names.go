package dns

import (
	"container/list"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
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
	namesMax  = 1 << 16     // names that have addresses at a time
	nameKept  = time.Minute // how long a name keeps its addresses, since its last use, though others need them
	firstFake = 16          // of a range
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
// many, the one that was used longest ago loses its number to the new one. But a name that was used within nameKept is
// fresh and keeps it, as one that is held does: a program may still have the address that it was told, though
// answers are to be kept for fakeTTL only, and it must not come to lead to a name of somebody else's choice.
//
// A fresh name counts for the client that used it last. No client gets a name that would have it use more than it
// leaves for the others.
//
// The first number is random: an address that a program has kept from an earlier run is better one that is unknown
// than one of another name.
type names struct {
	max   int  // 0: namesMax
	fixed bool // the first number is 0, for tests

	mu     sync.Mutex
	byName map[string]*entry // nil before the first
	byNum  map[int]*entry
	users  map[netip.Prefix]int // fresh and held names, by who used them last
	start  int                  // the first number
	fresh  list.List            // of *entry that are not held, used last first; some may be so no more
	stale  list.List            // the same of those that may lose their numbers
}

type entry struct {
	name   string
	number int
	holds  int
	place  *list.Element // in fresh or stale; nil while held
	stale  bool
	used   time.Time
	user   netip.Prefix
}

var (
	errNamesFull = errors.New("dns: all fake addresses are in use")
	errNamesMany = errors.New("dns: the client uses too many fake addresses")
)

// number returns the number of name, which is in lower case and without the last dot, for a client that asks.
func (n *names) number(name string, client netip.AddrPort) (int, error) {
	user := proxy.ClientNetwork(client.Addr())
	n.mu.Lock()
	defer n.mu.Unlock()
	if e := n.byName[name]; e != nil {
		n.use(e, user)
		return e.number, nil
	}
	if n.byName == nil {
		n.byName, n.byNum = make(map[string]*entry), make(map[int]*entry)
		n.users = make(map[netip.Prefix]int)
		if !n.fixed {
			n.start = rand.IntN(namesMax)
		}
	}
	limit := n.max
	if limit == 0 {
		limit = namesMax
	}
	n.age()
	switch free := limit - len(n.byNum) + n.stale.Len(); {
	case free == 0:
		return 0, errNamesFull
	case n.users[user] >= free:
		return 0, errNamesMany
	}
	e := &entry{name: name, number: (n.start + len(n.byNum)) % namesMax, used: time.Now(), user: user}
	if len(n.byNum) >= limit {
		old := n.stale.Remove(n.stale.Back()).(*entry)
		delete(n.byName, old.name)
		e.number = old.number
	}
	n.byName[name], n.byNum[e.number] = e, e
	e.place = n.fresh.PushFront(e)
	n.users[user]++
	return e.number, nil
}

// age finds the names that are not fresh any more.
func (n *names) age() {
	now := time.Now()
	for back := n.fresh.Back(); back != nil; back = n.fresh.Back() {
		e := back.Value.(*entry)
		if now.Sub(e.used) < nameKept {
			return
		}
		n.fresh.Remove(back)
		e.place, e.stale = n.stale.PushFront(e), true
		n.unuse(e.user)
	}
}

// use says that the user uses e, which is fresh then.
func (n *names) use(e *entry, user netip.Prefix) {
	e.used = time.Now()
	if e.stale {
		n.stale.Remove(e.place)
		e.place, e.stale = n.fresh.PushFront(e), false
	} else {
		if e.place != nil {
			n.fresh.MoveToFront(e.place)
		}
		if e.user == user {
			return
		}
		n.unuse(e.user)
	}
	e.user = user
	n.users[user]++
}

// unuse undoes the count of one name for a user.
func (n *names) unuse(user netip.Prefix) {
	if n.users[user]--; n.users[user] == 0 {
		delete(n.users, user)
	}
}

// find returns the entry of the name that ip stands for, which the client uses, or nil. The lock is held.
func (n *names) find(ip netip.Addr, client netip.AddrPort) *entry {
	e := n.byNum[numberOf(ip)]
	if e != nil {
		n.use(e, proxy.ClientNetwork(client.Addr()))
	}
	return e
}

// peek returns the name that ip stands for, which is no use of it.
func (n *names) peek(ip netip.Addr) (string, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e := n.byNum[numberOf(ip)]; e != nil {
		return e.name, true
	}
	return "", false
}

// lookup returns the name that ip stands for, for a client that uses it.
func (n *names) lookup(ip netip.Addr, client netip.AddrPort) (string, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e := n.find(ip, client); e != nil {
		return e.name, true
	}
	return "", false
}

// hold is lookup, and keeps the name's number from being given to another until release.
func (n *names) hold(ip netip.Addr, client netip.AddrPort) (*entry, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	e := n.find(ip, client)
	if e == nil {
		return nil, false
	}
	if e.holds++; e.holds == 1 {
		n.fresh.Remove(e.place)
		e.place = nil
	}
	return e, true
}

// release undoes a hold, and was a use until now.
func (n *names) release(e *entry) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e.holds--; e.holds == 0 {
		e.used = time.Now()
		e.place = n.fresh.PushFront(e)
	}
}
