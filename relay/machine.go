package relay

// machine is the state of a joined pair: the rules by which an end or an error of one side becomes
// an action on the other. It does no I/O, knows no time and starts nothing. An engine reports
// what happens to its conns and does what it is told; all engines drive this one machine, and so
// behave alike. A machine is not safe for concurrent use.
//
// The direction with source s is way[s]; its destination is s.other().
type machine struct {
	way     [2]way
	mute    [2]bool // the side could not be half-closed: only closing tells it that its peer has ended
	phase   phase
	drain   Side // the side that drains, in phase draining
	first   Side
	end     [2]End
	trouble *trouble // nil while there is none, so that most pairs have no room for it
}

// trouble is the errors of a pair.
type trouble struct {
	failed [2]error // the side's conn is known to be broken: an end that it still reports is no end
	err    [2]error // of the way
}

// failure returns what broke the conn of s, nil if nothing did.
func (m *machine) failure(s Side) error {
	if m.trouble == nil {
		return nil
	}
	return m.trouble.failed[s]
}

// err returns the error that the way from s ended with.
func (m *machine) err(s Side) error {
	if m.trouble == nil {
		return nil
	}
	return m.trouble.err[s]
}

func (m *machine) fail(s Side, err error) {
	m.troubled().failed[s] = err
}

func (m *machine) setErr(s Side, err error) {
	if err != nil || m.trouble != nil {
		m.troubled().err[s] = err
	}
}

func (m *machine) troubled() *trouble {
	if m.trouble == nil {
		m.trouble = new(trouble)
	}
	return m.trouble
}

type way uint8

const (
	flowing way = iota
	ended       // the source's end, and all before it, was passed on
	broken      // bytes were lost, or may have been
)

type phase uint8

const (
	running  phase = iota // bytes flow, or may again
	settling              // the pair is broken, and one direction still delivers what it has
	draining              // no more is written; the send queue of machine.drain empties, then all ends
	over
)

// action is what the engine must do, a set. In one set, the order to do things in is the order of
// the constants.
type action uint16

const (
	stopA  action = 1 << iota // read no more from A; what was read and not yet written is dropped
	stopB                     //
	endA                      // half-close A
	endB                      //
	drainA                    // write no more to A, report drained once its send queue is empty
	drainB                    //
	closeA                    // the pair is over: close A
	closeB                    //
	abortA                    // the pair is over: abort A
	abortB                    //
)

// has reports whether act, given for side A, is asked for side s.
func (a action) has(act action, s Side) bool { return a&(act<<s) != 0 }

// limit says which silence counts at the moment. The engine reports expired once no byte has
// moved for so long and, while running, none waits in a buffer or send queue either.
type limit uint8

const (
	limitIdle limit = iota
	limitHalfOpen
	limitSettle
	limitNone
)

func newMachine() machine { return machine{first: Neither, drain: Neither} }

func (m *machine) limit() limit {
	switch {
	case m.phase == over:
		return limitNone
	case m.phase != running:
		return limitSettle
	case m.way[A] == ended || m.way[B] == ended:
		return limitHalfOpen
	}
	return limitIdle
}

// eof: s has ended, and all that was read from it was passed on.
func (m *machine) eof(s Side) action {
	if m.phase >= draining || m.way[s] != flowing {
		return 0
	}
	if err := m.failure(s); err != nil {
		return m.readErr(s, err)
	}
	m.finish(s, ended, EOF, nil)
	o := s.other()
	switch m.way[o] {
	case ended:
		return m.over()
	case broken: // o's bytes did not reach s; these were the last words of s
		return m.drainTo(o)
	}
	return endA << o
}

// noHalfClose: the half-close of s, asked for by an action, is beyond its conn.
func (m *machine) noHalfClose(s Side) {
	m.mute[s] = true
	m.setErr(s.other(), ErrNoHalfClose)
}

// readErr: reading from s failed, and all that was read before was passed on.
func (m *machine) readErr(s Side, err error) action {
	if m.phase >= draining || m.way[s] != flowing {
		return 0
	}
	o := s.other()
	m.fail(s, err)
	m.finish(s, broken, Read, err)
	act := m.breakInto(s, err)
	if m.failure(o) != nil { // nobody is left to hear it
		return m.over()
	}
	return act | m.drainTo(o)
}

// writeErr: writing what came from s to its peer failed.
func (m *machine) writeErr(s Side, err error) action {
	if m.phase >= draining || m.way[s] != flowing {
		return 0
	}
	m.finish(s, broken, Write, err)
	switch m.way[s.other()] {
	case flowing: // its last words may still come
		m.phase = settling
		return stopA << s
	case ended:
		return stopA<<s | m.drainTo(s)
	}
	return m.over()
}

// connErr: the conn of s failed at a time when nobody read from it or wrote to it.
func (m *machine) connErr(s Side, err error) action {
	if m.phase >= draining || m.failure(s) != nil {
		return 0
	}
	m.fail(s, err)
	o := s.other()
	switch m.way[s] {
	case flowing: // what it sent before can still be read, up to the error
		m.phase = settling
		return m.breakInto(s, err)
	case ended:
		act := m.breakInto(s, err)
		return act | m.drainTo(o)
	}
	m.breakInto(s, err)
	return m.over() // o takes no more bytes, and s gives and takes none
}

// expired: the limit ran out.
func (m *machine) expired() action {
	switch m.phase {
	case over:
		return 0
	case draining:
		return m.over()
	case settling:
		for s := range m.way {
			if s := Side(s); m.way[s] == flowing {
				if err := m.failure(s); err != nil { // its bytes wait, and the other side does not take them
					m.finish(s, broken, Read, err)
					return m.over()
				}
				m.finish(s, broken, Read, m.err(s.other()))
				return stopA<<s | m.drainTo(s.other())
			}
		}
		return m.over()
	}
	end, err := Idle, ErrIdle
	if m.limit() == limitHalfOpen {
		end, err = HalfOpen, ErrHalfOpen
	}
	return m.cut(end, err)
}

// drained: the send queue of the side that was told to drain is empty, or cannot be known.
func (m *machine) drained() action {
	if m.phase != draining {
		return 0
	}
	return m.over()
}

// cancel: the relay must end now.
func (m *machine) cancel(err error) action {
	if m.phase == over {
		return 0
	}
	return m.cut(Canceled, err)
}

// exceeded: bytes came, and the quota is used up.
func (m *machine) exceeded() action {
	if m.phase == over {
		return 0
	}
	return m.cut(Quota, ErrQuota)
}

// cut ends all that has not ended yet. It is nobody's doing: first stays as it is.
func (m *machine) cut(end End, err error) action {
	for s := range m.way {
		if m.way[s] == flowing {
			m.way[s], m.end[s] = broken, end
			m.setErr(Side(s), err)
		}
	}
	return m.over()
}

// finish records the end of the way from s.
func (m *machine) finish(s Side, w way, end End, err error) {
	m.way[s], m.end[s] = w, end
	m.setErr(s, err)
	if m.first == Neither {
		m.first = s
	}
}

// breakInto breaks the way into s, whose conn has failed.
func (m *machine) breakInto(s Side, err error) action {
	o := s.other()
	if m.first == Neither {
		m.first = s
	}
	if m.way[o] != flowing {
		return 0
	}
	m.finish(o, broken, Write, err)
	return stopA << o
}

func (m *machine) drainTo(s Side) action {
	m.phase, m.drain = draining, s
	return drainA << s
}

// over ends the pair. A side is closed cleanly only where that tells it no lie: both directions
// have ended, or the side itself failed after all that was meant for it had been passed on, or
// closing is the only way to tell it of an end. Otherwise it is aborted.
func (m *machine) over() action {
	m.phase = over
	var act action
	for s := range m.way {
		s := Side(s)
		o := s.other()
		switch {
		case m.way[s] == ended && m.way[o] == ended,
			m.way[o] == ended && m.end[s] == Read,
			m.mute[s] && m.end[s] == HalfOpen:
			act |= closeA << s
		default:
			act |= abortA << s
		}
	}
	return act
}
