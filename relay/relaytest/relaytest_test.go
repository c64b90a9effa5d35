package relaytest

import "testing"

// With no relay at all, every scenario passes over every transport.
func TestDirect(t *testing.T) {
	for _, l := range Legs() {
		t.Run(l.Name, func(t *testing.T) { RunBed(t, Direct(l), Options{}) })
	}
}
