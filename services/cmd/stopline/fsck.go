package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/retention"
	checker "github.com/stopline-traffic/stopline/services/internal/fsck"
)

var fsckCommand = command{
	name:     "fsck",
	synopsis: "stopline fsck [--policy FILE] [--signatures] [--checkpoint FILE]... [--json] DIR",
	summary:  "check a data folder's log offline, and name what is wrong",
	manual: `Walks the log in DIR without a network, on all cores: genesis document, block
journal with its headers and votes, entries, tiles, every sealed checkpoint with
its cosignatures, and the payloads that have not been let go. What is damaged is
named by file, offset, record, leaf, block, kind and rule. Nothing is changed;
stopline repair does that. Memory does not grow with the log.

Without --policy the folder's own policy is used, which shows only that the
folder fits together. A folder that was put back as a whole to what it was before
fits together, too: --checkpoint names a newer checkpoint that somebody has kept.
The demo may be running meanwhile.

EXIT STATUS
    0  everything is as it should be
    1  something is not; it is named
    2  wrong usage, or no data folder`,
	flags: func(set *flag.FlagSet) func(context.Context, []string, streams) error {
		var o fsckFlags
		set.StringVar(&o.policy, "policy", "", "`FILE` with the policy that you trust")
		set.BoolVar(&o.signatures, "signatures", false, "verify the signature of every record, too, by the registry in force at its\nblock")
		set.Func("checkpoint", "`FILE` with a signed checkpoint that the log must still hold; may be given\nseveral times", func(name string) error {
			o.checkpoints = append(o.checkpoints, name)
			return nil
		})
		set.BoolVar(&o.json, "json", false, "print one JSON object")
		return func(ctx context.Context, args []string, s streams) error {
			if len(args) != 1 {
				return usageError("fsck: one data folder is needed, got %d arguments", len(args))
			}
			return fsck(ctx, s, args[0], o)
		}
	},
}

// absences is what explains that payloads of a folder are gone.
func absences(dir fs.FS) (ledger.Absences, error) { return retention.NewAbsences(dir) }

type fsckFlags struct {
	policy           string
	checkpoints      []string
	signatures, json bool
}

// options reads the files that flags name.
func (f fsckFlags) options(command string) (o ledger.FsckOptions, err error) {
	o.Signatures = f.signatures
	if f.policy != "" {
		b, err := os.ReadFile(f.policy)
		if err != nil {
			return o, usageError("%s: --policy: %v", command, err)
		}
		if o.Policy, err = ledger.ParsePolicy(b); err != nil {
			return o, usageError("%s: --policy %s: %v", command, f.policy, err)
		}
	}
	for _, name := range f.checkpoints {
		b, err := os.ReadFile(name)
		if err != nil {
			return o, usageError("%s: --checkpoint: %v", command, err)
		}
		o.Known = append(o.Known, b)
	}
	return o, nil
}

func fsck(ctx context.Context, s streams, dir string, f fsckFlags) error {
	if i, err := os.Stat(dir); err != nil || !i.IsDir() {
		return usageError("fsck: %s is no data folder", dir)
	}
	if _, err := os.Stat(filepath.Join(dir, "log")); err != nil {
		if _, err := os.Stat(filepath.Join(dir, "genesis.json")); err != nil {
			return usageError("fsck: %s is no data folder: %v", dir, err)
		}
	}
	o, err := f.options("fsck")
	if err != nil {
		return err
	}
	if o.Absences, err = absences(os.DirFS(dir)); err != nil {
		return fmt.Errorf("fsck: %w", err)
	}
	done := func() {}
	if isTerminal(s.err) {
		o.Progress, done = fsckProgress(s.err, time.Now)
	}
	r, err := checker.Run(ctx, os.DirFS(dir), o, 0)
	done()
	if err != nil {
		return err
	}
	if f.json {
		_, err = s.out.Write(r.JSON())
	} else {
		_, err = io.WriteString(s.out, r.Text())
	}
	if err != nil {
		return err
	}
	if code := r.ExitCode(); code != ledger.ExitPass {
		return exitError{code: code}
	}
	return nil
}

// fsckProgress returns what shows on one line of a terminal, a few times a second, how
// far a check is, how fast, and how long it will still take; and what ends the line.
func fsckProgress(w io.Writer, now func() time.Time) (show func(ledger.FsckProgress), done func()) {
	begin, last := now(), time.Time{}
	show = func(p ledger.FsckProgress) {
		at := now()
		if at.Sub(last) < 200*time.Millisecond && p.Bytes < p.Total {
			return
		}
		last = at
		line := fmt.Sprintf("%d blocks, %d leaves", p.Blocks, p.Leaves)
		if took := at.Sub(begin).Seconds(); took >= 0.5 && p.Total > 0 && p.Bytes > 0 {
			part := float64(p.Bytes) / float64(p.Total)
			left := time.Duration(took * (1/part - 1) * float64(time.Second))
			line += fmt.Sprintf(", %.0f leaves/s, %.0f %%, %s left", float64(p.Leaves)/took, 100*part, left.Round(time.Second))
		}
		fmt.Fprintf(w, "\r%-76s", line)
	}
	return show, func() { fmt.Fprintln(w) }
}
