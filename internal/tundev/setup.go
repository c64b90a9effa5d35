package tundev

import (
	"errors"
	"log/slog"
	"net/netip"
)

// DefaultMark is the firewall mark of the connections that do not go into a device, because the program that
// serves it made them. It is the one that package capture leaves alone, too.
const DefaultMark = 0x736c0000

// ErrBusy is wrapped by the error of Up and Clean for a network that a running program leads into a device.
var ErrBusy = errors.New("in use")

// Setup says how a network, that is a network namespace, is led into a TUN device: the device with its addresses, routes
// in tables of their own, and the policy rules that say what goes by those. Nothing that is there is changed: the
// tables, the main one first, stay what they are, and so does resolv.conf.
//
// These go on as before, whatever the settings:
//   - what comes from an address of this machine, because it was connected before, because it answers somebody who
//     connected to this machine (a remote shell, say), or because its program chose the address;
//   - what bears one of Marks;
//   - multicast and broadcast;
//   - what is for this machine, and, without Include, for networks that it has other routes to than a default route.
//
// The rest goes into the device: packets of this machine, and those that it forwards. With IPv6 switched off, only IPv4 does.
type Setup struct {
	Name      string         // of the device; empty: sluice0
	Namespace string         // as in ip netns: /run/netns/NAME, with the device and all routes; empty: the calling thread's
	MTU       int            // 0: DefaultMTU
	Include   []netip.Prefix // destinations that go into the device, whatever the other routes are; empty: all
	Exclude   []netip.Prefix // destinations that do not; of two networks the smaller one counts
	Marks     []uint32       // marks of packets that do not
	DNS       bool           // everything to port 53 goes into the device, but to Exclude
	Log       *slog.Logger   // nil: silent

	dir  string // for records; empty: the system's
	conf string // which says the machine's name servers; empty: resolvConf
	etc  string // with files for namespaces; empty: namespacesEtc
}

// DefaultName is the name of a device that is not given one.
const DefaultName = "sluice0"

// MinMTU is the smallest MTU of a device that carries IPv6 (RFC 8200 section 5).
const MinMTU = 1280

// The rules and routes are known by these numbers. Priorities lie behind those of Tailscale, whose networks go on as
// before, and in front of the main table's. Nobody else has the protocol (iproute2's rt_protos lists those in use).
const (
	protocol      = 83
	firstPriority = 7100
	lastPriority  = 7110
	tableAll      = 7100 // a default route into the device
	tableSome     = 7101 // routes to Include into the device
)

// The device's addresses are the first of what package dns gives to names, which leaves them alone: ranges that nobody
// has routes to. Where an address is taken, it is the one of the next of four networks of four addresses.
var (
	addr4 = netip.MustParsePrefix("198.18.0.1/30")
	addr6 = netip.MustParsePrefix("fd5c:1e7a:b3d2:198::1/126")
)

const addrChoices = 4

// notUnicast goes on as before.
var notUnicast = []netip.Prefix{
	netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("255.255.255.255/32"),
	netip.MustParsePrefix("ff00::/8"),
}

// Addrs returns the networks that the device's addresses are from.
func Addrs() (v4, v6 netip.Prefix) {
	return netip.PrefixFrom(addr4.Addr(), 28).Masked(), netip.PrefixFrom(addr6.Addr(), 124).Masked()
}

// Cleaned says what Clean has removed.
type Cleaned struct {
	Rules, Routes int
	Files         []string
}

// Any says whether there was anything to remove.
func (c Cleaned) Any() bool { return c.Rules+c.Routes+len(c.Files) > 0 }
