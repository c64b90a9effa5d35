//go:build !linux

package main

import (
	"context"
	"errors"
	"fmt"
)

func (p *program) exec(context.Context, *execOptions, string, []string) error {
	return fmt.Errorf("exec: needs the namespaces of Linux: %w", errors.ErrUnsupported)
}
