package tundev

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

func TestOpen(t *testing.T) {
	proxytest.InNetwork(t, func() {
		for _, o := range []Options{{}, {Name: "tt7"}, {MTU: 9000}, {NoOffload: true}} {
			d, err := Open(o)
			if err != nil {
				t.Errorf("%+v: %v", o, err)
				continue
			}
			wantMTU := o.MTU
			if wantMTU == 0 {
				wantMTU = DefaultMTU
			}
			if d.MTU() != wantMTU || o.Name != "" && d.Name() != o.Name || o.Name == "" && !strings.HasPrefix(d.Name(), "sluice") {
				t.Errorf("%+v: %s, MTU %d", o, d.Name(), d.MTU())
			}
			for range 2 {
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			}
		}
	})
}

func TestOpenFails(t *testing.T) {
	proxytest.InNetwork(t, func() {
		d, err := Open(Options{Name: "taken"})
		if err != nil {
			t.Error(err)
			return
		}
		defer d.Close()
		for o, want := range map[Options]error{
			{Name: "taken"}:                 unix.EBUSY,
			{Name: strings.Repeat("x", 16)}: nil,
			{Name: "a/b"}:                   unix.EINVAL,
			{Name: "big", MTU: 100000}:      unix.EINVAL,
		} {
			if d, err := Open(o); err == nil || want != nil && !errors.Is(err, want) {
				t.Errorf("%+v: %v, %v, want %v", o, d, err, want)
			}
		}
	})
}

func TestCloseFreesTheReader(t *testing.T) {
	proxytest.InNetwork(t, func() {
		d, err := Open(Options{})
		if err != nil {
			t.Error(err)
			return
		}
		ended := make(chan error, 1)
		go func() {
			var h Header
			_, err := d.ReadPacket(&h, [][]byte{make([]byte, PacketMax)})
			ended <- err
		}()
		d.Close()
		if err := <-ended; !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
		if err := d.WritePacket(Header{}, [][]byte{{0x45}}); !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
}

func TestFromFile(t *testing.T) {
	proxytest.InNetwork(t, func() {
		d, err := Open(Options{})
		if err != nil {
			t.Error(err)
			return
		}
		defer d.Close()
		fd, err := unix.Dup(int(d.File().Fd()))
		if err != nil {
			t.Error(err)
			return
		}
		e, err := FromFile(os.NewFile(uintptr(fd), "tun"), 1400)
		if err != nil {
			t.Error(err)
			return
		}
		defer e.Close()
		if e.Name() != d.Name() || e.MTU() != 1400 {
			t.Errorf("%s, MTU %d", e.Name(), e.MTU())
		}
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Error(err)
			return
		}
		if d, err := FromFile(null, 0); err == nil || !strings.Contains(err.Error(), "is not an open TUN device") {
			t.Error(d, err)
		}
	})
}

func TestHeader(t *testing.T) {
	for _, h := range []Header{
		{},
		{NeedsCsum: true, CsumStart: 20, CsumOffset: 16},
		{GSO: GSOTCP4, HdrLen: 52, SegSize: 1448, NeedsCsum: true, CsumStart: 20, CsumOffset: 16, ECN: true},
		{GSO: GSOTCP6, HdrLen: 72, SegSize: 1428, NeedsCsum: true, CsumStart: 40, CsumOffset: 16},
		{GSO: GSOUDP, HdrLen: 28, SegSize: 1200, NeedsCsum: true, CsumStart: 20, CsumOffset: 6},
	} {
		var b [vnetSize]byte
		var got Header
		h.marshal(&b)
		if got.parse(&b); got != h {
			t.Errorf("%+v became %+v", h, got)
		}
	}
}
