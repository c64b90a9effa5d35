package config

import (
	"fmt"
	"reflect"
	"slices"
	"time"

	"github.com/sluice-proxy/sluice/internal/outbound"
	"github.com/sluice-proxy/sluice/internal/process"
	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/route"
)

// maxList bounds a list of destinations: some million lines.
const maxList = 64 << 20

// minInterval bounds how often members of a group are checked.
const minInterval = Duration(100 * time.Millisecond)

// Rule sends the flows that it matches by Via. All conditions that are given must hold; one with several values
// holds for any of them.
type Rule struct {
	To       []Target  `yaml:"to"`       // the destination: names and networks
	ToFile   string    `yaml:"to-file"`  // a file with more of them
	Port     []Ports   `yaml:"port"`     // the destination's port
	Protocol string    `yaml:"protocol"` // one of RuleProtocols
	Inbound  []string  `yaml:"inbound"`  // names of inbounds
	User     []string  `yaml:"user"`     // who the client has proved to be
	From     []Prefix  `yaml:"from"`     // the client's address
	Process  []Process `yaml:"process"`  // the client's program, on this machine
	Via      []string  `yaml:"via"`      // names of outbounds or URLs, first hop first
}

// Target is a destination in a rule, in the words of [route.Targets].
type Target string

// UnmarshalText reads a name or a network.
func (t *Target) UnmarshalText(text []byte) error {
	*t = Target(text)
	return new(route.Targets).Add(string(text))
}

// Ports is a port or a range of ports, in the words of [route.ParsePorts].
type Ports string

// UnmarshalText reads ports.
func (p *Ports) UnmarshalText(text []byte) error {
	*p = Ports(text)
	_, err := route.ParsePorts(string(text))
	return err
}

// Process is one or more processes, in the words of [route.ParseProcesses].
type Process string

// UnmarshalText reads processes.
func (p *Process) UnmarshalText(text []byte) error {
	*p = Process(text)
	_, err := route.ParseProcesses(string(text))
	return err
}

func (c *Config) fillRules(l *errorList, outboundsSound bool) {
	sound := len(l.errs) == 0 // otherwise a rule may lack what it says
	var names []string
	for i := range c.Inbounds {
		names = append(names, c.Inbounds[i].Name)
	}
	all := -1 // the first rule that matches every flow
	for i := range c.Rules {
		r, path := &c.Rules[i], fmt.Sprintf("rules[%d]", i)
		if len(r.Via) == 0 && !l.src.has(path+".via") {
			l.add(path+".via", "missing: where such flows go (as in [direct], [reject], or the name of an outbound)")
		}
		if c.checkVia(l, path+".via", r.Via) && outboundsSound {
			if _, err := c.chain(r.Via); err != nil {
				l.add(path+".via", "%w", err)
			}
		}
		if r.Protocol != "" {
			oneOf(l, path+".protocol", r.Protocol, RuleProtocols)
		}
		for j, name := range r.Inbound {
			at := fmt.Sprintf("%s.inbound[%d]", path, j)
			switch k := slices.Index(names, name); {
			case name == "":
			case k < 0:
				l.add(at, "no inbound is called %s%s", name, didYouMean(name, names))
			case isFar(c.Inbounds[k].Type):
				l.add(at, "%s is of type %s, which goes to one destination from here", name, c.Inbounds[k].Type)
			}
		}
		if len(r.Process) > 0 && !process.Supported {
			l.add(path+".process", "this system does not tell the processes of clients")
		}
		switch same := c.sameRule(i); {
		case all >= 0:
			l.add(path, "is never reached: rules[%d] matches every flow", all)
		case sound && same >= 0:
			l.add(path, "is never reached: rules[%d] has the same conditions", same)
		case r.isEmpty(l.src, path):
			all = i
		}
	}
}

// isEmpty says whether the rule at path has no condition, not even one that is wrong.
func (r *Rule) isEmpty(src *source, path string) bool {
	v := reflect.ValueOf(r).Elem()
	for _, key := range keysOf(v.Type()) {
		if f, _ := fieldOf(v, key); key != "via" && (!f.IsZero() || src.has(path+"."+key)) {
			return false
		}
	}
	return true
}

// sameRule returns the first rule before the one at i that has the same conditions, or -1.
func (c *Config) sameRule(i int) int {
	r := c.Rules[i]
	return slices.IndexFunc(c.Rules[:i], func(other Rule) bool {
		other.Via = r.Via
		return reflect.DeepEqual(other, r)
	})
}

func (c *Config) fillGroup(l *errorList, o *Outbound, path string) {
	setDefault(&o.Policy, GroupPolicies[0])
	setDefault(&o.Interval, DefaultCheckInterval)
	oneOf(l, path+".policy", o.Policy, GroupPolicies)
	c.checkVia(l, path+".members", o.Members)
	checked := o.Check != Dst{}
	if !checked && o.Policy == "least-latency" && !l.src.has(path+".check") {
		l.add(path+".policy", "least-latency needs check: a host:port to which the members' latency is measured")
	}
	if !checked && o.Keep {
		l.add(path+".keep", "is of no use without check")
	}
	if checked && o.Check.Network != "tcp" {
		l.add(path+".check", "%v cannot be connected to through every member: give host:port", o.Check)
	}
	if o.Interval < minInterval {
		l.add(path+".interval", "%v is too short: %v at least", o.Interval, minInterval)
	}
}

// buildRules makes the rules, for all inbounds.
func (b *builder) buildRules() {
	asked, needsPID := false, false
	for i := range b.c.Rules {
		r, path := &b.c.Rules[i], fmt.Sprintf("rules[%d]", i)
		way := b.route(r.Via, path+".via")
		rule := route.Rule{
			To: b.targets(r, path), Network: r.Protocol, Inbounds: r.Inbound, Users: r.User,
			Name: way.Name, Dialer: way.Dialer,
		}
		if len(r.From) > 0 {
			rule.From = route.Networks(prefixes(r.From))
		}
		for _, s := range r.Port { // Fill has read them, and so the processes
			p, _ := route.ParsePorts(string(s))
			rule.Ports = append(rule.Ports, p)
		}
		for _, s := range r.Process {
			p, _ := route.ParseProcesses(string(s))
			rule.Processes = append(rule.Processes, p)
			asked, needsPID = true, needsPID || p.NeedsPID()
		}
		b.rules = append(b.rules, rule)
	}
	if asked {
		b.owners = &process.Table{UserOnly: !needsPID}
	}
}

// targets returns the destinations of a rule, or nil where it does not ask for them.
func (b *builder) targets(r *Rule, path string) *route.Targets {
	if len(r.To) == 0 && r.ToFile == "" {
		return nil
	}
	set := new(route.Targets)
	for i, to := range r.To {
		if err := set.Add(string(to)); err != nil { // of flags: Load has read those of a file
			b.errs.add(fmt.Sprintf("%s.to[%d]", path, i), "%w", err)
		}
	}
	if r.ToFile == "" {
		return set
	}
	place := b.secrets.path(r.ToFile)
	list, _, err := readUpTo(place, maxList)
	errs := []error{err}
	if err == nil {
		errs = set.AddList(place, list)
	}
	for _, err := range errs {
		b.errs.add(path+".to-file", "%w", err)
	}
	return set
}

func group(b *builder, o *Outbound, _ proxy.Dialer) (proxy.Dialer, error) {
	g := &outbound.Group{
		Name: o.Name, Check: proxy.Addr(o.Check), Interval: o.Interval.Wait(), Keep: o.Keep, Log: b.log,
		Policy: map[string]outbound.Policy{
			"round-robin": outbound.RoundRobin, "least-latency": outbound.LeastLatency,
		}[o.Policy],
	}
	for i, m := range o.Members {
		way, err := b.member(m)
		if err != nil {
			return nil, fmt.Errorf("members[%d]: %w", i, err)
		}
		g.Members = append(g.Members, outbound.Member{Name: m, Dialer: way.Dialer})
	}
	b.kept = append(b.kept, g)
	return g, nil
}

// Explain says which rule and which way out a flow of b takes: a line for people. The client's process is not known
// here, so rules that ask for it are passed over.
func (c *Config) Explain(b *Bound, f proxy.Flow) string {
	f.Inbound = b.Name
	name, _ := b.Router.Route(f)
	by := "no rule"
	if r, ok := b.Router.(*route.Router); ok {
		if i := r.Find(f); i >= 0 {
			by = fmt.Sprintf("rules[%d]", i)
			if line := c.src.line(by); line > 0 {
				by += fmt.Sprintf(" (%s:%d)", c.src.file, line)
			}
		}
	}
	return fmt.Sprintf("%s: %v: by %s, via %s", b.Name, f.Dst, by, name)
}
