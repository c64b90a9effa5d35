package dns

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

// clientAt returns a client's address; each i has another.
func clientAt(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}), 4000)
}

// numbers asks for names, each as a client of its own.
type numbers struct {
	*testing.T
	*names
	clients int
}

func (n *numbers) client() netip.AddrPort { n.clients++; return clientAt(n.clients) }

func (n *numbers) number(name string) int {
	n.Helper()
	i, err := n.names.number(name, n.client())
	if err != nil {
		n.Fatalf("%s: %v", name, err)
	}
	return i
}

func (n *numbers) full(name string) {
	n.Helper()
	if i, err := n.names.number(name, n.client()); !errors.Is(err, errNamesFull) {
		n.Errorf("%s got %d, %v", name, i, err)
	}
}

// consistent says whether the lists and counts agree.
func (n *numbers) consistent() {
	n.Helper()
	fresh, users := 0, 0
	for _, e := range n.byName {
		if n.byNum[e.number] != e || (e.place == nil) != (e.holds > 0) {
			n.Errorf("the entry %+v", e)
		}
		if !e.stale {
			fresh++
		}
	}
	for user, count := range n.users {
		if users += count; count <= 0 {
			n.Errorf("%v uses %d", user, count)
		}
	}
	if len(n.byName) != len(n.byNum) || users != fresh || n.stale.Len() != len(n.byName)-fresh {
		n.Errorf("%d names, %d numbers, %d fresh, %d used, %d stale", len(n.byName), len(n.byNum), fresh, users, n.stale.Len())
	}
}

func TestNamesKeepTheirAddresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &numbers{T: t, names: &names{max: 3, fixed: true}}
		a := n.number("a")
		time.Sleep(time.Second)
		b := n.number("b")
		time.Sleep(time.Second)
		c := n.number("c")
		if a == b || b == c || a == c || n.number("a") != a || n.number("b") != b {
			t.Fatalf("numbers %d %d %d", a, b, c)
		}
		if name, ok := n.lookup(fakeIP6(c), n.client()); name != "c" || !ok {
			t.Errorf("c is %q", name)
		}
		time.Sleep(nameKept)
		n.lookup(fakeIP4(c), n.client()) // c is fresh, a is the oldest
		if d := n.number("d"); d != a {
			t.Errorf("d got %d, not that of a", d)
		}
		if name, _ := n.lookup(fakeIP4(a), n.client()); name != "d" {
			t.Errorf("a's address is that of %q", name)
		}

		// b is the only one that is not fresh. Held, it stays.
		held, ok := n.hold(fakeIP4(b), n.client())
		again, _ := n.hold(fakeIP4(b), n.client())
		if !ok || held != again || held.name != "b" {
			t.Fatalf("held %v %v", held, again)
		}
		n.full("f")
		time.Sleep(2 * nameKept)
		for _, ip := range []netip.Addr{fakeIP4(a), fakeIP4(c)} {
			if _, ok := n.hold(ip, n.client()); !ok {
				t.Errorf("%v is not known", ip)
			}
		}
		n.full("f")
		n.consistent()
		n.release(held)
		time.Sleep(nameKept)
		n.full("f")
		n.release(again)
		time.Sleep(nameKept - 1) // it was in use until then
		n.full("f")
		time.Sleep(time.Nanosecond)
		if f := n.number("f"); f != b || n.number("f") != f {
			t.Error("f did not get the number of b, which is free again")
		}
		n.consistent()
	})
}

// A client that asks for very many names must not have the addresses that others were told lead to its own.
func TestAddressInUseIsNotGivenToAnotherName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const most = 64
		n := &numbers{T: t, names: &names{max: most, fixed: true}}
		bank := n.number("bank.example")
		flood := func() (got int) {
			for i := range 4 * most {
				if _, err := n.names.number(fmt.Sprintf("h%d.evil.example", i), n.client()); err == nil {
					got++
				}
			}
			return got
		}
		for range 3 {
			for _, use := range []func(){
				func() { n.number("bank.example") },
				func() { n.lookup(fakeIP4(bank), n.client()) },
				func() { e, _ := n.hold(fakeIP4(bank), n.client()); time.Sleep(time.Hour); flood(); n.release(e) },
			} {
				use()
				flood()
				time.Sleep(nameKept - 1)
				flood()
				if name, _ := n.peek(fakeIP4(bank)); name != "bank.example" {
					t.Fatalf("the address is that of %q", name)
				}
			}
			n.consistent()
		}
		time.Sleep(nameKept + 1)
		if flood() != most {
			t.Error("names that are not used any more have kept their addresses")
		}
		if name, _ := n.peek(fakeIP4(bank)); name == "bank.example" {
			t.Error("the pool was not full: there was nothing to test")
		}
	})
}

func TestOneClientCannotUseAllAddresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const most = 1024
		n := &numbers{T: t, names: &names{max: most, fixed: true}}
		flood := func(from string) (got int) {
			for i := range 2 * most {
				_, err := n.names.number(fmt.Sprintf("h%d.%s", i, from), netip.MustParseAddrPort(from))
				if err == nil {
					got++
				} else if !errors.Is(err, errNamesMany) {
					t.Fatal(err)
				}
			}
			return got
		}
		for _, tt := range []struct {
			from string
			want int
		}{
			{"10.0.0.1:1", most / 2},
			{"[2001:db8::1]:1", most / 4},
			{"[2001:db8::2]:1", 0}, // the same network
			{"[2001:db8:0:1::1]:1", most / 8},
			{"10.0.0.2:1", most / 16},
		} {
			if got := flood(tt.from); got != tt.want {
				t.Errorf("%s got %d addresses, want %d", tt.from, got, tt.want)
			}
			n.consistent()
		}
		n.number("a.example")
		time.Sleep(nameKept)
		if got := flood("10.0.0.1:1"); got != most/2 {
			t.Errorf("a minute later it got %d", got)
		}
		n.consistent()
	})
}

// Who keeps the names of others fresh is who uses them.
func TestNamesCountForWhoUsesThem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &numbers{T: t, names: &names{max: 8, fixed: true}}
		first, second := clientAt(1000), clientAt(1001)
		for i := range 4 {
			if _, err := n.names.number(fmt.Sprintf("h%d", i), first); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := n.names.number("more", first); !errors.Is(err, errNamesMany) {
			t.Errorf("the first is told %v", err)
		}
		for i := range 4 {
			n.lookup(fakeIP4(i), second)
		}
		if _, err := n.names.number("more", second); !errors.Is(err, errNamesMany) {
			t.Errorf("the second is told %v", err)
		}
		if _, err := n.names.number("more", first); err != nil {
			t.Errorf("the first is told %v, and has none", err)
		}
		if _, ok := n.names.peek(fakeIP4(0)); !ok || n.byNum[0].user != proxy.ClientNetwork(second.Addr()) {
			t.Error("to look is no use")
		}
		n.consistent()
	})
}

func TestNumbersWrapAround(t *testing.T) {
	n := &numbers{T: t, names: &names{max: 2, byName: map[string]*entry{}, byNum: map[int]*entry{},
		users: map[netip.Prefix]int{}, start: namesMax - 1}}
	a, b := n.number("a"), n.number("b")
	if a != namesMax-1 || b != 0 {
		t.Errorf("numbers %d, %d", a, b)
	}
	if name, ok := n.lookup(fakeIP4(b), n.client()); name != "b" || !ok {
		t.Errorf("b is %q", name)
	}
}

func TestNoFreeAddressIsAFailureLoggedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		h := &Handler{names: names{fixed: true, max: 1}, Next: new(proxytest.RecordingHandler),
			Log: slog.New(slog.NewTextHandler(&log, nil))}
		a := fakeOf(t, h, "a.example")
		refused := func(lines int) {
			t.Helper()
			for range 5 {
				if m := ask(t, h, newQuestion("b.example.", dns.TypeA)); m.Rcode != dns.RcodeServerFailure || len(m.Answer) > 0 {
					t.Errorf("answer: %v", m)
				}
			}
			said := log.String()
			if n := strings.Count(said, errNamesFull.Error()); n != lines || !strings.Contains(said, "client=10.9.0.2") {
				t.Errorf("%d lines, want %d:\n%s", n, lines, said)
			}
		}
		refused(1)
		time.Sleep(episodeGap)
		if fakeOf(t, h, "a.example") != a {
			t.Error("a has another address")
		}
		time.Sleep(nameKept - 1)
		refused(2)
		c := newClient()
		end := serve(t, h, c, relay.Endpoint{IP: a, Port: 9}.String())
		time.Sleep(2 * nameKept)
		refused(3)
		end()
		time.Sleep(nameKept - 1)
		refused(4)
		time.Sleep(time.Nanosecond)
		if b := fakeOf(t, h, "b.example"); b != a {
			t.Errorf("b has %v", b)
		}
	})
}
