package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
)

var verifyCommand = command{
	name:     "verify",
	synopsis: "stopline verify [--policy FILE] [--genesis FILE] [--json] BUNDLE|ACCUSATION",
	summary:  "check an evidence bundle, or proof of a liar, offline, against keys that you trust",
	manual: `Checks a bundle with nothing but the bundle itself and the policy that you pin:
every record's signature, its place in a block that a quorum of validators
agreed on, the block's place in the log, and the checkpoint's signatures. No
network is used.

The policy (C2SP tlog-policy: the log's key, the validators' cosigning keys, and
how many are needed) must come to you by a way that you trust, not with the
bundle: the one inside is only a hint. The demo leaves it in its data folder as
policy. Without --policy the file that $STOPLINE_POLICY names is used.

An accusation is a JSON document that a validator wrote into its folder evidence/
when it caught another one lying: two votes in one slot, two blocks decided at
one height, or two checkpoints that do not fit together. Votes are signed with
keys that are not in the policy but in the district's genesis document, so those
two kinds need --genesis, with the document as you got it from somebody you
trust; its hash is printed. For validators who came later, or have other keys
now, the accusation shows how they came to be, from genesis on. Checkpoints are
judged by --policy, --genesis or both.

EXIT STATUS
    0  passed; for an accusation: it holds, and the guilty are named
    1  failed; the record and the reason are named
    2  wrong usage, or a file cannot be read
    3  consistent in itself, but no policy was pinned: anybody could have made
       it. Fingerprints are printed, to compare with what you know. For an
       accusation: the keys to judge it by were not given`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		policy := fs.String("policy", os.Getenv("STOPLINE_POLICY"), "`FILE` with the policy that you trust")
		genesis := fs.String("genesis", "", "`FILE` with the district's genesis document, as you trust it: for accusations")
		asJSON := fs.Bool("json", false, "print one JSON object")
		return func(_ context.Context, args []string, s streams) error {
			if len(args) != 1 {
				return usageError("verify: one bundle is needed, got %d arguments", len(args))
			}
			return verify(s, *policy, *genesis, args[0], *asJSON)
		}
	},
}

// maxBundle is more than a bundle may be, so that a wrong file is not read whole.
const maxBundle = 1 << 30

func verify(s streams, policyFile, genesisFile, bundleFile string, asJSON bool) error {
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
	if bytes.HasPrefix(b, []byte("{")) { // a bundle begins with PK
		return verifyAccusation(s, b, trusted, genesisFile, asJSON)
	}
	if genesisFile != "" {
		return usageError("verify: --genesis: a bundle is checked by --policy alone")
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

// maxGenesis is more than a genesis document may be.
const maxGenesis = 256 << 20

func verifyAccusation(s streams, b []byte, policy *ledger.Policy, genesisFile string, asJSON bool) error {
	trust := ledger.Trust{Policy: policy}
	if genesisFile != "" {
		var err error
		if trust.Genesis, err = readAtMost(genesisFile, maxGenesis); err != nil {
			return usageError("verify: --genesis: %v", err)
		}
		if _, err := identity.ParseGenesis(trust.Genesis); err != nil {
			return usageError("verify: --genesis %s: %v", genesisFile, err)
		}
	}
	var j ledger.Judgement
	a, err := ledger.ParseAccusation(b)
	if err == nil {
		j, err = a.Judge(trust)
	}
	if err != nil {
		j.Outcome, j.Reason = ledger.Fail, err.Error()
	}
	var out []byte
	if asJSON {
		if out, err = j.JSON(); err != nil {
			return err
		}
	} else {
		out = []byte(j.Text())
		if trust.Genesis != nil {
			out = fmt.Appendf(out, "\ngenesis %x\n", sha256.Sum256(trust.Genesis))
		}
	}
	if _, err := s.out.Write(out); err != nil {
		return err
	}
	if code := j.ExitCode(); code != ledger.ExitPass {
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
