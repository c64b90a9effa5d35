package outbound

import (
	"context"
	"fmt"
	"net"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/relay"
)

// Reject is the way out for what must not get out: it connects to nothing.
type Reject struct{}

var (
	_ proxy.PacketDialer = Reject{}
	_ proxy.Binder       = Reject{}
	_ proxy.Denier       = Reject{}
)

// Denied implements proxy.Denier. Its error is proxy.ErrDenied.
func (Reject) Denied(dst proxy.Addr) error {
	return fmt.Errorf("outbound: reject: %v: %w", dst, proxy.ErrDenied)
}

// DialStream implements proxy.Dialer. Its error is proxy.ErrDenied.
func (r Reject) DialStream(_ context.Context, dst proxy.Addr) (net.Conn, error) {
	return nil, ofOrigin(r.Denied(dst))
}

// DialPackets implements proxy.PacketDialer. Its error is proxy.ErrDenied.
func (r Reject) DialPackets(_ context.Context, dst proxy.Addr) (relay.PacketConn, error) {
	return nil, r.Denied(dst)
}

// Bind implements proxy.Binder. Its error is proxy.ErrDenied.
func (r Reject) Bind(_ context.Context, from proxy.Addr) (net.Listener, error) {
	return nil, r.Denied(from)
}
