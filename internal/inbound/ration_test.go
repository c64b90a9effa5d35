package inbound

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestScanDoesNotFloodTheLog: a thousand refused clients a second are ten lines a second, which say how many there were.
func TestScanDoesNotFloodTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b strings.Builder
		s := &listening{log: slog.New(slog.NewTextHandler(&b, nil))}
		for i := range 30_000 {
			s.stranger(slog.LevelInfo, "refused", "i", i)
			time.Sleep(time.Millisecond)
		}
		time.Sleep(rationTime)
		s.stranger(slog.LevelInfo, "refused", "i", "last")
		lines := strings.Split(strings.TrimSpace(b.String()), "\n")
		if len(lines) != 3*rationLines+1 {
			t.Fatalf("%d lines", len(lines))
		}
		missed := fmt.Sprintf("left-out=%d", 10_000-rationLines)
		for _, i := range []int{rationLines, 2 * rationLines, 3 * rationLines} {
			if !strings.HasSuffix(lines[i], missed) {
				t.Errorf("line %d: %s, want %s", i, lines[i], missed)
			}
		}
		if n := strings.Count(b.String(), "left-out"); n != 3 {
			t.Errorf("%d lines tell of others", n)
		}
	})
}

// TestDebugLogsAll: who looks for a fault sees every client.
func TestDebugLogsAll(t *testing.T) {
	var b strings.Builder
	s := &listening{log: slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	for range 3 * rationLines {
		s.stranger(slog.LevelInfo, "refused")
	}
	if n := strings.Count(b.String(), "\n"); n != 3*rationLines {
		t.Errorf("%d lines", n)
	}
}
