package capture

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"

	"github.com/google/nftables"
	nlsocket "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// installed is a Capture's rules in the kernel.
type installed struct {
	conn  *nftables.Conn // the owner of the table
	table *nftables.Table
	// choose is the chain that decides about new connections.
	choose *nftables.Chain
	policy *policy // nil for REDIRECT
}

// Begin brings new traffic to the listeners at at, which have one port and are there already. All is
// installed, or nothing is.
func (c *Capture) Begin(at []netip.AddrPort) error {
	if c.installed != nil {
		return errors.New("capture: Begin was called twice")
	}
	v4, v6 := targets(at)
	if !v4.IsValid() && !v6.IsValid() {
		return errors.New("capture: nobody listens")
	}
	port := max(v4.Port(), v6.Port())
	in := newInstalled(c, port)
	if err := in.own(); err != nil {
		return explain(err, in.table.Name)
	}
	c.installed = in
	if c.TProxy {
		in.policy = &policy{number: Mark | uint32(port)}
		if err := in.policy.install(v4.IsValid(), v6.IsValid()); err != nil {
			c.End()
			return explain(err, in.table.Name)
		}
	}
	b := &builder{Capture: c, v4: v4, v6: v6, mark: Mark | uint32(port)}
	b.build()
	err := b.err
	if err == nil {
		err = in.conn.Flush()
	}
	if err != nil {
		c.End()
		return explain(err, in.table.Name)
	}
	return nil
}

// Stop leaves new traffic alone from now on. What has been captured stays so. It does nothing before Begin and after End.
func (c *Capture) Stop() error {
	in := c.installed
	if in == nil {
		return nil
	}
	in.conn.FlushChain(in.choose)
	if err := in.conn.Flush(); err != nil {
		return fmt.Errorf("capture: stop: %w", err)
	}
	return nil
}

// End removes all that Begin has installed. It does nothing before Begin, and may be called twice.
func (c *Capture) End() error {
	in := c.installed
	if in == nil {
		return nil
	}
	c.installed = nil
	var errs []error
	// The table first: without it nobody sets the mark that the policy is about.
	in.conn.DelTable(in.table)
	if err := in.conn.Flush(); err != nil {
		errs = append(errs, err)
	}
	if err := in.conn.CloseLasting(); err != nil { // which would remove the table, too
		errs = append(errs, err)
	}
	if in.policy != nil {
		errs = append(errs, in.policy.remove())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("capture: remove: %w", err)
	}
	return nil
}

func newInstalled(c *Capture, port uint16) *installed {
	return &installed{table: &nftables.Table{Name: c.tableName(port), Family: nftables.TableFamilyINet}}
}

// own creates the table such that it belongs to our socket.
func (in *installed) own() error {
	var socket *nlsocket.Conn
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(s *nlsocket.Conn) error {
		socket = s
		return s.SetWriteBuffer(sendBuffer)
	}))
	if err != nil {
		return err
	}
	if err := createOwned(socket, in.table); err != nil {
		// Of a table whose owner is another the kernel says what it says to who has no rights at all, who may not list
		// tables either.
		if errors.Is(err, os.ErrPermission) {
			if _, e := conn.ListTablesOfFamily(in.table.Family); e == nil {
				err = syscall.EEXIST
			}
		}
		conn.CloseLasting()
		return err
	}
	in.conn = conn
	return nil
}

// tableOwned is NFT_TABLE_F_OWNER: the table goes with the socket that has created it.
const tableOwned = 2

// sendBuffer is room for rules with some ten thousand networks, which go to the kernel at once.
const sendBuffer = 8 << 20

// createOwned creates a table that must not be there yet, with the flag owner (Linux 5.12), which package nftables cannot set.
func createOwned(socket *nlsocket.Conn, t *nftables.Table) error {
	attrs, err := nlsocket.MarshalAttributes([]nlsocket.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: []byte(t.Name + "\x00")},
		{Type: unix.NFTA_TABLE_FLAGS, Data: []byte{0, 0, 0, tableOwned}},
	})
	if err != nil {
		return err
	}
	const subsystem = unix.NFNL_SUBSYS_NFTABLES
	message := func(typ int, flags nlsocket.HeaderFlags, family, resource byte, attrs []byte) nlsocket.Message {
		return nlsocket.Message{
			Header: nlsocket.Header{Type: nlsocket.HeaderType(typ), Flags: nlsocket.Request | flags},
			Data:   append([]byte{family, unix.NFNETLINK_V0, 0, resource}, attrs...), // struct nfgenmsg
		}
	}
	if _, err := socket.SendMessages([]nlsocket.Message{
		message(unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, subsystem, nil),
		message(subsystem<<8|unix.NFT_MSG_NEWTABLE, nlsocket.Acknowledge|nlsocket.Create|nlsocket.Excl,
			byte(t.Family), 0, attrs),
		message(unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, subsystem, nil),
	}); err != nil {
		return err
	}
	_, err = socket.Receive() // the acknowledgement, or the error
	return err
}

// explain says what can be done about err.
func explain(err error, table string) error {
	switch {
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("capture: to set up packet filter rules needs the capability CAP_NET_ADMIN: run as root, or "+
			"`setcap cap_net_admin+ep` on the program (or `sluice exec` for one program, which needs none): %w", err)
	case errors.Is(err, syscall.EEXIST):
		return fmt.Errorf("capture: there is a table %s already: another sluice has set up this port", table)
	case errors.Is(err, syscall.EPROTONOSUPPORT), errors.Is(err, syscall.EAFNOSUPPORT):
		return fmt.Errorf("capture: this kernel has no nf_tables: %w", err)
	case errors.Is(err, syscall.EOPNOTSUPP), errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.EINVAL):
		return fmt.Errorf("capture: this kernel lacks what the rules need (Linux 5.12 with the modules nf_tables, nft_fib_inet, "+
			"nft_ct, and nft_redir or nft_tproxy): %w", err)
	}
	return fmt.Errorf("capture: set up %s: %w", table, err)
}

// Clean removes what processes that are gone have left behind, and returns a line for each. It leaves alone what is in use.
func Clean() (removed []string, err error) {
	policies, err := policies()
	if err != nil {
		return nil, explain(err, "")
	}
	var errs []error
	for _, p := range policies {
		port := uint16(p.number &^ markMask)
		in := newInstalled(&Capture{TProxy: true}, port)
		err := in.own() // nobody else begins at that port meanwhile
		if errors.Is(err, syscall.EEXIST) {
			continue
		}
		if err != nil {
			errs = append(errs, explain(err, in.table.Name))
			continue
		}
		err = p.remove()
		if err := errors.Join(err, in.conn.CloseLasting()); err != nil {
			errs = append(errs, fmt.Errorf("capture: %w", err))
			continue
		}
		removed = append(removed, fmt.Sprintf("the routing of sluice tproxy %d", port))
	}
	return removed, errors.Join(errs...)
}
