package netstack

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/tundev"
	"github.com/sluice-proxy/sluice/relay"
)

func at(host string, o *proxytest.Origin) string {
	return net.JoinHostPort(host, fmt.Sprint(o.Addr.Port))
}

func TestStreamEcho(t *testing.T) {
	proxytest.NoLeaks(t)
	origin := proxytest.Listen(t, "tcp", proxytest.Echo)
	b := newBed(t, engine(toLoopback{}), nil, tundev.Options{})
	for _, host := range []string{host4, host6} {
		c := b.dial(at(host, origin))
		io.WriteString(c, "hello")
		c.CloseWrite()
		if got, err := io.ReadAll(c); string(got) != "hello" || err != nil {
			t.Errorf("%s: %q, %v", host, got, err)
		}
	}
}

func TestRefusedByTheOrigin(t *testing.T) {
	proxytest.NoLeaks(t)
	for _, tt := range []struct {
		dial        error
		want, want6 syscall.Errno
	}{
		{syscall.ECONNREFUSED, syscall.ECONNREFUSED, syscall.ECONNREFUSED},
		{syscall.EHOSTUNREACH, syscall.EHOSTUNREACH, syscall.EHOSTUNREACH},
		{syscall.ENETUNREACH, syscall.ENETUNREACH, syscall.ENETUNREACH},
		{proxy.ErrDenied, syscall.EHOSTUNREACH, syscall.EACCES},
		{errors.New("something else"), syscall.ECONNREFUSED, syscall.ECONNREFUSED},
	} {
		b := newBed(t, engine(failing{tt.dial}), nil, tundev.Options{})
		for host, want := range map[string]syscall.Errno{host4: tt.want, host6: tt.want6} {
			_, err := b.tryDial("tcp", net.JoinHostPort(host, "80"), proxytest.Patience)
			if !errors.Is(err, want) {
				t.Errorf("%v to %s: %v, want %v", tt.dial, host, err, want)
			}
		}
	}
}

func TestTimeoutIsSilence(t *testing.T) {
	proxytest.NoLeaks(t)
	b := newBed(t, engine(failing{syscall.ETIMEDOUT}), nil, tundev.Options{})
	_, err := b.tryDial("tcp", host4+":80", 300*time.Millisecond)
	if ne, ok := errors.AsType[net.Error](err); !ok || !ne.Timeout() {
		t.Error(err)
	}
}

func TestBulk(t *testing.T) {
	proxytest.NoLeaks(t)
	const size = 64 << 20
	origin := proxytest.Listen(t, "tcp", proxytest.Echo)
	b := newBed(t, engine(toLoopback{}), nil, tundev.Options{})
	for _, host := range []string{host4, host6} {
		c := b.dial(at(host, origin))
		sent, got := sha256.New(), sha256.New()
		go func() {
			io.Copy(io.MultiWriter(c, sent), io.LimitReader(proxytest.Pattern(), size))
			c.CloseWrite()
		}()
		n, err := io.Copy(got, c)
		if n != size || err != nil || !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
			t.Errorf("%s: %d bytes, %v", host, n, err)
		}
	}
}

func TestOriginResets(t *testing.T) {
	proxytest.NoLeaks(t)
	origin := proxytest.Listen(t, "tcp", func(c net.Conn) {
		io.ReadFull(c, make([]byte, 1))
		io.WriteString(c, "last words")
		relay.Abort(c)
	})
	b := newBed(t, engine(toLoopback{}), nil, tundev.Options{})
	c := b.dial(at(host4, origin))
	io.WriteString(c, "x")
	got, err := io.ReadAll(c)
	if string(got) != "last words" && len(got) != 0 || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%q, %v", got, err)
	}
}

func TestClientResets(t *testing.T) {
	proxytest.NoLeaks(t)
	ended := make(chan error, 1)
	origin := proxytest.Listen(t, "tcp", func(c net.Conn) {
		_, err := io.Copy(io.Discard, c)
		ended <- err
	})
	b := newBed(t, engine(toLoopback{}), nil, tundev.Options{})
	c := b.dial(at(host4, origin))
	io.WriteString(c, "x")
	proxytest.Until(t, "the origin", func() bool { return origin.Accepted() == 1 })
	relay.Abort(c)
	if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
		t.Error(err)
	}
}
