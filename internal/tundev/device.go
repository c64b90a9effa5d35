// Package tundev opens TUN devices: network interfaces whose packets a program reads and writes.
//
// A packet costs much the same to carry whatever its size, so a device without offloads is slow: at an MTU of 1500 bytes
// a gigabyte is 700 000 packets. A [Device] therefore speaks the kernel's language for packets that are not yet cut
// and not yet summed (virtio_net_hdr): one that is read may be up to 64 KiB of TCP with a note of how to cut
// it, and so may one that is written. Who reads must be ready for that, and never needs to cut: see [Header].
package tundev

import (
	"errors"
	"os"
)

// DefaultMTU is the MTU of a device for which none is asked.
const DefaultMTU = 1500

// PacketMax is the size of the largest packet that is read or written: offloads make packets larger than the MTU.
const PacketMax = 65535

// ErrGone is wrapped by the errors of a device that was deleted while it was in use.
var ErrGone = errors.New("the TUN device was deleted")

// Options say what device to open. The zero value is useful.
type Options struct {
	Name      string // of the interface; may end in %d, for the first free number; empty: sluice%d
	MTU       int    // bytes of an IP packet on the device; 0: DefaultMTU
	NoOffload bool   // every packet is cut to the MTU and has its sums: slower, and easier to look at
}

// Device is an open TUN device. Close frees a ReadPacket that waits; its methods may be called from any goroutine.
type Device struct {
	file *os.File
	name string
	mtu  int
	*device
}

// Name returns the interface's name as it was when the device was opened.
func (d *Device) Name() string { return d.name }

// MTU returns the largest packet that the device's other side sends or takes without its being cut.
func (d *Device) MTU() int { return d.mtu }

// File returns the file below. It stays the device's: it must not be closed.
func (d *Device) File() *os.File { return d.file }

// GSO says how a packet is to be cut into segments of at most the MTU.
type GSO uint8

// The kinds of segmentation.
const (
	GSONone GSO = iota
	GSOTCP4     // TCP over IPv4
	GSOTCP6     // TCP over IPv6
	GSOUDP      // UDP datagrams of one size, over either
)

// Header says of a packet what the kernel leaves to be done. The zero Header is that of a whole packet with its sums.
type Header struct {
	GSO     GSO
	ECN     bool   // with GSO of TCP: the first segment carries CWR, the others do not
	HdrLen  uint16 // with GSO: the bytes of all headers, which every segment begins with
	SegSize uint16 // with GSO: the payload of each segment but the last

	// NeedsCsum says that the sum from CsumStart to the end of the packet belongs at CsumStart+CsumOffset, where
	// that of the pseudo header stands now. The packet has not been on a wire since: its bytes are right.
	NeedsCsum             bool
	CsumStart, CsumOffset uint16

	CsumValid bool // of a packet that was read: its sums were checked
}
