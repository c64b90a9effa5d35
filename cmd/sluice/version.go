package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

func (p *program) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  wantArgs(0, "takes no arguments"),
		RunE: func(*cobra.Command, []string) error {
			info, _ := debug.ReadBuildInfo()
			_, err := fmt.Fprintln(p.stdout, version(info))
			return err
		},
	}
}

// version describes a build: "sluice v1.2.3 (0123abcd, modified) go1.26.1 linux/amd64".
func version(info *debug.BuildInfo) string {
	module, revision, modified := "(unknown)", "", ""
	if info != nil {
		if info.Main.Version != "" {
			module = info.Main.Version
		}
		for _, s := range info.Settings {
			switch {
			case s.Key == "vcs.revision":
				revision = s.Value[:min(12, len(s.Value))]
			case s.Key == "vcs.modified" && s.Value == "true":
				modified = ", modified"
			}
		}
	}
	if revision != "" {
		revision = " (" + revision + modified + ")"
	}
	return fmt.Sprintf("sluice %s%s %s %s/%s", module, revision, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
