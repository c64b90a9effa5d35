package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/sluice-proxy/sluice/relay/relaytest"
)

// page is a page of the documentation.
type page struct {
	name  string // from the module's root
	lines []string
}

// pages returns README.md and docs/*.md.
func pages(t *testing.T) []page {
	names, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(names) == 0 {
		t.Fatal("no pages in docs", err)
	}
	var all []page
	for _, name := range append(names, "../../README.md") {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, page{strings.TrimPrefix(name, "../../"), strings.Split(string(text), "\n")})
	}
	return all
}

// command is a sluice command line of a page.
type command struct {
	page  string
	line  int
	text  string
	args  []string
	whole bool   // it can be run as it stands; otherwise it is named in a sentence, and may lack arguments
	says  string // the complaint that the page shows below it
}

// programName matches what runs sluice.
var programName = regexp.MustCompile(
	`^(\$ )?(sluice|go run (\.|github\.com/sluice-proxy/sluice)/cmd/sluice(@latest)?)( |$)`)

var codeSpan = regexp.MustCompile("`([^`]+)`")

// commands returns the command lines of a page: those in blocks of code and those in its sentences.
func (p page) commands() []command {
	var all []command
	fenced := false
	for i, line := range p.lines {
		if strings.HasPrefix(line, "```") {
			fenced = !fenced
			continue
		}
		texts := []string{line}
		if !fenced {
			texts = nil
			for _, m := range codeSpan.FindAllStringSubmatch(line, -1) {
				texts = append(texts, m[1])
			}
		}
		for _, text := range texts {
			prefix := programName.FindString(text)
			if prefix == "" {
				continue
			}
			c := command{page: p.name, line: i + 1, text: text, args: words(text[len(prefix):]), whole: fenced}
			if fenced && strings.HasPrefix(p.lines[i+1], "sluice: ") {
				c.says = p.lines[i+1]
			}
			all = append(all, c)
		}
	}
	return all
}

// words divides a command line as a shell does, up to a comment, a redirection or the next command. There
// is no more of the shell in it than pages need.
func words(line string) []string {
	var all []string
	var word []byte
	in, quote := false, byte(0)
	for i := 0; i < len(line); i++ {
		c := line[i]
		switch {
		case quote != 0 && c == quote:
			quote = 0
		case quote != 0:
			word = append(word, c)
		case c == '\'' || c == '"':
			in, quote = true, c
		case strings.IndexByte("><|&;", c) >= 0 || c == '#' && !in:
			line = line[:i]
		case c == ' ':
			if in {
				all, word, in = append(all, string(word)), nil, false
			}
		default:
			in, word = true, append(word, c)
		}
	}
	if in {
		all = append(all, string(word))
	}
	return all
}

func TestWords(t *testing.T) {
	for line, want := range map[string][]string{
		"":                        nil,
		"a  b":                    {"a", "b"},
		"a 'b c?x=y#z' d # e":     {"a", "b c?x=y#z", "d"},
		"a --print-config >f.yml": {"a", "--print-config"},
		`a "" b`:                  {"a", "", "b"},
		"a#b | c":                 {"a#b"},
	} {
		if got := words(line); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", line, got, want)
		}
	}
}

// TestDocsCommands: every command line in the pages is one that the program takes. Those that serve one
// inbound are run up to their configuration; complaints that a page shows are the program's own.
func TestDocsCommands(t *testing.T) {
	seen := 0
	for _, p := range pages(t) {
		for _, c := range p.commands() {
			seen++
			if why := c.check(); why != "" {
				t.Errorf("%s:%d: %s: %s", c.page, c.line, c.text, why)
			}
		}
	}
	if seen < 20 {
		t.Errorf("found %d command lines only", seen)
	}
}

// check says what is wrong with c, or "".
func (c command) check() string {
	root := (&program{}).rootCommand()
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	cmd, rest, err := root.Find(c.args)
	if err != nil {
		return err.Error()
	}
	cmd.InitDefaultHelpFlag()
	if err := cmd.ParseFlags(rest); err != nil && c.says == "" {
		return err.Error()
	}
	args := cmd.Flags().Args()
	switch {
	case !c.whole && (cmd.HasParent() || len(args) == 0):
		return "" // the name of a command, which is there
	case c.says == "":
		if err := cmd.ValidateArgs(args); err != nil {
			return err.Error()
		}
	}
	if cmd.Flags().Lookup("print-config") == nil {
		return ""
	}
	var out, complaint bytes.Buffer
	code := run(context.Background(), append(slices.Clone(c.args), "--print-config"), nil, &out, &complaint, noEnv)
	said, _, _ := strings.Cut(complaint.String(), "\n")
	switch {
	case said != c.says:
		return "the program says: " + said
	case (code == exitOK) != (c.says == ""):
		return "ends with the wrong code"
	}
	return ""
}

var link = regexp.MustCompile(`(?:\]\(|^\[[^\]]+\]: )([^)\s]+)`)

// TestDocsLinks: every relative link in the pages leads to a file, and to a heading where it names one.
func TestDocsLinks(t *testing.T) {
	all := pages(t)
	headings := make(map[string][]string)
	for _, p := range all {
		headings[filepath.Clean(p.name)] = p.headings()
	}
	for _, p := range all {
		for i, line := range p.lines {
			for _, m := range link.FindAllStringSubmatch(line, -1) {
				if strings.Contains(m[1], "://") {
					continue
				}
				file, anchor, _ := strings.Cut(m[1], "#")
				target := filepath.Clean(p.name)
				if file != "" {
					target = filepath.Join(filepath.Dir(p.name), file)
				}
				if _, err := os.Stat(filepath.Join("../..", target)); err != nil {
					t.Errorf("%s:%d: %s leads nowhere", p.name, i+1, m[1])
				} else if anchor != "" && !slices.Contains(headings[target], anchor) {
					t.Errorf("%s:%d: %s has no heading %s", p.name, i+1, target, anchor)
				}
			}
		}
	}
}

var anchorID = regexp.MustCompile(`<a id="([^"]+)">`)

// headings returns the anchors of the page's headings, and those that it sets itself.
func (p page) headings() []string {
	var all []string
	for _, line := range p.lines {
		for _, m := range anchorID.FindAllStringSubmatch(line, -1) {
			all = append(all, m[1])
		}
		if title := strings.TrimLeft(line, "#"); title != line && strings.HasPrefix(title, " ") {
			all = append(all, notInAnchor.ReplaceAllString(strings.ReplaceAll(strings.ToLower(title[1:]), " ", "-"), ""))
		}
	}
	return all
}

var notInAnchor = regexp.MustCompile(`[^a-z0-9_-]`)

// TestDocsScenarios: the names in every table column called scenario, and all names of the form
// NAME/from-client and NAME/from-origin, are those of scenarios. A name without its form stands for both.
func TestDocsScenarios(t *testing.T) {
	known := make(map[string]bool)
	for _, s := range relaytest.Scenarios() {
		base, _, _ := strings.Cut(s.Name, "/")
		known[s.Name], known[base] = true, true
	}
	seen := 0
	for _, p := range pages(t) {
		column := -1
		for i, line := range p.lines {
			cells := strings.Split(strings.Trim(line, "| "), "|")
			for j := range cells {
				cells[j] = strings.TrimSpace(cells[j])
			}
			switch {
			case !strings.HasPrefix(line, "|"):
				column = -1
			case slices.Contains(cells, "scenario"):
				column = slices.Index(cells, "scenario")
			}
			for _, m := range codeSpan.FindAllStringSubmatch(line, -1) {
				name := m[1]
				inColumn := column >= 0 && column < len(cells) && strings.Contains(cells[column], "`"+name+"`")
				if !inColumn && !strings.HasSuffix(name, "/from-client") && !strings.HasSuffix(name, "/from-origin") {
					continue
				}
				seen++
				if !known[name] {
					t.Errorf("%s:%d: there is no scenario %s", p.name, i+1, name)
				}
			}
		}
	}
	if seen < 10 {
		t.Errorf("found %d scenarios only", seen)
	}
}
