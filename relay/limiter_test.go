package relay

import (
	"context"
	"errors"
	"io"
	"math"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

func TestLimiter(t *testing.T) {
	for _, rate := range []int64{1, 10, 1000, 1 << 20, 100 << 30} {
		l := NewLimiter(rate)
		l.last = 0
		var got int64
		for now := int64(0); now < int64(100*time.Second); now += int64(throttleTick) {
			for {
				n := min(l.allowed(now), 1<<40)
				if n <= 0 {
					break
				}
				l.charge(int(n))
				got += n
			}
		}
		if want := 100 * rate; got > want || got < want-want/100-rate/10-1 {
			t.Errorf("%d bytes/s: %d in 100 s", rate, got)
		}
	}
}

// TestSharedLimitIsShared: one that always asks first must not get all, and whoever stops asking must not hold the others up.
func TestSharedLimitIsShared(t *testing.T) {
	for _, rate := range []int64{100, 2 << 20, 10 << 30} {
		l := NewLimiter(rate)
		l.last = 0
		gs := make([]*governor, 4)
		for i := range gs {
			gs[i] = newGovernor(&Relay{Shared: l})
		}
		var got [4]int64
		end := int64(20 * time.Second)
		for now := int64(0); now < end; now += int64(throttleTick) {
			for i, g := range gs {
				if i == 3 && now > end/2 {
					continue // it is over, in whatever place
				}
				n, _ := g.allowed(A, math.MaxInt32, now+int64(i)*1000) // a little later than the one before
				g.charge(A, n)
				got[i] += int64(n)
			}
		}
		sum := got[0] + got[1] + got[2] + got[3]
		if want := 20 * rate; sum > want || sum < want-want/50-rate/10 {
			t.Errorf("%d bytes/s: %d in 20 s", rate, sum)
		}
		for i, n := range got {
			if share := [...]float64{.29, .29, .29, .125}[i]; float64(n) < share*.7*float64(sum) {
				t.Errorf("%d bytes/s: %d of %d for the one at %d: %v", rate, n, sum, i, got)
			}
		}
	}
}

// TestSharedLimitIsUsedUp: those that take it in small pieces, or have little to move, must not leave it unused.
func TestSharedLimitIsUsedUp(t *testing.T) {
	for _, has := range []int{1 << 30, 640 << 10} { // how many bytes one has at each tick
		l := NewLimiter(200 << 20)
		l.last = 0
		gs := make([]*governor, 4)
		for i := range gs {
			gs[i] = newGovernor(&Relay{Shared: l})
		}
		var sum int64
		for now := int64(0); now < int64(20*time.Second); now += int64(throttleTick) {
			for _, g := range gs {
				for rest := has; rest > 0; {
					n, _ := g.allowed(A, min(64<<10, rest), now)
					if n == 0 {
						break
					}
					g.charge(A, n)
					rest -= n
					sum += int64(n)
				}
			}
		}
		if want := int64(20 * 200 << 20); sum > want || sum < want-want/50 {
			t.Errorf("with %d bytes a tick: %d of %d", has, sum, want)
		}
	}
}

func TestLimiterStartsEmptyAndHoldsLittle(t *testing.T) {
	l := NewLimiter(1000)
	l.last = 0
	if n := l.allowed(0); n != 0 {
		t.Error("starts with", n)
	}
	if n := l.allowed(int64(1000 * time.Hour)); n != 100 {
		t.Error("after a long silence it allows", n)
	}
	l.charge(1100) // somebody moved more than was allowed
	if n := l.allowed(int64(1000*time.Hour + 999*time.Millisecond)); n > 0 {
		t.Error("not paid yet, and allows", n)
	}
	if n := l.allowed(int64(1000*time.Hour + 1050*time.Millisecond)); n <= 0 {
		t.Error("paid, and allows", n)
	}
}

func TestLimiterOfAnyRateStaysInRange(t *testing.T) {
	for _, rate := range []int64{math.MaxInt64, math.MaxInt64 / 10, 1} {
		l := NewLimiter(rate)
		l.last = 0
		for _, now := range []int64{0, int64(200 * time.Millisecond), int64(1400 * time.Millisecond), math.MaxInt64} {
			if n := l.allowed(now); n < 0 || n > max(rate/10, 1) {
				t.Errorf("rate %d at %d: %d", rate, now, n)
			}
		}
	}
}

func TestQuotaIsExactBothWays(t *testing.T) {
	for _, portable := range []bool{false, true} {
		client, ra := tcpPair(t)
		rb, origin := tcpPair(t)
		result := make(chan Result, 1)
		r := &Relay{Quota: 1 << 20, Portable: portable}
		go func() { result <- r.Join(context.Background(), WithHead(ra, make([]byte, 1000)), rb, nil) }()
		for _, c := range []net.Conn{client, origin} {
			go io.CopyN(c, zeros{}, 1<<20)
			go io.Copy(io.Discard, c)
		}
		res := <-result
		if n := res.AToB.Bytes + res.BToA.Bytes; n > 1<<20 || !errors.Is(res.Err(), ErrQuota) {
			t.Errorf("portable=%v: %d bytes of %d, %v", portable, n, 1<<20, res)
		}
	}
}

func TestRateOfBothEngines(t *testing.T) {
	for _, portable := range []bool{false, true} {
		t.Run(map[bool]string{false: "kernel", true: "portable"}[portable], func(t *testing.T) {
			const rate, size = 4 << 20, 2 << 20
			shared := NewLimiter(rate)
			for _, r := range []*Relay{{Rate: rate, Portable: portable}, {Shared: shared, Portable: portable}} {
				client, ra := tcpPair(t)
				rb, origin := tcpPair(t)
				result := make(chan Result, 1)
				start := time.Now()
				go func() { result <- r.Join(context.Background(), ra, rb, nil) }()
				go func() {
					io.CopyN(client, zeros{}, size)
					client.CloseWrite()
				}()
				n, err := io.Copy(io.Discard, origin)
				if n != size || err != nil {
					t.Errorf("read %d, %v", n, err)
				}
				if d := time.Since(start); d < 350*time.Millisecond {
					t.Errorf("%d bytes took %v at %d bytes/s", size, d, rate)
				}
				origin.Close()
				if res := <-result; res.Err() != nil {
					t.Error(res, res.Err())
				}
			}
		})
	}
}

func TestRateInFakeTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, origin, result := joined(&Relay{Rate: 1000})
		go func() {
			client.Write(make([]byte, 60000))
			client.CloseWrite()
		}()
		start := time.Now()
		n, err := io.Copy(io.Discard, origin)
		if d := time.Since(start); n != 60000 || err != nil || d < 59*time.Second || d > 61*time.Second {
			t.Errorf("%d bytes in %v, %v", n, d, err)
		}
		origin.Close()
		<-result
	})
}

func TestQuota(t *testing.T) {
	for _, portable := range []bool{false, true} {
		for _, more := range []int{0, 1, 100000} {
			const quota = 300000
			client, ra := tcpPair(t)
			rb, origin := tcpPair(t)
			result := make(chan Result, 1)
			r := &Relay{Quota: quota, Portable: portable}
			go func() { result <- r.Join(context.Background(), ra, rb, nil) }()
			go func() {
				io.CopyN(client, zeros{}, quota+int64(more))
				client.CloseWrite()
			}()
			n, err := io.Copy(io.Discard, origin)
			origin.Close()
			res := <-result
			if more == 0 {
				if n != quota || err != nil || res.AToB.End != EOF {
					t.Errorf("portable=%v: exactly the quota: read %d, %v, %v", portable, n, err, res)
				}
				continue
			}
			if n > quota || err == nil || res.AToB.End != Quota || !errors.Is(res.Err(), ErrQuota) || res.AToB.Bytes > quota {
				t.Errorf("portable=%v, %d more: read %d, %v, %v, %v", portable, more, n, err, res, res.Err())
			}
		}
	}
}

func TestBusyPoll(t *testing.T) {
	client, ra := tcpPair(t)
	rb, origin := tcpPair(t)
	p := (&Relay{BusyPoll: 200 * time.Microsecond}).Start(ra, rb, nil, nil)
	defer p.Abort(nil)
	for range 1000 {
		io.WriteString(client, "x")
		read(t, origin, "x")
		io.WriteString(origin, "y")
		read(t, client, "y")
	}
}
