package dns

import (
	"bytes"
	"sync"
	"testing"

	"github.com/miekg/dns"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/relay"
)

// batching is a client's conn that takes and has batches, and counts those of more than one.
type batching struct {
	*client

	mu            sync.Mutex
	reads, writes int
}

func (b *batching) ReadMore(ps []relay.Packet) (n int) {
	for n < len(ps) && len(b.in) > 0 && b.ReadPacket(&ps[n]) == nil {
		n++
	}
	if n > 0 {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.reads++
	}
	return n
}

func (b *batching) WritePackets(ps []relay.Packet) (n int, err error) {
	if len(ps) > 1 {
		b.mu.Lock()
		b.writes++
		b.mu.Unlock()
	}
	for n < len(ps) && err == nil {
		if err = b.WritePacket(&ps[n]); err == nil {
			n++
		}
	}
	return n, err
}

// echoesInBatches is a Next that answers what it has read by batches, with from in place of where it went to.
func echoesInBatches(t *testing.T, from relay.Endpoint) handlerFunc {
	return func(f proxy.Flow, c relay.PacketConn) {
		defer c.Close()
		ps := make([]relay.Packet, 64)
		for c.ReadPacket(&ps[0]) == nil {
			n := 1 + c.(relay.BatchReader).ReadMore(ps[1:])
			for i := range ps[:n] {
				if p := &ps[i]; p.Endpoint.Host() != f.Dst.Host {
					t.Errorf("the session to %v has a datagram to %v", f.Dst, p.Endpoint)
				} else if from.IP.IsValid() {
					p.Endpoint = from
				}
			}
			for rest := ps[:n]; len(rest) > 0; {
				was := rest[0].Endpoint
				m, err := c.(relay.BatchWriter).WritePackets(rest)
				if err != nil {
					return
				}
				if rest[0].Endpoint != was {
					t.Errorf("the endpoint %v is %v after it was written", was, rest[0].Endpoint)
				}
				rest = rest[m:]
			}
			for i := range ps[:n] {
				ps[i].Free()
			}
		}
	}
}

func TestLanesPassBatches(t *testing.T) {
	for _, named := range []bool{true, false} {
		h := &Handler{names: names{fixed: true}, Next: echoesInBatches(t, relay.Endpoint{})}
		to := "192.0.2.1:9"
		if named {
			h.Next = echoesInBatches(t, endpoint("192.0.2.1:9"))
			to = fakeOf(t, h, "a.example").String() + ":9"
		}
		b := &batching{client: newClient()}
		const datagrams = 500
		for i := range datagrams {
			b.send(to, []byte{byte(i >> 8), byte(i)})
		}
		end := serveConn(t, h, b, to)
		for i := range datagrams {
			if got := b.next(t); got.Endpoint != endpoint(to) || whole16(got.Data) != uint16(i) {
				t.Fatalf("datagram %d is %x from %v", i, got.Data, got.Endpoint)
			}
		}
		end()
		if most := datagrams / 32; b.reads == 0 || b.reads > most || b.writes == 0 || b.writes > most {
			t.Errorf("%d reads and %d writes of %d datagrams", b.reads, b.writes, datagrams)
		}
	}
}

// What of a batch is for others goes to them, and the lane keeps its own in their order.
func TestBatchOfManyLanes(t *testing.T) {
	proxytest.NoLeaks(t)
	h := &Handler{names: names{fixed: true}, Next: echoesInBatches(t, relay.Endpoint{})}
	query := mustPack(t, newQuestion("x.example.", dns.TypeA))
	all := []string{fakeOf(t, h, "a.example").String() + ":9", fakeOf(t, h, "b.example").String() + ":9",
		"192.0.2.1:9", "10.0.0.53:53"}
	b := &batching{client: newClient()}
	const rounds = 100
	b.send(all[0], append([]byte{0, 0}, query...))
	for i := range rounds {
		for _, to := range all {
			data := append([]byte{byte(i >> 8), byte(i)}, query...)
			if endpoint(to).Port == Port {
				data = bytes.Clone(query)
				data[0], data[1] = byte(i>>8), byte(i)
			}
			b.send(to, data)
		}
	}
	defer serveConn(t, h, b, all[0])()
	seen := map[relay.Endpoint]int{endpoint(all[0]): -1}
	for range 1 + rounds*len(all) {
		got := b.next(t)
		if want := max(0, seen[got.Endpoint]); int(whole16(got.Data)) != want {
			t.Fatalf("from %v came %d, want %d", got.Endpoint, whole16(got.Data), want)
		}
		seen[got.Endpoint]++
	}
	for _, to := range all {
		if seen[endpoint(to)] != rounds {
			t.Errorf("%d from %s", seen[endpoint(to)], to)
		}
	}
}
