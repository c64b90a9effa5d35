// Package inbound takes clients in: each file holds one protocol, and accept.go the loop that all
// share. An inbound reads what its client wants, within a deadline, and hands it over as a
// [proxy.Flow] with a [proxy.Pending]; it neither dials nor relays.
package inbound

import (
	"log/slog"
	"net/netip"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxy"
)

// Listener holds the settings that all stream inbounds share, and is embedded in them.
type Listener struct {
	Name string     // for flows and logs
	Addr proxy.Addr // where to listen

	Allow, Deny []netip.Prefix // clients let in (empty: all), and refused although allowed
	MaxConns    int            // sessions at a time; 0: no limit. At the limit accepting pauses
	AcceptProxy bool           // every client must begin with a PROXY header (v1 or v2), which says its true address

	HandshakeTimeout time.Duration // from accept to the end of the handshake; 0: 10 s
	Log              *slog.Logger  // nil: silent
}
