package relay_test

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/sluice-proxy/sluice/relay"
)

// Each benchmark runs over relay.Join and over what it is measured against, two io.Copy with half-close:
//
//	go test -run '^$' -bench . -count 10 ./relay | benchstat -col /relay -
//
// Both ends are in the same process, so B/op and allocs/op are those of the whole path; whatever is there in both
// columns belongs to the ends.

// joiner relays between two conns and closes them.
type joiner struct {
	name string
	join func(a, b *net.TCPConn)
}

var joiners = []joiner{{"relay=join", joinConns}, {"relay=iocopy", copyConns}}

func joinConns(a, b *net.TCPConn) { relay.Join(context.Background(), a, b) }

func copyConns(a, b *net.TCPConn) {
	var wg sync.WaitGroup
	wg.Add(1)
	go copyHalf(&wg, b, a)
	io.Copy(a, b)
	a.CloseWrite()
	wg.Wait()
	a.Close()
	b.Close()
}

func copyHalf(wg *sync.WaitGroup, dst, src *net.TCPConn) {
	defer wg.Done()
	io.Copy(dst, src)
	dst.CloseWrite()
}

// tcpPair returns the two ends of a TCP connection over loopback.
func tcpPair(b *testing.B, ln net.Listener) (dialed, accepted *net.TCPConn) {
	b.Helper()
	d, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	a, err := ln.Accept()
	if err != nil {
		b.Fatal(err)
	}
	return d.(*net.TCPConn), a.(*net.TCPConn)
}

func listenLoopback(b *testing.B) net.Listener {
	b.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { ln.Close() })
	return ln
}

// relayed is a relay between a client and an origin, all over TCP.
type relayed struct {
	client, origin *net.TCPConn
	done           sync.WaitGroup // the relay, and what the benchmark runs at the origin
}

func startRelay(b *testing.B, j joiner, ln net.Listener) *relayed {
	b.Helper()
	r := new(relayed)
	var left, right *net.TCPConn
	r.client, left = tcpPair(b, ln)
	right, r.origin = tcpPair(b, ln)
	r.done.Add(1)
	go r.carry(j, left, right)
	return r
}

func (r *relayed) carry(j joiner, left, right *net.TCPConn) {
	defer r.done.Done()
	j.join(left, right)
}

func (r *relayed) close() {
	r.client.Close()
	r.origin.Close()
	r.done.Wait()
}

// drain reads the origin to its end, one chunk at a time, and closes drained.
func (r *relayed) drain(size int, drained chan<- struct{}) {
	defer r.done.Done()
	defer close(drained)
	for buf := make([]byte, size); ; {
		if _, err := r.origin.Read(buf); err != nil {
			return
		}
	}
}

// echo sends back messages at the origin.
func (r *relayed) echo() {
	defer r.done.Done()
	for buf := make([]byte, 64); ; {
		n, err := r.origin.Read(buf)
		if err != nil {
			return
		}
		if _, err := r.origin.Write(buf[:n]); err != nil {
			return
		}
	}
}

// BenchmarkBulk moves 256 KiB a step, one way.
func BenchmarkBulk(b *testing.B) {
	for _, j := range joiners {
		b.Run(j.name, func(b *testing.B) {
			const chunk = 256 << 10
			r := startRelay(b, j, listenLoopback(b))
			defer r.close()
			buf := make([]byte, chunk)
			drained := make(chan struct{})
			r.done.Add(1)
			go r.drain(chunk, drained)
			b.SetBytes(chunk)
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				if _, err := r.client.Write(buf); err != nil {
					b.Fatal(err)
				}
			}
			r.client.CloseWrite()
			<-drained // the time ends when the last byte has arrived
			b.StopTimer()
		})
	}
}

// BenchmarkPingPong sends 64 bytes there and back a step.
func BenchmarkPingPong(b *testing.B) {
	for _, j := range joiners {
		b.Run(j.name, func(b *testing.B) {
			r := startRelay(b, j, listenLoopback(b))
			defer r.close()
			r.done.Add(1)
			go r.echo()
			buf := make([]byte, 64)
			b.SetBytes(2 * int64(len(buf)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := r.client.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(r.client, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkShortConn opens a pair, relays one request and one reply, and closes it, a step.
func BenchmarkShortConn(b *testing.B) {
	for _, j := range joiners {
		b.Run(j.name, func(b *testing.B) {
			ln := listenLoopback(b)
			buf := make([]byte, 64)
			b.SetBytes(2 * int64(len(buf)))
			b.ReportAllocs()
			for b.Loop() {
				r := startRelay(b, j, ln)
				r.client.Write(buf)
				if _, err := io.ReadFull(r.origin, buf); err != nil {
					b.Fatal(err)
				}
				r.origin.Write(buf)
				if _, err := io.ReadFull(r.client, buf); err != nil {
					b.Fatal(err)
				}
				r.close()
			}
		})
	}
}
