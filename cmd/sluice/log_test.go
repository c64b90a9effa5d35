package main

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/sluice-proxy/sluice/internal/config"
)

// gate is a reader of the log that reads when it is opened.
type gate struct {
	open chan struct{}
	bytes.Buffer
}

func (g *gate) Write(p []byte) (int, error) {
	<-g.open
	return g.Buffer.Write(p)
}

// TestLogDoesNotBlock: lines wait for who reads them, in their order, up to a bound; how many were lost is said.
func TestLogDoesNotBlock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gate{open: make(chan struct{})}
		p := &program{stderr: g, lookupEnv: noEnv}
		log, flush := p.logger(config.Log{Level: "info", Format: "text"})
		long := strings.Repeat("x", 1<<20)
		const logged, kept = 10, 3 // a fourth line is 4 MiB and its time
		for i := range logged {
			log.Info(fmt.Sprint(i, long))
		}
		flush() // gives up
		close(g.open)
		flush()
		lines := strings.Split(strings.ReplaceAll(g.String(), long, ""), "\n")
		if len(lines) != kept+2 || lines[kept+1] != "" {
			t.Fatalf("%d lines: %q", len(lines), lines)
		}
		for i, line := range lines[:kept] {
			if !strings.HasSuffix(line, fmt.Sprintf("msg=%d", i)) {
				t.Errorf("line %d: %s", i, line)
			}
		}
		if want := fmt.Sprintf("lines=%d", logged-kept); !strings.HasSuffix(lines[kept], want) {
			t.Errorf("%s, want %s", lines[kept], want)
		}
	})
}

// TestLogIsWhole: what was logged is there after flush, and no goroutine.
func TestLogIsWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b bytes.Buffer
		p := &program{stderr: &b, lookupEnv: noEnv}
		log, flush := p.logger(config.Log{Level: "info", Format: "json"})
		for range 1000 {
			log.Info("line")
		}
		flush()
		if n := bytes.Count(b.Bytes(), []byte("\n")); n != 1000 {
			t.Errorf("%d lines", n)
		}
	})
}
