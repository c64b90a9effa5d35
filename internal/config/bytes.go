package config

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Size is a number of bytes, written with a unit, as in 500kB or 1GiB. The zero value is one that was not
// given.
type Size int64

// UnmarshalText reads a whole number with one of the units B, kB (or KB), MB, GB, which are powers of
// 1000, and KiB, MiB, GiB, which are powers of 1024.
func (s *Size) UnmarshalText(text []byte) error {
	n, err := parseBytes(string(text), string(text), "a size")
	*s = Size(n)
	return err
}

// MarshalText writes s as UnmarshalText reads it.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// String returns s exactly, in the unit that makes it shortest; empty where it was not given.
func (s Size) String() string { return formatBytes(int64(s)) }

// Rate is a number of bytes a second, written as a [Size], with or without /s: 10MB or 10MB/s. The zero
// value is one that was not given.
type Rate int64

// UnmarshalText reads a rate.
func (r *Rate) UnmarshalText(text []byte) error {
	n, err := parseBytes(strings.TrimSuffix(string(text), "/s"), string(text), "a rate in bytes a second")
	*r = Rate(n)
	return err
}

// MarshalText writes r as UnmarshalText reads it.
func (r Rate) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// String returns r exactly, with /s; empty where it was not given.
func (r Rate) String() string {
	if r == 0 {
		return ""
	}
	return formatBytes(int64(r)) + "/s"
}

// byteUnits are the units of sizes. Where two are the same, the first is written.
var byteUnits = []struct {
	name  string
	bytes int64
}{
	{"B", 1},
	{"kB", 1e3}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9},
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30},
}

// parseBytes reads a positive number of bytes. The error quotes all of what was given, and calls it what
// it should be.
func parseBytes(text, given, what string) (int64, error) {
	digits := strings.TrimRight(text, "kKMGiB")
	n, err := strconv.ParseInt(digits, 10, 64)
	for _, u := range byteUnits {
		switch large := errors.Is(err, strconv.ErrRange); {
		case text[len(digits):] != u.name || err != nil && !large:
			continue
		case n <= 0:
			return 0, fmt.Errorf("%q is not more than zero (leave it out for no limit)", given)
		case large || n > math.MaxInt64/u.bytes:
			return 0, fmt.Errorf("%q is too much", given)
		}
		return n * u.bytes, nil
	}
	return 0, fmt.Errorf("%q is not %s (a whole number with a unit, as in 500kB, 10MB, 1GiB)", given, what)
}

// formatBytes writes n in the unit that needs the fewest characters; of several, the first.
func formatBytes(n int64) string {
	shortest := ""
	for _, u := range byteUnits {
		if n == 0 || n%u.bytes != 0 {
			continue
		}
		if s := strconv.FormatInt(n/u.bytes, 10) + u.name; shortest == "" || len(s) < len(shortest) {
			shortest = s
		}
	}
	return shortest
}
