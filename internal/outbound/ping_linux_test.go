package outbound

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

func TestPing(t *testing.T) {
	proxytest.NeedRoot(t)
	proxytest.NoLeaks(t)
	d := &Direct{Mark: 7}
	for _, dst := range []string{"127.0.0.1", "::1"} {
		for _, payload := range [][]byte{nil, []byte("odd"), make([]byte, 1400), make([]byte, 20000)} {
			ctx, cancel := context.WithTimeout(t.Context(), proxytest.Patience)
			if err := d.Ping(ctx, netip.MustParseAddr(dst), payload); err != nil {
				t.Errorf("%s with %d bytes: %v", dst, len(payload), err)
			}
			cancel()
		}
	}
}

// TestPingUnanswered: silence lasts as long as the context, and no longer.
func TestPingUnanswered(t *testing.T) {
	proxytest.NeedRoot(t)
	proxytest.NoLeaks(t)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	broadcast := netip.MustParseAddr("127.255.255.255") // which nobody answers (icmp_echo_ignore_broadcasts)
	if err := new(Direct).Ping(ctx, broadcast, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}
