package route_test

import (
	"bytes"
	"fmt"
	"runtime"
	"testing"

	"github.com/sluice-proxy/sluice/internal/route"
)

// bigLists returns a list of a hundred thousand names, and one of as many networks.
func bigLists() (names, networks []byte) {
	var n, c bytes.Buffer
	for i := range 100_000 {
		fmt.Fprintf(&n, ".ads%d.tracker%d.example\n", i, i%10)
		if i%2 == 0 {
			fmt.Fprintf(&c, "%d.%d.%d.0/24\n", 20+i>>16, i>>8&255, i&255)
		} else {
			fmt.Fprintf(&c, "2001:db8:%x:%x::/64\n", i>>16, i&0xffff)
		}
	}
	return n.Bytes(), c.Bytes()
}

func BenchmarkRoute(b *testing.B) {
	r := big(b)
	for name, f := range bigFlows {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				r.Route(f)
			}
		})
	}
}

// BenchmarkList measures how long a hundred thousand entries take to read, and how many bytes they keep.
func BenchmarkList(b *testing.B) {
	names, networks := bigLists()
	for what, list := range map[string][]byte{"names": names, "networks": networks} {
		b.Run(what, func(b *testing.B) {
			var kept float64
			for b.Loop() {
				before := heap()
				set := new(route.Targets)
				if errs := set.AddList("list", list); errs != nil {
					b.Fatal(errs)
				}
				kept = float64(heap()) - float64(before)
				runtime.KeepAlive(set)
			}
			b.ReportMetric(kept/(1<<20), "MiB")
		})
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
