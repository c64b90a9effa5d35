package config

import (
	"bytes"
	"cmp"
	"encoding"
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// maxFile bounds every file that is read: a configuration or a list of users this large is a mistake.
const maxFile = 1 << 20

// ReadFile loads the file called name.
func ReadFile(name string) (*Config, error) {
	data, _, err := readFile(name)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	return Load(name, data)
}

// Load reads a configuration and fills it. The name is for errors, and relative paths in the
// configuration are relative to its directory. The error joins one [*Error] for each thing that is
// wrong, in the order of the file.
func Load(name string, data []byte) (*Config, error) {
	c := &Config{src: source{file: name, dir: filepath.Dir(name), lines: map[string]int{}}}
	d := decoder{errorList{src: &c.src}}
	root, err := parse(data)
	if err != nil {
		if e, ok := errors.AsType[*Error](err); ok {
			e.File = name
			return nil, e
		}
		e := &Error{File: name, Err: err}
		if y, ok := errors.AsType[yaml.Error](err); ok {
			e.Err = errors.New(y.GetMessage())
			if t := y.GetToken(); t != nil && t.Position != nil {
				e.Line = t.Position.Line
			}
			if ipv6Port.Match(lineIn(data, e.Line)) {
				e.Err = fmt.Errorf(`%w (an IPv6 address needs quotes, as in "[::1]:1080")`, e.Err)
			}
		}
		return nil, e
	}
	if root != nil {
		d.value(root, "", reflect.ValueOf(c).Elem())
	}
	c.fill(&d.errorList)
	if len(d.errs) > 0 {
		return nil, d.join()
	}
	return c, nil
}

// ipv6Port matches an address that YAML takes for the start of a list.
var ipv6Port = regexp.MustCompile(`[:\-]\s+\[[0-9a-fA-F.]*:[0-9a-fA-F:.]*\]:`)

// lineIn returns line n of data, from 1.
func lineIn(data []byte, n int) []byte {
	for line := range bytes.Lines(data) {
		if n--; n == 0 {
			return line
		}
	}
	return nil
}

// join returns the complaints as one error, in the order of their lines.
func (l *errorList) join() error {
	slices.SortStableFunc(l.errs, func(a, b *Error) int { return cmp.Compare(a.Line, b.Line) })
	errs := make([]error, len(l.errs))
	for i, e := range l.errs {
		errs[i] = e
	}
	return errors.Join(errs...)
}

// parse returns the root of the one document in data, or nil if that is empty.
func parse(data []byte) (root ast.Node, err error) {
	defer func() {
		if p := recover(); p != nil { // the parser is not ours, and what it reads is not either
			root, err = nil, fmt.Errorf("not valid YAML (%v)", p)
		}
	}()
	tokens := lexer.Tokenize(string(data))
	if err := checkDepth(tokens); err != nil {
		return nil, err
	}
	file, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey()) // value reports them, with their path
	if err != nil {
		return nil, err
	}
	for _, doc := range file.Docs {
		if doc == nil || doc.Body == nil || doc.Body.Type() == ast.CommentType {
			continue
		}
		if root != nil {
			return nil, errors.New("more than one document (---) in the file")
		}
		root = doc.Body
	}
	return root, nil
}

// maxDepth bounds lists and keys in each other on one line. The parser takes some kilobytes for each, and all of a file may be such.
const maxDepth = 32

// checkDepth says where there is more than that. What stands on lines of its own is indented, which bounds its depth.
func checkDepth(tokens token.Tokens) error {
	flow, entries, line := 0, 0, 0
	for _, t := range tokens {
		if t.Position.Line != line {
			line, entries = t.Position.Line, 0
		}
		switch t.Type {
		case token.SequenceStartType, token.MappingStartType:
			flow++
		case token.SequenceEndType, token.MappingEndType:
			flow--
		case token.SequenceEntryType, token.TagType:
			entries++
		}
		if max(flow, entries) > maxDepth {
			return &Error{Line: line, Err: fmt.Errorf("lists and keys in each other, more than %d deep", maxDepth)}
		}
	}
	return nil
}

// decoder puts YAML nodes into the fields of a Config. The library decodes as well, but stops at the
// first error and does not know the path.
type decoder struct{ errorList }

// value decodes n, which stands at path, into v.
func (d *decoder) value(n ast.Node, path string, v reflect.Value) {
	if !d.src.has(path) {
		d.src.lines[path] = lineOf(n)
	}
	switch n.(type) {
	case *ast.AnchorNode, *ast.AliasNode, *ast.MergeKeyNode, *ast.TagNode:
		d.add(path, "anchors, aliases and tags (& * << !) are not supported: text that begins with one of these needs quotes")
		return
	case *ast.NullNode, nil:
		d.add(path, "has no value: give one or remove the key")
		return
	}
	_, text := v.Addr().Interface().(encoding.TextUnmarshaler)
	switch {
	case !text && v.Kind() == reflect.Struct:
		m, ok := n.(ast.MapNode)
		if !ok {
			d.add(path, "expected keys with values, found %s", kind(n))
			return
		}
		d.mapping(m, path, v)
	case v.Kind() == reflect.Slice:
		s, ok := n.(*ast.SequenceNode)
		switch {
		case !ok:
			hint := ""
			if t, ok := scalar(n); ok {
				hint = " (as in [" + t + "])"
			}
			d.add(path, "expected a list%s, found %s", hint, kind(n))
			return
		case len(s.Values) == 0:
			d.add(path, "the list is empty: give a value or remove the key")
			return
		}
		v.Set(reflect.MakeSlice(v.Type(), len(s.Values), len(s.Values)))
		for i, e := range s.Values {
			d.value(e, fmt.Sprintf("%s[%d]", path, i), v.Index(i))
		}
	default:
		t, ok := scalar(n)
		if !ok {
			d.add(path, "expected one value, found %s", kind(n))
			return
		}
		if err := setText(v, t); err != nil {
			d.add(path, "%w", err)
		}
	}
}

// mapping decodes the keys of m into the fields of the struct v.
func (d *decoder) mapping(m ast.MapNode, path string, v reflect.Value) {
	seen := map[string]int{}
	for it := m.MapRange(); it.Next(); {
		n := it.KeyValue()
		line := n.Key.GetToken().Position.Line
		key, ok := scalar(n.Key)
		at := key
		if path != "" {
			at = path + "." + key
		}
		if !ok || it.Key().IsMergeKey() {
			d.addAt(line, path, "a key must be a plain word")
			continue
		}
		if first, dup := seen[key]; dup {
			d.addAt(line, at, "given twice: first on line %d", first)
			continue
		}
		seen[key] = line
		d.src.lines[at] = line
		f, ok := fieldOf(v, key)
		switch {
		case ok:
			d.value(n.Value, at, f)
		case key == "password" || key == "users":
			d.add(at, "secrets do not stand in the configuration: use %s-file or %[1]s-env", key)
		default:
			d.add(at, "unknown key%s", didYouMean(key, keysOf(v.Type())))
		}
	}
}

// scalar returns the text of a plain or quoted value as it stands in the file, so that 0x1F or 1_000
// do not turn into other numbers.
func scalar(n ast.Node) (string, bool) {
	switch n := n.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.LiteralNode:
		return n.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value, true
	}
	return "", false
}

// kind names what n is.
func kind(n ast.Node) string {
	switch n.(type) {
	case ast.MapNode:
		return "keys with values"
	case *ast.SequenceNode:
		return "a list"
	}
	if t, ok := scalar(n); ok {
		return strconv.Quote(t)
	}
	return "something else"
}

func lineOf(n ast.Node) int {
	if n == nil {
		return 0
	}
	if m, ok := n.(*ast.MappingNode); ok && len(m.Values) > 0 { // its own token may be the first colon
		n = m.Values[0]
	}
	if v, ok := n.(*ast.MappingValueNode); ok {
		n = v.Key
	}
	if t := n.GetToken(); t != nil && t.Position != nil {
		return t.Position.Line
	}
	return 0
}

// setText sets v, a single value, from its text.
func setText(v reflect.Value, text string) error {
	if u, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		if text == "" {
			return errors.New("is empty")
		}
		return u.UnmarshalText([]byte(text))
	}
	switch v.Kind() {
	case reflect.String:
		if text == "" {
			return errors.New("is empty: give a value or remove the key")
		}
		v.SetString(text)
	case reflect.Bool:
		if text != "true" && text != "false" {
			return fmt.Errorf("%q is neither true nor false", text)
		}
		v.SetBool(text == "true")
	case reflect.Int:
		n, err := strconv.ParseInt(text, 0, 32)
		if err != nil {
			return fmt.Errorf("%q is not a whole number", text)
		}
		v.SetInt(n)
	default:
		panic("config: a field of kind " + v.Kind().String()) // a mistake in Config, found by any test
	}
	return nil
}

// fieldOf returns the field of the struct v that key names.
func fieldOf(v reflect.Value, key string) (reflect.Value, bool) {
	for i := range v.NumField() {
		if key != "" && v.Type().Field(i).Tag.Get("yaml") == key {
			return v.Field(i), true
		}
	}
	return reflect.Value{}, false
}

// keysOf returns the keys of a struct, in the order of its fields.
func keysOf(t reflect.Type) []string {
	var keys []string
	for i := range t.NumField() {
		if k := t.Field(i).Tag.Get("yaml"); k != "" {
			keys = append(keys, k)
		}
	}
	return keys
}

// didYouMean returns " (did you mean x?)" for the candidate nearest to word, or the candidates where
// none is near and there are few of them.
func didYouMean(word string, candidates []string) string {
	best, dist := "", (len(word)+2)/3
	for _, c := range candidates {
		if d := distance(word, c); d <= dist && (best == "" || d < dist) {
			best, dist = c, d
		}
	}
	switch {
	case best != "":
		return fmt.Sprintf(" (did you mean %s?)", best)
	case len(candidates) > 0 && len(candidates) <= 10:
		return fmt.Sprintf(" (known: %s)", strings.Join(candidates, ", "))
	}
	return ""
}

// distance returns the number of letters to change, add or remove to make b of a.
func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range a {
		diagonal := row[0]
		row[0] = i + 1
		for j := range b {
			next := diagonal
			if a[i] != b[j] {
				next = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}
