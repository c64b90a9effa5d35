package capture

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// TestPortOfAnother: that another sluice has the table is what is said, and not that rights are missing.
func TestPortOfAnother(t *testing.T) {
	at := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:12345")}
	proxytest.InNetwork(t, func() {
		for _, tproxy := range []bool{false, true} {
			first, second := &Capture{TProxy: tproxy}, &Capture{TProxy: tproxy}
			if err := first.Begin(at); err != nil {
				t.Error(err)
				continue
			}
			if err := second.Begin(at); err == nil || !strings.Contains(err.Error(), "another sluice has set up this port") {
				t.Errorf("the second: %v", err)
			}
			if tproxy {
				if all, err := policies(); err != nil || len(all) != 1 {
					t.Errorf("the first has %v, %v", all, err)
				}
			}
			if err := errors.Join(second.End(), first.End()); err != nil {
				t.Error(err)
			}
		}
	})
}

// TestCleanMeanwhile: Clean, of another process, leaves alone what begins while it looks.
func TestCleanMeanwhile(t *testing.T) {
	const env = "SLUICE_TEST_CLEAN"
	if os.Getenv(env) != "" {
		cleanForever()
	}
	at := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:12345")}
	proxytest.InNetwork(t, func() {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestCleanMeanwhile$") // in the network of this thread
		cmd.Env = append(os.Environ(), env+"=1")
		var said strings.Builder
		cmd.Stdout = &said
		if err := cmd.Start(); err != nil {
			t.Error(err)
			return
		}
		for range 100 {
			c := &Capture{TProxy: true}
			err := c.Begin(at)
			for err != nil && strings.Contains(err.Error(), "already") { // Clean looks at that port
				err = c.Begin(at)
			}
			if err != nil {
				t.Error(err)
			}
			there, err := policies()
			if err != nil || len(there) != 1 {
				t.Errorf("it has %v, %v", there, err)
			}
			if err := c.End(); err != nil {
				t.Error(err)
			}
		}
		cmd.Process.Kill()
		cmd.Wait()
		if said.String() != "" {
			t.Error(said.String())
		}
	})
}

// cleanForever cleans until it is killed, or cannot.
func cleanForever() {
	for {
		if _, err := Clean(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
}
