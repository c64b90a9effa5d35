package tundev

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Link is a network that is led into a device. Down must be called, once its device is not served any more.
type Link struct {
	Device *Device        // Up opened it; it is for the caller to close
	Addrs  []netip.Prefix // of the device: IPv4, and IPv6 where the network has it

	ns      *namespace
	network network
	state   *state
	record  *record // what Down is to undo; nil: what is there was not looked at

	mu   sync.Mutex
	down bool
}

// Up opens the device and leads the network into it, or changes nothing: an error says what is wrong with the settings
// or the machine. What a killed process has left there goes first. Everything from then on is to be undone by Down;
// should the process be killed, by the next Up or Clean.
func (s *Setup) Up() (*Link, error) {
	set := *s
	set.Name = cmp.Or(s.Name, DefaultName)
	set.conf, set.etc = cmp.Or(s.conf, resolvConf), cmp.Or(s.etc, namespacesEtc)
	set.Log = cmp.Or(s.Log, slog.New(slog.DiscardHandler))
	if len(set.Name) >= unix.IFNAMSIZ {
		return nil, fmt.Errorf("tundev: %q is too long for the name of an interface (%d bytes at most)", set.Name, unix.IFNAMSIZ-1)
	}
	if s.MTU != 0 && (s.MTU < MinMTU || s.MTU > PacketMax) {
		return nil, fmt.Errorf("tundev: an MTU of %d: it is from %d to %d", s.MTU, MinMTU, PacketMax)
	}
	l, err := openLink(set.Namespace, set.dir)
	if err != nil {
		return nil, err
	}
	if err := l.ns.do(func() error { return l.up(&set) }); err != nil {
		if l.Device != nil {
			l.Device.Close()
		}
		return nil, errors.Join(err, l.Down())
	}
	return l, nil
}

// Clean removes what a killed process has left of a Setup in a namespace (empty: the calling thread's), and nothing
// else. The error wraps ErrBusy where the process lives.
func Clean(namespace string) (Cleaned, error) { return clean(namespace, "") }

func clean(namespace, dir string) (c Cleaned, err error) {
	l, err := openLink(namespace, dir)
	if err != nil {
		return Cleaned{}, err
	}
	err = l.ns.do(func() error {
		c, err = l.leftovers(namespacesEtc)
		return err
	})
	return c, errors.Join(err, l.Down())
}

// openLink opens what it takes to change a namespace.
func openLink(name, dir string) (*Link, error) {
	if err := needRights(); err != nil {
		return nil, err
	}
	ns, err := openNamespace(name)
	if err != nil {
		return nil, err
	}
	l := &Link{ns: ns}
	if l.state, err = openState(cmp.Or(dir, defaultDir()), ns); err != nil {
		ns.close()
		return nil, err
	}
	if err := ns.do(l.openNetwork); err != nil {
		return nil, errors.Join(err, l.Down())
	}
	return l, nil
}

func (l *Link) openNetwork() error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("tundev: netlink: %w", err)
	}
	l.network = network{h}
	return nil
}

// up does what Up says, in the namespace.
func (l *Link) up(s *Setup) error {
	left, err := l.leftovers(s.etc)
	if err != nil {
		return err
	}
	if left.Any() {
		s.Log.Warn("removed what a killed sluice had left", "rules", left.Rules, "routes", left.Routes, "files", left.Files)
	}
	if _, foreign, err := l.network.tableRoutes(); err != nil {
		return err
	} else if len(foreign) > 0 {
		return fmt.Errorf("tundev: routing table %d is in use by somebody else", foreign[0].Table)
	}
	choices := []netip.Prefix{addr4}
	if wantsIPv6() {
		choices = append(choices, addr6)
	} else {
		s.Log.Info("IPv6 is switched off here, and stays so")
	}
	for _, choice := range choices {
		a, err := l.network.chooseAddr(choice)
		if err != nil {
			return err
		}
		l.Addrs = append(l.Addrs, a)
	}
	l.record = l.plan(s)
	if err := l.state.write(l.record); err != nil {
		return err
	}
	if l.Device, err = l.network.open(s.Name, s.MTU); err != nil {
		return err
	}
	index, err := l.network.bringUp(s.Name, l.Addrs)
	if err != nil {
		return err
	}
	for _, a := range l.Addrs {
		for _, r := range s.routes(a.Addr().Is6(), index, a.Addr()) {
			if err := l.network.h.RouteAdd(r); err != nil {
				return fmt.Errorf("tundev: add route %v to table %d: %w", r.Dst, r.Table, err)
			}
		}
	}
	rules := slices.Clone(l.record.Rules)
	slices.SortStableFunc(rules, func(a, b rule) int { return b.kind() - a.kind() }) // exceptions before the rules
	for _, r := range rules {
		if err := l.network.h.RuleAdd(r.netlink()); err != nil {
			return fmt.Errorf("tundev: add rule %d: %w", r.Priority, err)
		}
	}
	for _, f := range l.record.Files {
		if err := f.make(); err != nil {
			return err
		}
	}
	return nil
}

// plan returns what is about to be made. It says, too, where questions for names may go another way.
func (l *Link) plan(s *Setup) *record {
	r := &record{PID: os.Getpid(), Namespace: s.Namespace, Device: s.Name}
	for _, a := range l.Addrs {
		r.Rules = append(r.Rules, s.rules(a.Addr().Is6(), s.Name, a.Addr())...)
	}
	if !s.DNS {
		return r
	}
	conf, _ := os.ReadFile(s.conf) // without it, there is no name server but 127.0.0.1
	server, only := loopbackOnly(conf)
	switch there := l.Addrs[0].Addr().Next(); {
	case !only:
	case s.Namespace == "":
		s.Log.Warn(fmt.Sprintf("names are asked of this machine's own resolver, %v (see %s), whose questions may go past %s; "+
			"for systemd-resolved: resolvectl dns %[3]s %v; resolvectl domain %[3]s ~.", server, s.conf, s.Name, there))
	default:
		if f := namespaceFile(s.etc, s.Namespace, there); f != nil {
			r.Files = append(r.Files, *f)
			s.Log.Info(fmt.Sprintf("names are asked of %v in %s, by %s", there, s.Namespace, f.Path))
		}
	}
	return r
}

// leftovers removes what processes have made that are gone: all that bears our numbers, of which a record may not know,
// since another process wrote it, or nobody; the files of the record; and that of the namespace, of which etc has them.
func (l *Link) leftovers(etc string) (c Cleaned, err error) {
	rec, err := l.state.read()
	if err != nil {
		return c, err
	}
	if err := l.aliveElsewhere(); err != nil {
		return c, err
	}
	if rec == nil {
		rec = new(record)
	}
	if rec.Namespace != l.ns.name {
		rec.Files = nil // they are for one that had this number before, or for this one by its name, and are known by their text
	}
	if l.ns.name != "" && len(rec.Files) == 0 {
		if f := leftFile(etc, l.ns.name); f != nil {
			rec.Files = append(rec.Files, *f)
		}
	}
	if c, err = l.remove(rec, func(rule) bool { return true }); err == nil {
		l.record = new(record) // nothing is left
	}
	return c, err
}

// aliveElsewhere complains where our rules lead into a device that is there: its process lives, but has its records
// elsewhere, as in a container that shares the machine's network.
func (l *Link) aliveElsewhere() error {
	ours, _, err := l.network.tableRoutes()
	if err != nil {
		return err
	}
	for _, r := range ours {
		if r.Type != unix.RTN_UNICAST || r.LinkIndex == 0 {
			continue
		}
		if link, err := l.network.h.LinkByIndex(r.LinkIndex); err == nil {
			return fmt.Errorf("tundev: another sluice leads this network into %s: %w", link.Attrs().Name, ErrBusy)
		}
	}
	return nil
}

// remove removes those of our rules that which wants gone, our routes, and the files of rec.
func (l *Link) remove(rec *record, which func(rule) bool) (c Cleaned, err error) {
	var errs []error
	c.Rules, err = l.network.removeRules(which)
	errs = append(errs, err)
	c.Routes, err = l.network.removeRoutes()
	errs = append(errs, err)
	for _, f := range rec.Files {
		removed, err := f.remove()
		errs = append(errs, err)
		if removed {
			c.Files = append(c.Files, f.Path)
		}
	}
	return c, errors.Join(errs...)
}

// Drain leads new connections past the device, and leaves those there that have its address.
func (l *Link) Drain() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.down {
		return nil
	}
	_, err := l.network.removeRules(func(r rule) bool {
		return r.Priority != priorityOurs && slices.Contains(l.record.Rules, r)
	})
	return err
}

// Down undoes what Up has done, but does not close the device. It may be called twice.
func (l *Link) Down() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.down {
		return nil
	}
	l.down = true
	var err error
	if l.record != nil {
		err = l.ns.do(func() error {
			_, err := l.remove(l.record, func(r rule) bool { return slices.Contains(l.record.Rules, r) })
			return err
		})
	}
	if l.network.h != nil {
		l.network.h.Close()
	}
	l.ns.close()
	return errors.Join(err, l.state.close(l.record != nil && err == nil))
}
