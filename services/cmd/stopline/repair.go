package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/repair"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

var repairCommand = command{
	name: "repair",
	synopsis: "stopline repair [--from SOURCE]... [--nats URL [--nats-creds FILE | --nats-nkey FILE --nats-user NAME]]\n" +
		"              [--policy FILE] [--checkpoint FILE]... [--dry-run] [--json] DIR",
	summary: "put a damaged data folder right, from what other holders have",
	manual: `Checks DIR as stopline fsck does, makes anew what follows from what is whole, and
fetches the rest: from copies of the folder, from a log on the web (tiles and the
newest checkpoint), from the validators (blocks, and payloads that they still
have). Nothing of that is believed: the folder as it would be is checked first,
down from the genesis document in DIR, and what is wrong is refused, with the file
named. Then each file takes its place in one step; its original is kept in
DIR/damaged-<time>. A repair that was cut short is done again.

Nobody may write to DIR meanwhile: stop what runs on it. Checkpoints that nobody
has any more are left out of the history, which is said; later ones cover what
they covered. Where DIR has neither genesis document nor blocks, --policy must say
which district it is.

EXIT STATUS
    0  everything is as it should be, or would be after what --dry-run lists
    1  something is still damaged; it is named
    2  wrong usage, or no data folder`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		var o repairFlags
		list := func(to *[]string) func(string) error {
			return func(s string) error {
				*to = append(*to, s)
				return nil
			}
		}
		fs.Func("from", "`SOURCE`: another holder's log on the web, by its URL, or a copy of the folder;\nmay be given several times, and they are asked in turn", list(&o.from))
		fs.StringVar(&o.nats.URL, "nats", "", "`URL` of the district's NATS servers, to ask the validators")
		fs.StringVar(&o.nats.CredsFile, "nats-creds", "", "`FILE` with a NATS user's JWT and seed")
		fs.StringVar(&o.nats.NKeyFile, "nats-nkey", "", "`FILE` with a NATS user's seed")
		fs.StringVar(&o.nats.User, "nats-user", "", "`NAME` by which the NATS user has its permissions")
		fs.StringVar(&o.nats.CAFile, "nats-ca", "", "`FILE` with the certificates by which the NATS servers are known")
		fs.StringVar(&o.policy, "policy", "", "`FILE` with the policy that you trust")
		fs.Func("checkpoint", "`FILE` with a signed checkpoint that the log must hold; may be given several\ntimes", list(&o.checkpoints))
		fs.BoolVar(&o.dry, "dry-run", false, "change nothing, and list what would be done")
		fs.BoolVar(&o.json, "json", false, "print one JSON object")
		return func(ctx context.Context, args []string, s streams) error {
			if len(args) != 1 {
				return usageError("repair: one data folder is needed, got %d arguments", len(args))
			}
			return repairFolder(ctx, s, args[0], o)
		}
	},
}

type repairFlags struct {
	fsckFlags
	from []string
	nats bus.ConnectOptions
	dry  bool
}

func repairFolder(ctx context.Context, s streams, dir string, f repairFlags) (err error) {
	if i, err := os.Stat(dir); err != nil || !i.IsDir() {
		return usageError("repair: %s is no data folder", dir)
	}
	o := repair.Options{Dir: dir, DryRun: f.dry, Absences: absences}
	if o.Fsck, err = f.options("repair"); err != nil {
		return err
	}
	for _, from := range f.from {
		if strings.HasPrefix(from, "http://") || strings.HasPrefix(from, "https://") {
			o.Sources = append(o.Sources, repair.HTTP(from, nil))
			continue
		}
		if i, err := os.Stat(from); err != nil || !i.IsDir() {
			return usageError("repair: --from %s: is neither a URL nor a folder", from)
		}
		o.Sources = append(o.Sources, repair.Folder(from, os.DirFS(from)))
	}
	if f.nats.URL != "" {
		f.nats.Name = "repair"
		b, err := bus.Connect(f.nats)
		if err != nil {
			return fmt.Errorf("repair: --nats: %w", err)
		}
		defer b.Close()
		sources, err := validatorSources(dir, f.from, b)
		if err != nil {
			return err
		}
		o.Sources = append(o.Sources, sources...)
	}
	r, err := repair.Run(ctx, o)
	if err != nil {
		return err
	}
	if f.json {
		b, err := json.MarshalIndent(r, "", " ")
		if err != nil {
			return err
		}
		_, err = s.out.Write(append(b, '\n'))
		if err != nil {
			return err
		}
	} else if _, err := io.WriteString(s.out, r.Text()); err != nil {
		return err
	}
	if !r.After.OK {
		return exitError{code: exitFailed}
	}
	return nil
}

// validatorSources has one source for each validator that a genesis document in
// one of the folders names. Those who came later are not asked: the others have
// the same.
func validatorSources(dir string, from []string, b *bus.Bus) (out []repair.Source, err error) {
	var g *identity.Genesis
	for _, d := range append([]string{dir}, from...) {
		doc, err := os.ReadFile(filepath.Join(d, "genesis.json"))
		if err != nil {
			continue
		}
		if g, err = identity.ParseGenesis(doc); err == nil {
			break
		}
	}
	if g == nil {
		return nil, errors.New("repair: --nats: no genesis document to be read says who the validators are")
	}
	reg, err := identity.NewRegistry(g)
	if err != nil {
		return nil, fmt.Errorf("repair: genesis.json: %w", err)
	}
	for _, v := range reg.Validators() {
		name := fmt.Sprintf("validator %d", v.Number)
		out = append(out, repair.Blocks(name, func(ctx context.Context, from ledger.Height, most int) ([]*pb.Block, error) {
			return askBlocks(ctx, b, topic.Sync(g.District, v.Number), from, most)
		}))
	}
	return out, nil
}

// askWait is how long a validator may take to answer.
const askWait = 10 * time.Second

func askBlocks(ctx context.Context, b *bus.Bus, subject string, from ledger.Height, most int) ([]*pb.Block, error) {
	ctx, cancel := context.WithTimeout(ctx, askWait)
	defer cancel()
	req, err := proto.Marshal(&pb.SyncRequest{FromHeight: uint64(from), MaxBlocks: uint32(most)})
	if err != nil {
		return nil, err
	}
	data, err := b.Request(ctx, subject, req)
	if err != nil {
		return nil, err
	}
	var resp pb.SyncResponse
	if err := wire.Decode(identity.Protobuf, data, &resp); err != nil {
		return nil, err
	}
	return resp.Blocks, nil
}
