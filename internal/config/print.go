package config

import (
	"fmt"
	"io"
	"slices"

	"github.com/goccy/go-yaml"
)

// Print writes c as a file that loads back to the same Config. It holds no secrets, only where they
// are. Relative paths stay as they are: the file belongs where they start.
func (c *Config) Print(w io.Writer) error {
	shown := *c
	shown.Inbounds = slices.Clone(c.Inbounds)
	for i := range shown.Inbounds {
		if in := &shown.Inbounds[i]; !isName(in.Name) {
			in.Name = "" // Fill made it
		}
	}
	data, err := yaml.MarshalWithOptions(shown, yaml.OmitEmpty(), yaml.OmitZero(), yaml.IndentSequence(true))
	if err != nil {
		return fmt.Errorf("config: print: %w", err)
	}
	_, err = w.Write(data)
	return err
}
