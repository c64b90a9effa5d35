package process

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// pair returns a client's conn to a listener on loopback of the network, and its two addresses.
func pair(t *testing.T, network, addr string) (client, peer netip.AddrPort, c net.Conn) {
	t.Helper()
	ln, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	if c, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.LocalAddr().(*net.TCPAddr).AddrPort(), c.RemoteAddr().(*net.TCPAddr).AddrPort(), c
}

func TestOwnerIsThisProcess(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if exe, err = filepath.EvalSymlinks(exe); err != nil {
		t.Fatal(err)
	}
	var table Table
	check := func(what string, client, peer netip.AddrPort, network string) {
		t.Helper()
		o, ok := table.Owner(client, peer, network)
		if !ok || o.UID != uint32(os.Getuid()) || o.PID != os.Getpid() || o.Path != exe || o.Cgroup == "" {
			t.Errorf("%s: %+v, %v; want %s, pid %d", what, o, ok, exe, os.Getpid())
		}
	}
	client, peer, _ := pair(t, "tcp", "127.0.0.1:0")
	check("IPv4", client, peer, "tcp")
	mapped := func(a netip.AddrPort) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr().As16()), a.Port())
	}
	check("IPv4 in IPv6", mapped(client), mapped(peer), "tcp")
	client, peer, _ = pair(t, "tcp", "[::1]:0")
	check("IPv6", client, peer, "tcp")

	for _, addr := range []string{"127.0.0.1:0", ":0"} {
		u, err := net.ListenPacket("udp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		port := u.LocalAddr().(*net.UDPAddr).AddrPort().Port()
		check("unconnected UDP at "+addr, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port),
			netip.MustParseAddrPort("127.0.0.1:9"), "udp")
	}
}

// TestOwnerOfNothing: neither a socket that is not there, nor one that only listens, nor a mix of families.
func TestOwnerOfNothing(t *testing.T) {
	client, peer, c := pair(t, "tcp", "127.0.0.1:0")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	listener := ln.Addr().(*net.TCPAddr).AddrPort()
	var table Table
	for what, s := range map[string]socket{
		"a listener":    {listener, peer, "tcp"},
		"another port":  {netip.AddrPortFrom(client.Addr(), client.Port()^1), peer, "tcp"},
		"two families":  {client, netip.MustParseAddrPort("[::1]:80"), "tcp"},
		"a Unix socket": {netip.AddrPort{}, netip.AddrPort{}, "tcp"},
		"far away":      {netip.MustParseAddrPort("192.0.2.1:1"), peer, "tcp"},
		"UDP":           {netip.MustParseAddrPort("127.0.0.1:1"), peer, "udp"},
	} {
		if o, ok := table.Owner(s.client, s.peer, s.network); ok {
			t.Errorf("%s belongs to %+v", what, o)
		}
	}
	if _, ok := table.Owner(client, peer, "tcp"); !ok {
		t.Fatal("the client was not found")
	}
	c.Close()
	if o, ok := table.Owner(client, peer, "tcp"); ok {
		t.Errorf("a closed socket belongs to %+v", o)
	}
}

// TestOwnerOfTheNextSocket: who takes a port that was another user's a moment ago is not taken for that user.
func TestOwnerOfTheNextSocket(t *testing.T) {
	proxytest.NeedRoot(t)
	_, peer, _ := pair(t, "tcp", "127.0.0.1:0")
	for _, userOnly := range []bool{true, false} {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(proxytest.FreePort(t))}}
		c, err := d.Dial("tcp", peer.String())
		if err != nil {
			t.Fatal(err)
		}
		client := c.LocalAddr().(*net.TCPAddr).AddrPort()
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		const nobody = 65534
		raw.Control(func(fd uintptr) { err = unix.Fchown(int(fd), nobody, nobody) })
		if err != nil {
			t.Fatal(err)
		}
		table := Table{UserOnly: userOnly}
		if o, ok := table.Owner(client, peer, "tcp"); !ok || o.UID != nobody {
			t.Fatalf("%+v, %v", o, ok)
		}
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
		next, err := d.Dial("tcp", peer.String())
		if err != nil {
			t.Fatal(err)
		}
		defer next.Close()
		if o, ok := table.Owner(client, peer, "tcp"); !ok || o.UID != 0 {
			t.Errorf("user only %v: %+v, %v", userOnly, o, ok)
		}
	}
}

func TestUserOnly(t *testing.T) {
	client, peer, _ := pair(t, "tcp", "127.0.0.1:0")
	table := Table{UserOnly: true}
	if o, ok := table.Owner(client, peer, "tcp"); !ok || o != (Owner{UID: uint32(os.Getuid())}) {
		t.Errorf("%+v, %v", o, ok)
	}
}

// TestKnownIsBounded: a flood of clients does not fill the memory.
func TestKnownIsBounded(t *testing.T) {
	var table Table
	for i := range 3 * knowMost {
		table.remember(uint64(i), finding{until: time.Now().Add(time.Hour)})
		if len(table.known) > knowMost {
			t.Fatalf("%d are known", len(table.known))
		}
	}
}

// TestHolderOnALoadedMachine: a socket of our own is found though there is no time to look through all processes.
func TestHolderOnALoadedMachine(t *testing.T) {
	client, peer, _ := pair(t, "tcp", "127.0.0.1:0")
	_, inode, ok := socketOf(socket{client, peer, "tcp"})
	if got := Holder(inode, time.Now().Add(-time.Second)); !ok || got != os.Getpid() {
		t.Errorf("found %d, %v", got, ok)
	}
}

func FuzzReadAnswer(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, 16+answerLen))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, inode, ok := readAnswer(b); ok && inode == 0 {
			t.Error("a socket without inode")
		}
	})
}

func BenchmarkOwner(b *testing.B) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	client, peer := c.LocalAddr().(*net.TCPAddr).AddrPort(), c.RemoteAddr().(*net.TCPAddr).AddrPort()
	var table Table
	table.Owner(client, peer, "tcp")
	b.Run("known", func(b *testing.B) {
		for b.Loop() {
			table.Owner(client, peer, "tcp")
		}
	})
	b.Run("user", func(b *testing.B) {
		for b.Loop() {
			socketOf(socket{client, peer, "tcp"})
		}
	})
	b.Run("recent process", func(b *testing.B) {
		for b.Loop() {
			clear(table.known)
			table.Owner(client, peer, "tcp")
		}
	})
	b.Run("all processes", func(b *testing.B) { // an inode that nobody has
		for b.Loop() {
			Holder(1, time.Now().Add(time.Minute))
		}
		b.ReportMetric(float64(len(pids())), "processes")
	})
}
