package lab

import (
	_ "embed"
	"html/template"
	"io"
	"strings"
)

//go:embed page.html
var page string

// WriteHTML writes the table as a web page of one file, with the code of each relay and a diagram of
// each of its failures.
func (t *Table) WriteHTML(w io.Writer) error {
	tmpl, err := template.New("page").Funcs(template.FuncMap{
		"mark": t.mark, "failing": t.failing, "failures": t.Failures, "code": highlight, "inc": func(i int) int { return i + 1 },
		"harms": harms,
	}).Parse(page)
	if err != nil {
		return err
	}
	rows := t.rows()
	return tmpl.Execute(w, map[string]any{"Relays": t.Relays, "Rows": rows, "Count": len(rows)})
}

// harms returns what users of a relay that fails so suffer, each once.
func harms(failures []*Finding) (all []string) {
	seen := make(map[string]bool)
	for _, f := range failures {
		if h := f.Scenario.Harm; !seen[h] {
			seen[h] = true
			all = append(all, h)
		}
	}
	return all
}

// highlight marks comments.
func highlight(code string) template.HTML {
	var b strings.Builder
	for l := range strings.Lines(code) {
		text, comment, ok := strings.Cut(l, "//")
		b.WriteString(template.HTMLEscapeString(text))
		if ok {
			b.WriteString("<i>//" + template.HTMLEscapeString(strings.TrimSuffix(comment, "\n")) + "</i>\n")
		}
	}
	return template.HTML(b.String())
}
