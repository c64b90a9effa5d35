package main

import (
	"os/exec"
	"strings"
	"testing"
)

const goodEvents = `
{"Action":"start","Package":"m/a"}
{"Action":"run","Package":"m/a","Test":"TestX"}
{"Action":"output","Package":"m/a","Test":"TestX","Output":"=== RUN   TestX\n"}
{"Action":"output","Package":"m/a","Test":"TestX","Output":"    x_test.go:1: quiet please\n"}
{"Action":"pass","Package":"m/a","Test":"TestX"}
{"Action":"output","Package":"m/a","Output":"PASS\n"}
{"Action":"output","Package":"m/a","Output":"ok  \tm/a\t0.010s\n"}
{"Action":"pass","Package":"m/a"}
{"Action":"output","Package":"m/b","Output":"?   \tm/b\t[no test files]\n"}
{"Action":"skip","Package":"m/b"}
`

const skipEvents = `
{"Action":"output","Package":"m/a","Test":"TestY","Output":"=== RUN   TestY\n"}
{"Action":"output","Package":"m/a","Test":"TestY/sub","Output":"=== RUN   TestY/sub\n"}
{"Action":"output","Package":"m/a","Test":"TestY/sub","Output":"    y_test.go:7: no curl here\n"}
{"Action":"output","Package":"m/a","Test":"TestY/sub","Output":"--- SKIP: TestY/sub (0.00s)\n"}
{"Action":"skip","Package":"m/a","Test":"TestY/sub"}
{"Action":"pass","Package":"m/a","Test":"TestY"}
`

const failEvents = `
{"Action":"output","Package":"m/c","Test":"TestZ","Output":"=== RUN   TestZ\n"}
{"Action":"output","Package":"m/c","Test":"TestZ","Output":"    z_test.go:3: wrong\n"}
{"Action":"output","Package":"m/c","Test":"TestZ","Output":"--- FAIL: TestZ (0.00s)\n"}
{"Action":"output","Package":"m/c","Test":"TestZ/bad","Output":"        z_test.go:4: wrong, too\n"}
{"Action":"output","Package":"m/c","Test":"TestZ/good","Output":"        z_test.go:5: fine\n"}
{"Action":"output","Package":"m/c","Test":"TestZ/bad","Output":"    --- FAIL: TestZ/bad (0.00s)\n"}
{"Action":"fail","Package":"m/c","Test":"TestZ/bad"}
{"Action":"output","Package":"m/c","Test":"TestZ/good","Output":"    --- PASS: TestZ/good (0.00s)\n"}
{"Action":"pass","Package":"m/c","Test":"TestZ/good"}
{"Action":"fail","Package":"m/c","Test":"TestZ"}
{"Action":"output","Package":"m/c","Test":"TestHung","Output":"panic: test timed out\n"}
{"Action":"output","Package":"m/c","Output":"FAIL\n"}
{"Action":"output","Package":"m/c","Output":"FAIL\tm/c\t0.010s\n"}
{"Action":"fail","Package":"m/c"}
`

func TestReport(t *testing.T) {
	for _, tt := range []struct {
		name, in, want string
		strict, ok     bool
	}{
		{"all ran", goodEvents, "ok  \tm/a\t0.010s\n?   \tm/b\t[no test files]\n", true, true},
		{"nothing ran", `{"Action":"skip","Package":"m/b"}`, "FAIL: no test ran\n", false, false},
		{"skips named", skipEvents, "SKIPPED m/a TestY/sub: y_test.go:7: no curl here\n", false, true},
		{"skips fail", skipEvents, "SKIPPED m/a TestY/sub: y_test.go:7: no curl here\nFAIL: 1 skipped\n", true, false},
		{"failure", failEvents, "    z_test.go:3: wrong\n--- FAIL: TestZ (0.00s)\n        z_test.go:4: wrong, too\n    --- FAIL: TestZ/bad (0.00s)\npanic: test timed out\nFAIL\nFAIL\tm/c\t0.010s\n", true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			r := &report{out: &out, tests: make(map[string]*written)}
			if err := r.read(strings.NewReader(tt.in)); err != nil {
				t.Fatal(err)
			}
			if ok := r.finish(tt.strict); ok != tt.ok {
				t.Errorf("finish = %v", ok)
			}
			if out.String() != tt.want {
				t.Errorf("printed:\n%s\nwant:\n%s", out.String(), tt.want)
			}
		})
	}
}

// The events above are what go test really prints: run it on a package with a skip and a failure.
func TestRealGoTest(t *testing.T) {
	cmd := exec.Command("go", "test", "-json", "-count=1", ".")
	cmd.Dir = "testdata/sample"
	events, err := cmd.Output()
	if err == nil {
		t.Error("the sample did not fail")
	}
	var out strings.Builder
	r := &report{out: &out, tests: make(map[string]*written)}
	if err := r.read(strings.NewReader(string(events))); err != nil {
		t.Fatal(err)
	}
	r.finish(true)
	for _, want := range []string{
		"SKIPPED sample TestSkips: sample_test.go:8: for a reason\n", "    sample_test.go:11: this went wrong\n",
		"--- FAIL: TestFails", "FAIL\tsample\t", "FAIL: 1 skipped\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("missing %q", want)
		}
	}
	for _, unwanted := range []string{"=== RUN", "TestPasses", "not to be seen"} {
		if strings.Contains(out.String(), unwanted) {
			t.Errorf("unwanted %q", unwanted)
		}
	}
	if t.Failed() {
		t.Logf("printed:\n%s", out.String())
	}
}
