package lab

import (
	_ "embed"
	"go/ast"
	"go/parser"
	"go/token"
	"strings"
)

//go:embed relays.go
var source string

// Code returns the relay's source, with the comment above it.
func (r *Relay) Code() string {
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, "relays.go", source, parser.ParseComments)
	if err != nil {
		return source
	}
	for _, d := range f.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && fn.Name.Name == r.code {
			return source[fset.Position(fn.Doc.Pos()).Offset:fset.Position(fn.End()).Offset]
		}
	}
	return ""
}

// About returns the comment above the relay's source.
func (r *Relay) About() string {
	var words []string
	for l := range strings.Lines(r.Code()) {
		text, ok := strings.CutPrefix(l, "// ")
		if !ok {
			break
		}
		words = append(words, strings.TrimSpace(text))
	}
	return strings.Join(words, " ")
}

// Body returns the relay's source without the comment above it.
func (r *Relay) Body() string {
	_, body, _ := strings.Cut("\n"+r.Code(), "\nfunc ")
	return "func " + body
}
