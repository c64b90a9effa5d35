package rtnetlink

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/vishvananda/netlink"
)

func TestInterruptedListIsAskedForAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		list := func() ([]int, error) {
			if asked++; asked < 3 {
				return []int{1}, fmt.Errorf("rules: %w", netlink.ErrDumpInterrupted)
			}
			return []int{1, 2, 3}, nil
		}
		if all, err := List(list); err != nil || !slices.Equal(all, []int{1, 2, 3}) {
			t.Errorf("%v, %v", all, err)
		}
	})
}

func TestListThatNeverHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all, err := List(func() ([]int, error) { return []int{1}, netlink.ErrDumpInterrupted })
		if !errors.Is(err, netlink.ErrDumpInterrupted) || all != nil {
			t.Errorf("%v, %v", all, err)
		}
	})
}

func TestOtherErrorsEndAtOnce(t *testing.T) {
	asked, other := 0, errors.New("other")
	if _, err := List(func() ([]int, error) { asked++; return nil, other }); err != other || asked != 1 {
		t.Errorf("asked %d times: %v", asked, err)
	}
}
