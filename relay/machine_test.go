package relay

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

var errTest = errors.New("test")

// step is an event and what the machine must ask for on it.
type step struct {
	event func(m *machine, s Side) action
	side  Side
	want  action
}

func sEOF(m *machine, s Side) action     { return m.eof(s) }
func sRead(m *machine, s Side) action    { return m.readErr(s, errTest) }
func sWrite(m *machine, s Side) action   { return m.writeErr(s, errTest) }
func sConn(m *machine, s Side) action    { return m.connErr(s, errTest) }
func sExpired(m *machine, _ Side) action { return m.expired() }
func sDrained(m *machine, _ Side) action { return m.drained() }
func sCancel(m *machine, _ Side) action  { return m.cancel(errTest) }
func sMute(m *machine, s Side) action    { m.noHalfClose(s); return 0 }

// mirror exchanges A and B.
func (a action) mirror() action { return a&0x155<<1 | a&0x2aa>>1 }

func (s Side) mirror() Side {
	if s == Neither {
		return s
	}
	return s.other()
}

// TestMachine plays every rule from both sides.
func TestMachine(t *testing.T) {
	tests := []struct {
		name  string
		steps []step
		aToB  End
		bToA  End
		first Side
		last  limit // the limit in force after all steps but the last
	}{
		{"both end", []step{{sEOF, A, endB}, {sEOF, B, closeA | closeB}}, EOF, EOF, A, limitHalfOpen},
		{"reset while both flow: the rest drains, then the peer is reset",
			[]step{{sRead, A, stopB | drainB}, {sDrained, A, abortA | abortB}}, Read, Write, A, limitSettle},
		{"reset behind data that the peer does not take",
			[]step{{sRead, A, stopB | drainB}, {sExpired, A, abortA | abortB}}, Read, Write, A, limitSettle},
		{"reset after the other side has ended: A got all that was meant for it",
			[]step{{sEOF, B, endA}, {sRead, A, drainB}, {sDrained, A, closeA | abortB}}, Read, EOF, B, limitSettle},
		{"reset after its own end",
			[]step{{sEOF, A, endB}, {sConn, A, stopB | drainB}, {sDrained, A, abortA | abortB}}, EOF, Write, A, limitSettle},
		{"write error: the last words come, then the sender is reset",
			[]step{{sWrite, A, stopA}, {sEOF, B, drainA}, {sDrained, A, abortA | abortB}}, Write, EOF, A, limitSettle},
		{"write error, last words that end in the reset",
			[]step{{sWrite, A, stopA}, {sRead, B, drainA}, {sDrained, A, abortA | abortB}}, Write, Read, A, limitSettle},
		{"write error, and silence",
			[]step{{sWrite, A, stopA}, {sExpired, A, stopB | drainA}, {sDrained, A, abortA | abortB}}, Write, Read, A, limitSettle},
		{"write error after the destination's end",
			[]step{{sEOF, B, endA}, {sWrite, A, stopA | drainA}, {sDrained, A, abortA | abortB}}, Write, EOF, B, limitSettle},
		{"nobody takes anything", []step{{sWrite, A, stopA}, {sWrite, B, abortA | abortB}}, Write, Write, A, limitSettle},
		{"failure seen before the read that finds it: its bytes still go on",
			[]step{{sConn, A, stopB}, {sRead, A, drainB}, {sDrained, A, abortA | abortB}}, Read, Write, A, limitSettle},
		{"a failed side's end is no end: the error was told elsewhere",
			[]step{{sConn, A, stopB}, {sEOF, A, drainB}, {sDrained, A, abortA | abortB}}, Read, Write, A, limitSettle},
		{"failure behind a stalled peer", []step{{sConn, A, stopB}, {sExpired, A, abortA | abortB}}, Read, Write, A, limitSettle},
		{"both fail", []step{{sConn, A, stopB}, {sConn, B, abortA | abortB}}, Write, Write, A, limitSettle},
		{"last words for a side that fails meanwhile",
			[]step{{sWrite, A, stopA}, {sConn, A, abortA | abortB}}, Write, Write, A, limitSettle},
		{"idle", []step{{sExpired, A, abortA | abortB}}, Idle, Idle, Neither, limitIdle},
		{"half-open", []step{{sEOF, A, endB}, {sExpired, A, abortA | abortB}}, EOF, HalfOpen, A, limitHalfOpen},
		{"half-open towards a side that could not be told",
			[]step{{sEOF, A, endB}, {sMute, B, 0}, {sExpired, A, abortA | closeB}}, EOF, HalfOpen, A, limitHalfOpen},
		{"a side that could not be told ends by itself",
			[]step{{sEOF, A, endB}, {sMute, B, 0}, {sEOF, B, closeA | closeB}}, EOF, EOF, A, limitHalfOpen},
		{"cancelled", []step{{sCancel, A, abortA | abortB}}, Canceled, Canceled, Neither, limitIdle},
		{"cancelled half-open", []step{{sEOF, A, endB}, {sCancel, A, abortA | abortB}}, EOF, Canceled, A, limitHalfOpen},
		{"cancelled while it drains", []step{{sRead, A, stopB | drainB}, {sCancel, A, abortA | abortB}}, Read, Write, A, limitSettle},
		{"what comes after the end changes nothing",
			[]step{{sEOF, A, endB}, {sEOF, B, closeA | closeB}, {sConn, A, 0}, {sRead, B, 0}, {sExpired, A, 0}, {sCancel, A, 0}, {sDrained, A, 0}},
			EOF, EOF, A, limitNone},
		{"an end is told once", []step{{sEOF, A, endB}, {sEOF, A, 0}, {sRead, A, 0}, {sEOF, B, closeA | closeB}}, EOF, EOF, A, limitHalfOpen},
	}
	for _, tt := range tests {
		for _, flip := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/flipped=%v", strings.ReplaceAll(tt.name, " ", "-"), flip), func(t *testing.T) {
				m := newMachine()
				ends, first := [2]End{tt.aToB, tt.bToA}, tt.first
				for i, st := range tt.steps {
					side, want := st.side, st.want
					if flip {
						side, want = side.mirror(), want.mirror()
					}
					if i == len(tt.steps)-1 && m.limit() != tt.last {
						t.Errorf("before step %d: limit %v, want %v", i, m.limit(), tt.last)
					}
					if got := st.event(&m, side); got != want {
						t.Errorf("step %d: actions %v, want %v", i, got, want)
					}
				}
				if flip {
					ends, first = [2]End{ends[B], ends[A]}, first.mirror()
				}
				if m.phase != over {
					t.Error("not over")
				}
				if m.end != ends || m.first != first {
					t.Errorf("ends %v, first %v; want %v, first %v", m.end, m.first, ends, first)
				}
			})
		}
	}
}

func (a action) String() string {
	names := [...]string{"stopA", "stopB", "endA", "endB", "drainA", "drainB", "closeA", "closeB", "abortA", "abortB"}
	var out []string
	for i, n := range names {
		if a&(1<<i) != 0 {
			out = append(out, n)
		}
	}
	return "{" + strings.Join(out, " ") + "}"
}

// model keeps the facts of a pair, and none of the machine's conclusions from them.
type model struct {
	told   [2]bool // the side's clean end, all bytes before it passed on, was reported
	lost   [2]bool // bytes that the side sent were lost
	broken [2]bool // the side's conn has failed
	cut    bool    // a limit or a cancellation has ended the pair
	halves [2]int  // how often the side was half-closed
	closed [2]int  // how often it was closed or aborted
	drains int
	over   bool
}

// FuzzMachine plays any sequence of events, also ones that no engine would report, against what
// must be true of every pair.
func FuzzMachine(f *testing.F) {
	f.Add([]byte{0, 1})
	f.Add([]byte{2, 9})
	f.Add([]byte{4, 1, 9})
	f.Add([]byte{6, 0, 8, 9})
	f.Add([]byte{0, 11, 8})
	f.Fuzz(func(t *testing.T, events []byte) {
		m := newMachine()
		var facts model
		for _, e := range events {
			facts.play(t, &m, e%12)
		}
		for i := 0; !facts.over; i++ { // silence must end every pair, in a few steps
			if i == 4 {
				t.Fatalf("not over after %d expiries: %+v", i, m)
			}
			facts.play(t, &m, 8)
		}
		for s := A; s <= B; s++ {
			if m.end[s] == EOF && !facts.told[s] {
				t.Errorf("%v: EOF without an end", s)
			}
			if m.end[s] != EOF && m.err(s) == nil {
				t.Errorf("%v: %v without an error", s, m.end[s])
			}
		}
	})
}

func (f *model) play(t *testing.T, m *machine, e byte) {
	s := Side(e & 1)
	wasFlowing := m.way[s] == flowing && m.phase < draining
	var act action
	switch e {
	case 0, 1:
		act = m.eof(s)
		if wasFlowing && !f.broken[s] {
			f.told[s] = true
		}
	case 2, 3:
		act = m.readErr(s, errTest)
		if wasFlowing {
			f.broken[s] = true
		}
	case 4, 5:
		act = m.writeErr(s, errTest)
		if wasFlowing {
			f.lost[s] = true
		}
	case 6, 7:
		act = m.connErr(s, errTest)
		if m.phase < draining || act != 0 {
			f.broken[s] = true
		}
	case 8:
		act = m.expired()
		f.cut = f.cut || act&(closeA|closeB|abortA|abortB) != 0
	case 9:
		act = m.drained()
	case 10:
		act = m.cancel(errTest)
		f.cut = f.cut || act != 0
	case 11: // an engine says this only on an order to half-close
		if f.halves[A] > 0 && !f.over {
			m.noHalfClose(A)
		}
	}
	if f.over && act != 0 {
		t.Fatalf("%v after the end", act)
	}
	for s := A; s <= B; s++ {
		o := s.other()
		if act.has(endA, s) {
			f.halves[s]++
			if !f.told[o] || f.broken[s] || f.broken[o] || f.lost[s] {
				t.Fatalf("half-close of %v: %+v", s, f)
			}
		}
		if act.has(drainA, s) {
			if f.drains++; f.drains > 1 {
				t.Fatal("a second drain")
			}
		}
		if act.has(closeA, s) || act.has(abortA, s) {
			f.closed[s]++
			f.over = true
		}
		if act.has(closeA, s) && !(f.told[A] && f.told[B]) {
			if f.lost[s] {
				t.Fatalf("%v lost bytes and was closed as if it had not", s)
			}
			if !f.told[o] {
				t.Fatalf("%v was closed, which says that %v ended", s, o)
			}
		}
		if act.has(abortA, s) && f.told[A] && f.told[B] && !f.lost[A] && !f.lost[B] {
			t.Fatalf("%v was aborted though both ended", s)
		}
		if f.halves[s] > 1 || f.closed[s] > 1 {
			t.Fatalf("twice: %+v", f)
		}
	}
	if f.over != (m.phase == over) || f.over && (f.closed[A] != 1 || f.closed[B] != 1) {
		t.Fatalf("over=%v, phase %v, closed %v", f.over, m.phase, f.closed)
	}
}
