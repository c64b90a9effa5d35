package conform

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/sluice-proxy/sluice/relay/relaytest"
)

// The verdicts of a [Result].
const (
	Pass    = "pass"
	Fail    = "fail"
	LeftOut = "left out"
)

// Report is what all scenarios have said of one relay.
type Report struct {
	Relay   string    `json:"relay"` // its name, with version and settings if they were given
	Addr    string    `json:"addr"`
	Mode    string    `json:"mode"`
	Quick   bool      `json:"quick,omitempty"` // small sizes, which find no limits of seconds
	Started time.Time `json:"started"`
	Seconds float64   `json:"seconds"`
	Results []Result  `json:"results"`
}

// Result is what became of one scenario.
type Result struct {
	Name    string   `json:"name"`
	Level   string   `json:"level"` // must or should
	Meaning string   `json:"meaning"`
	Verdict string   `json:"verdict"`          // Pass, Fail or LeftOut
	Reason  string   `json:"reason,omitempty"` // of a failure, or for leaving it out
	Harm    string   `json:"harm,omitempty"`   // what users suffer, of a failure
	Notes   []string `json:"notes,omitempty"`
	Seconds float64  `json:"seconds"`
}

// Run plays all scenarios on a bed and tells each result as it comes.
func Run(ctx context.Context, bed relaytest.Bed, o relaytest.Options, tell func(Result)) []Result {
	var results []Result
	for _, v := range relaytest.CheckAll(ctx, bed, o, func(v relaytest.Verdict) { tell(resultOf(v)) }) {
		results = append(results, resultOf(v))
	}
	return results
}

func resultOf(v relaytest.Verdict) Result {
	r := Result{
		Name: v.Scenario.Name, Level: v.Scenario.Level.String(), Meaning: v.Scenario.Meaning,
		Verdict: Pass, Notes: v.Notes, Seconds: v.Took.Round(time.Millisecond).Seconds(),
	}
	switch {
	case v.LeftOut != "":
		r.Verdict, r.Reason = LeftOut, v.LeftOut
	case v.Err != nil:
		r.Verdict, r.Harm = Fail, v.Scenario.Harm
		r.Reason = v.Reason()
	}
	return r
}

// Count returns how many results have a level ("" for any) and a verdict.
func (r *Report) Count(level, verdict string) (n int) {
	for _, res := range r.Results {
		if (level == "" || res.Level == level) && res.Verdict == verdict {
			n++
		}
	}
	return n
}

// Line writes one result on a line, as progress.
func (r Result) Line() string {
	switch r.Verdict {
	case Pass:
		return fmt.Sprintf("  ok    %-36s %5.1f s", r.Name, r.Seconds)
	case LeftOut:
		return fmt.Sprintf("  -     %-36s left out", r.Name)
	}
	return fmt.Sprintf("  FAIL  %-36s %5.1f s", r.Name, r.Seconds)
}

// Summary writes what a person wants to know: each failure, what users suffer by it, and what was seen.
func (r *Report) Summary(w io.Writer) {
	reasons := make(map[string][]string)
	var order []string
	for _, res := range r.Results {
		switch res.Verdict {
		case LeftOut:
			if reasons[res.Reason] == nil {
				order = append(order, res.Reason)
			}
			reasons[res.Reason] = append(reasons[res.Reason], res.Name)
		case Fail:
			fmt.Fprintf(w, "\n%s (%s): %s\n    %s.\n", res.Name, res.Level, res.Harm, res.Reason)
		}
	}
	if len(order) > 0 {
		fmt.Fprintln(w)
	}
	for _, why := range order {
		fmt.Fprintf(w, "Left out, since %s: %s.\n", why, strings.Join(reasons[why], ", "))
	}
	failed, passed := r.Count("", Fail), r.Count("", Pass)
	fmt.Fprintf(w, "\n%s: ", r.Relay)
	if failed == 0 {
		fmt.Fprintf(w, "all %d scenarios pass", passed)
	} else {
		fmt.Fprintf(w, "%d of %d scenarios fail (%d must, %d should)", failed, failed+passed, r.Count("must", Fail), r.Count("should", Fail))
	}
	fmt.Fprintf(w, ", in %s.\n", seconds(time.Duration(r.Seconds*float64(time.Second))))
}

// WriteJSON writes the report as JSON.
func (r *Report) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(r)
}

// ReadReport reads a file that WriteJSON has written.
func ReadReport(name string) (*Report, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	r := new(Report)
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("%s: not a report of sluice conform --json: %w", name, err)
	}
	if len(r.Results) == 0 {
		return nil, fmt.Errorf("%s: not a report of sluice conform --json: it has no results", name)
	}
	r.Relay = cmp.Or(r.Relay, r.Addr)
	return r, nil
}
