package outbound

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/sshlink"
)

// SSH opens streams through an SSH server, as ssh -L does: TCP, and Unix sockets of the server. Names
// are resolved there. All streams share the link's one connection, which is made when it is first needed.
type SSH struct {
	Link *sshlink.Link // SSH closes it
}

var _ proxy.Dialer = (*SSH)(nil)

// DialStream implements [proxy.Dialer]. The conn that it returns is an [*sshlink.Conn]. While the
// link connects again it waits, for as long as ctx lets it.
func (s *SSH) DialStream(ctx context.Context, dst proxy.Addr) (net.Conn, error) {
	if dst.Network != "tcp" && dst.Network != "unix" {
		return nil, fmt.Errorf("outbound: ssh %s: cannot ask for %v: %w", s.Link.Name, dst, errors.ErrUnsupported)
	}
	c, err := s.Link.Dial(ctx, dst.Network, dst.HostPort())
	if _, refused := errors.AsType[*sshlink.Refusal](err); refused {
		err = ofOrigin(err)
	}
	if err != nil {
		return nil, fmt.Errorf("outbound: %w", err)
	}
	return c, nil
}

// Start begins to connect, if the link is one that is kept.
func (s *SSH) Start() error { return s.Link.Start() }

// Close ends the link. Streams through it end with it.
func (s *SSH) Close() error { return s.Link.Close() }
