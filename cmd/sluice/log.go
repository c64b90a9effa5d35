package main

import (
	"log/slog"
	"os"
	"time"

	"github.com/lmittmann/tint"
	"golang.org/x/term"

	"github.com/sluice-proxy/sluice/internal/config"
)

// logger writes to standard error, as l says.
func (p *program) logger(l config.Log) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(l.Level)); err != nil {
		panic("sluice: level " + l.Level + " passed the check") // config.Fill knows the same four
	}
	options := &slog.HandlerOptions{Level: level}
	switch {
	case l.Format == "json":
		return slog.New(slog.NewJSONHandler(p.stderr, options))
	case l.Format == "auto" && isTerminal(p.stderr):
		noColor, _ := p.lookupEnv("NO_COLOR")
		return slog.New(tint.NewTextHandler(p.stderr, &tint.Options{
			Level: level, TimeFormat: time.TimeOnly, NoColor: noColor != "",
		}))
	}
	return slog.New(slog.NewTextHandler(p.stderr, options))
}

func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
