package tundev

import "os"

type device struct{}

// Open opens a new device, in the network namespace of the calling thread; it needs CAP_NET_ADMIN there. The interface is down and
// has no address. It goes when the device is closed.
func Open(o Options) (*Device, error) { panic("not yet") }

// FromFile takes over the file of a device that was opened elsewhere, as by a child in another namespace, with Open's
// flags. mtu is that of the interface, 0 for DefaultMTU: it cannot be asked from here. f is closed with the device, or at once on an error.
func FromFile(f *os.File, mtu int) (*Device, error) { panic("not yet") }

// ReadPacket waits for a packet and stores it in bufs, one after the other, which should have room for PacketMax bytes.
// It returns the packet's size. A packet for which there is no room is cut. After Close the error is
// [os.ErrClosed]; for a device that was deleted it wraps ErrGone.
func (d *Device) ReadPacket(h *Header, bufs [][]byte) (n int, err error) { panic("not yet") }

// WritePacket writes the packet whose bytes are those of bufs, one after the other.
func (d *Device) WritePacket(h Header, bufs [][]byte) error { panic("not yet") }

// Close deletes the device, unless it is persistent or open elsewhere.
func (d *Device) Close() error { return d.file.Close() }
