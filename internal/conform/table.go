package conform

import (
	"fmt"
	"io"
	"strings"
)

// Markdown writes a table with a row for each scenario and a column for each relay. The two forms of a
// scenario are one row. Several reports of one relay become one column: what fails in any of them fails,
// and is marked by "°" if it passes in another.
func Markdown(w io.Writer, reports []*Report) {
	var relays []string
	of := make(map[string][]*Report)
	var rows []Result
	seen := make(map[string]bool)
	for _, r := range reports {
		if of[r.Relay] == nil {
			relays = append(relays, r.Relay)
		}
		of[r.Relay] = append(of[r.Relay], r)
		for _, res := range r.Results {
			if base := baseOf(res.Name); !seen[base] {
				seen[base] = true
				rows = append(rows, res)
			}
		}
	}
	fmt.Fprint(w, "| scenario | a relay that passes |")
	for _, name := range relays {
		fmt.Fprintf(w, " %s |", name)
	}
	fmt.Fprintf(w, "\n|---|---|%s\n", strings.Repeat(":-:|", len(relays)))
	type tally struct{ passed, played int }
	tallies := make(map[string]tally)
	for _, row := range rows {
		base := baseOf(row.Name)
		name := "`" + base + "`"
		if row.Level == "should" {
			name = "*" + name + "*"
		}
		fmt.Fprintf(w, "| <a id=\"%s\"></a>%s | %s |", strings.ReplaceAll(base, "/", "-"), name, row.Meaning)
		for _, relay := range relays {
			mark := cell(of[relay], base)
			fmt.Fprintf(w, " %s |", mark)
			t := tallies[relay+row.Level]
			switch mark {
			case "✓":
				t.passed++
				t.played++
			case "–":
			default:
				t.played++
			}
			tallies[relay+row.Level] = t
		}
		fmt.Fprintln(w)
	}
	for _, level := range []string{"must", "should"} {
		fmt.Fprintf(w, "| **%s** | rows passed, of those played |", level)
		for _, relay := range relays {
			t := tallies[relay+level]
			fmt.Fprintf(w, " **%d/%d** |", t.passed, t.played)
		}
		fmt.Fprintln(w)
	}
}

func baseOf(name string) string {
	return strings.TrimSuffix(strings.TrimSuffix(name, "/from-client"), "/from-origin")
}

// cell writes the verdicts of reports on one scenario: ✓, ✗, or – if it was left out. Where one form of
// the two fails alone, an arrow says in which direction: → from the client, ← from the origin.
func cell(reports []*Report, base string) string {
	var failed, passed, up, down, single bool
	for _, r := range reports {
		fails, plays := false, false
		for _, res := range r.Results {
			if baseOf(res.Name) != base || res.Verdict == LeftOut {
				continue
			}
			plays = true
			if res.Verdict != Fail {
				continue
			}
			fails = true
			up = up || res.Name == base+"/from-client"
			down = down || res.Name == base+"/from-origin"
			single = single || res.Name == base
		}
		failed = failed || fails
		passed = passed || plays && !fails
	}
	mark := "✗"
	switch {
	case !failed && passed:
		return "✓"
	case !failed:
		return "–"
	case single || up && down:
	case up:
		mark = "✗→"
	case down:
		mark = "✗←"
	}
	if passed {
		mark += "°"
	}
	return mark
}
