package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/stopline-traffic/stopline/pkg/ledger"
)

var fsckCommand = command{
	name:     "fsck",
	synopsis: "stopline fsck [--policy FILE] [--json] DIR",
	summary:  "check a data folder's log offline, and name what is wrong",
	manual: `Walks the log in DIR without a network: genesis document, block journal with its
headers and votes, entries, tiles, every sealed checkpoint with its cosignatures,
and the payloads that have not been let go. What is damaged is named by file,
offset, record and rule. Nothing is changed.

Without --policy the folder's own policy is used, which shows only that the
folder fits together. The demo may be running meanwhile.

EXIT STATUS
    0  everything is as it should be
    1  something is not; it is named
    2  wrong usage, or no data folder`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		policy := fs.String("policy", "", "`FILE` with the policy that you trust")
		asJSON := fs.Bool("json", false, "print one JSON object")
		return func(ctx context.Context, args []string, s streams) error {
			if len(args) != 1 {
				return usageError("fsck: one data folder is needed, got %d arguments", len(args))
			}
			return fsck(ctx, s, args[0], *policy, *asJSON)
		}
	},
}

func fsck(ctx context.Context, s streams, dir, policyFile string, asJSON bool) error {
	if _, err := os.Stat(filepath.Join(dir, "genesis.json")); err != nil {
		return usageError("fsck: %s is no data folder: %v", dir, err)
	}
	var o ledger.FsckOptions
	if policyFile != "" {
		b, err := os.ReadFile(policyFile)
		if err != nil {
			return usageError("fsck: --policy: %v", err)
		}
		if o.Policy, err = ledger.ParsePolicy(b); err != nil {
			return usageError("fsck: --policy %s: %v", policyFile, err)
		}
	}
	if isTerminal(s.err) {
		o.Progress = func(done, total uint64) { fmt.Fprintf(s.err, "\r%d of %d blocks ", done, total) }
	}
	r, err := ledger.Fsck(ctx, os.DirFS(dir), o)
	if o.Progress != nil {
		fmt.Fprintln(s.err)
	}
	if err != nil {
		return err
	}
	if asJSON {
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
