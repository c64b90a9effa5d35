package netstack

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/tundev"
)

func within[T any](t *testing.T, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(proxytest.Patience):
		t.Fatalf("waited in vain: %s", what)
	}
	return v
}

// A client that gives up before its SYN is answered tells nobody. It is asked, and its kernel answers for it.
func TestClientGivesUpWhileDialing(t *testing.T) {
	proxytest.NoLeaks(t)
	d := newSilent()
	b := newBed(t, engine(d), nil, tundev.Options{})
	for _, host := range []string{host4, host6} {
		if _, err := b.tryDial("tcp", net.JoinHostPort(host, "80"), 50*time.Millisecond); err == nil {
			t.Fatal("connected")
		}
		within(t, "the dial", d.begun)
		if err := within(t, "the dial's end", d.ended); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: the dial ended for %v", host, err)
		}
	}
}

// A client that waits is asked as well, sends its SYN again, and is dialled for once.
func TestClientWaitsWhileDialing(t *testing.T) {
	proxytest.NoLeaks(t)
	d := newSilent()
	b := newBed(t, engine(d), nil, tundev.Options{})
	if _, err := b.tryDial("tcp", host4+":80", 1200*time.Millisecond); err == nil {
		t.Fatal("connected")
	}
	within(t, "the dial", d.begun)
	within(t, "the dial's end", d.ended)
	select {
	case <-d.begun:
		t.Error("a SYN once more was dialled for once more")
	default:
	}
}

// rawSYN makes a SYN from one address to another.
func rawSYN(src, dst netip.AddrPort, seq uint32, flags header.TCPFlags) []byte {
	b := make([]byte, header.IPv4MinimumSize+header.TCPMinimumSize)
	s, d := tcpip.AddrFrom4(src.Addr().As4()), tcpip.AddrFrom4(dst.Addr().As4())
	ip := header.IPv4(b)
	ip.Encode(&header.IPv4Fields{TotalLength: uint16(len(b)), TTL: 64, Protocol: uint8(header.TCPProtocolNumber), SrcAddr: s, DstAddr: d})
	ip.SetChecksum(^ip.CalculateChecksum())
	h := header.TCP(b[header.IPv4MinimumSize:])
	h.Encode(&header.TCPFields{SrcPort: src.Port(), DstPort: dst.Port(), SeqNum: seq, DataOffset: header.TCPMinimumSize, Flags: flags, WindowSize: 1000})
	h.SetChecksum(^h.CalculateChecksum(header.PseudoHeaderChecksum(header.TCPProtocolNumber, s, d, header.TCPMinimumSize)))
	return b
}

// rawSocket makes a socket in the namespace that sends whole packets of IPv4.
func (b *bed) rawSocket() *os.File {
	b.t.Helper()
	var fd int
	var err error
	b.inside(func() { fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW) })
	if err != nil {
		b.t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "raw")
	b.t.Cleanup(func() { f.Close() })
	return f
}

func (b *bed) sendRaw(f *os.File, pkt []byte) {
	b.t.Helper()
	to := unix.SockaddrInet4{Addr: [4]byte(pkt[16:20])}
	if err := unix.Sendto(int(f.Fd()), pkt, 0, &to); err != nil && !errors.Is(err, unix.ENOBUFS) {
		b.t.Fatal(err)
	}
}

func TestSpoofedResetsDoNotCancelADial(t *testing.T) {
	proxytest.NoLeaks(t)
	d := newSilent()
	b := newBed(t, engine(d), nil, tundev.Options{})
	raw := b.rawSocket()
	src, dst := ap("10.77.0.9", 5000), ap(host4, 80)
	b.sendRaw(raw, rawSYN(src, dst, 1000, header.TCPFlagSyn))
	within(t, "the dial", d.begun)
	b.sendRaw(raw, rawSYN(src, dst, 5, header.TCPFlagRst))
	select {
	case <-d.ended:
		t.Fatal("a RST with a wrong number ended the dial")
	case <-time.After(100 * time.Millisecond):
	}
	b.sendRaw(raw, rawSYN(src, dst, 1001, header.TCPFlagRst))
	if err := within(t, "the dial's end", d.ended); !errors.Is(err, syscall.ECONNRESET) {
		t.Error(err)
	}
}

// floodDialer dials ports above 1000 on loopback, and others never.
type floodDialer struct{ silent *silent }

func (f floodDialer) DialStream(ctx context.Context, dst proxy.Addr) (net.Conn, error) {
	if dst.Port < 1000 {
		return f.silent.DialStream(ctx, dst)
	}
	return toLoopback{}.DialStream(ctx, dst)
}

func TestFloodOfSYNs(t *testing.T) {
	proxytest.NoLeaks(t)
	const most = 500
	origin := proxytest.Listen(t, "tcp", proxytest.Echo)
	d := newSilent()
	b := newBed(t, engine(floodDialer{d}), func(s *Stack) { s.MaxPending = most }, tundev.Options{})
	c := b.dial(at(host4, origin))
	echo := func() {
		t.Helper()
		if _, err := io.WriteString(c, "x"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	raw := b.rawSocket()
	var slowest time.Duration
	begin := time.Now()
	for i := range uint32(20000) {
		ip := binary.BigEndian.AppendUint32(nil, 0xc6120000+i) // 198.18.0.0/15
		src, _ := netip.AddrFromSlice(ip)
		b.sendRaw(raw, rawSYN(netip.AddrPortFrom(src, uint16(1024+i)), ap(host4, 80), i, header.TCPFlagSyn))
		if i%100 == 0 {
			start := time.Now()
			echo()
			slowest = max(slowest, time.Since(start))
			if n := pendings(b.stack); n > most {
				t.Errorf("%d dials go on", n)
			}
		}
	}
	times := 1 + int(time.Since(begin)/repeatWait) // how often all may have given way
	if n := len(d.begun); n < most || n > times*most {
		t.Errorf("%d dials, want %d, at most %d times", n, most, times)
	}
	if n := strings.Count(b.log.String(), "SYNs dropped"); n < 1 || n > 2 {
		t.Errorf("said %d times:\n%s", n, b.log)
	}
	t.Logf("the slowest echo took %v", slowest)
}

// A handshake whose dial went well and whose client is not there ends, and does not hold up the end of Serve.
func TestSYNACKThatNobodyTakes(t *testing.T) {
	proxytest.NoLeaks(t)
	origin := proxytest.Listen(t, "tcp", proxytest.Echo)
	b := newBed(t, engine(toLoopback{}), nil, tundev.Options{})
	b.sendRaw(b.rawSocket(), rawSYN(ap("198.18.0.1", 5000), ap(host4, origin.Addr.Port), 1000, header.TCPFlagSyn))
	proxytest.Until(t, "the dial", func() bool { return origin.Accepted() == 1 })
	start := time.Now()
	b.cancel()
	if err := b.wait(); err != nil || time.Since(start) > 5*time.Second {
		t.Errorf("Serve ended after %v: %v", time.Since(start), err)
	}
}

// A client may use its port again at once for the same destination.
func TestPortIsUsedAgain(t *testing.T) {
	proxytest.NoLeaks(t)
	origin := proxytest.Listen(t, "tcp", func(c net.Conn) { io.WriteString(c, "bye") }) // ends first: TIME_WAIT is the stack's
	b := newBed(t, engine(toLoopback{}), nil, tundev.Options{})
	d := net.Dialer{LocalAddr: &net.TCPAddr{Port: 40001}, Timeout: proxytest.Patience, Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	}}
	for i := range 3 {
		var c net.Conn
		var err error
		start := time.Now()
		b.inside(func() { c, err = d.Dial("tcp", at(host4, origin)) })
		if err != nil || time.Since(start) > 900*time.Millisecond {
			t.Fatalf("time %d: after %v: %v", i, time.Since(start), err)
		}
		c.SetDeadline(time.Now().Add(proxytest.Patience))
		if got, err := io.ReadAll(c); string(got) != "bye" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		c.Close()
		time.Sleep(20 * time.Millisecond) // for the stack's TIME_WAIT
	}
}

func TestDeviceDeleted(t *testing.T) {
	proxytest.NoLeaks(t)
	origin := proxytest.Listen(t, "tcp", proxytest.Echo)
	b := newBed(t, engine(toLoopback{}), nil, tundev.Options{})
	c := b.dial(at(host4, origin))
	io.WriteString(c, "x")
	io.ReadFull(c, make([]byte, 1))
	b.inside(func() {
		if err := netlink.LinkDel(b.link); err != nil {
			t.Error(err)
		}
	})
	if err := b.wait(); !errors.Is(err, tundev.ErrGone) {
		t.Errorf("Serve: %v", err)
	}
}

// Close takes no new clients, and lets those there are go on to their end.
func TestClose(t *testing.T) {
	proxytest.NoLeaks(t)
	origin := proxytest.Listen(t, "tcp", proxytest.Echo)
	b := newBed(t, engine(toLoopback{}), nil, tundev.Options{})
	c := b.dial(at(host4, origin))
	io.WriteString(c, "x")
	io.ReadFull(c, make([]byte, 1))
	b.stack.Close()
	if c, err := b.tryDial("tcp", at(host4, origin), 5*time.Second); err == nil {
		c.Close()
		t.Error("a new client was taken")
	}
	io.WriteString(c, "y")
	c.CloseWrite()
	if got, err := io.ReadAll(c); string(got) != "y" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if err := b.wait(); err != nil {
		t.Error(err)
	}
}
