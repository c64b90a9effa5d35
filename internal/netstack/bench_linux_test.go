package netstack

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/tundev"
	"github.com/sluice-proxy/sluice/relay"
)

// lab is a namespace for origins.
type lab struct{ ns netns.NsHandle }

func newLab(b testing.TB) *lab {
	proxytest.NeedRoot(b)
	l := new(lab)
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked
		if l.ns, err = netns.New(); err != nil {
			return
		}
		var lo netlink.Link
		if lo, err = netlink.LinkByName("lo"); err == nil {
			err = netlink.LinkSetUp(lo)
		}
		reno()
	}()
	<-done
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.ns.Close() })
	return l
}

// reno has the namespace of the thread use a congestion control that does not pace.
func reno() { os.WriteFile("/proc/sys/net/ipv4/tcp_congestion_control", []byte("reno"), 0) }

// DialStream dials the port of dst on the lab's loopback.
func (l *lab) DialStream(ctx context.Context, dst proxy.Addr) (c net.Conn, err error) {
	in(l.ns, func() {
		c, err = new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(dst.Port))))
	})
	return c, err
}

// in runs f on a thread in a namespace.
func in(ns netns.NsHandle, f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked
		if netns.Set(ns) == nil {
			f()
		}
	}()
	<-done
}

func cpu() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// iperf runs a client for some seconds and returns the Gbit/s that arrived, and the relay's processor time for a gigabyte.
func iperf(b *testing.B, ns netns.NsHandle, host string, port int, args ...string) (gbit, cost float64) {
	args = append([]string{"-c", host, "-p", strconv.Itoa(port), "-t", "3", "-J"}, args...)
	cmd := exec.Command("iperf3", args...)
	before := cpu()
	var out []byte
	var err error
	in(ns, func() { out, err = cmd.Output() })
	used := cpu() - before
	var res struct {
		End struct {
			Sum struct {
				Bits  float64 `json:"bits_per_second"`
				Bytes float64 `json:"bytes"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	if err != nil || json.Unmarshal(out, &res) != nil {
		b.Fatalf("%v: %v: %s", cmd, err, out)
	}
	return res.End.Sum.Bits / 1e9, used.Seconds() / (res.End.Sum.Bytes / 1e9)
}

// BenchmarkBulk measures streams through a TUN device, beside a forward between kernel sockets. One iteration is enough.
func BenchmarkBulk(b *testing.B) {
	proxytest.Need(b, "iperf3")
	l := newLab(b)
	const port = 5201
	server := exec.Command("iperf3", "-s", "-p", strconv.Itoa(port))
	in(l.ns, func() { server.Start() })
	defer server.Wait()
	defer server.Process.Kill()
	time.Sleep(300 * time.Millisecond)

	var ln net.Listener
	in(l.ns, func() { ln, _ = net.Listen("tcp", "127.0.0.1:5202") })
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			o, err := l.DialStream(context.Background(), proxy.TCP("", port))
			if err != nil {
				c.Close()
				continue
			}
			new(relay.Relay).Start(c, o, nil, nil)
		}
	}()
	bed := newBed(b, engine(l), nil, tundev.Options{})
	in(bed.ns, reno)
	for _, way := range []struct {
		name string
		ns   netns.NsHandle
		host string
		port int
	}{{"kernel", l.ns, "127.0.0.1", 5202}, {"tun", bed.ns, host4, port}} {
		for _, dir := range [][]string{{"-P1"}, {"-P1", "-R"}, {"-P8"}, {"-P8", "-R"}} {
			b.Run(fmt.Sprint(way.name, dir), func(b *testing.B) {
				for range b.N {
					gbit, cost := iperf(b, way.ns, way.host, way.port, dir...)
					b.ReportMetric(gbit, "Gbit/s")
					b.ReportMetric(cost, "cpu-s/GB")
				}
			})
		}
	}
}
