package lab

import (
	"fmt"
	"html/template"
	"strings"
	"time"

	"github.com/sluice-proxy/sluice/relay/relaytest"
)

// A diagram is a picture of a finding: three lines from top to bottom, for the client, the relay and
// the origin, and an arrow for each event. Its colours are classes that the page defines.
type diagram struct {
	b strings.Builder
	y int
	t time.Duration
}

// The diagram's measures.
const (
	clientX, relayX, originX = 170, 385, 600
	diagramWidth             = 700
	rowHeight                = 30
	mostRows                 = 22
)

// Diagram draws the events as SVG.
func (f *Finding) Diagram() template.HTML {
	d := &diagram{y: 46}
	events := f.Events
	skipped := 0
	if len(events) > mostRows {
		skipped = len(events) - mostRows
	}
	for i := 0; i < len(events); i++ {
		if skipped > 0 && i == mostRows/2 {
			d.gap(fmt.Sprintf("%d more", skipped))
			i += skipped
			d.t = events[i].At
		}
		e := events[i]
		if wait := e.At - d.t; wait > 50*time.Millisecond {
			d.gap(fmt.Sprintf("%d ms later", wait.Milliseconds()))
		}
		d.t = e.At
		if i+1 < len(events) && passesThrough(e, events[i+1]) {
			d.through(e)
			i++
			continue
		}
		d.event(e)
	}
	return d.svg(f)
}

// passesThrough says whether b is what the other end saw of a, and just that.
func passesThrough(a, b relaytest.Event) bool {
	if a.Origin == b.Origin || a.Conn != b.Conn || b.At-a.At > 20*time.Millisecond {
		return false
	}
	switch a.Kind {
	case relaytest.Sent:
		return b.Kind == relaytest.Received && a.Bytes == b.Bytes
	case relaytest.HalfClosed, relaytest.Closed:
		return b.Kind == relaytest.SawEnd
	case relaytest.WasReset:
		return b.Kind == relaytest.SawReset
	}
	return false
}

func (d *diagram) svg(f *Finding) template.HTML {
	var s strings.Builder
	height := d.y + 10
	fmt.Fprintf(&s, `<svg viewBox="0 0 %d %d" width="%d" role="img" aria-label="%s">`,
		diagramWidth, height, diagramWidth, template.HTMLEscapeString("Sequence of events in "+f.Scenario.Name))
	for _, l := range []struct {
		x    int
		name string
	}{{clientX, "client"}, {relayX, f.Relay.Name}, {originX, "origin"}} {
		fmt.Fprintf(&s, `<text class="head" x="%d" y="16">%s</text>`, l.x, template.HTMLEscapeString(l.name))
	}
	fmt.Fprintf(&s, `<path class="life" d="M%d 24V%dM%d 24V%d"/>`, clientX, height, originX, height)
	fmt.Fprintf(&s, `<rect class="relay" x="%d" y="24" width="10" height="%d" rx="3"/>`, relayX-5, height-24)
	s.WriteString(d.b.String())
	s.WriteString("</svg>")
	return template.HTML(s.String())
}

func (d *diagram) next() int {
	y := d.y
	d.y += rowHeight
	return y
}

func (d *diagram) time(y int) {
	fmt.Fprintf(&d.b, `<text class="time" x="84" y="%d">%.1f ms</text>`, y+4, float64(d.t)/float64(time.Millisecond))
}

// gap is a stretch of time in which nothing happens.
func (d *diagram) gap(text string) {
	y := d.next()
	for _, x := range []int{clientX, originX} {
		fmt.Fprintf(&d.b, `<path class="gap" d="M%d %dV%d"/>`, x, y-12, y+8)
	}
	fmt.Fprintf(&d.b, `<text class="wait" x="84" y="%d">%s</text>`, y+2, text)
}

func (d *diagram) arrow(class string, from, to, y int) {
	tip, back := to, 7
	if from < to {
		tip, back = to-1, -7
	} else {
		tip = to + 1
	}
	fmt.Fprintf(&d.b, `<g class="%s"><path d="M%d %dH%d"/><path class="tip" d="M%d %dl%d -4v8z"/></g>`, class, from, y, tip, tip, y, back)
}

func (d *diagram) label(class string, x, y int, text string) {
	fmt.Fprintf(&d.b, `<text class="label %s" x="%d" y="%d">%s</text>`, class, x, y-5, template.HTMLEscapeString(text))
}

const leftX, rightX = (clientX + relayX) / 2, (relayX + originX) / 2

// through is what one end did and the other saw.
func (d *diagram) through(e relaytest.Event) {
	y := d.next()
	d.time(y)
	class, text := look(e)
	if e.Origin {
		d.arrow(class, originX, relayX+5, y)
		d.arrow(class, relayX-5, clientX, y)
		d.label(class, rightX, y, text)
		return
	}
	d.arrow(class, clientX, relayX-5, y)
	d.arrow(class, relayX+5, originX, y)
	d.label(class, leftX, y, text)
}

func (d *diagram) event(e relaytest.Event) {
	y := d.next()
	d.time(y)
	class, text := look(e)
	end, side, middle := clientX, relayX-5, leftX
	if e.Origin {
		end, side, middle = originX, relayX+5, rightX
	}
	switch {
	case e.Kind == relaytest.SawNothing, e.Kind == relaytest.Vanished:
		fmt.Fprintf(&d.b, `<path class="cross" d="M%d %dl8 8m0 -8l-8 8"/>`, end-4, y-4)
	case e.Kind.Seen():
		d.arrow(class, side, end, y)
	default:
		d.arrow(class, end, side, y)
	}
	d.label(class, middle, y, text)
}

// look returns the class and the label of an event.
func look(e relaytest.Event) (class, text string) {
	switch e.Kind {
	case relaytest.Sent, relaytest.Received:
		class, text = "bytes", size(e.Bytes)
		if e.Note != "" {
			text += ", " + e.Note
		}
	case relaytest.HalfClosed:
		class, text = "fin", "half-closes (FIN)"
	case relaytest.Closed:
		class, text = "fin", "closes (FIN)"
	case relaytest.SawEnd:
		class, text = "fin", "sees the end (FIN)"
	case relaytest.WasReset:
		class, text = "rst", "resets (RST)"
	case relaytest.SawReset:
		class, text = "rst", "sees a reset"
		if strings.Contains(e.Note, "pipe") {
			text = "cannot write: " + e.Note
		}
	case relaytest.SawNothing:
		class, text = "bad", "waits in vain"
	case relaytest.Vanished:
		class, text = "bad", "vanishes"
	}
	if e.Conn > 0 {
		text += fmt.Sprintf(" · connection %d", e.Conn+1)
	}
	return class, text
}
