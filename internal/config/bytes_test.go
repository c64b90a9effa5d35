package config

import "testing"

func TestRates(t *testing.T) {
	for text, want := range map[string]struct {
		n     Rate
		shown string
	}{
		"1B":                   {1, "1B/s"},
		"1kB":                  {1000, "1kB/s"},
		"1KB/s":                {1000, "1kB/s"},
		"1KiB":                 {1024, "1KiB/s"},
		"1000000B":             {1e6, "1MB/s"},
		"1500kB/s":             {1.5e6, "1500kB/s"},
		"2048MiB":              {2 << 30, "2GiB/s"},
		"7GB":                  {7e9, "7GB/s"},
		"128kB":                {128000, "128kB/s"}, // also 125KiB
		"9223372036854775807B": {1<<63 - 1, "9223372036854775807B/s"},
	} {
		var r Rate
		if err := r.UnmarshalText([]byte(text)); err != nil || r != want.n || r.String() != want.shown {
			t.Errorf("%s: %d, %v, %v, want %d, %s", text, r, r, err, want.n, want.shown)
		}
	}
	for text, want := range map[string]string{
		"-5MB":                  `"-5MB" is not more than zero (leave it out for no limit)`,
		"0":                     notRate("0"),
		"0B/s":                  `"0B/s" is not more than zero (leave it out for no limit)`,
		"10":                    notRate("10"),
		"10/s":                  notRate("10/s"),
		"MB":                    notRate("MB"),
		"/s":                    notRate("/s"),
		"1.5MB":                 notRate("1.5MB"),
		"10Mb":                  notRate("10Mb"), // bits
		"10M":                   notRate("10M"),
		"1TB":                   notRate("1TB"),
		"1MBB":                  notRate("1MBB"),
		"1MB/min":               notRate("1MB/min"),
		"1MB/s/s":               notRate("1MB/s/s"),
		"off":                   notRate("off"),
		"9223372036854775808B":  `"9223372036854775808B" is too much`,
		"9223372036854775807kB": `"9223372036854775807kB" is too much`,
	} {
		var r Rate
		if err := r.UnmarshalText([]byte(text)); err == nil || err.Error() != want {
			t.Errorf("%s: %d, %v, want %s", text, r, err, want)
		}
	}
}

func notRate(text string) string {
	return `"` + text + `" is not a rate in bytes a second (a whole number with a unit, as in 500kB, 10MB, 1GiB)`
}

// TestSizeIsNoRate: what moves at no time has no /s.
func TestSizeIsNoRate(t *testing.T) {
	var s Size
	if err := s.UnmarshalText([]byte("1GiB/s")); err == nil {
		t.Error("a size was read from 1GiB/s")
	}
	if err := s.UnmarshalText([]byte("1GiB")); err != nil || s != 1<<30 || s.String() != "1GiB" {
		t.Errorf("%d, %v, %v", s, s, err)
	}
}

func FuzzRate(f *testing.F) {
	f.Add("10MB/s")
	f.Add("1024KiB")
	f.Add("-1B")
	f.Add("99999999999999999999GB")
	f.Fuzz(func(t *testing.T, text string) {
		var r, again Rate
		if r.UnmarshalText([]byte(text)) != nil {
			return
		}
		if err := again.UnmarshalText([]byte(r.String())); r <= 0 || err != nil || again != r {
			t.Errorf("%q is %d, written %v, and read again %d, %v", text, r, r, again, err)
		}
	})
}
