package enclosure

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/tundev"
)

// Inside is the child's part: args are the arguments of the program after InsideName. It becomes the command, or returns
// what went wrong where there is nobody to be told.
func Inside(args []string) error {
	// Rights, and the signal at the parent's death, belong to a thread, and the one that executes the command
	// has to be the one that was prepared.
	runtime.LockOSThread()
	if len(args) < 3 {
		return errors.New("enclosure: this is a part of sluice exec and does nothing by itself")
	}
	fd, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	unix.CloseOnExec(fd)
	outside := os.NewFile(uintptr(fd), "enclosure")
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return err
	}
	var network Network
	if _, err := receive(outside, &network); err != nil {
		return ifAlive(err)
	}
	device, noIPv6, err := network.build()
	if err != nil {
		return send(outside, answerOf(err), -1)
	}
	err = sendDevice(outside, device, noIPv6)
	if err == nil {
		_, err = receive(outside, new(struct{}))
	}
	if err != nil {
		return ifAlive(err)
	}
	if err := dropRights(); err != nil {
		return send(outside, answerOf(fmt.Errorf("drop rights: %w", err)), -1)
	}
	a := answerOf(execute(args[1], args[2:]))
	a.Command = true
	return send(outside, a, -1)
}

// ifAlive returns err unless it is that the outside is gone, which has said why.
func ifAlive(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) {
		return nil
	}
	return err
}

// build makes the network, and the files that belong to it.
func (n *Network) build() (device *tundev.Device, noIPv6 bool, err error) {
	device, err = tundev.Open(tundev.Options{MTU: n.MTU})
	if err != nil {
		return nil, false, err
	}
	if noIPv6, err = n.connect(device.Name()); err != nil {
		return nil, false, err
	}
	allowPing()
	if n.Nameserver.IsValid() {
		err = newFiles(n.Nameserver).lay()
	}
	return device, noIPv6, err
}

// connect brings up loopback and the device.
func (n *Network) connect(name string) (noIPv6 bool, err error) {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return false, fmt.Errorf("loopback: %w", err)
	}
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		return false, fmt.Errorf("device %s: %w", name, err)
	}
	for _, p := range n.Addrs {
		addr, err := netlink.ParseAddr(p.String())
		if err == nil {
			addr.Flags = unix.IFA_F_NODAD // nobody else is there
			err = netlink.AddrAdd(link, addr)
		}
		if p.Addr().Is6() && (errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EACCES)) {
			noIPv6 = true
			continue
		}
		if err != nil {
			return false, fmt.Errorf("address %v: %w", p, err)
		}
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: everywhere(p.Addr())}
		if err := netlink.RouteAdd(route); err != nil {
			return false, fmt.Errorf("default route of %v: %w", p, err)
		}
		awaitLocal(p.Addr())
	}
	return noIPv6, nil
}

// awaitLocal waits until the kernel takes in what is for a. With an IPv6 address, that is a little after the address is there,
// and the first answers to the command would be lost.
func awaitLocal(a netip.Addr) {
	for range 1000 {
		routes, err := netlink.RouteGet(a.AsSlice())
		if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// everywhere returns the network of all addresses of a's family.
func everywhere(a netip.Addr) *net.IPNet {
	n := a.BitLen()
	return &net.IPNet{IP: make(net.IP, n/8), Mask: net.CIDRMask(0, n)}
}

// allowPing lets the user open the sockets that ping uses where it has no rights. A system that does not let
// us say so has pings that do not work, and nothing else.
func allowPing() {
	gid := os.Getegid()
	os.WriteFile("/proc/sys/net/ipv4/ping_group_range", fmt.Appendf(nil, "%d %d", gid, gid), 0)
}

func sendDevice(outside *os.File, device *tundev.Device, noIPv6 bool) error {
	raw, err := device.File().SyscallConn() // File.Fd would have it block, here and outside
	if err != nil {
		return err
	}
	var sent error
	err = raw.Control(func(fd uintptr) { sent = send(outside, answer{MTU: device.MTU(), NoIPv6: noIPv6}, int(fd)) })
	return errors.Join(err, sent)
}

// dropRights takes away what was given for building. What root has, where no rights were given, stays root's. The
// bounding set stays too: without it the kernel would refuse to run programs such as ping, whose file asks for a capability that
// means nothing outside this namespace.
func dropRights() error {
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return err
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		return err
	}
	caps[0].Inheritable, caps[1].Inheritable = 0, 0
	return unix.Capset(&header, &caps[0])
}

// execute becomes the command, or returns why not. As by execvp(3), a file that is no program is a script.
func execute(path string, args []string) error {
	err := syscall.Exec(path, args, os.Environ())
	if errors.Is(err, syscall.ENOEXEC) {
		err = syscall.Exec("/bin/sh", append([]string{"sh", path}, args[1:]...), os.Environ())
	}
	return err
}
