package relay_test

import (
	"context"
	"io"
	"testing"

	"github.com/sluice-proxy/sluice/relay"
	"github.com/sluice-proxy/sluice/relay/relaytest"
)

// TestConform plays every scenario over every mix of transports, with the engine that Join chooses.
func TestConform(t *testing.T) {
	var legs []relaytest.Leg // all
	if testing.Short() {
		legs = []relaytest.Leg{relaytest.TCP(), relaytest.TLS()}
	}
	relaytest.RunOver(t, relaytest.Options{Rounds: 50}, func(ctx context.Context, client, origin io.ReadWriteCloser) {
		relay.Join(ctx, client, origin)
	}, legs...)
}

// TestConformPortable plays them over the portable engine where Join would choose another.
func TestConformPortable(t *testing.T) {
	r := relay.Relay{Portable: true}
	join := func(ctx context.Context, client, origin io.ReadWriteCloser) { r.Join(ctx, client, origin, nil) }
	relaytest.RunOver(t, relaytest.Options{Rounds: 50}, join, relaytest.TCP(), relaytest.Unix())
}
