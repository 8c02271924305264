package audit

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"golang.org/x/mod/sumdb/note"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Rules of alarms.
const (
	// Fork: a checkpoint that bears all signatures it needs cannot belong to the
	// same history as others that were seen.
	Fork = "fork"
	// RollBack: the log here is shorter than it was.
	RollBack = "roll-back"
	// Missing: what a checkpoint covers is not here, for longer than a hiccup.
	Missing = "missing"
	// Damage: what is here does not fit together.
	Damage = "damage"
	// Unsigned: a checkpoint in the log lacks signatures that it needs.
	Unsigned = "unsigned"
)

// Alarm is something that must not be, and that only people can put right.
type Alarm struct {
	// ID is the same as long as it is about the same thing.
	ID     string    `json:"id"`
	Rule   string    `json:"rule"`
	Detail string    `json:"detail"`
	Since  time.Time `json:"since"`
	// Cleared is when it was seen no more. A fork never clears by itself.
	Cleared *time.Time `json:"cleared,omitempty"`
	// Evidence is a file in the auditor's memory, for `stopline verify`.
	Evidence string `json:"evidence,omitempty"`
}

const (
	maxPatience = 50 * time.Second // so that an alarm is raised within 60 s
	// tellEvery is how often alarms that stand are told again, for those who come
	// later.
	tellEvery = 10 * time.Second
	// lookFor bounds one look at what is new, so that nobody waits long for it.
	lookFor = 400 * time.Millisecond
	// keepSeconds is how often what was verified is made durable.
	keepEvery = time.Second
	// maxPending bounds what others saw that is not here yet.
	maxPending = 256
	// seenEvery is how often one source's checkpoints are kept that say nothing
	// new.
	seenEvery = time.Minute
)

// kept is the newest checkpoint that was verified: what comes later must have
// grown out of it.
type kept struct {
	Height ledger.Height `json:"height"`
	Size   uint64        `json:"size"`
	Root   string        `json:"root"`
	Note   string        `json:"note"`
}

// foreign is a checkpoint that somebody else saw and whose log is not here yet.
type foreign struct {
	from   string
	note   []byte
	sealed *ledger.Sealed
	since  time.Time
}

// seen is one record of the memory of others' checkpoints.
type seen struct {
	At      time.Time `json:"at"`
	From    string    `json:"from"`
	Verdict string    `json:"verdict"`
	Note    string    `json:"note"`
}

// Verdicts on a checkpoint that somebody else saw.
const (
	Consistent = "consistent" // it is of this log's history
	Ahead      = "ahead"      // nothing here reaches that far yet
	Forked     = "fork"
)

// watch re-verifies what is sealed, and remembers it. Its own state is of its
// memory folder, which is no cache: it cannot be made again.
type watch struct {
	s      *Service
	seen   *seglog.Log
	alarms *seglog.Log
	count  metric.Int64Counter

	// Owned by look, under s.refreshing.
	loaded   bool
	at       place
	tiler    *ledger.Tiler
	full     []ledger.TileFile
	next     uint64 // record of the history
	savedAt  time.Time
	saved    kept
	retryAt  time.Time
	met      *finding // what the last walk broke off at
	failing  bool
	first    map[string]time.Time // when a condition was first met
	stat     map[string]fs.FileInfo
	fileSize uint64

	mu       sync.Mutex // guards what follows
	newest   kept
	pending  []foreign
	standing map[string]*Alarm
	outbox   []Alarm
	toldAt   time.Time
	lastSeen map[string]time.Time
	m        Metrics
}

func newWatch(s *Service) (_ *watch, err error) {
	w := &watch{s: s, first: map[string]time.Time{}, stat: map[string]fs.FileInfo{}, standing: map[string]*Alarm{}, lastSeen: map[string]time.Time{}}
	// Without a provider of metrics it counts for nobody.
	if w.count, err = otel.Meter("github.com/stopline-traffic/stopline/services/audit").Int64Counter("stopline.audit.alarms",
		metric.WithDescription("Alarms that the auditor has raised, by rule.")); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	for _, l := range []struct {
		log **seglog.Log
		dir string
	}{{&w.seen, "seen"}, {&w.alarms, "alarms"}} {
		dir := filepath.Join(s.c.Memory, l.dir)
		if s.c.Quiet {
			*l.log, err = seglog.OpenReader(dir)
		} else if err = os.MkdirAll(s.c.Memory, 0o755); err == nil {
			*l.log, err = seglog.Open(dir, seglog.Options{})
		}
		if err != nil {
			return nil, err
		}
	}
	b, err := os.ReadFile(w.newestFile())
	if err == nil {
		err = json.Unmarshal(b, &w.newest)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", w.newestFile(), err)
	}
	w.saved = w.newest
	if err := w.alarms.Scan(0, func(i uint64, rec []byte) error {
		var a Alarm
		if err := json.Unmarshal(rec, &a); err != nil {
			return fmt.Errorf("alarms: record %d: %w", i, err)
		}
		delete(w.standing, a.ID)
		if a.Cleared == nil {
			w.standing[a.ID] = &a
		}
		return nil
	}); err != nil {
		return nil, err
	}
	return w, nil
}

func (w *watch) newestFile() string { return filepath.Join(w.s.c.Memory, "newest.json") }

func (w *watch) close() error {
	var errs []error
	w.mu.Lock()
	newest := w.newest
	w.mu.Unlock()
	errs = append(errs, w.save(newest))
	for _, l := range []*seglog.Log{w.seen, w.alarms} {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	return errors.Join(errs...)
}

func (w *watch) save(k kept) error {
	if k == w.saved || w.s.c.Quiet {
		return nil
	}
	b, err := json.Marshal(k)
	if err != nil {
		return err
	}
	if err := district.WriteFile(w.newestFile(), append(b, '\n'), 0o644); err != nil {
		return err
	}
	w.saved = k
	return nil
}

func (w *watch) metrics() Metrics {
	w.mu.Lock()
	defer w.mu.Unlock()
	m := w.m
	m.Verified, m.Standing = w.newest.Size, uint64(len(w.standing))
	return m
}

// finding is an alarm's condition as one look meets it.
type finding struct {
	rule, subject, detail string
	// wait is set where it may be a hiccup.
	wait     bool
	evidence string
}

// look verifies what is new, and raises and clears alarms. trouble is what was
// wrong with reading the folder. The caller holds s.refreshing.
func (w *watch) look(trouble error) {
	if w.s.c.Quiet {
		return
	}
	now := time.Now()
	var fs []finding
	if trouble != nil {
		w.loaded = false // the files were opened anew, and may be others
		fs = append(fs, finding{rule: Damage, subject: "folder", detail: trouble.Error()})
	}
	if w.s.blocks != nil && w.s.history != nil {
		fs = append(fs, w.folder(now)...)
		fs = append(fs, w.foreign()...)
	}
	raised := map[string]bool{}
	for _, f := range fs {
		id := f.rule + " " + f.subject
		raised[id] = true
		if _, ok := w.first[id]; !ok {
			w.first[id] = now
		}
		if f.wait && now.Sub(w.first[id]) < w.s.c.Patience {
			continue
		}
		w.raise(now, id, f)
	}
	for id := range w.first {
		if !raised[id] {
			delete(w.first, id)
		}
	}
	// A look that broke off has not seen everything that it saw before.
	if !w.failing {
		w.clear(now, raised)
	}
}

func (w *watch) raise(now time.Time, id string, f finding) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.standing[id] != nil {
		return
	}
	a := &Alarm{ID: id, Rule: f.rule, Detail: f.detail, Since: now.UTC(), Evidence: f.evidence}
	w.standing[id] = a
	w.m.Alarms++
	w.count.Add(context.Background(), 1, metric.WithAttributes(attribute.String("rule", f.rule)))
	w.s.log.Error("audit: alarm", "rule", a.Rule, "err", a.Detail)
	w.record(*a)
}

// record makes an alarm's new state durable, and has it told. Caller holds mu.
func (w *watch) record(a Alarm) {
	w.outbox = append(w.outbox, a)
	b, err := json.Marshal(a)
	if err == nil {
		_, err = w.alarms.Append(b)
	}
	if err != nil {
		w.s.log.Error("audit: an alarm could not be made durable", "rule", a.Rule, "err", err)
	}
}

func (w *watch) clear(now time.Time, raised map[string]bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(w.standing)) {
		a := w.standing[id]
		if raised[id] || a.Rule == Fork {
			continue
		}
		delete(w.standing, id)
		at := now.UTC()
		a.Cleared = &at
		w.s.log.Info("audit: alarm has cleared", "rule", a.Rule, "err", a.Detail)
		w.record(*a)
	}
}

// Alarms returns those that stand, by id.
func (s *Service) Alarms() []Alarm {
	s.watch.mu.Lock()
	defer s.watch.mu.Unlock()
	out := []Alarm{}
	for _, id := range slices.Sorted(maps.Keys(s.watch.standing)) {
		out = append(out, *s.watch.standing[id])
	}
	return out
}

// AlarmHistory returns every change of every alarm, the oldest first.
func (s *Service) AlarmHistory() ([]Alarm, error) {
	out := []Alarm{}
	err := s.watch.alarms.Scan(0, func(_ uint64, rec []byte) error {
		var a Alarm
		if err := json.Unmarshal(rec, &a); err != nil {
			return err
		}
		out = append(out, a)
		return nil
	})
	return out, err
}

// tell publishes alarms that are new, and now and then all that stand.
func (s *Service) tell() {
	if s.c.Bus == nil {
		return
	}
	w := s.watch
	w.mu.Lock()
	out := w.outbox
	w.outbox = nil
	if now := time.Now(); now.Sub(w.toldAt) >= tellEvery {
		w.toldAt = now
		for _, a := range w.standing {
			out = append(out, *a)
		}
	}
	w.mu.Unlock()
	for i := range out {
		b, err := json.Marshal(&out[i])
		if err == nil {
			err = s.c.Bus.Send(topic.Alarm(s.genesis.District), b)
		}
		if err != nil {
			s.log.Warn("audit: an alarm could not be told; it is told again", "rule", out[i].Rule, "err", err)
		}
	}
}

// folder verifies what is new in the data folder.
func (w *watch) folder(now time.Time) (out []finding) {
	if w.replaced() {
		// Somebody has put other files in the place of those that are open.
		if err := w.s.shut(); err != nil {
			w.s.log.Warn("audit: closing replaced files", "err", err)
		}
		w.loaded = false
		if err := w.s.open(); err != nil {
			return []finding{{rule: Damage, subject: "folder", detail: err.Error()}}
		}
	}
	w.mu.Lock()
	newest := w.newest
	w.mu.Unlock()
	height, err := w.lastSealed()
	if err != nil {
		return []finding{{rule: Damage, subject: "history", detail: err.Error()}}
	}
	if height < newest.Height {
		out = append(out, finding{rule: RollBack, subject: "history", detail: fmt.Sprintf("the history of checkpoints ends with block %d; block %d was seen sealed, at size %d", height, newest.Height, newest.Size)})
	}
	if n := w.s.blocks.Next(); n < uint64(newest.Height) {
		out = append(out, finding{rule: RollBack, subject: "blocks", detail: fmt.Sprintf("the journal ends with block %d; block %d was seen sealed, at size %d", n, newest.Height, newest.Size)})
	}
	out = append(out, w.file(now, newest)...)
	if len(out) > 0 && out[0].rule == RollBack {
		w.loaded = false // what comes after is verified against what was kept
		return out
	}
	if now.Before(w.retryAt) {
		if w.met != nil { // it was not looked at again
			out = append(out, *w.met)
		}
		return out
	}
	f, done := w.walk(now)
	w.failing = f == nil && !done && w.failing
	w.met = f
	if f != nil {
		// Begin again from what was kept; not at once, because it may be long ago.
		w.loaded, w.retryAt = false, now.Add(min(5*time.Second, 5*w.s.c.Poll))
		w.failing = true
		out = append(out, *f)
	}
	if err := w.keep(now, false); err != nil {
		out = append(out, finding{rule: Damage, subject: "memory", detail: err.Error()})
	}
	return out
}

// replaced reports whether the newest files of the journals are others than
// before, or shorter.
func (w *watch) replaced() bool {
	changed := false
	for _, dir := range []string{"log/blocks", "log/checkpoints"} {
		entries, err := os.ReadDir(filepath.Join(w.s.c.Dir, dir))
		if err != nil || len(entries) == 0 {
			if w.stat[dir] != nil {
				changed = true
			}
			delete(w.stat, dir)
			continue
		}
		if old := w.stat[dir]; old != nil {
			st, err := os.Stat(filepath.Join(w.s.c.Dir, dir, old.Name()))
			if err != nil || !os.SameFile(old, st) || st.Size() < old.Size() {
				changed = true
			}
		}
		if st, err := os.Stat(filepath.Join(w.s.c.Dir, dir, entries[len(entries)-1].Name())); err == nil {
			w.stat[dir] = st
		}
	}
	return changed
}

// lastSealed returns the height of the last record of the history.
func (w *watch) lastSealed() (ledger.Height, error) {
	n := w.s.history.Next()
	if n == 0 {
		return 0, nil
	}
	at, err := w.sealedAt(n - 1)
	if err != nil {
		return 0, err
	}
	return at.Height, nil
}

func (w *watch) sealedAt(i uint64) (*ledger.SealedAt, error) {
	b, err := w.s.history.Read(i)
	if err != nil {
		return nil, err
	}
	at, err := ledger.ParseSealedAt(b)
	if err != nil {
		return nil, fmt.Errorf("history of checkpoints: record %d: %w", i, err)
	}
	return at, nil
}

// file looks at the checkpoint that is served, which is written after the
// history.
func (w *watch) file(now time.Time, newest kept) []finding {
	const name = "log/checkpoint"
	b, err := os.ReadFile(filepath.Join(w.s.c.Dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		if newest.Size == 0 {
			return nil
		}
		return []finding{{rule: Missing, subject: name, detail: "the served checkpoint is gone", wait: true}}
	}
	if err != nil {
		return []finding{{rule: Damage, subject: name, detail: err.Error()}}
	}
	sealed, err := w.open(b)
	if err != nil {
		// Those who seal may have changed in blocks that are being read.
		return []finding{{rule: Unsigned, subject: name, detail: name + ": " + err.Error(), wait: true}}
	}
	if sealed.Size < w.fileSize || sealed.Size < newest.Size && now.Sub(w.savedAt) > w.s.c.Patience {
		return []finding{{rule: RollBack, subject: name, detail: fmt.Sprintf("the served checkpoint is of size %d; one of size %d was seen", sealed.Size, max(w.fileSize, newest.Size))}}
	}
	w.fileSize = sealed.Size
	switch verdict, err := w.judge(sealed); {
	case err != nil:
		return []finding{{rule: Damage, subject: "index", detail: err.Error()}}
	case verdict == Forked:
		return []finding{w.fork(name, sealed, b)}
	case verdict == Ahead:
		return []finding{{rule: Missing, subject: name, detail: fmt.Sprintf("the served checkpoint is of size %d; blocks up to there are not all here", sealed.Size), wait: true}}
	}
	return nil
}

// open verifies a checkpoint under any set of validators that the district has
// had, the newest first.
func (w *watch) open(signed []byte) (*ledger.Sealed, error) {
	w.s.mu.RLock()
	sets := slices.Clone(w.s.succession.Sets())
	w.s.mu.RUnlock()
	var first error
	for i := len(sets) - 1; i >= 0; i-- {
		sealed, err := sets[i].Quorum.Open(signed)
		if err == nil {
			return sealed, nil
		}
		if first == nil {
			first = err
		}
	}
	return nil, first
}

// judge compares a checkpoint, signed as it must be, with the log as it is here.
func (w *watch) judge(c *ledger.Sealed) (string, error) {
	w.s.mu.RLock()
	have := w.s.now.size
	w.s.mu.RUnlock()
	if c.Size > have {
		return Ahead, nil
	}
	root, ok, err := w.s.index.rootAt(context.Background(), c.Size)
	if err != nil {
		return "", err
	}
	if !ok || root != c.Root {
		// No block of ours ends there: validators cosign nothing else.
		return Forked, nil
	}
	return Consistent, nil
}

// fork describes a fork, and leaves proof of it where two checkpoints of one size
// are at hand.
func (w *watch) fork(from string, c *ledger.Sealed, signed []byte) finding {
	f := finding{rule: Fork, subject: fmt.Sprintf("%d %x", c.Size, c.Root[:8]),
		detail: fmt.Sprintf("a checkpoint of size %d with root %x, seen by %s, bears all signatures that it needs, and is not of this log's history", c.Size, c.Root[:8], from)}
	ours, err := w.noteAt(c.Size)
	if err != nil || ours == nil {
		return f
	}
	a, err := ledger.NewCheckpointAccusation(ours, signed).Marshal()
	if err == nil {
		name := filepath.Join("evidence", fmt.Sprintf("fork-%d-%x.json", c.Size, c.Root[:8]))
		path := filepath.Join(w.s.c.Memory, name)
		if err = os.MkdirAll(filepath.Dir(path), 0o755); err == nil {
			err = district.WriteFile(path, a, 0o644)
		}
		if err == nil {
			f.evidence = name
		}
	}
	if err != nil {
		w.s.log.Error("audit: proof of a fork could not be written", "err", err)
	}
	return f
}

// noteAt returns our sealed checkpoint of a size, nil if there is none.
func (w *watch) noteAt(size uint64) ([]byte, error) {
	w.mu.Lock()
	newest := w.newest
	w.mu.Unlock()
	if newest.Size == size {
		return []byte(newest.Note), nil
	}
	h, end, err := w.s.index.blockOf(context.Background(), size-1)
	if err != nil || end != size {
		return nil, err
	}
	i, err := w.search(h)
	if err != nil || i == w.s.history.Next() {
		return nil, err
	}
	at, err := w.sealedAt(i)
	if err != nil || at.Height != h {
		return nil, err
	}
	return at.Note, nil
}

// search returns the first record of the history for block h or a later one.
func (w *watch) search(h ledger.Height) (uint64, error) {
	first, end := w.s.history.First(), w.s.history.Next()
	var bad error
	n := sort.Search(int(end-first), func(k int) bool {
		at, err := w.sealedAt(first + uint64(k))
		if err != nil {
			bad = err
			return true
		}
		return at.Height >= h
	})
	return first + uint64(n), bad
}

// load takes up the right edge of the log as it was when newest was verified, or
// an empty log where nothing was.
func (w *watch) load() *finding {
	w.mu.Lock()
	newest := w.newest
	w.mu.Unlock()
	w.tiler, w.at, w.full, w.next = &ledger.Tiler{}, place{}, nil, w.s.history.First()
	if newest.Height == 0 {
		w.loaded = true
		return nil
	}
	rec, err := w.s.blocks.Read(uint64(newest.Height - 1))
	if err != nil {
		return &finding{rule: Damage, subject: "blocks", detail: fmt.Sprintf("block %d, which was seen sealed: %v", newest.Height, err)}
	}
	d, err := ledger.ParseDecided(rec)
	if err != nil {
		return &finding{rule: Damage, subject: "blocks", detail: fmt.Sprintf("block %d, which was seen sealed: %v", newest.Height, err)}
	}
	root, err := hex.DecodeString(newest.Root)
	if err != nil || len(root) != len(ledger.Hash{}) {
		return &finding{rule: Damage, subject: "memory", detail: "newest.json: root: must be 32 bytes in hex"}
	}
	if d.Header.Size != newest.Size || d.Header.Root != ledger.Hash(root) {
		return &finding{rule: Fork, subject: fmt.Sprintf("block %d %x", newest.Height, d.Header.Root[:8]),
			detail: fmt.Sprintf("block %d in the journal ends at size %d with root %x; it was seen sealed at size %d with root %x: history was rewritten", newest.Height, d.Header.Size, d.Header.Root[:8], newest.Size, root[:8])}
	}
	if w.tiler, err = ledger.LoadTiler(wider{w.s}, newest.Size, ledger.Hash(root)); err != nil {
		// The tiles are no longer those of that size, or were changed: make them
		// from the blocks, all of them.
		w.s.log.Info("audit: the log is verified from its beginning", "err", err)
		w.tiler = &ledger.Tiler{}
		w.loaded = true
		return nil
	}
	if w.next, err = w.search(newest.Height + 1); err != nil {
		return &finding{rule: Damage, subject: "history", detail: err.Error()}
	}
	w.at, w.loaded = place{newest.Height, newest.Size, d.Header.Hash()}, true
	return nil
}

// wider reads tiles of a size also where only wider ones are left.
type wider struct{ s *Service }

func (r wider) ReadTile(t ledger.TileID) ([]byte, error) {
	b, err := r.s.readTile(t)
	if !errors.Is(err, fs.ErrNotExist) || t.Width == ledger.TileWidth {
		return b, err
	}
	full := t
	full.Width = ledger.TileWidth
	path := filepath.Join(r.s.c.Dir, "log", filepath.FromSlash(full.Path()))
	wide, err2 := os.ReadFile(path)
	if errors.Is(err2, fs.ErrNotExist) {
		files, err3 := os.ReadDir(path + ".p")
		if err3 != nil {
			return nil, err
		}
		for _, f := range files {
			var width int
			if _, err := fmt.Sscanf(f.Name(), "%d", &width); err == nil && width > t.Width {
				if wide, err2 = os.ReadFile(filepath.Join(path+".p", f.Name())); err2 == nil {
					break
				}
			}
		}
	}
	if err2 != nil {
		return nil, err
	}
	return narrow(wide, t)
}

// narrow cuts a wider tile.
func narrow(b []byte, t ledger.TileID) ([]byte, error) {
	if t.Level >= 0 {
		if len(b) < 32*t.Width {
			return nil, fmt.Errorf("%s: a wider tile is too short", t.Path())
		}
		return b[:32*t.Width], nil
	}
	es, err := ledger.ReadEntries(b)
	if err != nil || len(es) < t.Width {
		return nil, fmt.Errorf("%s: a wider bundle is too short", t.Path())
	}
	var out []byte
	for _, e := range es[:t.Width] {
		out = ledger.AppendEntry(out, e)
	}
	return out, nil
}

// walk verifies the checkpoints of the history that are new: their signatures,
// that the blocks up to them give their roots, and that the tiles are those of
// the blocks. done is false where it is not through yet.
func (w *watch) walk(now time.Time) (f *finding, done bool) {
	if !w.loaded {
		if f := w.load(); f != nil {
			return f, false
		}
	}
	for end := w.s.history.Next(); w.next < end; {
		if time.Since(now) > lookFor {
			return nil, false
		}
		at, err := w.sealedAt(w.next)
		if err != nil {
			return &finding{rule: Damage, subject: "history", detail: err.Error()}, false
		}
		if at.Height > w.s.at.height {
			if uint64(at.Height) > w.s.blocks.Next() {
				return &finding{rule: Missing, subject: fmt.Sprintf("blocks %d", w.s.blocks.Next()+1),
					detail: fmt.Sprintf("blocks from %d on are sealed and not in the journal", w.s.blocks.Next()+1), wait: true}, false
			}
			return nil, true // not read yet; what is wrong with that is told elsewhere
		}
		if f := w.blocks(at.Height); f != nil {
			return f, false
		}
		if f := w.checkpoint(at, w.next == end-1); f != nil {
			return f, false
		}
		w.next++
	}
	return nil, true
}

// blocks walks up to a block.
func (w *watch) blocks(to ledger.Height) *finding {
	if w.at.height >= to {
		return nil
	}
	bad := func(h ledger.Height, format string, args ...any) *finding {
		return &finding{rule: Damage, subject: fmt.Sprintf("block %d", h), detail: fmt.Sprintf("block %d: ", h) + fmt.Sprintf(format, args...)}
	}
	var found *finding
	err := w.s.blocks.Scan(uint64(w.at.height), func(i uint64, rec []byte) error {
		h := ledger.Height(i + 1)
		if h > to {
			return errEnough
		}
		d, err := ledger.ParseDecided(rec)
		if err != nil {
			found = bad(h, "%v", err)
			return errEnough
		}
		w.tiler.Append(d.Leaves)
		w.full = append(w.full, w.tiler.Full()...)
		switch {
		case d.Header.Height != h || d.Header.PrevSize != w.at.size || w.at.height > 0 && d.Header.Parent != w.at.hash:
			found = bad(h, "does not follow block %d", w.at.height)
		case d.Header.Size != w.tiler.Size() || ledger.LeavesDigest(d.Leaves) != d.Header.Leaves:
			found = bad(h, "its leaves are not those of its header")
		case d.Header.Root != w.tiler.Root():
			found = bad(h, "its leaves do not give the root of its header")
		}
		if found != nil {
			return errEnough
		}
		w.at = place{h, d.Header.Size, d.Header.Hash()}
		// A log that is verified from its beginning must pass what was kept.
		w.mu.Lock()
		newest := w.newest
		w.mu.Unlock()
		if h == newest.Height && (d.Header.Size != newest.Size || hex.EncodeToString(d.Header.Root[:]) != newest.Root) {
			found = &finding{rule: Fork, subject: fmt.Sprintf("block %d %x", h, d.Header.Root[:8]), detail: fmt.Sprintf("block %d was seen sealed with another root: history was rewritten", h)}
			return errEnough
		}
		return nil
	})
	if found == nil && err != nil && !errors.Is(err, errEnough) {
		found = bad(w.at.height+1, "%v", err)
	}
	return found
}

// checkpoint verifies one checkpoint of the history against the blocks walked.
func (w *watch) checkpoint(at *ledger.SealedAt, last bool) *finding {
	w.s.mu.RLock()
	quorum := w.s.succession.At(at.Height).Quorum
	w.s.mu.RUnlock()
	sealed, err := quorum.Open(at.Note)
	if err != nil {
		return &finding{rule: Unsigned, subject: fmt.Sprintf("block %d", at.Height), detail: fmt.Sprintf("the checkpoint of block %d in the history: %v", at.Height, err)}
	}
	if at.Height == w.at.height && (sealed.Size != w.at.size || sealed.Root != w.tiler.Root()) {
		f := w.fork("the history of checkpoints", sealed, at.Note)
		f.detail = fmt.Sprintf("the checkpoint of block %d in the history, of size %d, bears all signatures that it needs, and is not what the blocks give", at.Height, sealed.Size)
		return &f
	}
	for i, t := range w.full {
		if f := w.tile(t, false); f != nil {
			w.full = w.full[i:]
			return f
		}
	}
	w.full = nil
	if last {
		for _, t := range w.tiler.Partial() {
			if f := w.tile(t, true); f != nil {
				return f
			}
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if at.Height > w.newest.Height {
		w.newest = kept{at.Height, sealed.Size, hex.EncodeToString(sealed.Root[:]), string(at.Note)}
	}
	return nil
}

// tile compares a tile on disk with what it must be. A partial one may have been
// removed since, when the log grew.
func (w *watch) tile(t ledger.TileFile, partial bool) *finding {
	b, err := w.s.readTile(t.TileID)
	switch {
	case errors.Is(err, fs.ErrNotExist) && partial:
		if c, err := os.ReadFile(filepath.Join(w.s.c.Dir, "log/checkpoint")); err == nil {
			if sealed, err := w.open(c); err == nil && sealed.Size > w.at.size {
				return nil
			}
		}
		fallthrough
	case errors.Is(err, fs.ErrNotExist):
		return &finding{rule: Missing, subject: t.Path(), detail: t.Path() + " is sealed and not there", wait: true}
	case err != nil:
		return &finding{rule: Damage, subject: t.Path(), detail: err.Error()}
	case !bytes.Equal(b, t.Data):
		return &finding{rule: Damage, subject: t.Path(), detail: t.Path() + " is not what the blocks give"}
	}
	return nil
}

// keep makes what was verified durable.
func (w *watch) keep(now time.Time, always bool) error {
	if !always && now.Sub(w.savedAt) < keepEvery {
		return nil
	}
	w.mu.Lock()
	newest := w.newest
	w.mu.Unlock()
	if newest == w.saved {
		return nil
	}
	w.savedAt = now
	return w.save(newest)
}

// foreign looks again at what others saw that was not here.
func (w *watch) foreign() (out []finding) {
	w.mu.Lock()
	pending := slices.Clone(w.pending)
	w.mu.Unlock()
	var still []foreign
	for _, p := range pending {
		if p.sealed == nil {
			// Signed by validators that were not known yet.
			var err error
			if p.sealed, err = w.open(p.note); err != nil {
				if time.Since(p.since) < w.s.c.Patience {
					still = append(still, p)
				}
				continue
			}
		}
		verdict, err := w.judge(p.sealed)
		if err != nil {
			out = append(out, finding{rule: Damage, subject: "index", detail: err.Error()})
			still = append(still, p)
			continue
		}
		switch verdict {
		case Ahead:
			still = append(still, p)
			if time.Since(p.since) >= w.s.c.Patience {
				out = append(out, finding{rule: Missing, subject: "stretch", detail: fmt.Sprintf("%s saw the log sealed at size %d; here it is not that long: a stretch is withheld", p.from, p.sealed.Size)})
			}
		case Forked:
			out = append(out, w.fork(p.from, p.sealed, p.note))
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pending = append(still, w.pending[len(pending):]...) // only added to meanwhile
	return out
}

// hearSeal takes what sealing announces: it may tell others what it does not
// write here.
func (s *Service) hearSeal(data []byte) {
	var m pb.Seal
	if err := wire.Decode(identity.Protobuf, data, &m); err != nil {
		s.log.Warn("audit: an announced seal cannot be read", "err", err)
		return
	}
	if _, err := s.Saw("sealing", m.Checkpoint); err != nil {
		s.log.Warn("audit: an announced seal is not taken", "err", err)
	}
}

// Saw takes a checkpoint of this district's log that somebody else has seen, and
// says how it fits what is here: [Consistent], [Ahead], [Forked]. The error has
// kind Invalid where it does not bear the signatures that it needs: then it says
// nothing about the log.
func (s *Service) Saw(from string, signed []byte) (verdict string, err error) {
	w := s.watch
	if len(from) > 200 {
		from = strings.ToValidUTF8(from[:200], "")
	}
	now := time.Now()
	sealed, err := w.open(signed)
	if err != nil {
		w.mu.Lock()
		w.m.Strange++
		w.mu.Unlock()
		if !w.bySomebodyNew(signed) {
			return "", kind.Errorf(kind.Invalid, "checkpoint: %w", err)
		}
		w.wait(foreign{from, bytes.Clone(signed), nil, now})
		return Ahead, nil
	}
	if verdict, err = w.judge(sealed); err != nil {
		return "", err
	}
	w.mu.Lock()
	w.m.Seen++
	due := verdict == Forked || now.Sub(w.lastSeen[from]) >= seenEvery
	if due && len(w.lastSeen) < 4*maxPending {
		w.lastSeen[from] = now
	}
	w.mu.Unlock()
	if verdict == Ahead {
		w.wait(foreign{from, bytes.Clone(signed), sealed, now})
	}
	if verdict == Forked && !s.c.Quiet {
		f := w.fork(from, sealed, signed)
		w.raise(now, f.rule+" "+f.subject, f)
		s.tell()
	}
	if !due || s.c.Quiet {
		return verdict, nil
	}
	b, err := json.Marshal(seen{now.UTC(), from, verdict, string(signed)})
	if err == nil {
		_, err = w.seen.Append(b)
	}
	return verdict, err
}

// bySomebodyNew reports whether a checkpoint of the log that lacks known
// cosigners is signed by the log at least, and longer than what is here: then
// the validators may have changed.
func (w *watch) bySomebodyNew(signed []byte) bool {
	key, err := note.NewVerifier(w.s.genesis.LogKey)
	if err != nil || len(signed) > ledger.MaxNote {
		return false
	}
	n, err := note.Open(signed, note.VerifierList(key))
	if err != nil {
		return false
	}
	c, err := ledger.ParseCheckpoint(n.Text)
	w.s.mu.RLock()
	defer w.s.mu.RUnlock()
	return err == nil && c.Origin == w.s.genesis.Origin && c.Size > w.s.now.size
}

// wait keeps a checkpoint until the log is here. Of one source the longest counts
// and the one that has waited longest.
func (w *watch) wait(f foreign) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for i := len(w.pending) - 1; i >= 0; i-- {
		if w.pending[i].from != f.from {
			continue
		}
		if n++; n == 2 { // the oldest stays, the newest is replaced
			for k := len(w.pending) - 1; k >= 0; k-- {
				if w.pending[k].from == f.from {
					w.pending[k] = f
					return
				}
			}
		}
	}
	if len(w.pending) < maxPending {
		w.pending = append(w.pending, f)
	}
}
