package tundev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// device is what a Device is on Linux.
type device struct {
	raw    syscall.RawConn
	closed atomic.Bool
	read   vector // of ReadPacket alone
	pool   sync.Pool
}

// flags are what every Device is opened with: IP packets, without a header but that of the offloads.
const flags = unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR

// Open opens a new device, in the network namespace of the calling thread; it needs CAP_NET_ADMIN there. The interface is down and
// has no address. It goes when the device is closed.
func Open(o Options) (*Device, error) {
	name := o.Name
	if name == "" {
		name = "sluice%d"
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return nil, fmt.Errorf("tundev: %q is no name of an interface (%d bytes at most)", name, unix.IFNAMSIZ-1)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("tundev: open /dev/net/tun: %w", err)
	}
	ifr.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("tundev: make TUN device %s: %w", name, err)
	}
	d, err := newDevice(fd, ifr.Name(), o.MTU)
	if err != nil {
		return nil, err
	}
	if err := d.setUp(o.NoOffload); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// FromFile takes over the file of a device that was opened elsewhere, as by a child in another namespace, by Open. mtu is that of
// the interface, 0 for DefaultMTU: it cannot be asked from here. f is closed, in any case.
func FromFile(f *os.File, mtu int) (*Device, error) {
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("tundev: %w", err)
	}
	fd := -1
	if cerr := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil {
		err = cerr
	}
	if err != nil {
		return nil, fmt.Errorf("tundev: %w", err)
	}
	ifr, _ := unix.NewIfreq("")
	if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("tundev: %s is not an open TUN device: %w", f.Name(), err)
	}
	if has := ifr.Uint16(); has&flags != flags || has&unix.IFF_TAP != 0 {
		unix.Close(fd)
		return nil, fmt.Errorf("tundev: device %s was not opened with IFF_TUN, IFF_NO_PI and IFF_VNET_HDR (flags %#x)", ifr.Name(), has)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("tundev: %w", err)
	}
	return newDevice(fd, ifr.Name(), mtu)
}

func newDevice(fd int, name string, mtu int) (*Device, error) {
	if mtu == 0 {
		mtu = DefaultMTU
	}
	d := &Device{file: os.NewFile(uintptr(fd), "/dev/net/tun"), name: name, mtu: mtu, device: new(device)}
	raw, err := d.file.SyscallConn()
	if err != nil {
		d.file.Close()
		return nil, fmt.Errorf("tundev: %w", err)
	}
	d.raw = raw
	d.read.call = d.read.tryRead
	d.pool.New = newWriteVector
	return d, nil
}

func (d *Device) setUp(noOffload bool) error {
	// USO came with Linux 6.2.
	const tso = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN
	var err error
	if cerr := d.raw.Control(func(fd uintptr) {
		if !noOffload {
			err = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, tso|unix.TUN_F_USO4|unix.TUN_F_USO6)
			if err == unix.EINVAL {
				err = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, tso)
			}
		}
	}); cerr != nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("tundev: offloads of %s: %w", d.name, err)
	}
	// By netlink: the ioctl for the queue is refused in a user namespace, whatever the rights there.
	link, err := netlink.LinkByName(d.name)
	if err != nil {
		return fmt.Errorf("tundev: interface %s: %w", d.name, err)
	}
	if d.mtu != DefaultMTU {
		if err := netlink.LinkSetMTU(link, d.mtu); err != nil {
			return fmt.Errorf("tundev: MTU %d of %s: %w", d.mtu, d.name, err)
		}
	}
	if err := netlink.LinkSetTxQLen(link, queueLength); err != nil {
		return fmt.Errorf("tundev: queue of %s: %w", d.name, err)
	}
	return nil
}

// queueLength is how many packets the kernel holds for the reader. Its own value, 500, is 10 ms of 500 Mbit/s of
// datagrams: less than a reader may have to wait for a processor.
const queueLength = 4000

// The fields of struct virtio_net_hdr, which is in the machine's byte order.
const (
	vnetSize = 10

	vnetNeedsCsum = 1 // flags
	vnetDataValid = 2

	vnetTCP4 = 1 // gso_type
	vnetTCP6 = 4
	vnetUDP  = 5
	vnetECN  = 0x80
)

// iovecsMax is how many slices of a packet are passed to the kernel as they are.
const iovecsMax = 64

// vector is what one readv or writev needs.
type vector struct {
	hdr   [vnetSize]byte
	iov   [1 + iovecsMax]unix.Iovec
	used  int
	n     int
	errno syscall.Errno
	call  func(fd uintptr) bool // tryRead, made once
	ctl   func(fd uintptr)      // doWrite, made once
}

func newWriteVector() any {
	v := new(vector)
	v.ctl = v.doWrite
	return v
}

// set points v at the header and bufs. Of more than iovecsMax, the last are joined.
func (v *vector) set(bufs [][]byte) {
	v.iov[0].Base = &v.hdr[0]
	v.iov[0].SetLen(vnetSize)
	v.used = 1
	for i, b := range bufs {
		if len(b) == 0 {
			continue
		}
		if v.used == iovecsMax && i < len(bufs)-1 {
			var rest []byte
			for _, b := range bufs[i:] {
				rest = append(rest, b...)
			}
			v.add(rest)
			return
		}
		v.add(b)
	}
}

func (v *vector) add(b []byte) {
	v.iov[v.used].Base = &b[0]
	v.iov[v.used].SetLen(len(b))
	v.used++
}

// forget drops the pointers to the caller's memory.
func (v *vector) forget() { clear(v.iov[:v.used]) }

// The system calls are raw: they do not wait, and the scheduler, told of one that takes some 20 µs, gives the
// processor to another thread, to have it back at once.

func (v *vector) tryRead(fd uintptr) bool {
	for {
		n, _, errno := syscall.RawSyscall(unix.SYS_READV, fd, uintptr(unsafe.Pointer(&v.iov[0])), uintptr(v.used))
		if errno == unix.EINTR {
			continue
		}
		v.n, v.errno = int(n), errno
		return errno != unix.EAGAIN
	}
}

func (v *vector) doWrite(fd uintptr) {
	for {
		n, _, errno := syscall.RawSyscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&v.iov[0])), uintptr(v.used))
		if errno == unix.EINTR {
			continue
		}
		v.n, v.errno = int(n), errno
		return
	}
}

// ReadPacket waits for a packet and stores it in bufs, one after the other, which should have room for PacketMax bytes.
// It returns the packet's size. One goroutine at a time may call it. After Close the error is
// [os.ErrClosed]; for a device that was deleted it wraps ErrGone.
func (d *Device) ReadPacket(h *Header, bufs [][]byte) (n int, err error) {
	v := &d.read
	v.set(bufs)
	v.n, v.errno = 0, 0
	err = d.raw.Read(v.call)
	if err != nil && !d.closed.Load() { // the netpoller tells of an error, not of which
		if cerr := d.raw.Control(func(fd uintptr) { v.call(fd) }); cerr == nil && v.errno != unix.EAGAIN {
			err = nil
		}
	}
	v.forget()
	if err == nil && v.errno != 0 {
		err = v.errno
	}
	if err != nil {
		return 0, d.failed("read", err)
	}
	if v.n < vnetSize {
		return 0, d.failed("read", fmt.Errorf("a packet of %d bytes", v.n))
	}
	h.parse(&v.hdr)
	return v.n - vnetSize, nil
}

// WritePacket writes the packet whose bytes are those of bufs, one after the other. It keeps nothing of them, and may
// be called by many at a time. An error is about this packet, unless it wraps ErrGone or is [os.ErrClosed].
func (d *Device) WritePacket(h Header, bufs [][]byte) error {
	v := d.pool.Get().(*vector)
	h.marshal(&v.hdr)
	v.set(bufs)
	err := d.raw.Control(v.ctl)
	if err == nil && v.errno != 0 {
		err = v.errno
	}
	v.forget()
	d.pool.Put(v)
	if err != nil {
		return d.failed("write", err)
	}
	return nil
}

func (d *Device) failed(op string, err error) error {
	switch {
	case d.closed.Load():
		return os.ErrClosed
	case errors.Is(err, unix.EBADFD):
		return fmt.Errorf("tundev: %s: %w", d.name, ErrGone)
	}
	return fmt.Errorf("tundev: %s %s: %w", op, d.name, err)
}

// Close deletes the device, unless it is persistent or open elsewhere. It may be called twice.
func (d *Device) Close() error {
	d.closed.Store(true)
	if err := d.file.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("tundev: close %s: %w", d.name, err)
	}
	return nil
}

func (h *Header) parse(b *[vnetSize]byte) {
	e := binary.NativeEndian
	*h = Header{
		ECN:        b[1]&vnetECN != 0,
		NeedsCsum:  b[0]&vnetNeedsCsum != 0,
		CsumValid:  b[0]&vnetDataValid != 0,
		HdrLen:     e.Uint16(b[2:]),
		SegSize:    e.Uint16(b[4:]),
		CsumStart:  e.Uint16(b[6:]),
		CsumOffset: e.Uint16(b[8:]),
	}
	switch b[1] &^ vnetECN {
	case vnetTCP4:
		h.GSO = GSOTCP4
	case vnetTCP6:
		h.GSO = GSOTCP6
	case vnetUDP:
		h.GSO = GSOUDP
	}
}

func (h *Header) marshal(b *[vnetSize]byte) {
	e := binary.NativeEndian
	*b = [vnetSize]byte{}
	if h.NeedsCsum {
		b[0] = vnetNeedsCsum
		e.PutUint16(b[6:], h.CsumStart)
		e.PutUint16(b[8:], h.CsumOffset)
	}
	if h.GSO == GSONone {
		return
	}
	b[1] = [...]byte{GSOTCP4: vnetTCP4, GSOTCP6: vnetTCP6, GSOUDP: vnetUDP}[h.GSO]
	if h.ECN {
		b[1] |= vnetECN
	}
	e.PutUint16(b[2:], h.HdrLen)
	e.PutUint16(b[4:], h.SegSize)
}
