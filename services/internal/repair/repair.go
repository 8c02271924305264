// Package repair puts a damaged data folder right from what other holders have.
//
// It works on a stage beside the folder. There it makes anew what can be made of
// what is whole (tiles of blocks, the checkpoint of the history), and fetches the
// rest from sources, one kind of file after another. Each time the whole folder as
// it would be is checked as stopline fsck does, down from the genesis document that
// is here: what a source gave stays only if there is nothing wrong with it and
// less wrong with the folder. Only then is anything put in place, each file in one
// step, its original beside it in a folder of its own.
//
// So a source that lies is refused, and a repair that does not succeed, or is cut
// short, leaves no file worse than it was. Nobody may write to the folder
// meanwhile.
//
// For each payload it holds 8 bytes of memory, and of damaged segments all that
// can be read.
package repair

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
	"github.com/stopline-traffic/stopline/services/internal/fsck"
)

// Options of a repair.
type Options struct {
	// Dir is the data folder. Required.
	Dir string
	// Sources are asked in turn.
	Sources []Source
	// Fsck says how the folder is checked; Progress and MaxProblems are not used.
	Fsck ledger.FsckOptions
	// Absences makes what explains absent payloads of a folder. Optional.
	Absences func(fs.FS) (ledger.Absences, error)
	// DryRun changes nothing, and says what would be done.
	DryRun bool
	// Now names the folder of originals. Optional.
	Now func() time.Time
	// Logger is optional.
	Logger *slog.Logger
	// Hook, for tests, is called before each operation that changes the folder:
	// link, rename, remove. An error ends the repair there.
	Hook func(op, path string) error
}

// Action is one file that is replaced or taken away.
type Action struct {
	File string `json:"file"`
	// What is "replace", "add" or "remove".
	What string `json:"what"`
	From string `json:"from,omitempty"`
}

// Report says what a repair did, or would do.
type Report struct {
	Before  ledger.FsckReport `json:"before"`
	After   ledger.FsckReport `json:"after"`
	Actions []Action          `json:"actions,omitempty"`
	// Refused is what sources gave and was not right, with the file.
	Refused []string `json:"refused,omitempty"`
	// Lost is what nobody has any more.
	Lost []string `json:"lost,omitempty"`
	// Aside is the folder, below the data folder, with the originals.
	Aside  string `json:"aside,omitempty"`
	DryRun bool   `json:"dry_run,omitempty"`
}

// Text returns the report for people.
func (r *Report) Text() string {
	var b strings.Builder
	for _, a := range r.Actions {
		verb := map[string]string{"replace": "replaced", "add": "added", "remove": "taken away"}[a.What]
		if r.DryRun {
			verb = "would be " + verb
		}
		fmt.Fprintf(&b, "%s: %s", a.File, verb)
		if a.From != "" {
			fmt.Fprintf(&b, ", from %s", a.From)
		}
		b.WriteByte('\n')
	}
	for _, s := range r.Refused {
		fmt.Fprintf(&b, "refused: %s\n", s)
	}
	for _, s := range r.Lost {
		fmt.Fprintf(&b, "lost: %s\n", s)
	}
	if r.Aside != "" && len(r.Actions) > 0 && !r.DryRun {
		fmt.Fprintf(&b, "originals: %s\n", r.Aside)
	}
	b.WriteString(r.After.Text())
	return b.String()
}

// repair is one run.
type repair struct {
	Options
	*stage
	r   Report
	now ledger.FsckReport // of the stage
}

// own is who is named as the source of what was made from the folder itself.
const own = "this folder"

// rounds bounds how often it goes from the start: what is right shows what else is
// wrong.
const rounds = 8

// Run repairs a data folder. An error means that it could not be tried, or that
// putting files in place failed half-way; what it could not repair is in the
// report's After.
func Run(ctx context.Context, o Options) (Report, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Hook == nil {
		o.Hook = func(string, string) error { return nil }
	}
	s, err := newStage(o.Dir)
	if err != nil {
		return Report{}, fmt.Errorf("repair: %w", err)
	}
	p := &repair{Options: o, stage: s}
	err = p.run(ctx)
	if derr := s.drop(); err == nil {
		err = derr
	}
	if err != nil {
		return p.r, fmt.Errorf("repair: %w", err)
	}
	return p.r, nil
}

func (p *repair) run(ctx context.Context) error {
	var err error
	if p.r.Before, err = p.check(ctx); err != nil {
		return err
	}
	p.now = p.r.Before
	for range rounds {
		staged, writes := len(p.names()), p.writes
		for _, f := range []func(context.Context) error{p.documents, p.strays, p.blocks, p.payloads, p.history, p.checkpoint, p.succession, p.tiles} {
			if p.now.OK {
				break
			}
			if err := f(ctx); err != nil {
				return err
			}
		}
		if p.now.OK || len(p.names()) == staged && p.writes == writes {
			break
		}
	}
	p.r.After, p.r.DryRun = p.now, p.DryRun
	for _, n := range p.names() {
		if p.same(n) {
			delete(p.files, n)
			continue
		}
		a := Action{File: n, What: "replace"}
		if _, err := os.Lstat(filepath.Join(p.dir, filepath.FromSlash(n))); err != nil {
			a.What = "add"
		}
		if p.gone[n] {
			a.What = "remove"
		}
		a.From = p.files[n].from
		p.r.Actions = append(p.r.Actions, a)
	}
	if len(p.r.Actions) == 0 || p.DryRun {
		return nil
	}
	p.r.Aside = "damaged-" + p.Now().UTC().Format("20060102T150405.000Z")
	return p.apply(p.r.Aside, p.Hook)
}

// check runs fsck over the stage.
func (p *repair) check(ctx context.Context) (ledger.FsckReport, error) {
	o := p.Fsck
	o.Progress, o.MaxProblems = nil, 100_000
	if p.Absences != nil {
		var err error
		if o.Absences, err = p.Absences(p.stage); err != nil {
			return ledger.FsckReport{}, err
		}
	}
	return fsck.Run(ctx, p.stage, o, 0)
}

// problems returns those of now in some files.
func problems(r ledger.FsckReport, in func(file string) bool) (out []ledger.Problem) {
	for _, q := range r.Problems {
		if in(q.File) {
			out = append(out, q)
		}
	}
	return out
}

func below(dir string) func(string) bool {
	return func(f string) bool { return f == dir || strings.HasPrefix(f, dir+"/") }
}

func is(names ...string) func(string) bool {
	return func(f string) bool { return slices.Contains(names, f) }
}

// try stages something and keeps it if the folder is better with it: nothing wrong
// with what was staged, less wrong with its kind of files.
func (p *repair) try(ctx context.Context, from string, in func(string) bool, stage func() error) (kept bool, err error) {
	m := p.mark()
	if err := stage(); err != nil {
		p.back(m)
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		p.refuse("%s: %v", from, err)
		return false, nil
	}
	names := p.since(m)
	if len(names) == 0 {
		return false, nil
	}
	r, err := p.check(ctx)
	if err != nil {
		p.back(m)
		return false, err
	}
	if bad := problems(r, is(names...)); len(bad) > 0 {
		p.back(m)
		p.refuse("%s: %s", from, bad[0])
		return false, nil
	}
	// What was sealed here stays: blocks that contradict it are of a fork, whoever
	// has voted for them.
	had := problems(p.now, below("log/checkpoints"))
	for _, q := range problems(r, below("log/checkpoints")) {
		if q.Conflict && !slices.ContainsFunc(had, func(x ledger.Problem) bool { return x.String() == q.String() }) {
			p.back(m)
			p.refuse("%s: %s contradicts a sealed checkpoint: %s", from, names[0], q)
			return false, nil
		}
	}
	if was, is := len(problems(p.now, in)), len(problems(r, in)); is >= was {
		p.back(m)
		p.refuse("%s: %s: nothing is better with it", from, names[0])
		return false, nil
	}
	p.now = r
	p.Logger.Info("repair: staged", "from", from, "files", len(names), "problems", len(r.Problems))
	return true, nil
}

func (p *repair) refuse(format string, args ...any) {
	if s := fmt.Sprintf(format, args...); !slices.Contains(p.r.Refused, s) {
		p.r.Refused = append(p.r.Refused, s)
	}
}

// documents fetches genesis and policy. A policy must fit genesis; genesis must be
// the one that the blocks here begin with, or what they are sealed with under a
// policy that the caller trusts.
func (p *repair) documents(ctx context.Context) error {
	for _, name := range []string{"genesis.json", "policy"} {
		for _, s := range p.Sources {
			if len(problems(p.now, is(name))) == 0 {
				break
			}
			_, err := p.try(ctx, s.Name(), is(name), func() error {
				b, err := s.File(ctx, name)
				if errors.Is(err, fs.ErrNotExist) {
					return nil
				}
				if err != nil {
					return err
				}
				if name == "genesis.json" {
					if err := p.anchored(b); err != nil {
						return fmt.Errorf("genesis.json: %w", err)
					}
				}
				return p.put(name, b, s.Name())
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// anchored reports whether a genesis document is that of the log here.
func (p *repair) anchored(genesis []byte) error {
	want, where, ok := ledger.Hash{}, "", false
	stop := errors.New("stop")
	_, err := ledger.Salvage(p.stage, "log/blocks", func(_ uint64, rec []byte, file string) error {
		if d, err := ledger.ParseDecided(rec); err == nil {
			want, where, ok = d.Header.Genesis, file, true
			return stop
		}
		return nil
	})
	if err != nil && !errors.Is(err, stop) {
		return err
	}
	if !ok {
		if p.Fsck.Policy != nil {
			return nil // then the check holds the log's first leaf against it
		}
		return errors.New("nothing here says which district this is: a trusted policy is needed")
	}
	if sha256.Sum256(genesis) != want {
		return fmt.Errorf("is of another district than the blocks here, see %s", where)
	}
	return nil
}

// strays takes away what does not belong, once blocks and documents are right.
func (p *repair) strays(ctx context.Context) error {
	var names []string
	for _, q := range p.now.Problems {
		if !q.Stray {
			continue
		}
		if strings.HasPrefix(q.File, "log/tile/") && len(problems(p.now, below("log/blocks"))) > 0 {
			continue // it may belong to blocks that cannot be read
		}
		names = append(names, q.File)
	}
	if len(names) == 0 {
		return nil
	}
	_, err := p.try(ctx, own, is(names...), func() error {
		for _, n := range names {
			p.take(n)
		}
		return nil
	})
	return err
}

// blocks fetches what the block journal lacks.
func (p *repair) blocks(ctx context.Context) error { return p.journal(ctx, "log/blocks") }

// journal fetches records of a journal that cannot be read or are not right.
func (p *repair) journal(ctx context.Context, dir string) error {
	for _, s := range p.Sources {
		if len(problems(p.now, below(dir))) == 0 {
			break
		}
		// First what is damaged only; then, where that does not fit what is beside it,
		// all of the files that it is in.
		for _, whole := range []bool{false, true} {
			kept, err := p.try(ctx, s.Name(), below(dir), func() error {
				j, err := p.load(dir, whole)
				if err != nil {
					return err
				}
				for _, h := range j.holes() {
					if err := s.Records(ctx, dir, h.from, h.to, func(n uint64, rec []byte) error {
						j.filled[n] = rec
						return nil
					}); err != nil {
						return fmt.Errorf("%s: %w", dir, err)
					}
				}
				return j.render(s.Name())
			})
			if err != nil {
				return err
			}
			if kept {
				break
			}
		}
	}
	return nil
}

// journal is what there is of one, and what was found for it.
type journal struct {
	p      *repair
	dir    string
	firsts []uint64
	bad    map[string]bool   // files to be written anew
	mine   map[uint64][]byte // records in bad files that are right
	filled map[uint64][]byte
	have   []span // what is right here, in any file
	next   uint64
	tail   bool // something may be missing at the end
}

// span is numbers from from on and below to.
type span struct{ from, to uint64 }

// load reads a journal. whole: nothing in a damaged file is taken as right.
func (p *repair) load(dir string, whole bool) (*journal, error) {
	j := &journal{p: p, dir: dir, bad: map[string]bool{}, mine: map[uint64][]byte{}, filled: map[uint64][]byte{}}
	type place struct {
		file string
		n    uint64
	}
	wrong := map[place]bool{}
	for _, q := range problems(p.now, below(dir)) {
		if q.Stray {
			continue
		}
		j.bad[q.File] = true
		if q.Record != nil {
			wrong[place{q.File, *q.Record}] = true
		}
		if q.Offset == nil {
			j.tail = true // or the whole journal is missing
		}
	}
	es, err := p.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range es {
		if first, ok := segment.ParseName(e.Name()); ok {
			j.firsts = append(j.firsts, first)
		}
	}
	slices.Sort(j.firsts)
	j.tail = j.tail || len(j.firsts) > 0 && j.bad[dir+"/"+segment.Name(j.firsts[len(j.firsts)-1])]
	j.next, err = ledger.Salvage(p.stage, dir, func(n uint64, rec []byte, file string) error {
		if j.bad[file] {
			if whole || wrong[place{file, n}] {
				return nil
			}
			j.mine[n] = rec
		}
		if k := len(j.have); k > 0 && j.have[k-1].to == n {
			j.have[k-1].to++
		} else {
			j.have = append(j.have, span{n, n + 1})
		}
		return nil
	})
	return j, err
}

// holes returns what is missing, the end included where it may be.
func (j *journal) holes() (out []span) {
	at := uint64(0)
	if j.dir != "log/blocks" && j.dir != "log/checkpoints" && len(j.firsts) > 0 && !j.bad[j.dir+"/"+segment.Name(0)] {
		at = j.firsts[0] // payloads may begin later
	}
	for _, h := range j.have {
		if h.from > at {
			out = append(out, span{at, h.from})
		}
		at = max(at, h.to)
	}
	if j.tail {
		out = append(out, span{at, math.MaxUint64})
	}
	return out
}

// render stages the files that have something new.
func (j *journal) render(from string) error {
	if len(j.filled) == 0 && !slices.ContainsFunc(j.firsts, func(f uint64) bool { return j.bad[j.dir+"/"+segment.Name(f)] }) {
		return nil
	}
	done := map[uint64]bool{}
	write := func(first, limit uint64) error {
		b := segment.AppendHeader(nil, first)
		n := first
		for ; n < limit; n++ {
			rec, ok := j.filled[n]
			if !ok {
				rec, ok = j.mine[n]
			}
			if !ok {
				break
			}
			b = segment.AppendFrames(b, n, rec)
			done[n] = true
		}
		if n < limit && limit != math.MaxUint64 {
			return nil // there is still a hole in it: it stays as it is
		}
		return j.p.put(j.dir+"/"+segment.Name(first), b, from)
	}
	for i, first := range j.firsts {
		limit := uint64(math.MaxUint64)
		if i+1 < len(j.firsts) {
			limit = j.firsts[i+1]
		}
		if j.bad[j.dir+"/"+segment.Name(first)] {
			if err := write(first, limit); err != nil {
				return err
			}
		}
	}
	// What is in none of them had a segment of its own.
	var rest []uint64
	for n := range j.filled {
		if !done[n] {
			rest = append(rest, n)
		}
	}
	slices.Sort(rest)
	for i := 0; i < len(rest); {
		k := i + 1
		for k < len(rest) && rest[k] == rest[k-1]+1 {
			k++
		}
		if err := write(rest[i], rest[k-1]+1); err != nil {
			return err
		}
		i = k
	}
	return nil
}

// wants finds the blocks of payloads that are missing.
func (p *repair) wants() (out []Want, err error) {
	absent := slices.Clone(p.now.Absent)
	slices.SortFunc(absent, func(a, b ledger.LeafRange) int {
		if a.First < b.First {
			return -1
		}
		return 1
	})
	if len(absent) == 0 {
		return nil, nil
	}
	i := 0
	_, err = ledger.Salvage(p.stage, "log/blocks", func(_ uint64, rec []byte, _ string) error {
		d, err := ledger.ParseDecided(rec)
		if err != nil {
			return nil //nolint:nilerr // its payloads are dealt with when it is right
		}
		w := Want{Header: d.Header}
		for leaf := d.Header.PrevSize + 1; leaf < d.Header.Size; leaf++ {
			for i < len(absent) && absent[i].Last < leaf {
				i++
			}
			if i < len(absent) && absent[i].First <= leaf {
				w.Leaves = append(w.Leaves, leaf)
			}
		}
		if len(w.Leaves) > 0 {
			out = append(out, w)
		}
		return nil
	})
	return out, err
}

// payloads fetches payloads that are missing, each into the folder of its class.
func (p *repair) payloads(ctx context.Context) error {
	in := below("payload")
	if len(problems(p.now, in)) == 0 || len(problems(p.now, below("log/blocks"))) > 0 {
		return nil // without the blocks nobody knows what is missing
	}
	for _, s := range p.Sources {
		if len(problems(p.now, in)) == 0 {
			return nil
		}
		_, err := p.try(ctx, s.Name(), in, func() error { return p.fetchPayloads(ctx, s) })
		if err != nil {
			return err
		}
	}
	// Stores that do not fit record by record are taken over file by file.
	es, err := p.ReadDir("payload")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range es {
		if dir := path.Join("payload", e.Name()); e.IsDir() && len(problems(p.now, below(dir))) > 0 {
			if err := p.journal(ctx, dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// entry is one place of a payload store.
type entry struct {
	leaf uint64
	n    uint64 // record, where it is known
	data []byte // of what was fetched
}

func (p *repair) fetchPayloads(ctx context.Context, s Source) error {
	wants, err := p.wants()
	if err != nil {
		return err
	}
	found := map[string][]entry{}
	have := map[uint64]bool{}
	err = s.Payloads(ctx, wants, func(class string, pl *ledger.Payload) error {
		if class == "" || strings.ContainsAny(class, "/\\.") {
			return fmt.Errorf("payload: leaf %d: %q is no class", pl.Index, class)
		}
		i, ok := slices.BinarySearchFunc(wants, pl.Index, func(w Want, leaf uint64) int {
			if w.Header.Size <= leaf {
				return -1
			}
			if w.Header.PrevSize > leaf {
				return 1
			}
			return 0
		})
		if !ok || pl.Height != wants[i].Header.Height || have[pl.Index] {
			return nil // not asked for, or had
		}
		have[pl.Index] = true
		found[class] = append(found[class], entry{leaf: pl.Index, data: pl.Marshal()})
		return nil
	})
	if err != nil {
		return err
	}
	es, err := p.ReadDir("payload")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range es {
		if e.IsDir() && e.Name() != "tmp" && found[e.Name()] == nil && len(problems(p.now, below("payload/"+e.Name()))) > 0 {
			found[e.Name()] = []entry{} // what is torn off its end may be all that is wrong
		}
	}
	for class, es := range found {
		if err := p.fit(s, "payload/"+class, es); err != nil {
			return err
		}
	}
	return nil
}

// fit puts payloads into their places in a store: between those before and behind.
func (p *repair) fit(s Source, dir string, add []entry) error {
	j, err := p.load(dir, false)
	if err != nil {
		return err
	}
	var all []entry
	drop := map[uint64]bool{}
	for _, e := range add {
		drop[e.leaf] = true // what is here of it is not right
	}
	_, err = ledger.Salvage(p.stage, dir, func(n uint64, rec []byte, file string) error {
		pl, err := ledger.ParsePayload(rec)
		if err != nil || drop[pl.Index] || j.bad[file] && j.mine[n] == nil {
			delete(j.mine, n)
			return nil //nolint:nilerr // it will be missing
		}
		all = append(all, entry{leaf: pl.Index, n: n})
		return nil
	})
	if err != nil {
		return err
	}
	slices.SortFunc(add, func(a, b entry) int {
		if a.leaf < b.leaf {
			return -1
		}
		return 1
	})
	k := 0
	place := func(from, to uint64, upTo uint64) { // those below upTo belong in [from, to)
		first := k
		for k < len(add) && add[k].leaf < upTo {
			k++
		}
		n := uint64(k - first)
		switch {
		case to == math.MaxUint64 || n == to-from:
		case from == 0 && n < to: // those before them were let go of
			from = to - n
		default:
			return // others are missing, too
		}
		for i := range n {
			j.filled[from+i] = add[first+int(i)].data
		}
	}
	at := uint64(0)
	for _, e := range all {
		place(at, e.n, e.leaf)
		at = e.n + 1
	}
	place(at, math.MaxUint64, math.MaxUint64)
	return j.render(s.Name())
}

// history fetches sealed checkpoints; the last may be in the file checkpoint; what
// nobody has is left out, so that those behind it can be read.
func (p *repair) history(ctx context.Context) error {
	const dir = "log/checkpoints"
	if len(problems(p.now, is("genesis.json", "policy"))) > 0 || len(problems(p.now, below("log/blocks"))) > 0 {
		return nil
	}
	if err := p.journal(ctx, dir); err != nil || len(problems(p.now, below(dir))) == 0 {
		return err
	}
	for _, q := range problems(p.now, below(dir)) {
		if q.Conflict {
			return nil // that is no damage but evidence, and stays
		}
	}
	_, err := p.try(ctx, own, below(dir), func() error { return p.closeRanks(dir) })
	return err
}

// closeRanks rewrites the history from its first damaged file on with what can be
// read of it.
func (p *repair) closeRanks(dir string) error {
	j, err := p.load(dir, false)
	if err != nil {
		return err
	}
	begin := uint64(0)
	for i, first := range j.firsts {
		// A file is right if it is not named and the one before it is there.
		if j.bad[dir+"/"+segment.Name(first)] || i == 0 && first > 0 {
			break
		}
		if i > 0 && !slices.ContainsFunc(j.have, func(s span) bool { return s.from < first && s.to > first || s.to == first }) {
			break
		}
		begin = first
	}
	var recs [][]byte
	last := uint64(0)
	err = func() error {
		_, err := ledger.Salvage(p.stage, dir, func(n uint64, rec []byte, file string) error {
			if at, err := ledger.ParseSealedAt(rec); err == nil && uint64(at.Height) > last && (!j.bad[file] || j.mine[n] != nil) {
				last = uint64(at.Height)
				if n >= begin {
					recs = append(recs, rec)
				}
			}
			return nil
		})
		return err
	}()
	if err != nil {
		return err
	}
	if b, err := fs.ReadFile(p.stage, "log/checkpoint"); err == nil {
		height, err := p.heightOf(b)
		if err != nil {
			return err
		}
		if uint64(height) > last {
			at := ledger.SealedAt{Height: height, Note: b}
			recs = append(recs, at.Marshal())
		}
	}
	b := segment.AppendHeader(nil, begin)
	for i, rec := range recs {
		b = segment.AppendFrames(b, begin+uint64(i), rec)
	}
	if err := p.put(dir+"/"+segment.Name(begin), b, own); err != nil {
		return err
	}
	for _, first := range j.firsts {
		if first > begin {
			p.take(dir + "/" + segment.Name(first))
		}
	}
	p.r.Lost = append(p.r.Lost, dir+": checkpoints that nobody has; later ones cover what they covered")
	return nil
}

// heightOf finds the block at whose end a checkpoint is, 0 where there is none.
func (p *repair) heightOf(note []byte) (height ledger.Height, err error) {
	text, _, _ := strings.Cut(string(note), "\n\n")
	cp, err := ledger.ParseCheckpoint(text + "\n")
	if err != nil {
		return 0, nil //nolint:nilerr // the file is damaged, too
	}
	found := errors.New("found")
	_, err = ledger.Salvage(p.stage, "log/blocks", func(_ uint64, rec []byte, _ string) error {
		d, err := ledger.ParseDecided(rec)
		if err == nil && d.Header.Size == cp.Size && d.Header.Root == cp.Root {
			height = d.Header.Height
			return found
		}
		return nil
	})
	if errors.Is(err, found) {
		err = nil
	}
	return height, err
}

// checkpoint makes the file checkpoint of the history.
func (p *repair) checkpoint(ctx context.Context) error {
	const name = "log/checkpoint"
	if len(problems(p.now, is(name))) == 0 || len(problems(p.now, below("log/checkpoints"))) > 0 {
		return nil
	}
	_, err := p.try(ctx, own, is(name), func() error {
		var note []byte
		_, err := ledger.Salvage(p.stage, "log/checkpoints", func(_ uint64, rec []byte, _ string) error {
			at, err := ledger.ParseSealedAt(rec)
			if err == nil {
				note = at.Note
			}
			return err
		})
		if err != nil {
			return err
		}
		if note == nil {
			p.take(name) // nothing is sealed yet
			return nil
		}
		return p.put(name, note, own)
	})
	return err
}

// succession makes the list of validator sets of the blocks, or fetches it.
func (p *repair) succession(ctx context.Context) error {
	const name = "succession.json"
	if len(problems(p.now, below("log/blocks"))) > 0 {
		return nil // they say what must be in it
	}
	for _, s := range append(slices.Clone(p.Sources), nil) {
		if len(problems(p.now, is(name))) == 0 {
			return nil
		}
		from := own
		if s != nil {
			from = s.Name()
		}
		_, err := p.try(ctx, from, is(name), func() error {
			b := p.now.Succession
			if s != nil {
				var err error
				if b, err = s.File(ctx, name); errors.Is(err, fs.ErrNotExist) {
					return nil
				} else if err != nil {
					return err
				}
			}
			if b == nil {
				return nil
			}
			return p.put(name, b, from)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// tiles makes tiles of the blocks, or fetches them where blocks cannot be read.
func (p *repair) tiles(ctx context.Context) error {
	in := below("log/tile")
	if len(problems(p.now, in)) == 0 {
		return nil
	}
	if len(problems(p.now, below("log/blocks"))) == 0 {
		_, err := p.try(ctx, own, in, p.makeTiles)
		return err
	}
	for _, s := range p.Sources {
		_, err := p.try(ctx, s.Name(), in, func() error {
			for _, q := range problems(p.now, in) {
				if q.Stray {
					continue
				}
				b, err := s.File(ctx, q.File)
				if errors.Is(err, fs.ErrNotExist) {
					continue
				}
				if err != nil {
					return err
				}
				if err := p.put(q.File, b, s.Name()); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// makeTiles makes the tiles that are damaged or missing of the blocks.
func (p *repair) makeTiles() error {
	want := map[ledger.TileID][]ledger.TileID{} // by the full tile
	for _, q := range problems(p.now, below("log/tile")) {
		if q.Stray {
			p.take(q.File)
			continue
		}
		id, err := ledger.ParseTilePath(strings.TrimPrefix(q.File, "log/"))
		if err != nil {
			continue
		}
		full := id
		full.Width = ledger.TileWidth
		want[full] = append(want[full], id)
	}
	put := func(t ledger.TileFile) error {
		full := t.TileID
		full.Width = ledger.TileWidth
		for _, id := range want[full] {
			if id.Width > t.Width {
				continue
			}
			part := t
			part.Data = part.Data[:len(part.Data)/t.Width*id.Width] // all entries are of one size
			if err := p.put("log/"+id.Path(), part.Data, own); err != nil {
				return err
			}
		}
		return nil
	}
	var t ledger.Tiler
	_, err := ledger.Salvage(p.stage, "log/blocks", func(_ uint64, rec []byte, _ string) error {
		d, err := ledger.ParseDecided(rec)
		if err != nil {
			return err
		}
		t.Append(d.Leaves)
		for _, f := range t.Full() {
			if err := put(f); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, f := range t.Partial() {
		if err := put(f); err != nil {
			return err
		}
	}
	return nil
}
