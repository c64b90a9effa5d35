package lab

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/sluice-proxy/sluice/relay/relaytest"
)

// rows groups the scenarios by what they are about: the two directions of one are one row.
func (t *Table) rows() (rows []row) {
	index := make(map[string]int)
	for i, s := range t.Scenarios {
		base := strings.TrimSuffix(strings.TrimSuffix(s.Name, "/from-client"), "/from-origin")
		if _, ok := index[base]; !ok {
			index[base] = len(rows)
			rows = append(rows, row{Base: base, Scenario: s})
		}
		r := &rows[index[base]]
		r.at = append(r.at, i)
	}
	return rows
}

type row struct {
	Base string
	relaytest.Scenario
	at []int // in Table.Scenarios
}

// Anchor is the row's name in a page.
func (r row) Anchor() string { return strings.ReplaceAll(r.Base, "/", "-") }

// Holds says whether the scenario is one of the row.
func (r row) Holds(name string) bool {
	return name == r.Base || name == r.Base+"/from-client" || name == r.Base+"/from-origin"
}

// mark is ✗ for a relay that fails the row, → or ← where it does so in one direction, and · for a pass.
func (t *Table) mark(r row, relay int) string {
	failed := ""
	for _, i := range r.at {
		if t.Findings[relay][i].Failed() {
			failed += t.Scenarios[i].Name[len(r.Base):]
		}
	}
	switch failed {
	case "":
		if len(r.at) > 0 && !t.Findings[relay][r.at[0]].Failed() {
			return "·"
		}
		return "✗"
	case "/from-client":
		return "→"
	case "/from-origin":
		return "←"
	}
	return "✗"
}

// failing counts the rows in which a relay fails.
func (t *Table) failing(relay int) (n int) {
	for _, r := range t.rows() {
		if t.mark(r, relay) != "·" {
			n++
		}
	}
	return n
}

// WriteText writes the table, for a terminal.
func (t *Table) WriteText(w io.Writer) {
	rows := t.rows()
	fmt.Fprintf(w, "%-24s", "")
	for i := range t.Relays {
		fmt.Fprintf(w, "%3d", i+1)
	}
	fmt.Fprintln(w)
	for _, r := range rows {
		fmt.Fprintf(w, "%-24s", r.Base)
		for i := range t.Relays {
			fmt.Fprintf(w, "  %s", t.mark(r, i))
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintln(w, "\n· passes   ✗ fails   → ← fails when the client, when the origin does it")
	fmt.Fprintln(w)
	for i, r := range t.Relays {
		fmt.Fprintf(w, "%3d  %-20s  fails %2d of %d   %s (%s)\n", i+1, r.Name, t.failing(i), len(rows), r.Title, r.Origin)
	}
}

// WriteRelay writes one relay: its code, what its users lose, and what happened, event by event.
func (t *Table) WriteRelay(w io.Writer, r *Relay) {
	fmt.Fprintf(w, "%s: %s\nKnown from: %s.\n\n%s\n\n", r.Name, r.Title, r.Origin, r.Code())
	failures := t.Failures(r)
	if len(failures) == 0 {
		fmt.Fprintln(w, "It loses nothing: all scenarios pass.")
		return
	}
	fmt.Fprintln(w, "What it loses:")
	shown := make(map[string]bool)
	for _, f := range failures {
		if !shown[f.Scenario.Harm] {
			shown[f.Scenario.Harm] = true
			fmt.Fprintf(w, "  - %s\n", f.Scenario.Harm)
		}
	}
	for _, f := range failures {
		fmt.Fprintf(w, "\n%s: %s\n\n", f.Scenario.Name, f.Scenario.Meaning)
		f.WriteTimeline(w)
		fmt.Fprintf(w, "\n  FAILED: %s.\n", f.Reason())
	}
}

// WriteTimeline writes the events, the client's on the left and the origin's on the right.
func (f *Finding) WriteTimeline(w io.Writer) {
	const left, wide, most = "", 34, 40
	fmt.Fprintf(w, "  %12s  %-*s%s\n", "", wide, "client", "origin")
	for i, e := range f.Events {
		if i == most {
			fmt.Fprintf(w, "  %12s  … %d more\n", left, len(f.Events)-most)
			break
		}
		if e.Origin {
			fmt.Fprintf(w, "  %12s  %-*s%s\n", at(e), wide, "", describe(e))
		} else {
			fmt.Fprintf(w, "  %12s  %s\n", at(e), describe(e))
		}
	}
}

func at(e relaytest.Event) string {
	return fmt.Sprintf("%.1f ms", float64(e.At)/float64(time.Millisecond))
}

// describe says what happened at an end, without the end's name.
func describe(e relaytest.Event) string {
	s := e.Kind.String()
	if e.Bytes > 0 {
		s += " " + size(e.Bytes)
	}
	if e.Note != "" {
		s += " (" + e.Note + ")"
	}
	if e.Conn > 0 {
		s += fmt.Sprintf(" [%d]", e.Conn+1)
	}
	return s
}

func size(n int) string {
	switch {
	case n == 1:
		return "1 byte"
	case n >= 10<<20:
		return fmt.Sprintf("%d MiB", n>>20)
	case n >= 10<<10:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d bytes", n)
}
