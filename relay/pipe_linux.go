package relay

import "golang.org/x/sys/unix"

// pipe is a kernel pipe that bytes pass through on their way from one socket to another.
type pipe struct {
	r, w int
	size int // what it holds at most
	n    int // what it holds
}

const (
	pipeSize  = 1 << 20 // wanted; less where the kernel's limit for unprivileged users is reached
	pipesKept = 2       // empty pipes that a busy loop keeps for the next direction; an idle one keeps none
	pipesMax  = 64      // pipes that a loop has at a time: a stalled reader keeps one, with what it holds
)

// pipes are the pipes of one loop.
type pipes struct {
	free []*pipe
	made int
}

// get returns an empty pipe, or nil where there is none to be had.
func (ps *pipes) get() *pipe {
	if n := len(ps.free); n > 0 {
		p := ps.free[n-1]
		ps.free = ps.free[:n-1]
		return p
	}
	if ps.made >= pipesMax {
		return nil
	}
	var fd [2]int
	if unix.Pipe2(fd[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		return nil
	}
	p := &pipe{r: fd[0], w: fd[1]}
	for size := pipeSize; size >= minSplicePipe; size /= 4 {
		if n, err := unix.FcntlInt(uintptr(p.w), unix.F_SETPIPE_SZ, size); err == nil {
			p.size = n
			break
		}
	}
	if p.size < minSplicePipe { // too small to be worth two system calls
		p.close()
		return nil
	}
	ps.made++
	return p
}

// put takes a pipe back. One that still holds bytes cannot be used again.
func (ps *pipes) put(p *pipe) {
	if p.n == 0 && len(ps.free) < pipesKept {
		ps.free = append(ps.free, p)
		return
	}
	p.close()
	ps.made--
}

// trim closes the pipes that are not in use.
func (ps *pipes) trim() {
	for _, p := range ps.free {
		p.close()
	}
	ps.made -= len(ps.free)
	ps.free = ps.free[:0]
}

func (p *pipe) close() {
	rawClose(p.r)
	rawClose(p.w)
}

// fill moves at most limit bytes from a socket into the pipe, which is empty.
func (p *pipe) fill(fd, limit int) (int, error) {
	n, err := rawSplice(fd, p.w, min(p.size, limit))
	p.n += n
	return n, err
}

// drain moves bytes from the pipe to a socket.
func (p *pipe) drain(fd int) (int, error) {
	n, err := rawSplice(p.r, fd, p.n)
	p.n -= n
	return n, err
}
