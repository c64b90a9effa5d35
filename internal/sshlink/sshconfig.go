package sshlink

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// configReader reads files of the form ssh_config(5) for one host: the first value of a keyword that
// applies to the host is the one that counts. They are evaluated while they are read, as ssh(1) does
// it, because what a Match says may depend on what stands before it.
type configReader struct {
	host, user string
	env        Env
	values     map[string][]value
	order      int
	warnings   []string
}

// value is what a keyword was given, and where.
type value struct {
	text  string
	file  string
	line  int
	order int
}

func (v value) errorf(format string, args ...any) error {
	if v.file == "" {
		return &filesError{fmt.Errorf(format, args...)}
	}
	return &filesError{fmt.Errorf("%s:%d: %w", v.file, v.line, fmt.Errorf(format, args...))}
}

// lists are the keywords that may be given several times, or several values.
var lists = map[string]bool{
	"identityfile": true, "certificatefile": true, "userknownhostsfile": true, "globalknownhostsfile": true,
}

// repeated are those of lists whose values add up.
var repeated = map[string]bool{"identityfile": true, "certificatefile": true}

// checks are the forms of values. Keywords that are not here are passed over: ssh(1) has a hundred,
// most about terminals.
var checks = map[string]func(string) error{
	"hostname": anything, "user": anything, "proxyjump": anything, "proxycommand": anything, "identityfile": anything,
	"certificatefile": anything, "identityagent": anything, "userknownhostsfile": anything,
	"globalknownhostsfile": anything, "hostkeyalias": anything,
	"port":                  isPort,
	"identitiesonly":        isFlag,
	"hashknownhosts":        isFlag,
	"stricthostkeychecking": isStrictness,
	"serveraliveinterval":   isSeconds,
	"serveralivecountmax":   isCount,
	"connecttimeout":        isSeconds,
}

func anything(string) error { return nil }

func isPort(s string) error {
	if n, err := strconv.ParseUint(s, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("port %q is not a number from 1 to 65535", s)
	}
	return nil
}

func isFlag(s string) error {
	if !slices.Contains([]string{"yes", "no", "true", "false"}, strings.ToLower(s)) {
		return fmt.Errorf("%q is neither yes nor no", s)
	}
	return nil
}

func isStrictness(s string) error {
	if !slices.Contains([]string{"yes", "no", "ask", "accept-new", "off"}, strings.ToLower(s)) {
		return fmt.Errorf("%q is not one of yes, ask, accept-new, no", s)
	}
	return nil
}

func isCount(s string) error {
	if n, err := strconv.ParseUint(s, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("%q is not a number from 1 to 65535", s)
	}
	return nil
}

func isSeconds(s string) error {
	if seconds(s) < 0 {
		return fmt.Errorf("%q is not a time (as in 30 or 2m)", s)
	}
	return nil
}

// seconds reads a time of ssh_config: 90, 90s, 2m, 1h30m. It is negative for what is none; none is 0.
func seconds(s string) time.Duration {
	if strings.EqualFold(s, "none") {
		return 0
	}
	if n, err := strconv.ParseUint(s, 10, 31); err == nil {
		return time.Duration(n) * time.Second
	}
	d, err := time.ParseDuration(strings.ToLower(s))
	if err != nil || d < 0 || strings.ContainsAny(s, ".+-") {
		return -1
	}
	return d
}

// read reads the file called name. One that is not there is empty.
func (r *configReader) read(name string) error {
	return r.file(name, true, 0)
}

// maxIncludes is how deep files may include each other, as in ssh(1).
const maxIncludes = 16

func (r *configReader) file(name string, active bool, depth int) error {
	data, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return &filesError{err}
	}
	if len(data) > maxFile {
		return &filesError{fmt.Errorf("%s is larger than %d MiB", name, maxFile>>20)}
	}
	return r.parse(name, string(data), active, depth)
}

// parse evaluates the text of a file. What it includes applies only where active is true, and leaves it
// as it was.
func (r *configReader) parse(name, text string, active bool, depth int) error {
	outer, n := active, 0
	for line := range strings.Lines(text) {
		n++
		at := value{file: name, line: n}
		words, err := split(line)
		if err != nil {
			return at.errorf("%w", err)
		}
		if len(words) == 0 {
			continue
		}
		keyword, args := strings.ToLower(words[0]), words[1:]
		check := checks[keyword]
		switch {
		case keyword != "host" && keyword != "match" && keyword != "include" && check == nil:
			continue
		case len(args) == 0 || args[0] == "" && keyword != "match":
			return at.errorf("%s has no value", words[0])
		}
		switch keyword {
		case "host":
			active = outer && matchList(args, r.host)
		case "match":
			ok, err := r.match(args)
			if err != nil {
				return at.errorf("Match: %w", err)
			}
			active = outer && ok
		case "include":
			for _, pattern := range args {
				if err := r.include(name, pattern, active, depth); err != nil {
					if _, ok := errors.AsType[*filesError](err); ok {
						return err
					}
					return at.errorf("Include %s: %w", pattern, err)
				}
			}
		default:
			if keyword == "proxycommand" {
				args = []string{strings.Join(args, " ")}
			}
			if len(args) > 1 && (!lists[keyword] || repeated[keyword]) {
				return at.errorf("%s has more than one value: quote it if it holds spaces", words[0])
			}
			for _, arg := range args {
				if err := check(arg); err != nil {
					return at.errorf("%s: %w", words[0], err)
				}
			}
			if active {
				r.set(keyword, args, at)
			}
		}
	}
	return nil
}

func (r *configReader) set(keyword string, args []string, at value) {
	if len(r.values[keyword]) > 0 && !repeated[keyword] {
		return // the first one counts
	}
	r.order++
	for _, arg := range args {
		at.text, at.order = arg, r.order
		r.values[keyword] = append(r.values[keyword], at)
	}
}

func (r *configReader) first(keyword string) (value, bool) {
	if v := r.values[keyword]; len(v) > 0 {
		return v[0], true
	}
	return value{}, false
}

func (r *configReader) yes(keyword string) bool {
	v, _ := r.first(keyword)
	return strings.EqualFold(v.text, "yes") || strings.EqualFold(v.text, "true")
}

func (r *configReader) include(from, pattern string, active bool, depth int) error {
	if depth+1 > maxIncludes {
		return errors.New("files include each other too deep")
	}
	switch {
	case strings.HasPrefix(pattern, "~/"):
		pattern = filepath.Join(r.env.Home, pattern[2:])
	case filepath.IsAbs(pattern):
	case strings.HasPrefix(from, "/etc/ssh/"):
		pattern = filepath.Join("/etc/ssh", pattern)
	default:
		pattern = filepath.Join(r.env.Home, ".ssh", pattern)
	}
	files, err := filepath.Glob(pattern)
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := r.file(f, active, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// match evaluates the criteria of a Match. Those that would run programs, or need to know more than a
// link does, are never met, which is said by a warning.
func (r *configReader) match(args []string) (bool, error) {
	ok := true
	for i := 0; i < len(args); i++ {
		criterion := strings.ToLower(args[i])
		not := strings.HasPrefix(criterion, "!")
		criterion = strings.TrimPrefix(criterion, "!")
		if criterion == "all" {
			if len(args) > 1 {
				return false, errors.New("all stands alone")
			}
			return !not, nil
		}
		if criterion == "canonical" || criterion == "final" {
			ok = ok && not // files are read once
			continue
		}
		if i++; i == len(args) {
			return false, fmt.Errorf("%s has no value", args[i-1])
		}
		list := strings.Split(args[i], ",")
		var met bool
		switch criterion {
		case "host":
			host := r.host
			if v, given := r.first("hostname"); given {
				host, _ = expander{env: r.env, host: r.host, alias: r.host}.expand(v, "%h")
			}
			met = matchList(lower(list), strings.ToLower(host))
		case "originalhost":
			met = matchList(lower(list), strings.ToLower(r.host))
		case "localuser":
			met = matchList(list, r.env.User)
		case "user":
			user := r.user
			if v, given := r.first("user"); given && user == "" {
				user = v.text
			}
			if user == "" {
				user = r.env.User
			}
			met = matchList(list, user)
		case "exec", "localnetwork", "tagged", "command", "sessiontype", "version":
			r.warnings = append(r.warnings, "Match "+criterion+" is not supported: what it holds was passed over")
			ok = false
			continue
		default:
			return false, fmt.Errorf("unknown criterion %q", args[i-1])
		}
		ok = ok && met != not
	}
	return ok, nil
}

// matchList says whether s matches one of patterns, and none that begins with !.
func matchList(patterns []string, s string) bool {
	ok := false
	for _, p := range patterns {
		not := strings.HasPrefix(p, "!")
		if matchPattern(strings.TrimPrefix(p, "!"), s) {
			if not {
				return false
			}
			ok = true
		}
	}
	return ok
}

func lower(list []string) []string {
	for i := range list {
		list[i] = strings.ToLower(list[i])
	}
	return list
}

// matchPattern matches s with a pattern in which * is any bytes and ? any one.
func matchPattern(p, s string) bool {
	star, mark := -1, 0
	i, j := 0, 0
	for i < len(s) {
		switch {
		case j < len(p) && p[j] == '*':
			star, mark = j, i
			j++
		case j < len(p) && (p[j] == '?' || p[j] == s[i]):
			i, j = i+1, j+1
		case star >= 0:
			mark++
			i, j = mark, star+1
		default:
			return false
		}
	}
	return strings.Trim(p[j:], "*") == ""
}

// split returns the words of a line: the keyword, with = or space behind it, and its values, which may
// be quoted. A comment begins with # where a word could.
func split(line string) (words []string, err error) {
	const space = " \t\r\n\f"
	rest := strings.Trim(line, space)
	if rest == "" || rest[0] == '#' {
		return nil, nil
	}
	if i := strings.IndexAny(rest, space+"="); i >= 0 {
		words = append(words, rest[:i])
		rest = strings.TrimLeft(rest[i:], space)
		rest = strings.TrimLeft(strings.TrimPrefix(rest, "="), space)
	} else {
		return []string{rest}, nil
	}
	for rest != "" && rest[0] != '#' {
		var word strings.Builder
		var quote byte
		i := 0
		for ; i < len(rest); i++ {
			c := rest[i]
			switch {
			case quote != 0 && c == quote:
				quote = 0
			case quote == 0 && (c == '"' || c == '\''):
				quote = c
			case c == '\\' && i+1 < len(rest) && strings.IndexByte(`"'\`, rest[i+1]) >= 0:
				i++
				word.WriteByte(rest[i])
			case quote == 0 && strings.IndexByte(space, c) >= 0:
				goto end
			default:
				word.WriteByte(c)
			}
		}
	end:
		if quote != 0 {
			return nil, errors.New("a quote is not closed")
		}
		words = append(words, word.String())
		rest = strings.TrimLeft(rest[i:], space)
	}
	return words, nil
}

// expander replaces the tokens in values.
type expander struct {
	env         Env
	host, alias string
	user        string
	port        uint16
}

// path expands ~, ${VARIABLES} and tokens in the name of a file.
func (x expander) path(v value) (string, error) {
	s, err := x.expand(v, "")
	if err == nil && (s == "~" || strings.HasPrefix(s, "~/")) {
		s = filepath.Join(x.env.Home, s[1:])
	}
	return s, err
}

// expand replaces tokens; only, if not empty, lists those that may stand there.
func (x expander) expand(v value, only string) (string, error) {
	var b strings.Builder
	for rest := v.text; ; {
		i := strings.IndexAny(rest, "%$")
		if i < 0 || i+1 == len(rest) {
			b.WriteString(rest)
			return b.String(), nil
		}
		b.WriteString(rest[:i])
		rest = rest[i:]
		if rest[0] == '$' {
			name, after, ok := strings.Cut(strings.TrimPrefix(rest, "${"), "}")
			if rest[1] != '{' || only != "" {
				b.WriteByte('$')
				rest = rest[1:]
				continue
			}
			if !ok {
				return "", v.errorf("${ is not closed")
			}
			text := x.env.get(name)
			if text == "" {
				return "", v.errorf("the environment variable %s is not set", name)
			}
			b.WriteString(text)
			rest = after
			continue
		}
		token := rest[:2]
		if only != "" && token != "%%" && !strings.Contains(only, token) {
			return "", v.errorf("%s cannot stand here", token)
		}
		rest = rest[2:]
		switch token {
		case "%%":
			b.WriteByte('%')
		case "%h":
			b.WriteString(x.host)
		case "%n":
			b.WriteString(x.alias)
		case "%p":
			fmt.Fprint(&b, x.port)
		case "%r":
			b.WriteString(x.user)
		case "%u":
			b.WriteString(x.env.User)
		case "%d":
			b.WriteString(x.env.Home)
		case "%i":
			fmt.Fprint(&b, os.Getuid())
		case "%L", "%l":
			name, _ := os.Hostname()
			if token == "%L" {
				name, _, _ = strings.Cut(name, ".")
			}
			b.WriteString(name)
		default:
			return "", v.errorf("unknown token %s", token)
		}
	}
}
