package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/stopline-traffic/stopline/pkg/ledger"
)

var verifyCommand = command{
	name:     "verify",
	synopsis: "stopline verify [--policy FILE] [--json] BUNDLE",
	summary:  "check an evidence bundle offline, against a policy that you trust",
	manual: `Checks a bundle with nothing but the bundle itself and the policy that you pin:
every record's signature, its place in a block that a quorum of validators
agreed on, the block's place in the log, and the checkpoint's signatures. No
network is used.

The policy (C2SP tlog-policy: the log's key, the validators' cosigning keys, and
how many are needed) must come to you by a way that you trust, not with the
bundle: the one inside is only a hint. The demo leaves it in its data folder as
policy. Without --policy the file that $STOPLINE_POLICY names is used.

EXIT STATUS
    0  passed
    1  failed; the record and the reason are named
    2  wrong usage, or a file cannot be read
    3  consistent in itself, but no policy was pinned: anybody could have made
       it. Fingerprints are printed, to compare with what you know`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		policy := fs.String("policy", os.Getenv("STOPLINE_POLICY"), "`FILE` with the policy that you trust")
		asJSON := fs.Bool("json", false, "print one JSON object")
		return func(_ context.Context, args []string, s streams) error {
			if len(args) != 1 {
				return usageError("verify: one bundle is needed, got %d arguments", len(args))
			}
			return verify(s, *policy, args[0], *asJSON)
		}
	},
}

// maxBundle is more than a bundle may be, so that a wrong file is not read whole.
const maxBundle = 1 << 30

func verify(s streams, policyFile, bundleFile string, asJSON bool) error {
	var trusted *ledger.Policy
	if policyFile != "" {
		b, err := os.ReadFile(policyFile)
		if err != nil {
			return usageError("verify: --policy: %v", err)
		}
		if trusted, err = ledger.ParsePolicy(b); err != nil {
			return usageError("verify: --policy %s: %v", policyFile, err)
		}
	}
	b, err := readAtMost(bundleFile, maxBundle)
	if err != nil {
		return usageError("verify: %v", err)
	}
	r, err := ledger.VerifyBundle(b, trusted)
	var f *ledger.Finding
	if err != nil && !errors.As(err, &f) {
		return err // findings are in the report
	}
	if asJSON {
		_, err = s.out.Write(append(r.JSON(), '\n'))
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

func readAtMost(name string, n int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, n+1))
	err = errors.Join(err, f.Close())
	if err == nil && int64(len(b)) > n {
		err = fmt.Errorf("%s: more than %d bytes", name, n)
	}
	return b, err
}
