package tundev

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/rtnetlink"
)

// sysctl is where the kernel's settings of the calling thread's network namespace are.
const sysctl = "/proc/sys/net"

// hasIPv6 says whether the kernel has IPv6 at all.
func hasIPv6() bool {
	_, err := os.Stat(filepath.Join(sysctl, "ipv6"))
	return err == nil
}

// wantsIPv6 says whether the calling thread's network has IPv6, and it is not switched off.
func wantsIPv6() bool {
	off, err := os.ReadFile(filepath.Join(sysctl, "ipv6/conf/all/disable_ipv6"))
	return err == nil && strings.TrimSpace(string(off)) == "0"
}

// chooseAddr returns the first of our choices that is not one of another interface's networks.
func (n network) chooseAddr(choice netip.Prefix) (netip.Prefix, error) {
	family := netlink.FAMILY_V4
	if choice.Addr().Is6() {
		family = netlink.FAMILY_V6
	}
	taken, err := rtnetlink.List(func() ([]netlink.Addr, error) { return n.h.AddrList(nil, family) })
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("tundev: list addresses: %w", err)
	}
	first := choice
	for range addrChoices {
		free := true
		for _, t := range taken {
			// A network that is larger than all our choices would leave none, and does no harm: the device's is smaller.
			p := prefixOf(t.IPNet)
			free = free && !(choice.Contains(p.Addr()) || p.Bits() >= choice.Bits() && p.Overlaps(choice))
		}
		if free {
			return choice, nil
		}
		b := choice.Addr().AsSlice()
		b[len(b)-1] += 1 << (choice.Addr().BitLen() - choice.Bits())
		next, _ := netip.AddrFromSlice(b)
		choice = netip.PrefixFrom(next, choice.Bits())
	}
	return netip.Prefix{}, fmt.Errorf("tundev: %v and the addresses behind it are taken by other interfaces", first.Addr())
}

// open opens the device. One that is there already, and may be opened like a new one, is somebody else's.
func (n network) open(name string, mtu int) (*Device, error) {
	var missing netlink.LinkNotFoundError
	if _, err := n.h.LinkByName(name); err == nil {
		return nil, fmt.Errorf("tundev: an interface %s is there already: choose another name", name)
	} else if !errors.As(err, &missing) {
		return nil, fmt.Errorf("tundev: interface %s: %w", name, err)
	}
	d, err := Open(Options{Name: name, MTU: mtu})
	return d, explainOpen(err)
}

// needRights says what to do for who has no rights at all, before all else that is forbidden, too.
func needRights() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil || caps[0].Effective&(1<<unix.CAP_NET_ADMIN) != 0 {
		return nil // who cannot ask will be told later
	}
	return explainOpen(unix.EPERM)
}

// explainOpen says what a person can do where a device cannot be opened.
func explainOpen(err error) error {
	switch {
	case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES):
		return fmt.Errorf("tundev: a TUN device needs CAP_NET_ADMIN: run as root, "+
			"or run one command with all its traffic by `sluice exec`, which needs no rights: %w", err)
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO):
		return fmt.Errorf("tundev: this machine has no /dev/net/tun (load the module by `modprobe tun`, or give the container "+
			"the device; without, programs can use `sluice proxy`): %w", err)
	}
	return err
}

// bringUp gives the interface its addresses and switches it on. It returns its index.
func (n network) bringUp(device string, addrs []netip.Prefix) (index int, err error) {
	link, err := n.h.LinkByName(device)
	if err != nil {
		return 0, fmt.Errorf("tundev: interface %s: %w", device, err)
	}
	// Answers to what other rules sent into the device, and to those whom we forward for, are not what the filter expects.
	if err := n.loosen(device, link.Attrs().Index); err != nil {
		return 0, err
	}
	for _, a := range addrs {
		if a.Addr().Is6() {
			// New interfaces may have IPv6 off though the network has it. The link-local address is of no use.
			if err := setSysctl("ipv6/conf/"+device+"/disable_ipv6", "0"); err != nil {
				return 0, err
			}
			if err := n.h.LinkSetIP6AddrGenMode(link, nl6GenNone); err != nil {
				return 0, fmt.Errorf("tundev: interface %s: %w", device, err)
			}
		}
		addr := &netlink.Addr{IPNet: ipNet(a)}
		if a.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD // nobody else is there to ask
		}
		if err := n.h.AddrAdd(link, addr); err != nil {
			return 0, fmt.Errorf("tundev: add address %v to %s: %w", a, device, err)
		}
	}
	if err := n.h.LinkSetUp(link); err != nil {
		return 0, fmt.Errorf("tundev: switch on %s: %w", device, err)
	}
	return link.Attrs().Index, nil
}

// nl6GenNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
const nl6GenNone = 1

// loosen makes the device's reverse-path filter, where there is one, let in what there is any route to. By netlink: in a container,
// /proc/sys may be read-only.
func (n network) loosen(device string, index int) error {
	for _, of := range []string{"all", device} {
		v, err := os.ReadFile(filepath.Join(sysctl, "ipv4/conf", of, "rp_filter"))
		if err != nil || strings.TrimSpace(string(v)) != "1" {
			continue
		}
		link := nl.NewIfInfomsg(unix.AF_UNSPEC)
		link.Index = int32(index)
		families := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
		settings := families.AddRtAttr(unix.AF_INET, nil).AddRtAttr(ifaInetConf, nil)
		settings.AddRtAttr(rpFilter, nl.Uint32Attr(2))
		request := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
		request.AddData(link)
		request.AddData(families)
		if _, err := request.Execute(unix.NETLINK_ROUTE, 0); err != nil {
			return fmt.Errorf("tundev: reverse-path filter of %s: %w", device, err)
		}
		return nil
	}
	return nil
}

// Of linux/if_link.h and linux/ip.h.
const (
	ifaInetConf = 1 // IFLA_INET_CONF
	rpFilter    = 8 // IPV4_DEVCONF_RP_FILTER
)

// setSysctl writes a setting, unless it has that value.
func setSysctl(name, value string) error {
	name = filepath.Join(sysctl, name)
	if v, err := os.ReadFile(name); err == nil && strings.TrimSpace(string(v)) == value {
		return nil
	}
	if err := os.WriteFile(name, []byte(value), 0); err != nil {
		return fmt.Errorf("tundev: %w", err)
	}
	return nil
}
