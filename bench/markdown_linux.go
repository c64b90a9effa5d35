package main

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
)

// subjects are the peers whose ratios are worked out, bases what they are compared with.
var (
	subjects = []string{"sluice", "sluice-lib"}
	bases    = []string{"direct", "haproxy", "haproxy-1m", "nginx", "iocopy"}
)

// markdown writes the tables.
func (r *Report) markdown(out io.Writer) error {
	var w bytes.Buffer
	for _, t := range tables {
		r.table(&w, t)
	}
	for _, s := range subjects {
		r.ratios(&w, s, bases, true)
	}
	for _, s := range labSubjects {
		r.ratios(&w, s, slices.DeleteFunc(slices.Clone(labBases), func(b string) bool { return b == s }), false)
	}
	if rows := r.goalRows(); len(rows) > 0 {
		fmt.Fprintf(&w, "### Goals of the transparent ways in\n\n")
		writeTable(&w, []string{"goal", "host", "lan"}, rows)
	}
	for _, p := range r.measured() {
		if text := r.projection(p); text != "" && slices.Contains(subjects, p) {
			fmt.Fprintf(&w, "%s\n", text)
		}
	}
	r.facts(&w)
	_, err := out.Write(w.Bytes())
	return err
}

// measured returns the names of the peers that have samples.
func (r *Report) measured() (names []string) {
	for _, p := range r.Peers {
		if slices.ContainsFunc(r.Samples, func(s *Sample) bool { return s.Peer == p.Name && s.Err == "" }) {
			names = append(names, p.Name)
		}
	}
	return names
}

// table writes the columns of t whose tests were run.
func (r *Report) table(w *bytes.Buffer, t table) {
	heads, cells := []string{"relay"}, [][]metric(nil)
	for i, c := range t.cells {
		if slices.ContainsFunc(r.tests, func(t test) bool { return t.name == c[0].test }) {
			heads, cells = append(heads, t.heads[i]), append(cells, c)
		}
	}
	if len(cells) == 0 {
		return
	}
	var rows [][]string
	for _, p := range r.measured() {
		row, empty := []string{p}, true
		for _, c := range cells {
			s := r.cell(p, c)
			row, empty = append(row, s), empty && s == "–"
		}
		if !empty {
			rows = append(rows, row)
		}
	}
	fmt.Fprintf(w, "### %s\n\n", t.title)
	writeTable(w, heads, rows)
}

// cell shows the medians of a peer, and where it means something their ratio to direct.
func (r *Report) cell(peer string, ms []metric) string {
	var parts []string
	for _, m := range ms {
		vs := r.values(m.test, peer, m.key)
		v, ok := median(vs)
		limit := limitOf(m.test)
		if !ok || peer == limit && m.isRelays() {
			parts = append(parts, "–")
			continue
		}
		s := fmt.Sprintf(m.format, v)
		if q, ok := ratio(vs, r.values(m.test, limit, m.key)); ok && m.ofLimit && peer != limit {
			s += fmt.Sprintf(" (%.2f)", q)
		}
		parts = append(parts, s)
	}
	if !slices.ContainsFunc(parts, func(s string) bool { return s != "–" }) {
		return "–"
	}
	return strings.Join(parts, " · ")
}

// isRelays says that m is about the relay alone, and so nothing where there is none.
func (m metric) isRelays() bool { return strings.HasPrefix(m.key, "relay_") }

// ratios writes the table of subject ÷ base for every metric with a name; best adds the best of the others.
func (r *Report) ratios(w *bytes.Buffer, subject string, bases []string, best bool) {
	names := r.measured()
	if !slices.Contains(names, subject) {
		return
	}
	heads := []string{"ratio"}
	var over []string
	for _, b := range bases {
		if slices.Contains(names, b) {
			heads, over = append(heads, subject+" ÷ "+b), append(over, b)
		}
	}
	if best {
		heads = append(heads, subject+" ÷ best")
	}
	var rows [][]string
	for _, t := range tables {
		for _, m := range slices.Concat(t.cells...) {
			row, ok := r.ratioRow(subject, over, m)
			if !ok {
				continue
			}
			if best {
				row = append(row, r.best(subject, m))
			}
			rows = append(rows, row)
		}
	}
	if len(over) == 0 || len(rows) == 0 {
		return
	}
	fmt.Fprintf(w, "### %s beside the others: ↑ above 1 is better, ↓ below 1 is better\n\n", subject)
	writeTable(w, heads, rows)
}

func (r *Report) ratioRow(subject string, over []string, m metric) (row []string, some bool) {
	arrow := map[bool]string{true: "↑", false: "↓"}[m.more]
	row = []string{m.name + " " + arrow}
	for _, b := range over {
		q, ok := ratio(r.values(m.test, subject, m.key), r.values(m.test, b, m.key))
		if !ok || b == limitOf(m.test) && m.isRelays() {
			row = append(row, "–")
			continue
		}
		row, some = append(row, fmt.Sprintf("%.2f", q)), true
	}
	return row, some && m.name != ""
}

// best compares subject with the relay that does best in m, and names it.
func (r *Report) best(subject string, m metric) string {
	name, top := "", 0.0
	for _, p := range r.measured() {
		if p == "direct" || slices.Contains(subjects, p) {
			continue
		}
		if v, ok := median(r.values(m.test, p, m.key)); ok && (name == "" || v > top == m.more) {
			name, top = p, v
		}
	}
	q, ok := ratio(r.values(m.test, subject, m.key), r.values(m.test, name, m.key))
	if !ok {
		return "–"
	}
	return fmt.Sprintf("%.2f %s", q, name)
}

// facts writes what a reader must know to judge the tables.
func (r *Report) facts(w *bytes.Buffer) {
	mid, most, known := r.noise()
	fmt.Fprintf(w, "Medians over the rounds (%s, %s a measurement), taken in turns, in %s.\n",
		r.Settings["rounds"], r.Settings["time"], r.Took)
	if known {
		fmt.Fprintf(w, "Others took %.0f %% of the machine meanwhile (median; at most %.0f %%).\n", mid, most)
	}
	if mid > 5 {
		fmt.Fprintf(w, "**The machine was not quiet: do not quote these figures.**\n")
	}
	fmt.Fprintf(w, "\n- Machine: %s, %s cores, Linux %s, %s, congestion control %s, %s open files a process, load average %s.\n",
		r.Machine["cpu"], r.Machine["cores"], r.Machine["kernel"], r.Machine["go"], r.Machine["congestion control"],
		r.Machine["open files"], r.Machine["load average at the start"])
	fmt.Fprintf(w, "- Isolation: %s. Threads of each relay: %s.\n", r.Settings["isolation"], r.Settings["threads"])
	for _, p := range r.Peers {
		switch {
		case p.Missing != "":
			fmt.Fprintf(w, "- %s was not measured: %s\n", p.Name, p.Missing)
		case p.Version != "":
			fmt.Fprintf(w, "- %s: %s (%s)\n", p.Name, p.About, p.Version)
		default:
			fmt.Fprintf(w, "- %s: %s\n", p.Name, p.About)
		}
	}
	for _, s := range r.Samples {
		if s.Err != "" && r.missing[s.Peer] == "" {
			fmt.Fprintf(w, "- %s, %s, round %d failed: %s\n", s.Peer, s.Test, s.Round, s.Err)
		}
		for _, n := range s.Notes {
			fmt.Fprintf(w, "- %s, %s, round %d: %s\n", s.Peer, s.Test, s.Round, n)
		}
	}
}

// writeTable writes a Markdown table whose columns are aligned, so that it can be read in a terminal, too.
func writeTable(w *bytes.Buffer, heads []string, rows [][]string) {
	width := make([]int, len(heads))
	for _, row := range append([][]string{heads}, rows...) {
		for i, c := range row {
			width[i] = max(width[i], len([]rune(c)))
		}
	}
	line := func(row []string) {
		for i, c := range row {
			pad := strings.Repeat(" ", width[i]-len([]rune(c)))
			if i == 0 {
				fmt.Fprintf(w, "| %s%s ", c, pad)
			} else {
				fmt.Fprintf(w, "| %s%s ", pad, c)
			}
		}
		w.WriteString("|\n")
	}
	line(heads)
	for i, n := range width {
		if i == 0 {
			fmt.Fprintf(w, "|%s", strings.Repeat("-", n+2))
		} else {
			fmt.Fprintf(w, "|%s:", strings.Repeat("-", n+1))
		}
	}
	w.WriteString("|\n")
	for _, row := range rows {
		line(row)
	}
	w.WriteString("\n")
}
