package netstack

import (
	"io"
	"net"
	"runtime"
	"testing"

	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/tundev"
)

// An idle stream costs little. What its two kernel sockets cost is not counted, nor is what the test's own ends do.
func TestIdleStreamsAreSmall(t *testing.T) {
	if testing.Short() {
		t.Skip("opens 1000 streams")
	}
	const n = 1000
	most := int64(24 << 10)
	if racing {
		most *= 3 // the detector's own
	}
	origin := proxytest.Listen(t, "tcp", proxytest.Echo)
	b := newBed(t, engine(toLoopback{}), nil, tundev.Options{})
	before := memory()
	perConn := ownCost(t, origin.Addr.HostPort(), n)
	begun := memory()
	conns := make([]net.Conn, n)
	b.inside(func() {
		for i := range conns {
			var err error
			if conns[i], err = net.Dial("tcp", at(host4, origin)); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for _, c := range conns {
		io.WriteString(c, "x")
		io.ReadFull(c, make([]byte, 1))
	}
	used := int64(memory()-begun)/n - perConn
	t.Logf("%d bytes a stream, beside the %d of the test's own ends (%d before)", used, perConn, before)
	if used > most {
		t.Errorf("%d bytes a stream, want %d at most", used, most)
	}
	for _, c := range conns {
		c.Close()
	}
}

// ownCost returns what a conn of the test's own costs with its echo.
func ownCost(t *testing.T, addr string, n int) int64 {
	begun := memory()
	conns := make([]net.Conn, n)
	for i := range conns {
		var err error
		if conns[i], err = net.Dial("tcp", addr); err != nil {
			t.Fatal(err)
		}
		io.WriteString(conns[i], "x")
		io.ReadFull(conns[i], make([]byte, 1))
	}
	cost := int64(memory()-begun) / int64(n)
	for _, c := range conns {
		c.Close()
	}
	return cost
}

// memory returns what the process uses of heap and stacks.
func memory() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse + m.StackInuse
}
