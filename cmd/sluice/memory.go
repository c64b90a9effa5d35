package main

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
	"time"
)

// quiet is how long there must have been no garbage collection for a burst to be over.
const quiet = 2 * time.Second

// A tidier gives memory back to the system after a burst. A collector that paces itself by the heap it finds keeps room for as
// much again, which is right while there is work, and half of what an idle relay costs afterwards. The tidier waits for collections,
// not for time: an idle process does not wake up for it.
type tidier struct {
	mu     sync.Mutex
	timer  *time.Timer
	cycles uint64 // automatic collections when last seen
	ended  bool
}

// sentinel is garbage; that it is collected tells of a collection.
type sentinel struct{ _ [16]byte }

func startTidier() *tidier {
	t := &tidier{cycles: automaticCycles()}
	t.timer = time.AfterFunc(quiet, debug.FreeOSMemory) // what starting took
	t.await()
	return t
}

func (t *tidier) await() { runtime.SetFinalizer(new(sentinel), t.collected) }

// collected runs after each collection.
func (t *tidier) collected(*sentinel) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended {
		return
	}
	if n := automaticCycles(); n != t.cycles { // not the one that tidying itself has forced
		t.cycles = n
		t.timer.Reset(quiet)
	}
	t.await()
}

func (t *tidier) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended = true
	t.timer.Stop()
}

func automaticCycles() uint64 {
	s := []metrics.Sample{{Name: "/gc/cycles/automatic:gc-cycles"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}
