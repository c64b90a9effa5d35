//go:build unix

package proxytest

import (
	"fmt"
	"testing"

	"github.com/sluice-proxy/sluice/internal/proxy"
)

func TestStart(t *testing.T) {
	Need(t, "python3")
	NoLeaks(t)
	port := FreePort(t)
	Start(t, fmt.Sprintf("127.0.0.1:%d", port), "python3", "-m", "http.server", "-b", "127.0.0.1", fmt.Sprint(port))
	Dial(t, proxy.TCP("127.0.0.1", port))
}
