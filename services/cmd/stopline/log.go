package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	neturl "net/url"
	"os"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/district"
)

var logCommand = command{
	name:     "log",
	synopsis: "stopline log check [--policy FILE] [--seen FILE] --genesis FILE URL",
	summary:  "check a district's newest checkpoint over HTTP",
	manual: `Reads the newest checkpoint of the log at URL and verifies it from a genesis
document that you trust: who the validators are now is followed from the first
ones on, through the proof of each change that the log serves, and a quorum of
them must have cosigned.

--policy says whose cosignatures you want besides, such as a neighbouring
district's: the file that the district gives out, which names its first
validators. Without it a quorum of validators is enough.

--seen is a file that remembers the checkpoint; the next time, the log must show
that it has only grown since. Keep one for each log.

EXIT STATUS
    0  the checkpoint is good
    1  it is not, or the log has not only grown; or it cannot be read
    2  wrong usage`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		genesis := fs.String("genesis", "", "`FILE` with the district's genesis document")
		policy := fs.String("policy", "", "`FILE` with the policy that you trust")
		seen := fs.String("seen", "", "`FILE` that remembers the newest checkpoint")
		return func(ctx context.Context, args []string, s streams) error {
			if len(args) == 2 && args[0] == "check" && *genesis != "" {
				return logCheck(ctx, s, args[1], *genesis, *policy, *seen)
			}
			return usageError("log: want «check», --genesis and one URL")
		}
	},
}

// logWait is how long one file of a log may take.
const logWait = 20 * time.Second

// remoteLog reads a log over HTTP.
type remoteLog struct {
	ctx    context.Context //nolint:containedctx // of one command
	client *http.Client
	url    string
}

// get reads one file of at most n bytes.
func (r *remoteLog) get(name string, n int64) ([]byte, error) {
	req, err := http.NewRequestWithContext(r.ctx, http.MethodGet, strings.TrimRight(r.url, "/")+"/"+name, nil)
	if err != nil {
		return nil, err
	}
	resp, err := r.client.Do(req)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, n+1))
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("%s: %s", name, resp.Status)
	case int64(len(b)) > n:
		return nil, fmt.Errorf("%s: more than %d bytes", name, n)
	}
	return b, nil
}

// ReadTile makes it a ledger.TileReader.
func (r *remoteLog) ReadTile(t ledger.TileID) ([]byte, error) {
	return r.get(t.Path(), 1<<25) // 256 entries of 65,535 bytes and their lengths
}

func logCheck(ctx context.Context, s streams, url, genesisFile, policyFile, seenFile string) error {
	if u, err := neturl.Parse(url); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return usageError("log check: %q: must be the URL of a log", url)
	}
	genesis, err := readAtMost(genesisFile, maxGenesis)
	if err != nil {
		return usageError("log check: --genesis: %v", err)
	}
	policy, err := logPolicy(genesis, policyFile)
	if err != nil {
		return usageError("log check: %v", err)
	}
	r := &remoteLog{ctx: ctx, client: &http.Client{Timeout: logWait}, url: url}
	// The witnessed one where witnesses are needed, and it alone may meet a policy
	// that wants them.
	var sealed *ledger.Sealed
	var set ledger.Council
	var signed []byte
	var last error
	for _, name := range []string{"checkpoint", "checkpoint.witnessed"} {
		if signed, last = r.get(name, ledger.MaxNote); last != nil {
			continue
		}
		// After the checkpoint, so that it shows all changes before it.
		var doc []byte
		if doc, last = r.get("succession", ledger.MaxSuccession); last != nil {
			return last
		}
		proof, err := ledger.ParseSuccessionProof(doc)
		if err != nil {
			return err
		}
		line, err := proof.Verify(genesis, policy)
		if err != nil {
			return err
		}
		if sealed, set, last = line.OpenNewest(signed); last == nil {
			break
		}
	}
	if last != nil {
		return last
	}
	grown := ""
	if seenFile != "" {
		if grown, err = onlyGrown(r, seenFile, sealed); err != nil {
			return err
		}
		if err := district.WriteFile(seenFile, signed, 0o644); err != nil {
			return err
		}
	}
	fmt.Fprintf(s.out, "OK: log %s, %d entries\n", sealed.Origin, sealed.Size)
	if len(set.Validators) > 0 {
		fmt.Fprintf(s.out, "decided by %d validators, in force since block %d\n", len(set.Validators), set.Since)
	}
	for _, c := range sealed.Cosignatures {
		fmt.Fprintf(s.out, "  cosigned by %s at %s\n", c.Witness.Cosigner.Name(), c.At.Format("2006-01-02 15:04:05 UTC"))
	}
	_, err = io.WriteString(s.out, grown)
	return err
}

// logPolicy returns the policy for a log's first validators.
func logPolicy(genesis []byte, file string) (*ledger.Policy, error) {
	if file != "" {
		b, err := readAtMost(file, ledger.MaxPolicy)
		if err != nil {
			return nil, fmt.Errorf("--policy: %w", err)
		}
		p, err := ledger.ParsePolicy(b)
		if err != nil {
			return nil, fmt.Errorf("--policy %s: %w", file, err)
		}
		return p, nil
	}
	g, err := identity.ParseGenesis(genesis)
	if err != nil {
		return nil, fmt.Errorf("--genesis: %w", err)
	}
	reg, err := identity.NewRegistry(g)
	if err != nil {
		return nil, fmt.Errorf("--genesis: %w", err)
	}
	b, err := ledger.CouncilPolicy(g, reg.Validators())
	if err != nil {
		return nil, fmt.Errorf("--genesis: %w", err)
	}
	return ledger.ParsePolicy(b)
}

// onlyGrown holds a checkpoint against the one that was seen before.
func onlyGrown(r *remoteLog, file string, now *ledger.Sealed) (string, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return "seen for the first time\n", nil
	}
	if err != nil {
		return "", err
	}
	text, _, _ := strings.Cut(string(b), "\n\n")
	before, err := ledger.ParseCheckpoint(text + "\n")
	switch {
	case err != nil:
		return "", fmt.Errorf("%s: %w", file, err)
	case before.Origin != now.Origin:
		return "", fmt.Errorf("%s: is of the log %s, this is %s", file, before.Origin, now.Origin)
	case before.Size > now.Size:
		return "", fmt.Errorf("the log has shrunk: %d entries were seen, it shows %d", before.Size, now.Size)
	case before.Size == now.Size && before.Root != now.Root:
		return "", fmt.Errorf("the log was forked: two roots of %d entries", now.Size)
	case before.Size == now.Size:
		return "as seen before\n", nil
	}
	if before.Size > 0 {
		p, err := tlog.ProveTree(int64(now.Size), int64(before.Size), ledger.NewHashReader(r, now.Size))
		if err != nil {
			return "", fmt.Errorf("consistency: %w", err)
		}
		if err := tlog.CheckTree(p, int64(now.Size), tlog.Hash(now.Root), int64(before.Size), tlog.Hash(before.Root)); err != nil {
			return "", fmt.Errorf("the log does not show that it has only grown from the %d entries seen before to %d: %w", before.Size, now.Size, err)
		}
	}
	return fmt.Sprintf("has only grown since %d entries were seen\n", before.Size), nil
}
