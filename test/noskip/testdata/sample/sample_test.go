// Package sample has one test of each outcome.
package sample

import "testing"

func TestPasses(t *testing.T) { t.Log("not to be seen") }

func TestSkips(t *testing.T) { t.Skip("for a reason") }

func TestFails(t *testing.T) {
	t.Error("this went wrong")
}
