package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/go-json-experiment/json"
	"github.com/spf13/cobra"
)

// build is what the Go toolchain wrote into the binary about its source.
type build struct {
	Version  string `json:"version"`
	Commit   string `json:"commit"`
	Time     string `json:"time"`
	Modified bool   `json:"modified"` // built from a tree with uncommitted changes
	Go       string `json:"go"`
}

func readBuild() build {
	b := build{Version: "(devel)", Commit: "unknown", Go: runtime.Version()}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	if info.Main.Version != "" {
		b.Version = info.Main.Version
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			b.Commit = s.Value
		case "vcs.time":
			b.Time = s.Value
		case "vcs.modified":
			b.Modified = s.Value == "true"
		}
	}
	return b
}

func buildVersion() string {
	b := readBuild()
	text := fmt.Sprintf("%s commit %s", b.Version, b.Commit)
	if b.Time != "" {
		text += " of " + b.Time
	}
	if b.Modified {
		text += " (modified)"
	}
	return text + " " + b.Go
}

func versionCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version and the commit this program was built from",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output == "json" {
				return printJSON(cmd, readBuild())
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "countersign "+buildVersion())
			return err
		},
	}
	outputFlag(cmd, &output, "text", "text", "json")
	return cmd
}

// outputFlag adds -o, restricted to choices.
func outputFlag(cmd *cobra.Command, output *string, value string, choices ...string) {
	*output = value
	cmd.Flags().VarP(&choice{output, choices}, "output", "o", "output format")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(choices, cobra.ShellCompDirectiveNoFileComp))
}

// choice is a flag that takes one of a few words.
type choice struct {
	value   *string
	choices []string
}

func (c *choice) String() string { return *c.value }

func (c *choice) Set(s string) error {
	for _, v := range c.choices {
		if s == v {
			*c.value = s
			return nil
		}
	}
	return fmt.Errorf("must be one of %s", c.Type())
}

// Type is shown in the help, in the place of a type's name.
func (c *choice) Type() string {
	text := c.choices[0]
	for _, v := range c.choices[1:] {
		text += "|" + v
	}
	return text
}

// printJSON writes v as one line of JSON to standard output.
func printJSON(cmd *cobra.Command, v any) error {
	if err := json.MarshalWrite(cmd.OutOrStdout(), v, json.Deterministic(true)); err != nil {
		return err
	}
	_, err := fmt.Fprintln(cmd.OutOrStdout())
	return err
}
