package netstack

import (
	"testing"
	"testing/synctest"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// waitingWorkers starts n workers that wait, and returns what each got at last.
func waitingWorkers(t *streams, n int) <-chan *tcp.ForwarderRequest {
	got := make(chan *tcp.ForwarderRequest, n)
	for range n {
		go func() { got <- t.next(time.After(workerIdle)) }()
	}
	synctest.Wait()
	return got
}

func newWorkers() *streams {
	s := new(streams)
	s.init(&running{closed: make(chan struct{})}, 0)
	return s
}

func TestWorkerTakesTheNextStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newWorkers()
		got := waitingWorkers(s, 1)
		req := new(tcp.ForwarderRequest)
		s.serve(req) // leaves it to the worker: it would fail on such a request
		if <-got != req {
			t.Error("the worker has got another request")
		}
	})
}

func TestWorkersDoNotWaitForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newWorkers()
		begun := time.Now()
		got := waitingWorkers(s, workersMax+3)
		for range 3 {
			if <-got != nil || time.Since(begun) > 0 {
				t.Fatal("more workers wait than should")
			}
		}
		for range workersMax {
			if <-got != nil || time.Since(begun) != workerIdle {
				t.Fatalf("a worker has waited for %v", time.Since(begun))
			}
		}
		if n := s.workers.idle.Load(); n != 0 {
			t.Errorf("%d are counted as waiting", n)
		}
	})
}

func TestWorkersEndWithTheStack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newWorkers()
		begun := time.Now()
		got := waitingWorkers(s, 2)
		close(s.r.closed)
		for range 2 {
			if <-got != nil || time.Since(begun) > 0 {
				t.Error("a worker waits for streams of a stack that takes none")
			}
		}
	})
}
