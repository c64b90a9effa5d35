package netstack

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxytest"
	"github.com/sluice-proxy/sluice/internal/tundev"
	"github.com/sluice-proxy/sluice/relay/relaytest"
)

// The client is the namespace's kernel, and the origin this machine's.
func TestConform(t *testing.T) {
	proxytest.NoLeaks(t)
	origin, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer origin.Close()
	b := newBed(t, engine(toLoopback{}), nil, tundev.Options{})
	_, port, _ := net.SplitHostPort(origin.Addr().String())
	relaytest.RunBed(t, &relaytest.Dialed{
		Origin: origin,
		Meter:  relaytest.InProcess(),
		Connect: func(ctx context.Context) (c net.Conn, err error) {
			b.inside(func() { c, err = new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(host4, port)) })
			return c, err
		},
	}, relaytest.Options{
		Delay:   250 * time.Millisecond, // on a machine that has other things to do
		Rounds:  20,
		Silence: 100 * time.Millisecond,
		Prompt:  3 * time.Second,
		Timeout: 40 * time.Second,
	})
}
