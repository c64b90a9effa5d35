package relay

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// buffers are the copy buffers of one loop. They do not lie in Go's heap: after a burst, when many directions
// have held one each, the memory goes back to the system at once, without a garbage collection.
type buffers struct {
	free []*[largeSize]byte
}

// buffersKept is how many a busy loop keeps; an idle one keeps one.
const buffersKept = 16

// get returns a buffer, or nil if the system gives none.
func (bs *buffers) get() *[largeSize]byte {
	if n := len(bs.free); n > 0 {
		b := bs.free[n-1]
		bs.free = bs.free[:n-1]
		return b
	}
	b, err := unix.MmapPtr(-1, 0, nil, largeSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil
	}
	return (*[largeSize]byte)(b)
}

func (bs *buffers) put(b *[largeSize]byte) {
	if len(bs.free) < buffersKept {
		bs.free = append(bs.free, b)
		return
	}
	unix.MunmapPtr(unsafe.Pointer(b), largeSize)
}

// cargoes are the cargoes of one loop that hold nothing.
type cargoes []*cargo

func (cs *cargoes) get() *cargo {
	n := len(*cs)
	if n == 0 {
		return new(cargo)
	}
	c := (*cs)[n-1]
	*cs = (*cs)[:n-1]
	return c
}

func (cs *cargoes) put(c *cargo) {
	if len(*cs) < buffersKept {
		*c = cargo{}
		*cs = append(*cs, c)
	}
}

// trim keeps at most keep of those that are not in use.
func (bs *buffers) trim(keep int) {
	for len(bs.free) > keep {
		unix.MunmapPtr(unsafe.Pointer(bs.get()), largeSize)
	}
}
