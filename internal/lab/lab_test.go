package lab

import (
	"bytes"
	"regexp"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// Each relay loses what it is known for, sluice loses nothing, and none leaves anything behind.
func TestLab(t *testing.T) {
	proxytest.NoLeaks(t)
	table := Run(t.Context(), Relays(), "", nil)
	known := map[string][]string{
		"two-copies":          {"half-close", "send-and-close"},
		"shared-remote":       {"send-and-close", "stalled-connection"},
		"close-peer":          {"half-close", "early-response"},
		"close-both":          {"half-close", "early-response", "reset-idle"},
		"either-done":         {"half-close", "early-response"},
		"deadline":            {"half-close-silence", "half-close-trickle"},
		"half-close-deadline": {"half-close-silence", "half-close-trickle"},
		"close-read":          {"early-response-close", "reset-idle"},
		"half-close":          {"reset-idle", "reset-sending", "reset-behind-data", "reset-after-half-close"},
	}
	for i, r := range table.Relays {
		fails := make(map[string]bool)
		for _, row := range table.rows() {
			fails[row.Base] = table.mark(row, i) != "·"
		}
		for _, base := range known[r.Name] {
			if !fails[base] {
				t.Errorf("%s passes %s", r.Name, base)
			}
		}
		if known[r.Name] == nil && !r.Right {
			t.Errorf("%s has nothing that it is known to lose", r.Name)
		}
		for _, f := range table.Failures(r) {
			if r.Right {
				t.Errorf("%s fails %s: %v", r.Name, f.Scenario.Name, f.Err)
			}
			if len(f.Events) == 0 {
				t.Errorf("%s fails %s, and there is no story", r.Name, f.Scenario.Name)
			}
		}
	}

	var page bytes.Buffer
	if err := table.WriteHTML(&page); err != nil {
		t.Fatal(err)
	}
	for _, link := range regexp.MustCompile(`href="#([^"]+)"`).FindAllStringSubmatch(page.String(), -1) {
		if n := strings.Count(page.String(), ` id="`+link[1]+`"`); n != 1 {
			t.Errorf("the page has %d places for the link to %s", n, link[1])
		}
	}
}

// Every relay has its source, with what is wrong with it above.
func TestCode(t *testing.T) {
	for _, r := range Relays() {
		if about := r.About(); len(about) < 50 || !strings.HasSuffix(about, ".") {
			t.Errorf("%s: about: %q", r.Name, about)
		}
		if body := r.Body(); !strings.HasPrefix(body, "func "+r.code+"(") || !strings.HasSuffix(body, "\n}") {
			t.Errorf("%s: body: %q", r.Name, body)
		}
	}
}
