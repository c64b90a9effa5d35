package relay

import (
	"errors"
	"sync"
	"syscall"
	"testing"
	"time"
)

// nobodyAt returns a place on this machine where nobody listens.
func nobodyAt(t *testing.T) Endpoint {
	t.Helper()
	c := listenUDP(t, "udp4", "127.0.0.1:0")
	defer c.Close()
	return EndpointOf(c.LocalAddr())
}

// TestErrorsOfOthersBlameNobodyElse: while errors of other places come and are read, a datagram to a place that is well is neither
// lost nor said to be undeliverable.
func TestErrorsOfOthersBlameNobodyElse(t *testing.T) {
	c, origin := listenUDP(t, "udp4", "127.0.0.1:0"), listenUDP(t, "udp4", "127.0.0.1:0")
	var all sync.WaitGroup
	defer all.Wait()
	defer c.Close()
	all.Go(func() {
		var p Packet
		for {
			err := c.ReadPacket(&p)
			if _, ok := errors.AsType[*UnreachableError](err); err != nil && !ok {
				return
			}
			p.Free()
		}
	})
	var gone [8]Endpoint
	for i := range gone {
		gone[i] = nobodyAt(t)
	}
	good := EndpointOf(origin.LocalAddr())
	for i := range 20_000 {
		c.WritePacket(&Packet{Endpoint: gone[i%len(gone)], Data: []byte("lost")})
		if i%3 > 0 {
			continue
		}
		if err := c.WritePacket(&Packet{Endpoint: good, Data: []byte("x")}); err != nil {
			t.Fatalf("datagram %d to a place that is well: %v", i, err)
		}
	}
}

// TestBatchThatTakesAnErrorLeavesItToTheReader: an ICMP error that a write of several datagrams is told of first is still read.
func TestBatchThatTakesAnErrorLeavesItToTheReader(t *testing.T) {
	c, origin := listenUDP(t, "udp4", "127.0.0.1:0"), listenUDP(t, "udp4", "127.0.0.1:0")
	gone, good := nobodyAt(t), EndpointOf(origin.LocalAddr())
	c.WritePacket(&Packet{Endpoint: gone, Data: []byte("lost")})
	time.Sleep(50 * time.Millisecond) // until the poller has heard, and forgotten since nobody waits
	for rest := []Packet{{Endpoint: good, Data: []byte("a")}, {Endpoint: good, Data: []byte("b")}}; len(rest) > 0; {
		n, err := c.WritePackets(rest)
		if err != nil {
			t.Fatal(err)
		}
		rest = rest[n:]
	}
	c.conn.SetReadDeadline(time.Now().Add(2 * time.Second))
	err := c.ReadPacket(new(Packet))
	if u, ok := errors.AsType[*UnreachableError](err); !ok || u.To != gone || !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("read %v", err)
	}
}
