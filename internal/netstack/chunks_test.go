package netstack

import (
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"gvisor.dev/gvisor/pkg/buffer"
)

func newChunks(t *testing.T) *chunks {
	t.Helper()
	if unsafe.Sizeof(uintptr(0)) != 8 {
		t.Skip("only where a word has 64 bits")
	}
	c := new(chunks)
	if c.init(); !c.known {
		t.Fatal("gVisor keeps the count of references elsewhere: look into package buffer")
	}
	return c
}

func memoryOf(v *buffer.View) *byte { return &v.AsSlice()[0] }

// A chunk is given out again when nobody has it any more, and not before; clones count.
func TestChunksAreUsedAgain(t *testing.T) {
	c := newChunks(t)
	defer c.free()
	v := c.get()
	first := memoryOf(v)
	v.AsSlice()[0] = 'x'
	w := v.Clone()
	v.Release()
	other := c.get()
	if memoryOf(other) == first {
		t.Error("given out while somebody has it")
	}
	w.CapLength(1)
	w.Release()
	again := c.get()
	if memoryOf(again) != first || again.Size() != chunkSize || again.AsSlice()[0] != 'x' {
		t.Errorf("not the same: %d bytes", again.Size())
	}
	again.Release()
	other.Release()
}

// However many are in use, each is another, and no more than chunksMax are kept.
func TestChunksInUseAreDistinct(t *testing.T) {
	c := newChunks(t)
	defer c.free()
	seen := make(map[*byte]bool)
	var all []*buffer.View
	for range 2 * chunksMax {
		v := c.get()
		if seen[memoryOf(v)] {
			t.Fatal("given out twice")
		}
		seen[memoryOf(v)] = true
		all = append(all, v)
	}
	for _, v := range all {
		v.Release()
	}
	if len(c.ours) != chunksMax {
		t.Errorf("%d are kept", len(c.ours))
	}
	for range chunksMax {
		c.get().Release()
	}
	if len(c.ours) != chunksMax {
		t.Errorf("%d are kept", len(c.ours))
	}
}

func TestChunksAreGivenBackWhenIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newChunks(t)
		kept := func() int {
			c.mu.Lock()
			defer c.mu.Unlock()
			return len(c.ours)
		}
		v := c.get()
		c.get().Release()
		for range 5 { // in use
			time.Sleep(chunksKept / 2)
			c.get().Release()
		}
		if n := kept(); n == 0 {
			t.Error("none was kept")
		}
		time.Sleep(2*chunksKept + 1)
		if n := kept(); n != 0 {
			t.Errorf("%d are kept", n)
		}
		v.AsSlice()[0] = 1 // still ours to write to
		v.Release()
		c.get().Release()
		if n := kept(); n != 1 {
			t.Errorf("%d are kept", n)
		}
		c.free()
	})
}
