package relay

// The bounds of datagrams that the kernel takes as one.
const (
	segmentsMax     = 64
	segmentsMaxSize = 65_000
)

// SameSegments returns how many of the first of ps, one at least, can be sent as segments of one datagram: they go to one place, and are
// of one size but for the last, which may be shorter.
func SameSegments(ps []Packet) int {
	size, total := len(ps[0].Data), len(ps[0].Data)
	n := 1
	for n < min(len(ps), segmentsMax) && size > 0 {
		p := &ps[n]
		total += len(p.Data)
		if p.Endpoint != ps[0].Endpoint || len(p.Data) > size || len(p.Data) == 0 || total > segmentsMaxSize {
			break
		}
		n++
		if len(p.Data) < size {
			break
		}
	}
	return n
}
