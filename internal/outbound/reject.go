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

var _ proxy.PacketDialer = Reject{}

// DialStream implements proxy.Dialer. Its error is proxy.ErrDenied.
func (Reject) DialStream(_ context.Context, dst proxy.Addr) (net.Conn, error) {
	return nil, ofOrigin(fmt.Errorf("outbound: reject: %v: %w", dst, proxy.ErrDenied))
}

// DialPackets implements proxy.PacketDialer. Its error is proxy.ErrDenied.
func (Reject) DialPackets(_ context.Context, dst proxy.Addr) (relay.PacketConn, error) {
	return nil, fmt.Errorf("outbound: reject: %v: %w", dst, proxy.ErrDenied)
}
