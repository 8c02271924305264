// Command stopline runs a district's traffic signals from its own sensors, and
// proves afterwards why a light changed.
//
// One program holds every part. `stopline demo` wires all of them together in
// one process around an embedded NATS server:
//
//	built-in city or SUMO ── roadside units ──▶ ingest ──▶ validation ──▶ 4 validators
//	        ▲                     ▲                                          │
//	        └──── lamps ──────────┴──── commands ◀── signal-control ◀────────┤
//	                                                                         ▼
//	                              page, evidence ◀── gateway, audit ◀── sealing
//
// Run `stopline help` for the list of subcommands, `stopline COMMAND -h` for
// the manual page of one.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
)

// version is set at build time with -ldflags "-X main.version=…".
var version = "devel"

// Exit codes that every subcommand keeps to.
const (
	exitOK        = 0
	exitFailed    = 1 // what was asked for is not so, or could not be done
	exitUsage     = 2
	exitUntrusted = 3 // verify: consistent, but signed by nobody the verifier trusts
)

// exitError ends the program with a code of its own; its text has been printed
// already where it is empty.
type exitError struct {
	code int
	text string
}

func (e exitError) Error() string { return e.text }

// usageError is an error in how a command was called.
func usageError(format string, args ...any) error {
	return exitError{exitUsage, fmt.Sprintf(format, args...)}
}

// streams are what a command reads and writes; tests give their own.
type streams struct {
	out, err io.Writer
}

// command is one subcommand and its manual page.
type command struct {
	name, synopsis, summary string
	// manual is the text of the manual page between synopsis and options.
	manual string
	// flags declares the options and returns what to run with the arguments.
	flags func(fs *flag.FlagSet) func(ctx context.Context, args []string, io streams) error
}

func commands() []command {
	return []command{demoCommand, consensusCommand, simulateCommand, verifyCommand, auditCommand, fsckCommand, repairCommand, logCommand, witnessCommand, enrolCommand, onboardCommand, registryCommand, retentionCommand, holdCommand, redactCommand, tokenCommand, policyCommand, replayCommand, measuresCommand, planCommand, benchCommand, versionCommand}
}

var versionCommand = command{
	name: "version", synopsis: "stopline version", summary: "print the version",
	manual: "Prints the version that was set when the program was built.",
	flags: func(*flag.FlagSet) func(context.Context, []string, streams) error {
		return func(_ context.Context, _ []string, s streams) error {
			_, err := fmt.Fprintln(s.out, "stopline", version)
			return err
		}
	},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second interrupt ends the program at once: the first gives the signal back.
	context.AfterFunc(ctx, stop)
	code := Main(ctx, os.Args[1:], streams{os.Stdout, os.Stderr})
	stop()
	os.Exit(code)
}

// Main runs one command line and returns the exit code.
func Main(ctx context.Context, args []string, s streams) int {
	err := serve(ctx, args, s)
	var x exitError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &x):
		if x.text != "" {
			fmt.Fprintln(s.err, "stopline:", x.text)
		}
		return x.code
	default:
		fmt.Fprintln(s.err, "stopline:", err)
		return exitFailed
	}
}

func serve(ctx context.Context, args []string, s streams) error {
	if len(args) == 0 {
		help(s.err)
		return exitError{code: exitUsage}
	}
	name := args[0]
	if name == "help" || name == "-h" || name == "-help" || name == "--help" {
		if len(args) < 2 {
			help(s.out)
			return nil
		}
		name, args = args[1], []string{args[1], "-h"}
	}
	for _, c := range commands() {
		if c.name == name {
			return c.run(ctx, args[1:], s)
		}
	}
	return usageError("no command %q; `stopline help` lists them", name)
}

func (c command) run(ctx context.Context, args []string, s streams) error {
	fs := flag.NewFlagSet("stopline "+c.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	run := c.flags(fs)
	rest, err := parse(fs, args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		c.page(s.out, fs)
		return nil
	case err != nil:
		return usageError("%s: %v; `stopline %s -h` explains", c.name, err, c.name)
	}
	return run(ctx, rest, s)
}

// parse lets options stand after arguments, as people type them.
func parse(fs *flag.FlagSet, args []string) ([]string, error) {
	var rest []string
	for {
		if err := fs.Parse(args); err != nil {
			return nil, err
		}
		if fs.NArg() == 0 {
			return rest, nil
		}
		if done := len(args) - fs.NArg(); done > 0 && args[done-1] == "--" {
			return append(rest, fs.Args()...), nil
		}
		rest, args = append(rest, fs.Arg(0)), fs.Args()[1:]
	}
}

func help(w io.Writer) {
	fmt.Fprint(w, `NAME
    stopline - traffic signals that can prove themselves

SYNOPSIS
    stopline COMMAND [OPTIONS] [ARGUMENTS]

COMMANDS
`)
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	for _, c := range commands() {
		fmt.Fprintf(tw, "    %s\t%s\n", c.name, c.summary)
	}
	_ = tw.Flush() // w has taken, or refused, everything else the same way
	fmt.Fprint(w, `
    stopline COMMAND -h prints the manual page of a command.

EXIT STATUS
    0  done, or verified
    1  failed, or not verified
    2  wrong usage
    3  verify: consistent, but signed by nobody that the verifier trusts
`)
}

func (c command) page(w io.Writer, fs *flag.FlagSet) {
	fmt.Fprintf(w, "NAME\n    stopline %s - %s\n\nSYNOPSIS\n", c.name, c.summary)
	for line := range strings.Lines(c.synopsis) {
		fmt.Fprintf(w, "    %s\n", strings.TrimRight(line, "\n"))
	}
	fmt.Fprintf(w, "\nDESCRIPTION\n")
	for line := range strings.Lines(strings.TrimSpace(c.manual)) {
		line = strings.TrimRight(line, "\n")
		if line != "" {
			line = "    " + line
		}
		fmt.Fprintln(w, line)
	}
	var opts []*flag.Flag
	fs.VisitAll(func(f *flag.Flag) { opts = append(opts, f) })
	if len(opts) == 0 {
		return
	}
	fmt.Fprintf(w, "\nOPTIONS\n")
	for _, f := range opts {
		kind, usage := flag.UnquoteUsage(f)
		fmt.Fprintf(w, "    --%s", f.Name)
		if kind != "" {
			fmt.Fprintf(w, " %s", strings.ToUpper(kind)) // "duration" where the text names none
		}
		fmt.Fprintln(w)
		for line := range strings.Lines(usage) {
			fmt.Fprintf(w, "        %s\n", strings.TrimRight(line, "\n"))
		}
		if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" && f.DefValue != "0s" {
			fmt.Fprintf(w, "        Default: %s\n", f.DefValue)
		}
	}
}
