package main

import (
	"bytes"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/lmittmann/tint"
	"golang.org/x/term"

	"github.com/sluice-proxy/sluice/internal/config"
)

// logger returns what logs to standard error, as l says, and never blocks. flush is to be called at the end.
func (p *program) logger(l config.Log) (log *slog.Logger, flush func()) {
	w := &logWriter{to: p.stderr, complain: slog.New(p.logHandler(l, p.stderr))}
	return slog.New(p.logHandler(l, w)), w.flush
}

func (p *program) logHandler(l config.Log, w io.Writer) slog.Handler {
	var level slog.Level
	if err := level.UnmarshalText([]byte(l.Level)); err != nil {
		panic("sluice: level " + l.Level + " passed the check") // config.Fill knows the same four
	}
	options := &slog.HandlerOptions{Level: level}
	switch {
	case l.Format == "json":
		return slog.NewJSONHandler(w, options)
	case l.Format == "auto" && isTerminal(p.stderr):
		noColor, _ := p.lookupEnv("NO_COLOR")
		return tint.NewTextHandler(w, &tint.Options{
			Level: level, TimeFormat: time.TimeOnly, NoColor: noColor != "",
		})
	}
	return slog.NewTextHandler(w, options)
}

// logMax bounds, in bytes, the lines that wait for who reads the log. More are counted, not kept.
const logMax = 4 << 20

// flushWait is how long the end of the program waits for who reads the log.
const flushWait = time.Second

// logWriter passes lines on to what may block, such as a pipe into a pager, and does not block itself: neither clients nor the
// end of the program wait for who reads the log. A goroutine writes while there are lines.
type logWriter struct {
	to       io.Writer
	complain *slog.Logger // writes to the same place: says how many lines were lost

	mu      sync.Mutex
	lines   [][]byte
	size    int           // bytes of lines, and of those that are being written
	lost    int           // lines
	writing chan struct{} // closed when the goroutine ends; nil: there is none
}

// Write takes one line.
func (w *logWriter) Write(line []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.size+len(line) > logMax {
		w.lost++
		return len(line), nil // the goroutine is there, or there would be room
	}
	w.lines = append(w.lines, bytes.Clone(line))
	w.size += len(line)
	if w.writing == nil {
		w.writing = make(chan struct{})
		go w.pass()
	}
	return len(line), nil
}

// pass writes the lines that wait, until there are none.
func (w *logWriter) pass() {
	for {
		w.mu.Lock()
		lines, lost := w.lines, w.lost
		w.lines, w.lost = nil, 0
		if len(lines) == 0 && lost == 0 {
			close(w.writing)
			w.writing = nil
			w.mu.Unlock()
			return
		}
		w.mu.Unlock()
		for _, line := range lines {
			w.to.Write(line) // where nobody can read it, there is nobody to be told
			w.mu.Lock()
			w.size -= len(line)
			w.mu.Unlock()
		}
		if lost > 0 {
			w.complain.Warn("lines were not logged: who reads the log did not keep up", "lines", lost)
		}
	}
}

// flush waits until what was logged is written, but not for ever.
func (w *logWriter) flush() {
	w.mu.Lock()
	writing := w.writing
	w.mu.Unlock()
	if writing == nil {
		return
	}
	wait := time.NewTimer(flushWait)
	defer wait.Stop()
	select {
	case <-writing:
	case <-wait.C:
	}
}

func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
