package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sluice-proxy/sluice/internal/proxytest"
)

func noEnv(string) (string, bool) { return "", false }

func TestExitCodes(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	wrong := filepath.Join(t.TempDir(), "wrong.yaml")
	if err := os.WriteFile(wrong, []byte("inbounds: 7"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args string
		want int
	}{
		{"--help", 0},
		{"version", 0},
		{"proxy --print-config", 0},
		{"check " + wrong, 1},
		{"run " + wrong, 1},
		{"run none.yaml", 1},
		{"forward " + taken.Addr().String() + " 127.0.0.1:9", 1},
		{"proxy 0 --users-file none", 1},
		{"nothing", 2},
		{"--nothing", 2},
		{"forward 1", 2},
		{"forward 1 nowhere", 2},
		{"proxy :1080", 2},
		{"proxy 0 --via nowhere", 2},
		{"run", 2},
	} {
		var out bytes.Buffer
		got := run(t.Context(), strings.Fields(test.args), strings.NewReader(""), &out, &out, noEnv)
		if got != test.want {
			t.Errorf("sluice %s: exit code %d, want %d:\n%s", test.args, got, test.want, &out)
		}
	}
}

// TestRunLeavesNothing runs the program within the test, and ends it while a session goes on.
func TestRunLeavesNothing(t *testing.T) {
	proxytest.NoLeaks(t)
	origin := proxytest.Listen(t, "tcp", proxytest.Echo)
	ctx, cancel := context.WithCancel(t.Context())
	stdout, code := new(lockedBuffer), make(chan int)
	go func() {
		code <- run(ctx, []string{"forward", "0", origin.Addr.String()}, strings.NewReader(""), stdout, io.Discard, noEnv)
	}()
	var addr string
	proxytest.Until(t, "sluice listens", func() bool {
		if m := listening.FindStringSubmatch(stdout.String()); m != nil {
			addr = m[1]
		}
		return addr != ""
	})
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(proxytest.Patience))
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	cancel()
	if !proxytest.Resets(c) {
		t.Error("the session was not aborted")
	}
	if got := <-code; got != exitOK {
		t.Errorf("exit code %d", got)
	}
}

// lockedBuffer may be written while it is read.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func TestVersion(t *testing.T) {
	info := &debug.BuildInfo{Main: debug.Module{Version: "v1.2.3"}, Settings: []debug.BuildSetting{
		{Key: "vcs.revision", Value: "0123456789abcdef0123"}, {Key: "vcs.modified", Value: "true"}}}
	if got := version(info); !strings.HasPrefix(got, "sluice v1.2.3 (0123456789ab, modified) go1") {
		t.Error(got)
	}
	if got := version(nil); !strings.HasPrefix(got, "sluice (unknown) go1") {
		t.Error(got)
	}
}
