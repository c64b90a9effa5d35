package inbound

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/sluice-proxy/sluice/internal/proxy"
)

// Mixed is a SOCKS5 and an HTTP proxy on one port. The first byte of a client tells which it wants: that of
// SOCKS is its version, that of HTTP a letter.
type Mixed struct {
	Listener
	Users Users // who may use it; nil: everybody
}

var _ proxy.Inbound = (*Mixed)(nil)

// Serve implements proxy.Inbound.
func (m *Mixed) Serve(ctx context.Context, h proxy.Handler) error {
	socks := &SOCKS5{Listener: m.Listener, Users: m.Users}
	http := &HTTP{Listener: m.Listener, Users: m.Users}
	return m.serve(ctx, func(ctx context.Context, c *client) {
		first, err := c.peek()
		switch {
		case err != nil:
			c.fail(fmt.Errorf("inbound: mixed: %w", err))
		case first == 5:
			socks.serveClient(ctx, h, c)
		case 'A' <= first && first <= 'Z':
			http.serveClient(ctx, h, c)
		default:
			refuseForeign(c, first)
		}
	})
}

// peek returns the client's first byte, which is then read again.
func (c *client) peek() (byte, error) {
	if len(c.head) == 0 {
		b := make([]byte, 1)
		if _, err := io.ReadFull(c.bare, b); err != nil {
			return 0, err
		}
		c.head = b
	}
	return c.head[0], nil
}

// refuseForeign refuses a client that speaks neither SOCKS5 nor HTTP, in its own words where that is easy.
func refuseForeign(c *client, first byte) {
	switch first {
	case 4:
		c.Write([]byte{0, 91, 0, 0, 0, 0, 0, 0}) // SOCKS4: request rejected
		c.fail(fmt.Errorf("inbound: mixed: SOCKS4 is not supported: set the client to SOCKS5: %w", errors.ErrUnsupported))
	case 0x16:
		c.fail(fmt.Errorf("inbound: mixed: TLS on a plain proxy port: set the client to an http:// proxy, "+
			"which carries https as well: %w", errors.ErrUnsupported))
	default:
		c.fail(fmt.Errorf("inbound: mixed: neither SOCKS5 nor HTTP: the first byte is %#02x: %w",
			first, errors.ErrUnsupported))
	}
}
