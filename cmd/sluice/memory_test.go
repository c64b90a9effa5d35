package main

import (
	"runtime/metrics"
	"testing"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// TestMemoryGoesBackAfterABurst checks that garbage does not stay when the work that made it is over.
func TestMemoryGoesBackAfterABurst(t *testing.T) {
	const burst = 64 << 20
	tidy := startTidier()
	defer tidy.stop()
	held := make([][]byte, 0, burst/4096)
	for range burst / 4096 {
		held = append(held, make([]byte, 4096))
	}
	clear(held)
	before := heapInUse()
	if before < burst {
		t.Fatalf("%d bytes after a burst of %d: it cannot be seen", before, burst)
	}
	proxytest.Until(t, "the memory goes back", func() bool { return heapInUse() < before-burst/2 })
}

// heapInUse returns the bytes of the heap that are not the system's.
func heapInUse() int64 {
	s := []metrics.Sample{
		{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/free:bytes"}, {Name: "/memory/classes/heap/unused:bytes"},
	}
	metrics.Read(s)
	var n int64
	for _, m := range s {
		n += int64(m.Value.Uint64())
	}
	return n
}
