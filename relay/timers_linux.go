package relay

// timer is one deadline of a loop; its owner embeds it.
type timer struct {
	deadline int64 // as clock tells it
	place    int32 // in the heap, from 1; 0: not in it
}

// timed is what a loop calls back when a deadline has passed.
type timed interface {
	at() *timer
	// timeUp runs on the loop's goroutine. It sets the timer anew, or takes it out.
	timeUp(l *loop)
}

// timers is a heap of deadlines.
type timers []timed

func (t timers) next() (deadline int64, ok bool) {
	if len(t) == 0 {
		return 0, false
	}
	return t[0].at().deadline, true
}

// due returns the first whose deadline has passed. It stays in the heap.
func (t timers) due(now int64) (timed, bool) {
	if len(t) == 0 || t[0].at().deadline > now {
		return nil, false
	}
	return t[0], true
}

// set moves x to a deadline, and enters it where it is not in the heap.
func (t *timers) set(x timed, deadline int64) {
	w := x.at()
	w.deadline = deadline
	if w.place == 0 {
		*t = append(*t, x)
		w.place = int32(len(*t))
	}
	i := int(w.place) - 1
	if !t.up(i) {
		t.down(i)
	}
}

// remove takes x out, if it is in.
func (t *timers) remove(x timed) {
	w := x.at()
	if w.place == 0 {
		return
	}
	i, last := int(w.place)-1, len(*t)-1
	t.swap(i, last)
	(*t)[last] = nil
	*t = (*t)[:last]
	w.place = 0
	if i < last && !t.up(i) {
		t.down(i)
	}
}

func (t timers) swap(i, j int) {
	t[i], t[j] = t[j], t[i]
	t[i].at().place, t[j].at().place = int32(i+1), int32(j+1)
}

func (t timers) less(i, j int) bool { return t[i].at().deadline < t[j].at().deadline }

func (t timers) up(i int) (moved bool) {
	for i > 0 {
		parent := (i - 1) / 2
		if !t.less(i, parent) {
			break
		}
		t.swap(i, parent)
		i, moved = parent, true
	}
	return moved
}

func (t timers) down(i int) {
	for {
		child := 2*i + 1
		if child >= len(t) {
			return
		}
		if child+1 < len(t) && t.less(child+1, child) {
			child++
		}
		if !t.less(child, i) {
			return
		}
		t.swap(i, child)
		i = child
	}
}
