package proxy

import (
	"testing"

	"github.com/sluice-proxy/sluice/relay"
)

// The queue keeps its order and its size while it is filled and emptied, and knows what it holds.
func TestPacketQueueKeepsOrder(t *testing.T) {
	const most = 2048
	var q PacketQueue
	in, out := 0, 0
	for step := range 5000 {
		for range step % 7 {
			if q.Len() < most {
				p := relay.Packet{Endpoint: relay.Endpoint{Port: uint16(in)}}
				p.Grow(in % 2 * 40000)
				q.Push(p)
				in++
			}
		}
		for range step % 6 {
			if q.Len() == 0 {
				break
			}
			p := q.Pop()
			if p.Endpoint.Port != uint16(out) || len(p.Data) != out%2*40000 {
				t.Fatalf("got %d with %d bytes, want %d", p.Endpoint.Port, len(p.Data), uint16(out))
			}
			p.Free()
			out++
		}
		if q.Len() != in-out {
			t.Fatalf("%d wait, and %d have come, %d gone", q.Len(), in, out)
		}
	}
	if in < 10_000 || len(q.packets) > 2*most {
		t.Errorf("%d in, %d slots", in, len(q.packets))
	}
	if q.Memory() < int64(q.Len()) {
		t.Errorf("%d datagrams have %d bytes", q.Len(), q.Memory())
	}
	waiting := int64(in - out)
	if n := q.Clear(); n != waiting || q.Len() != 0 || q.Memory() != 0 || q.packets != nil {
		t.Errorf("Clear: %d of %d, %d are left with %d bytes", n, waiting, q.Len(), q.Memory())
	}
}
