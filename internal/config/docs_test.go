package config

import (
	"reflect"
	"strings"
	"testing"
)

// TestDocsNameEveryKey: docs/config.md has a table row for every key and a section for every type.
func TestDocsNameEveryKey(t *testing.T) {
	docs := read(t, "../../docs/config.md")
	keys := append(keysOf(reflect.TypeFor[Inbound]()), keysOf(reflect.TypeFor[Outbound]())...)
	keys = append(keys, keysOf(reflect.TypeFor[Rule]())...)
	for _, k := range keysOf(reflect.TypeFor[Config]()) {
		if k != "log" {
			keys = append(keys, k)
		}
	}
	for _, k := range keysOf(reflect.TypeFor[Log]()) {
		keys = append(keys, "log."+k)
	}
	for _, k := range keys {
		if !strings.Contains(docs, "\n| `"+k+"` |") && k != "name" && k != "type" {
			t.Errorf("docs/config.md has no row for %s", k)
		}
	}
	for _, typ := range append(InboundTypes(), OutboundTypes()...) {
		if !strings.Contains(docs, "\n### "+typ) && !strings.Contains(docs, ", "+typ+"\n") && !strings.Contains(docs, ", "+typ+", ") {
			t.Errorf("docs/config.md has no section for type %s", typ)
		}
	}
}

// TestDocsExamplesAreGood loads the first example of each page that has one.
func TestDocsExamplesAreGood(t *testing.T) {
	for _, page := range []string{"config.md", "ssh.md", "routing.md"} {
		_, rest, ok := strings.Cut(read(t, "../../docs/"+page), "```yaml\n")
		example, _, closed := strings.Cut(rest, "```")
		if !ok || !closed {
			t.Fatalf("docs/%s has no example", page)
		}
		if _, err := Load("example.yaml", []byte(example)); err != nil {
			t.Errorf("docs/%s: %v", page, err)
		}
	}
}
