package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// lab is three network namespaces: a client on a LAN, its router, and an origin far behind that.
//
//	client ── veth, MTU 1500 ── router ── veth, MTU 1500 ── origin
//
// Each measurement has one of its own, so that what a relay changes in the router goes with it. The
// interfaces have the offloads that the kernel gives them. Nothing outside is touched.
type lab struct {
	ns  [places]int // descriptors of the namespaces
	who net.Listener
}

// place is one of the lab's namespaces.
type place int

const (
	atClient place = iota
	atRouter
	atOrigin
	places
)

// The addresses. The origin's is reached by default routes, since a network that has a route of its own is
// none that a tun takes in.
const (
	labLAN     = "10.83.1.0/24"
	labClient  = "10.83.1.2"
	labRouter  = "10.83.1.1" // in the LAN
	labNear    = "10.83.2.1" // the router, in the network between it and the origin
	labFar     = "10.83.2.2" // the origin, there
	labOrigin  = "203.0.113.1"
	labLANName = "lan0" // the router's interface to the LAN
)

// canLab says why there can be no lab.
func canLab() error {
	if os.Getuid() != 0 {
		return errors.New("network namespaces need root")
	}
	return nil
}

// newLab makes a lab. congestion is its congestion control, empty for the machine's.
func newLab(congestion string) (*lab, error) {
	l := &lab{ns: [places]int{-1, -1, -1}}
	err := l.build(congestion)
	if err != nil {
		l.close()
		return nil, fmt.Errorf("lab: %w", err)
	}
	return l, nil
}

func (l *lab) build(congestion string) error {
	for i := range l.ns {
		var err error
		if l.ns[i], err = newNetwork(); err != nil {
			return err
		}
	}
	for p := range places {
		if err := l.within(p, func() error { return settleNetwork(congestion, p == atRouter) }); err != nil {
			return err
		}
	}
	if err := l.within(atRouter, l.connect); err != nil {
		return err
	}
	steps := []struct {
		at  place
		set func() error
	}{
		{atClient, func() error { return address("eth0", labClient+"/24") }},
		{atClient, func() error { return route("0.0.0.0/0", labRouter) }},
		{atRouter, func() error { return address(labLANName, labRouter+"/24") }},
		{atRouter, func() error { return address("wan0", labNear+"/24") }},
		{atOrigin, func() error { return address("eth0", labFar+"/24") }},
		{atOrigin, func() error { return address("lo", labOrigin+"/32") }},
		{atRouter, func() error { return route("0.0.0.0/0", labFar) }},
		{atOrigin, func() error { return route(labLAN, labNear) }},
		{atClient, func() error { return awaitUp("eth0") }},
		{atRouter, func() error { return awaitUp(labLANName) }},
		{atRouter, func() error { return awaitUp("wan0") }},
		{atOrigin, func() error { return awaitUp("eth0") }},
		{atOrigin, l.listenWho},
	}
	for _, s := range steps {
		if err := l.within(s.at, s.set); err != nil {
			return err
		}
	}
	return nil
}

// close gives the namespaces up. They go with their last process.
func (l *lab) close() {
	if l.who != nil {
		l.who.Close()
	}
	for _, fd := range l.ns {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// here opens the network namespace of the calling thread.
func here() (int, error) {
	fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open network namespace: %w", err)
	}
	return fd, nil
}

// newNetwork makes a network namespace and returns a descriptor of it.
func newNetwork() (fd int, err error) {
	err = aside(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		fd, err = here()
		return err
	})
	return fd, err
}

// within calls f in a namespace. Sockets, processes and files of /proc/sys/net that f opens itself belong to
// that namespace. What f starts in a goroutine does not.
func (l *lab) within(p place, f func() error) error {
	return aside(func() error {
		if err := unix.Setns(l.ns[p], unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

// aside calls f in a thread that returns to its network namespace afterwards.
func aside(f func() error) error {
	runtime.LockOSThread()
	was, err := here()
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer unix.Close(was)
	ferr := f()
	if err := unix.Setns(was, unix.CLONE_NEWNET); err != nil {
		return errors.Join(ferr, fmt.Errorf("return to network namespace: %w", err)) // nobody else may get this thread
	}
	runtime.UnlockOSThread()
	return ferr
}

// settleNetwork prepares a new namespace.
func settleNetwork(congestion string, router bool) error {
	if err := loopbackUp(); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	set := [][2]string{
		{"ipv4/ip_local_port_range", "10240 65535"},
		{"ipv4/tcp_tw_reuse", "1"}, // or the ports of short connections are used up
		{"ipv4/conf/all/rp_filter", "0"},
		{"ipv4/conf/default/rp_filter", "0"},
		{"ipv6/conf/all/disable_ipv6", "1"},
		{"ipv6/conf/default/disable_ipv6", "1"},
	}
	if congestion != "" {
		set = append(set, [2]string{"ipv4/tcp_congestion_control", congestion})
	}
	if router {
		set = append(set, [2]string{"ipv4/ip_forward", "1"})
	}
	for _, kv := range set {
		path := filepath.Join("/proc/sys/net", kv[0])
		if err := os.WriteFile(path, []byte(kv[1]), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("set %s to %s: %w", kv[0], kv[1], err)
		}
	}
	return nil
}

// connect makes the router's two cables.
func (l *lab) connect() error {
	for name, to := range map[string]place{labLANName: atClient, "wan0": atOrigin} {
		a := netlink.NewLinkAttrs()
		a.Name, a.MTU = name, 1500
		v := &netlink.Veth{LinkAttrs: a, PeerName: "eth0", PeerNamespace: netlink.NsFd(l.ns[to])}
		if err := netlink.LinkAdd(v); err != nil {
			return fmt.Errorf("add veth %s: %w", name, err)
		}
	}
	return nil
}

// address gives an interface an address and brings it up.
func address(name, prefix string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	a, err := netlink.ParseAddr(prefix)
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(link, a); err != nil {
		return fmt.Errorf("add %s to %s: %w", prefix, name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring %s up: %w", name, err)
	}
	return nil
}

// awaitUp waits until an interface passes packets on. The kernel looks at most once a second for cables that
// were plugged in.
func awaitUp(name string) error {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("interface %s: %w", name, err)
		}
		if link.Attrs().OperState == netlink.OperUp {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("interface %s is still %v", name, link.Attrs().OperState)
		}
	}
}

func route(to, gateway string) error {
	p, g := netip.MustParsePrefix(to), netip.MustParseAddr(gateway)
	dst := &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
	if err := netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: g.AsSlice()}); err != nil {
		return fmt.Errorf("add route to %s: %w", to, err)
	}
	return nil
}

// listenWho starts the service that tells clients who they are. It ends with its listener.
func (l *lab) listenWho() (err error) {
	if l.who, err = net.Listen("tcp", labOrigin+":0"); err != nil {
		return err
	}
	go serveWho(l.who)
	return nil
}

func serveWho(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		c.SetDeadline(time.Now().Add(time.Second))
		c.Write([]byte(c.RemoteAddr().String()))
		c.Close()
	}
}

// relayed returns nil once connections from a place reach the origin through a relay: the origin knows
// them by another address than their own.
func (l *lab) relayed(from place) error {
	return l.within(from, func() error {
		c, err := net.DialTimeout("tcp", l.who.Addr().String(), time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Second))
		b := make([]byte, 64)
		n, err := c.Read(b)
		if err != nil {
			return err
		}
		if string(b[:n]) == c.LocalAddr().String() {
			return errors.New("connections go past it")
		}
		return nil
	})
}
