package main

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/sealing"
)

// Commands about what is kept, and for how long. They make proposals of registry
// changes, which go the way of all others: see registry.go.

var retentionCommand = command{
	name: "retention",
	synopsis: `stopline retention show [--json] DIR
stopline retention due [--json] DIR
stopline retention purge --dry-run [--json] DIR`,
	summary: "show how long payloads are kept, and what is due",
	manual: `How long the payloads of a class of records are kept says the registry's
retention entry: for each class a floor, before which they are not let go of, and
a ceiling, after which nobody may have them any more. What it does not name is
kept for good, and so is what the registry itself needs. To change it:

    stopline registry propose --type retention --id retention --file BODY --out P

with a BODY like {"version": 1, "classes": [{"class": "readings",
"floor_s": 2592000, "ceiling_s": 7776000}]}.

show prints the classes in the data folder DIR with their floors and ceilings,
legal holds, redactions, and deletions on their way. due adds which leaves are
due; purge --dry-run is the same. Purging itself is done by sealing and by the
validators while they run, each with a receipt in the log.`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		asJSON := fs.Bool("json", false, "print JSON")
		dry := fs.Bool("dry-run", false, "purge: say what would go, and let nothing go")
		return func(_ context.Context, args []string, s streams) error {
			if len(args) != 2 || !slices.Contains([]string{"show", "due", "purge"}, args[0]) {
				return usageError("retention: show, due or purge, and one data folder are needed")
			}
			if args[0] == "purge" && !*dry {
				return usageError("retention purge: sealing purges by itself, with a receipt; only --dry-run can be had here")
			}
			v, err := sealing.SurveyFolder(args[1])
			if err != nil {
				return err
			}
			if args[0] == "show" {
				for i := range v.Classes {
					v.Classes[i].Ranges = nil
				}
			}
			if *asJSON {
				return printJSON(s.out, v)
			}
			return printSurvey(s, v, args[0] != "show")
		}
	},
}

func printSurvey(s streams, v *sealing.Survey, due bool) error {
	w := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	if len(v.Policy) == 0 {
		fmt.Fprintf(w, "block %d; the registry has no retention entry: everything is kept\n\n", v.Height)
	} else {
		fmt.Fprintf(w, "block %d, %s; retention entry %x\n\n", v.Height, v.Time.Format(time.RFC3339), []byte(v.Policy)[:8])
	}
	fmt.Fprint(w, "CLASS\tFLOOR\tCEILING\tRECORDS\tDUE\tHELD\n")
	for _, c := range v.Classes {
		floor, ceiling := "for good", "never"
		if c.FloorS != nil {
			floor, ceiling = (time.Duration(*c.FloorS) * time.Second).String(), (time.Duration(*c.CeilingS) * time.Second).String()
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%d\n", c.Class, floor, ceiling, c.Records, c.Due, c.Held)
		for _, r := range c.Ranges {
			fmt.Fprintf(w, "  due: leaves %d to %d\n", r.First, r.Last)
		}
	}
	for _, id := range sortedKeys(v.Holds) {
		fmt.Fprintf(w, "hold %s: case %s, by %s\n", clean(id), clean(v.Holds[id].Case), clean(v.Holds[id].By))
	}
	for _, t := range v.Tombstones {
		fmt.Fprintf(w, "redacted: leaf %d by block %d, legal basis %s %s\n", t.Index, t.Since, t.Basis, clean(t.Reference))
	}
	for _, p := range v.Pending {
		fmt.Fprintf(w, "deletion on its way (%s): because of %s, leaves %d to %d\n", p.Stage, p.Receipt.Reason, p.Receipt.Ranges[0].First, p.Receipt.Ranges[len(p.Receipt.Ranges)-1].Last)
	}
	return w.Flush()
}

func sortedKeys[V any](m map[string]V) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// goRound declares what sign and submit need, and returns what to do for them;
// done is false for other verbs.
func goRound(fs *flag.FlagSet, o *registryOptions) func(ctx context.Context, verb string, args []string, s streams) (done bool, err error) {
	fs.StringVar(&o.url, "url", "", "address `URL` of the running demo\nDefault: http://127.0.0.1:8080; sign asks nobody without it")
	fs.StringVar(&o.key, "key", "", "sign, submit: `FILE` with an official's private key")
	fs.StringVar(&o.out, "out", "", "`FILE` for the proposal, which must not be there yet")
	fs.Uint64Var(&o.blocks, "blocks", 5_000_000, "for how many `BLOCKS` the proposal stands, 0 for ever")
	fs.DurationVar(&o.wait, "wait", 10*time.Second, "submit: how long to wait until it is in force")
	return func(ctx context.Context, verb string, args []string, s streams) (bool, error) {
		o.given = o.url != ""
		o.url = strings.TrimSuffix(cmp.Or(o.url, "http://127.0.0.1:8080"), "/")
		switch verb {
		case "sign":
			return true, o.sign(ctx, args, s)
		case "submit":
			return true, o.submit(ctx, args, s)
		}
		return false, nil
	}
}

var holdCommand = command{
	name: "hold",
	synopsis: `stopline hold place --id ID --case CASE --by WHO [filters] --out PROPOSAL [--url URL]
stopline hold release --id ID --out PROPOSAL [--url URL]
stopline hold sign --key FILE [--url URL] PROPOSAL
stopline hold submit --key FILE [--url URL] PROPOSAL`,
	summary: "keep records for a case, whatever the retention says",
	manual: `A hold keeps records from being let go of until it is released: those that all
filters given are true of, by what the records' signers say. Without any, all.

place and release write proposals of a registry change; officials sign them, and
one submits them, as with stopline registry.`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		var o registryOptions
		var h identity.Hold
		var classes, junctions, devices, leaves, from, to string
		round := goRound(fs, &o)
		fs.StringVar(&o.id, "id", "", "`ID` of the hold; never used again")
		fs.StringVar(&h.Case, "case", "", "place: the `CASE`")
		fs.StringVar(&h.By, "by", "", "place: `WHO` asked for it")
		fs.StringVar(&classes, "classes", "", "place: only of these `CLASSES`, with commas")
		fs.StringVar(&junctions, "junctions", "", "place: only of these `JUNCTIONS`, with commas")
		fs.StringVar(&devices, "devices", "", "place: only of these `DEVICES`, with commas")
		fs.StringVar(&leaves, "leaves", "", "place: these `LEAVES` and no filters, with commas")
		fs.StringVar(&from, "from", "", "place: not of before this `TIME`, RFC 3339")
		fs.StringVar(&to, "to", "", "place: not of after this `TIME`, RFC 3339")
		return func(ctx context.Context, args []string, s streams) error {
			verb := ""
			if len(args) > 0 {
				verb, args = args[0], args[1:]
			}
			if done, err := round(ctx, verb, args, s); done {
				return err
			}
			o.typ = string(identity.TypeHold)
			switch verb {
			case "release":
				o.revoke = true
			case "place":
				h.Classes = list[string](classes)
				h.Junctions = list[traffic.JunctionID](junctions)
				h.Devices = list[traffic.DeviceID](devices)
				for _, l := range list[string](leaves) {
					n, err := strconv.ParseUint(l, 10, 64)
					if err != nil {
						return usageError("--leaves: %q is no leaf's index", l)
					}
					h.Leaves = append(h.Leaves, n)
				}
				for _, t := range []struct {
					name, text string
					ms         *int64
				}{{"from", from, &h.FromUnixMS}, {"to", to, &h.ToUnixMS}} {
					if t.text == "" {
						continue
					}
					at, err := time.Parse(time.RFC3339, t.text)
					if err != nil {
						return usageError("--%s: %v", t.name, err)
					}
					*t.ms = at.UnixMilli()
				}
				b, err := json.Marshal(h)
				if err != nil {
					return err
				}
				o.body = b
			default:
				return usageError("hold: place, release, sign or submit is needed, got %q", verb)
			}
			return o.propose(ctx, args, s)
		}
	},
}

// list splits at commas.
func list[T ~string](s string) (out []T) {
	for _, p := range strings.Split(s, ",") {
		if p = strings.TrimSpace(p); p != "" {
			out = append(out, T(p))
		}
	}
	return out
}

var redactCommand = command{
	name: "redact",
	synopsis: `stopline redact bases
stopline redact propose --leaf N --basis CODE --data DIR --out PROPOSAL [--reference TEXT] [--url URL]
stopline redact sign --key FILE [--url URL] PROPOSAL
stopline redact submit --key FILE [--url URL] PROPOSAL`,
	summary: "erase one record's content everywhere, leaving a tombstone",
	manual: `A redaction has every holder let go of a record's envelope and salt: the payload
store, the validators, the index of audit, and the streams. What stays is in the
log for good: the leaf, which says nothing without the salt, and the redaction,
with the legal basis and who decided. All other records are proven as before.

propose reads the leaf's commitment from the log of the data folder DIR; anybody
who has the log can do that. bases lists the legal bases. Nothing of what is to
be erased belongs into --reference. Officials of at least two departments must
sign, as with stopline registry.`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		var o registryOptions
		var x identity.Redaction
		var leaf, data, commitment string
		round := goRound(fs, &o)
		fs.StringVar(&leaf, "leaf", "", "propose: `INDEX` of the record's leaf in the log")
		fs.StringVar(&x.Basis, "basis", "", "propose: `CODE` of the legal basis")
		fs.StringVar(&x.Reference, "reference", "", "propose: `TEXT` that names the decision, public for good")
		fs.StringVar(&data, "data", "", "propose: data folder `DIR` with the log")
		fs.StringVar(&commitment, "commitment", "", "propose: the leaf's commitment in `HEX`, instead of --data")
		return func(ctx context.Context, args []string, s streams) error {
			verb := ""
			if len(args) > 0 {
				verb, args = args[0], args[1:]
			}
			if done, err := round(ctx, verb, args, s); done {
				return err
			}
			switch verb {
			case "bases":
				w := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
				for _, b := range identity.Bases() {
					fmt.Fprintf(w, "%s\t%s\n", b.Code, b.Text)
				}
				return w.Flush()
			case "propose":
			default:
				return usageError("redact: bases, propose, sign or submit is needed, got %q", verb)
			}
			index, err := strconv.ParseUint(leaf, 10, 64)
			if err != nil {
				return usageError("redact propose: --leaf %q: is no leaf's index", leaf)
			}
			if (data == "") == (commitment == "") {
				return usageError("redact propose: either --data or --commitment is needed")
			}
			if data != "" {
				l, err := leafAt(data, index)
				if err != nil {
					return err
				}
				if l.Class != ledger.ClassRecord {
					return fmt.Errorf("leaf %d is that of a header, which holds no record", index)
				}
				commitment = hex.EncodeToString(l.Commitment[:])
			}
			if err := x.Commitment.UnmarshalText([]byte(commitment)); err != nil {
				return usageError("redact propose: --commitment: %v", err)
			}
			if o.body, err = json.Marshal(x); err != nil {
				return err
			}
			o.typ, o.id = string(identity.TypeRedaction), strconv.FormatUint(index, 10)
			return o.propose(ctx, args, s)
		}
	},
}

// leafAt reads a leaf of the sealed log in a data folder, and proves it.
func leafAt(dir string, index uint64) (ledger.Leaf, error) {
	policy, err := os.ReadFile(filepath.Join(dir, "policy"))
	if err != nil {
		return ledger.Leaf{}, err
	}
	if _, err := ledger.ParsePolicy(policy); err != nil {
		return ledger.Leaf{}, err
	}
	note, err := os.ReadFile(filepath.Join(dir, "log", "checkpoint"))
	if err != nil {
		return ledger.Leaf{}, err
	}
	text, _, _ := strings.Cut(string(note), "\n\n")
	cp, err := ledger.ParseCheckpoint(text + "\n")
	if err != nil {
		return ledger.Leaf{}, err
	}
	if index >= cp.Size {
		return ledger.Leaf{}, fmt.Errorf("the sealed log has %d leaves, and no leaf %d", cp.Size, index)
	}
	r := ledger.TileReaderFunc(func(t ledger.TileID) ([]byte, error) {
		return os.ReadFile(filepath.Join(dir, "log", filepath.FromSlash(t.Path())))
	})
	l, err := ledger.ReadLeaf(r, cp.Size, index)
	if err != nil {
		return ledger.Leaf{}, err
	}
	proof, err := ledger.Prove(r, cp.Size, index)
	if err != nil {
		return ledger.Leaf{}, err
	}
	return l, ledger.CheckInclusion(cp, index, l, proof)
}
