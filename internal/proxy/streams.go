package proxy

// Streams returns how many of the sessions are streams, and the bytes that those have moved so far, both ways.
func (e *Engine) Streams() (n int, moved int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for s := e.sessions.first; s != nil; s = s.next {
		if networks[s.network] == "udp" {
			continue
		}
		up, down := s.stats.Bytes()
		n, moved = n+1, moved+up+down
	}
	return n, moved
}
