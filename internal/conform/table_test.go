package conform

import (
	"strings"
	"testing"
)

func report(relay string, verdicts ...string) *Report {
	r := &Report{Relay: relay}
	for i := 0; i < len(verdicts); i += 2 {
		r.Results = append(r.Results, Result{Name: verdicts[i], Level: "must", Meaning: "all is well", Verdict: verdicts[i+1]})
	}
	return r
}

// The table has a row for the two forms of a scenario, and a column for all reports of a relay.
func TestMarkdown(t *testing.T) {
	var b strings.Builder
	Markdown(&b, []*Report{
		report("one", "a/from-client", Pass, "a/from-origin", Fail, "b", Fail, "c", Pass, "d", LeftOut),
		report("one", "a/from-client", Fail, "a/from-origin", Pass, "b", Pass, "c", Pass, "d", LeftOut),
		report("two", "a/from-client", Fail, "a/from-origin", Pass, "b", Pass, "c", LeftOut, "d", Fail),
	})
	const want = "| scenario | a relay that passes | one | two |\n" +
		"|---|---|:-:|:-:|\n" +
		"| <a id=\"a\"></a>`a` | all is well | ✗ | ✗→ |\n" +
		"| <a id=\"b\"></a>`b` | all is well | ✗° | ✓ |\n" +
		"| <a id=\"c\"></a>`c` | all is well | ✓ | – |\n" +
		"| <a id=\"d\"></a>`d` | all is well | – | ✗ |\n" +
		"| **must** | rows passed, of those played | **1/3** | **1/3** |\n" +
		"| **should** | rows passed, of those played | **0/0** | **0/0** |\n"
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", &b, want)
	}
}
