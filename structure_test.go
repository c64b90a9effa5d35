// Package sluice_test holds the module to its structure: which package may import which, and what
// each must say of itself. The files of all platforms are read, not only this one's.
package sluice_test

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/sluice-proxy/sluice"

// layers is the order of the packages, lowest first. A package may import those of lower layers
// only, so packages of one layer know nothing of each other.
var layers = [][]string{
	{"internal/rtnetlink"},
	{"relay", "internal/socks5", "internal/connect", "internal/sockopt", "internal/tundev", "internal/process", "internal/capture"},
	{"relay/relaytest"},
	{"internal/proxy"},
	{"internal/sshlink", "internal/proxytest"},
	{"internal/inbound", "internal/outbound", "internal/route", "internal/netstack", "internal/dns", "internal/enclosure", "internal/admin",
		"internal/conform", "internal/lab"},
	{"internal/config"},
	{"cmd/sluice"},
	{"bench", "test/conform", "test/e2e", "test/noskip", "test/transparent"},
}

// layerOf returns the layer of the package in dir, or -1. What is below a package's directory
// belongs to its layer, unless it is listed itself.
func layerOf(dir string) int {
	for ; dir != "."; dir = path.Dir(dir) {
		for i, l := range layers {
			if slices.Contains(l, dir) {
				return i
			}
		}
	}
	return -1
}

// within says whether dir is parent or below it.
func within(dir, parent string) bool { return dir == parent || strings.HasPrefix(dir, parent+"/") }

func isStd(imp string) bool {
	first, _, _ := strings.Cut(imp, "/")
	return !strings.Contains(first, ".")
}

// forbidden says why a file in the package directory dir may not import imp; "" if it may.
func forbidden(dir, imp string, inTest bool) string {
	own, inModule := strings.CutPrefix(imp, module+"/")
	switch {
	case within(imp, "gvisor.dev/gvisor") && !within(dir, "internal/netstack"):
		return "only internal/netstack may import gVisor"
	case inTest:
		return ""
	case within(dir, "relay") && !isStd(imp) && !within(imp, "golang.org/x/sys") && !within(own, "relay"):
		return "relay may import only the standard library and golang.org/x/sys"
	case (within(dir, "internal/socks5") || within(dir, "internal/connect")) && !isStd(imp):
		return "a wire protocol may import only the standard library"
	case !inModule:
		return ""
	case within(own, "internal/proxytest") && !within(dir, "bench"):
		return "internal/proxytest is for tests"
	case within(dir, own) || within(own, dir): // a package's own subpackages; Go refuses cycles
		return ""
	case layerOf(own) >= layerOf(dir):
		return "imports run from higher layers to lower ones (see layers in structure_test.go)"
	}
	return ""
}

func TestForbidden(t *testing.T) {
	const m = module + "/"
	for _, tt := range []struct {
		dir, imp string
		inTest   bool
		refused  bool
	}{
		{"relay", "net", false, false},
		{"relay", "golang.org/x/sys/unix", false, false},
		{"relay", "golang.org/x/net/proxy", false, true},
		{"relay", "golang.org/x/net/nettest", true, false},
		{"relay", m + "internal/proxy", false, true},
		{"relay", m + "relay/internal/poll", false, false},
		{"relay/relaytest", m + "relay", false, false},
		{"relay/relaytest", m + "internal/proxytest", false, true},
		{"internal/socks5", m + "relay", false, true},
		{"internal/proxy", m + "relay", false, false},
		{"internal/proxy", m + "internal/inbound", false, true},
		{"internal/inbound", m + "internal/proxy", false, false},
		{"internal/inbound", m + "internal/socks5", false, false},
		{"internal/inbound", m + "internal/outbound", false, true},
		{"internal/outbound", m + "internal/inbound", false, true},
		{"internal/outbound", m + "internal/route", false, true},
		{"internal/route", m + "internal/outbound", false, true},
		{"internal/outbound", m + "internal/proxytest", false, true},
		{"internal/outbound", m + "internal/proxytest", true, false},
		{"internal/config", m + "internal/inbound", false, false},
		{"internal/config", m + "cmd/sluice", false, true},
		{"internal/admin", m + "internal/config", false, true},
		{"cmd/sluice", m + "internal/config", false, false},
		{"cmd/sluice", "github.com/spf13/cobra", false, false},
		{"internal/netstack", "gvisor.dev/gvisor/pkg/tcpip", false, false},
		{"internal/tundev", "gvisor.dev/gvisor/pkg/tcpip", false, true},
		{"internal/inbound", "gvisor.dev/gvisor/pkg/tcpip", true, true},
	} {
		if got := forbidden(tt.dir, tt.imp, tt.inTest); (got != "") != tt.refused {
			t.Errorf("%s imports %s (in a test: %v): %q", tt.dir, tt.imp, tt.inTest, got)
		}
	}
}

func TestImports(t *testing.T) {
	for _, f := range sources(t) {
		for _, spec := range f.ast.Imports {
			imp, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			if why := forbidden(f.dir, imp, f.isTest); why != "" {
				t.Errorf("%s imports %s: %s", f.name, imp, why)
			}
		}
	}
}

func TestEveryPackageHasItsLayer(t *testing.T) {
	for _, f := range sources(t) {
		if f.dir != "." && layerOf(f.dir) < 0 {
			t.Errorf("%s: package %s has no layer: give it one in structure_test.go", f.name, f.dir)
		}
	}
}

func TestEveryPackageHasOneDocComment(t *testing.T) {
	docs := make(map[string][]string)
	for _, f := range sources(t) {
		switch {
		case f.isTest && f.dir != ".":
		case f.ast.Doc != nil:
			docs[f.dir] = append(docs[f.dir], f.name)
		case docs[f.dir] == nil:
			docs[f.dir] = []string{}
		}
	}
	for dir, files := range docs {
		switch {
		case len(files) == 0:
			t.Errorf("package %s has no doc comment", dir)
		case len(files) > 1:
			t.Errorf("package %s has more than one doc comment: %s", dir, strings.Join(files, ", "))
		}
	}
}

func TestEveryExportedNameHasADocComment(t *testing.T) {
	for _, f := range sources(t) {
		if f.isTest || f.ast.Name.Name == "main" {
			continue
		}
		for _, name := range undocumented(f.ast) {
			t.Errorf("%s: %s has no doc comment", f.name, name)
		}
	}
}

// undocumented returns the exported names of f, at top level, that no comment describes. One comment
// may describe a group. String, Error and the like of exported types are names like any other.
func undocumented(f *ast.File) (names []string) {
	for _, d := range f.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			if d.Doc == nil && d.Name.IsExported() && (d.Recv == nil || ast.IsExported(receiver(d))) {
				names = append(names, d.Name.Name)
			}
		case *ast.GenDecl:
			if d.Doc != nil {
				continue
			}
			for _, s := range d.Specs {
				switch s := s.(type) {
				case *ast.TypeSpec:
					if s.Doc == nil && s.Name.IsExported() {
						names = append(names, s.Name.Name)
					}
				case *ast.ValueSpec:
					for _, n := range s.Names {
						if s.Doc == nil && s.Comment == nil && n.IsExported() {
							names = append(names, n.Name)
						}
					}
				}
			}
		}
	}
	return names
}

// receiver returns the name of a method's type.
func receiver(d *ast.FuncDecl) string {
	typ := d.Recv.List[0].Type
	for {
		switch t := typ.(type) {
		case *ast.StarExpr:
			typ = t.X
		case *ast.IndexExpr:
			typ = t.X
		case *ast.IndexListExpr:
			typ = t.X
		case *ast.Ident:
			return t.Name
		default:
			return ""
		}
	}
}

func TestUndocumented(t *testing.T) {
	const src = `package p
type A struct{}
func (A) M() {}
func (a *b) M() {}
func f() {}
// G is documented.
func G() {}
// These are, too.
const ( C = 1; D = 2 )
var E, g int
var F int // so is this
`
	f, err := parser.ParseFile(token.NewFileSet(), "p.go", src, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	if got := undocumented(f); !slices.Equal(got, []string{"A", "M", "E"}) {
		t.Errorf("undocumented: %v", got)
	}
}

func TestNoInitFunctions(t *testing.T) {
	for _, f := range sources(t) {
		for _, d := range f.ast.Decls {
			if d, ok := d.(*ast.FuncDecl); ok && !f.isTest && d.Recv == nil && d.Name.Name == "init" {
				t.Errorf("%s: func init: wire it where it is used", f.name)
			}
		}
	}
}

func TestPackagesAreNouns(t *testing.T) {
	for _, f := range sources(t) {
		name := strings.TrimSuffix(f.ast.Name.Name, "_test")
		if slices.Contains([]string{"util", "utils", "common", "helper", "helpers", "misc", "shared", "base"}, name) {
			t.Errorf("%s: package %s: name it for what it is about", f.name, name)
		}
	}
}

func TestFilesAreShort(t *testing.T) {
	const most = 700
	for _, f := range sources(t) {
		if f.lines > most {
			t.Errorf("%s has %d lines (%d at most): split it by what it is about", f.name, f.lines, most)
		}
	}
}

type source struct {
	name   string // path below the module's root, with slashes
	dir    string // of the package: "relay", "internal/proxy"
	isTest bool
	lines  int
	ast    *ast.File
}

// sources parses every Go file of the module, for all platforms.
func sources(t *testing.T) (all []source) {
	t.Helper()
	err := filepath.WalkDir(".", func(name string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() && name != "." && (strings.HasPrefix(e.Name(), ".") || e.Name() == "testdata" || e.Name() == "vendor"):
			return filepath.SkipDir
		case e.IsDir() || !strings.HasSuffix(name, ".go"):
			return nil
		}
		src, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, src, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return fmt.Errorf("parse: %w", err)
		}
		name = filepath.ToSlash(name)
		all = append(all, source{
			name: name, dir: path.Dir(name), isTest: strings.HasSuffix(name, "_test.go"),
			lines: bytes.Count(src, []byte("\n")), ast: f,
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 5 {
		t.Fatalf("found only %d Go files: this test does not run in the module's root", len(all))
	}
	return all
}
