package netstack

import (
	"reflect"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"gvisor.dev/gvisor/pkg/buffer"
)

// chunks is the memory that large packets are read into, used again and again. gVisor has a pool for that, which clears what it gives
// out: as many bytes as a packet has, at the cost of a tenth of an upload, for memory that is written to at once.
//
// A chunk of ours is free again when nobody refers to it but us. That is in the reference count of gVisor's chunk, which it shows to nobody: it is
// read where reflection finds it, if what it says of a chunk that is tried proves right. If not, all are gVisor's.
type chunks struct {
	chunkAt, refsAt uintptr
	known           bool // where the count is

	mu   sync.Mutex
	ours []*buffer.View // one for each, which nobody else has
	next int
	used bool        // since the timer ran
	idle *time.Timer // runs while there are any
}

const (
	chunkSize  = 64 << 10
	chunksMax  = 128
	chunksLook = 4               // how many are looked at for one that is free
	chunksKept = 2 * time.Second // how long they are kept at least when no packets come
)

func (c *chunks) init() {
	c.known = c.locate() && c.try()
}

// locate finds the count: in the only field of its kind in what the field chunk of a View points to.
func (c *chunks) locate() bool {
	chunk, ok := reflect.TypeFor[buffer.View]().FieldByName("chunk")
	if !ok || chunk.Type.Kind() != reflect.Pointer || chunk.Type.Elem().Kind() != reflect.Struct || unsafe.Sizeof(uintptr(0)) != 8 {
		return false
	}
	c.chunkAt = chunk.Offset
	in := chunk.Type.Elem()
	for _, name := range []string{"refCount", "value"} {
		f, ok := in.FieldByName(name)
		if !ok || in.Kind() != reflect.Struct {
			return false
		}
		for _, i := range f.Index { // through what is embedded
			c.refsAt += in.Field(i).Offset
			in = in.Field(i).Type
		}
		if in.Kind() != reflect.Struct {
			break
		}
	}
	return in.Kind() == reflect.Int64
}

// try says whether the count is that of a chunk.
func (c *chunks) try() bool {
	v := buffer.NewView(1)
	defer v.Release()
	one := c.refs(v) == 1
	w := v.Clone()
	two := c.refs(v) == 2 && c.refs(w) == 2
	w.Release()
	return one && two && c.refs(v) == 1
}

// refs returns how many refer to the chunk of v.
func (c *chunks) refs(v *buffer.View) int64 {
	chunk := *(*unsafe.Pointer)(unsafe.Add(unsafe.Pointer(v), c.chunkAt))
	return atomic.LoadInt64((*int64)(unsafe.Add(chunk, c.refsAt)))
}

// get returns a view of chunkSize bytes, whatever they are.
func (c *chunks) get() *buffer.View {
	if !c.known {
		return buffer.NewViewSize(chunkSize)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.used = true
	for range min(chunksLook, len(c.ours)) {
		v := c.ours[c.next%len(c.ours)]
		c.next++
		if c.refs(v) == 1 {
			return v.Clone()
		}
	}
	v := buffer.NewViewSize(chunkSize)
	if len(c.ours) < chunksMax {
		c.ours = append(c.ours, v.Clone())
		if len(c.ours) == 1 {
			c.idle = time.AfterFunc(chunksKept, c.tick)
		}
	}
	return v
}

// tick gives them back if none was used since it was called before.
func (c *chunks) tick() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.used && len(c.ours) > 0 {
		c.used = false
		c.idle.Reset(chunksKept)
		return
	}
	c.release()
}

// free gives them back. Those that are in use are gVisor's when they are not.
func (c *chunks) free() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.idle != nil {
		c.idle.Stop()
	}
	c.release()
}

func (c *chunks) release() {
	for _, v := range c.ours {
		v.Release()
	}
	c.ours = nil
}
