package inbound

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// A ration bounds the lines about clients that come to no session. Whoever can connect can cause such lines, as many as it likes.
type ration struct {
	mu    sync.Mutex
	since time.Time // when the lines that are counted began
	lines int
	left  int // out, since the last line
}

// So many lines are logged in so much time, by each listener.
const (
	rationLines = 100
	rationTime  = 10 * time.Second
)

// take says whether a line is to be logged and, if so, how many were left out before it.
func (r *ration) take() (left int, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := time.Now(); r.since.IsZero() || now.Sub(r.since) >= rationTime {
		r.since, r.lines = now, 0
	}
	if r.lines == rationLines {
		r.left++
		return 0, false
	}
	r.lines++
	left, r.left = r.left, 0
	return left, true
}

// stranger logs of a client that comes to no session: of many, some. Who logs debug gets all.
func (s *listening) stranger(level slog.Level, message string, args ...any) {
	ctx := context.Background()
	if !s.log.Enabled(ctx, level) {
		return
	}
	if !s.log.Enabled(ctx, slog.LevelDebug) {
		left, ok := s.strangers.take()
		if !ok {
			return
		}
		if left > 0 {
			args = append(args, "left-out", left)
		}
	}
	s.say(level, message, args...)
}
