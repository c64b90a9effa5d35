package dns

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"github.com/sluice-proxy/sluice/internal/proxy"
	"github.com/sluice-proxy/sluice/internal/proxytest"
)

// streamTo has h serve a stream to port 53 and returns the client's end, with its deadline far off.
func streamTo(t testing.TB, h *Handler) (*pending, *bufio.Reader) {
	p := newPending()
	f := flowTo("10.0.0.53:53")
	f.Dst.Network = "tcp"
	go h.HandleStream(t.Context(), f, p)
	return p, bufio.NewReader(p.ours)
}

func TestStreamAsksManyQuestions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &resolver{answer: func(q *dns.Msg, network string) *dns.Msg {
			if q.Question[0].Name == "slow.example." {
				time.Sleep(time.Second)
			}
			return addressed(q, network)
		}}
		h := hijack(t, r)
		h.Mode = Fake
		p, in := streamTo(t, h)
		names := []string{"slow.example.", "a.example.", "b.example."}
		for _, name := range names {
			if _, err := p.ours.Write(frame(mustPack(t, newQuestion(name, dns.TypeTXT)))); err != nil {
				t.Fatal(err)
			}
		}
		var got []string
		for range names {
			b, err := readMessage(in)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, mustUnpack(t, b).Question[0].Name)
		}
		if got[2] != "slow.example." {
			t.Errorf("answers to %v", got)
		}
		p.ours.Write(frame(mustPack(t, newQuestion("a.example.", dns.TypeA))))
		if b, err := readMessage(in); err != nil || dataOf(mustUnpack(t, b)) != "198.18.0.16" {
			t.Errorf("A: %x, %v", b, err)
		}
		p.ours.Close()
		<-p.done
		if r.asks("udp") != 0 || r.asks("tcp") != 3 {
			t.Errorf("asked %v", r.asked)
		}
	})
}

func TestStreamEnds(t *testing.T) {
	whole := frame(mustPack(t, newQuestion("a.example.", dns.TypeA)))
	for _, tt := range []struct {
		name  string
		sends []byte
		after time.Duration
		gets  int // bytes
	}{
		{"silent", nil, streamIdle, 0},
		{"half a length", []byte{0}, streamIdle, 0},
		{"half a message", whole[:20], streamIdle, 0},
		{"no DNS", []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n" + strings.Repeat("x", 20000)), streamIdle, 2 + headerSize},
		{"an answer", []byte{0, 12, 0, 1, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 0, 0},
		{"nothing, often", []byte{0, 0, 0, 0}, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, in := streamTo(t, &Handler{names: names{fixed: true}, Next: noHandler{t}})
				start := time.Now()
				go p.ours.Write(tt.sends)
				b, err := io.ReadAll(in)
				if len(b) != tt.gets || err != nil && !errors.Is(err, io.ErrClosedPipe) {
					t.Errorf("got %x, %v", b, err)
				}
				<-p.done
				if took := time.Since(start); took != tt.after {
					t.Errorf("it took %v, want %v", took, tt.after)
				}
			})
		})
	}
}

func TestStreamStaysWhileItAsks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, in := streamTo(t, &Handler{names: names{fixed: true}, Next: noHandler{t}})
		for range 5 {
			p.ours.Write(frame(mustPack(t, newQuestion("a.example.", dns.TypeA))))
			if _, err := readMessage(in); err != nil {
				t.Fatal(err)
			}
			time.Sleep(streamIdle - time.Second)
		}
		p.ours.Close()
		<-p.done
	})
}

func TestStreamWhoseClientDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _ := streamTo(t, &Handler{names: names{fixed: true}, Next: noHandler{t}})
		start := time.Now()
		for err := error(nil); err == nil; {
			_, err = p.ours.Write(frame(mustPack(t, newQuestion("a.example.", dns.TypeA))))
		}
		<-p.done
		if took := time.Since(start); took != streamIdle {
			t.Errorf("it took %v", took)
		}
	})
}

func TestHeadOfAStreamIsRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPending()
		p.head = frame(mustPack(t, newQuestion("a.example.", dns.TypeA)))
		f := flowTo("10.0.0.53:53")
		f.Dst.Network = "tcp"
		go (&Handler{names: names{fixed: true}, Next: noHandler{t}}).HandleStream(t.Context(), f, p)
		b, err := readMessage(bufio.NewReader(p.ours))
		if err != nil || !bytes.Equal(b[:2], p.head[2:4]) {
			t.Errorf("got %x, %v", b, err)
		}
		p.ours.Close()
		<-p.done
	})
}

func TestStreamToPort53GoesToTheResolver(t *testing.T) {
	next := new(proxytest.RecordingHandler)
	h := hijack(t, new(resolver))
	h.Next = next
	p, _ := streamTo(t, h)
	p.talk(t, "anything")
	flows := next.Flows()
	if len(flows) != 1 || flows[0].Dst != proxy.TCP("192.0.2.53", 53) || flows[0].Client.Port() != 4000 {
		t.Errorf("flows %+v", flows)
	}
}
