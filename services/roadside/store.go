package roadside

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/stopline-traffic/stopline/pkg/ledger/segment"
)

// StoreConfig says where and how much a [Store] keeps. All is optional.
type StoreConfig struct {
	// Dir holds the frames; it belongs to one unit, and is made if need be.
	// Empty: frames are kept in memory only, and end with the process.
	Dir string
	// MaxFrames bounds the frames kept. Default 65,536: a busy junction sends one
	// a second and up to one more each second at changes of its lamps, so that
	// this is nine hours of it, and eighteen of an idle one.
	MaxFrames int
	// MaxBytes bounds the sizes of all files together, at any time, and what is
	// kept in memory where there are none. Default 64 MiB, enough for MaxFrames of
	// 1 kB. A file system may need more: each file takes whole blocks.
	MaxBytes int64
	// Flush is how long a frame waits in memory for its receipt before it is
	// written. While the network is there, little is ever written. Default 500 ms.
	Flush time.Duration
	// Logger is optional.
	Logger *slog.Logger
	// Hook, for tests, is called before each operation that changes a file:
	// create, write, sync, syncdir, remove. If it returns an error the operation
	// is not carried out and fails with it.
	Hook func(op, path string) error
}

// Validate returns everything that is wrong with c, joined, each with its field.
func (c StoreConfig) Validate() error {
	var errs []error
	if c.MaxFrames < 0 {
		errs = append(errs, fmt.Errorf("max_frames: %d is negative", c.MaxFrames))
	}
	if c.MaxBytes < 0 {
		errs = append(errs, fmt.Errorf("max_bytes: %d is negative", c.MaxBytes))
	}
	if c.Flush < 0 {
		errs = append(errs, fmt.Errorf("flush: %v is negative", c.Flush))
	}
	return errors.Join(errs...)
}

// StoreStats is a store at one moment, and what became of the frames since it
// was opened.
type StoreStats struct {
	// Waiting frames have no receipt yet; Events are those of them with events.
	Waiting int `json:"waiting"`
	Events  int `json:"waiting_events"`
	// Bytes of all files, or in memory where there are none.
	Bytes int64 `json:"bytes"`
	// Found frames were there when the store was opened. Kept frames have been
	// written and are durable.
	Found uint64 `json:"found"`
	Kept  uint64 `json:"kept"`
	// Dropped frames had to go without a receipt; those with events are counted
	// apart. The gap in their sequence says so to the district.
	Dropped       uint64 `json:"dropped"`
	DroppedEvents uint64 `json:"dropped_events"`
	// Torn ends of files are what a power cut leaves of frames that were never
	// counted as kept; Damaged places are not: what could be read around them is
	// kept. Errors are operations on files that failed.
	Torn    uint64 `json:"torn"`
	Damaged uint64 `json:"damaged"`
	Errors  uint64 `json:"errors"`
}

// Add adds another store's figures.
func (s *StoreStats) Add(o StoreStats) {
	s.Waiting += o.Waiting
	s.Events += o.Events
	s.Bytes += o.Bytes
	s.Found += o.Found
	s.Kept += o.Kept
	s.Dropped += o.Dropped
	s.DroppedEvents += o.DroppedEvents
	s.Torn += o.Torn
	s.Damaged += o.Damaged
	s.Errors += o.Errors
}

// Store keeps the frames that have no receipt, in order, within bounds. Make
// one with [OpenStore] and give it to [RunConfig].
//
// A frame that has waited for [StoreConfig.Flush] is written, together with all
// others that wait, and synced once for all of them. So a power cut, or kill -9,
// takes the frames without a receipt of the last one and a half Flush, and no
// others. A frame that had its receipt may be sent once more after that; the
// district takes it once.
//
// Frames with events and frames without are in files of their own, each of a
// 64th of the bounds. When the store is full the oldest file without events
// goes, as a whole; only where there is none left, the oldest with events, and
// only for frames with events. No file is ever written anew: a store that is full, or damaged, needs no more
// room than before. A file goes when the last of its frames has its receipt. A
// frame that goes while it is on its way, of which there are at most [Window],
// may still arrive; what it counts as is known with its answer.
//
// When files cannot be written, frames wait in memory, at most 4,096 of them.
type Store struct {
	cfg         StoreConfig
	log         *slog.Logger
	chunkFrames int
	chunkBytes  int64
	wake        chan struct{} // one token: something was put
	kick        chan struct{} // one token: much waits in memory

	io sync.Mutex // taken before mu; held while files are changed

	mu      sync.Mutex
	order   []*stored // by key; the dead are taken out from time to time
	dead    int       // in order
	pending []*stored // in memory only, oldest first; some may be dead
	chunks  [2][]*chunk
	trash   []*chunk // to be removed
	nextID  uint64   // of a chunk
	disk    int64    // bytes of files that exist, and those in trash
	memory  int64    // bytes pending
	waiting [2]int   // alive, by class
	inMem   int      // of which pending
	stats   StoreStats
	oldest  time.Time // when the oldest pending was put; zero: none is
	command commandFile
	ownPlan []byte // the fall-back plan; guarded by mu
	// ownOverride is the newest override or release; guarded by mu.
	ownOverride []byte
}

// class is 0 for frames without events, 1 for those with.
type class int

const (
	plain class = iota
	event
)

var classNames = [2]string{"plain", "event"}

// key is a frame's place in its device's order.
type key struct{ epoch, seq uint64 }

func (k key) compare(o key) int {
	return cmp.Or(cmp.Compare(k.epoch, o.epoch), cmp.Compare(k.seq, o.seq))
}

func (k key) String() string { return fmt.Sprintf("%d/%d", k.epoch, k.seq) }

// stored is a frame in the store. Guarded by the store's mu.
type stored struct {
	key      key
	class    class
	size     int64  // in a file
	envelope []byte // nil once it is in a file
	chunk    *chunk
	offset   int64
	record   uint64
	dead     bool // settled, or dropped
	flying   bool // has been sent and not been answered
	evicted  bool // dropped while it was flying: its answer decides what it counts as
}

// chunk is one file.
type chunk struct {
	id      uint64
	class   class
	size    int64
	records uint64 // written
	alive   int
	busy    bool // is being written
	full    bool // is not appended to
}

func (c *chunk) name() string { return fmt.Sprintf("%012d.%s", c.id, classNames[c.class]) }

// first is the number of the file's first record.
func (c *chunk) first() uint64 { return c.id << 32 }

// keySize is what stands before the envelope in a record.
const keySize = 16

// Bounds of what waits in memory where files cannot be written.
const (
	memoryFrames = 4096
	memoryBytes  = 8 << 20

	kickFrames = 256 // are written before their time
)

// OpenStore opens a folder, or makes it, and reads all of it. Damage is logged
// and counted, and no error; an error is that the folder cannot be used.
func OpenStore(c StoreConfig) (*Store, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	if c.MaxFrames == 0 {
		c.MaxFrames = 1 << 16
	}
	if c.MaxBytes == 0 {
		c.MaxBytes = 64 << 20
	}
	if c.Flush == 0 {
		c.Flush = 500 * time.Millisecond
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Store{cfg: c, log: c.Logger, chunkFrames: max(c.MaxFrames/64, 1), chunkBytes: max(c.MaxBytes/64, 1), wake: make(chan struct{}, 1), kick: make(chan struct{}, 1), nextID: 1}
	if c.Dir == "" {
		return s, nil
	}
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	if err := s.load(); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	if err := s.command.open(filepath.Join(c.Dir, "command")); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	// What cannot be read is as none: the unit has its filed plan.
	switch b, err := os.ReadFile(filepath.Join(c.Dir, planFile)); {
	case err == nil && len(b) <= MaxCommand:
		s.ownPlan = b
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		s.log.Warn("the fall-back plan cannot be read", "path", c.Dir, "err", err)
		s.stats.Errors++
	}
	switch b, err := os.ReadFile(filepath.Join(c.Dir, overrideFile)); {
	case err == nil && len(b) <= MaxCommand:
		s.ownOverride = b
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		s.log.Warn("the override cannot be read", "path", c.Dir, "err", err)
		s.stats.Errors++
	}
	return s, nil
}

// Fallback is the fall-back plan that was kept last, for [Config]; nil where there
// is none.
func (s *Store) Fallback() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ownPlan
}

// keepPlan makes a plan durable, in place of the one before.
func (s *Store) keepPlan(envelope []byte) error {
	s.io.Lock()
	defer s.io.Unlock()
	if s.cfg.Dir != "" {
		if err := s.replace(filepath.Join(s.cfg.Dir, planFile), envelope); err != nil {
			s.mu.Lock()
			s.stats.Errors++
			s.mu.Unlock()
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ownPlan = envelope
	return nil
}

const (
	planFile     = "plan"
	overrideFile = "override"
)

// Override is the override or release that was taken last, for [Config]; nil where
// there is none.
func (s *Store) Override() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ownOverride
}

// keepOverride makes an override durable, in place of the one before.
func (s *Store) keepOverride(envelope []byte) error {
	s.io.Lock()
	defer s.io.Unlock()
	if s.cfg.Dir != "" {
		if err := s.replace(filepath.Join(s.cfg.Dir, overrideFile), envelope); err != nil {
			s.mu.Lock()
			s.stats.Errors++
			s.mu.Unlock()
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ownOverride = envelope
	return nil
}

// replace writes a file as a whole: after a crash there is the old content or
// the new. What is left of an attempt is written over by the next.
func (s *Store) replace(path string, b []byte) error {
	tmp := path + ".new"
	if err := s.hook("create", tmp); err != nil {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	if err = s.hook("write", tmp); err == nil {
		_, err = f.Write(b)
	}
	if err == nil {
		if err = s.hook("sync", tmp); err == nil {
			err = f.Sync()
		}
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	if err := s.hook("syncdir", s.cfg.Dir); err != nil {
		return err
	}
	d, err := os.Open(s.cfg.Dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Close writes what waits in memory. Call it when Run has returned.
func (s *Store) Close() error {
	return errors.Join(s.flush(), s.command.close())
}

// Stats returns the store's figures.
func (s *Store) Stats() StoreStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Waiting, st.Events, st.Bytes = s.waiting[plain]+s.waiting[event], s.waiting[event], s.disk
	if s.cfg.Dir == "" {
		st.Bytes = s.memory
	}
	st.Errors += s.command.errors()
	return st
}

// LastCommand is the highest sequence of a command that was obeyed, for
// [Config]: what is known of it after a power cut may be some seconds old.
func (s *Store) LastCommand() uint64 { return s.command.last() }

// durable reports whether frames outlive the process.
func (s *Store) durable() bool { return s.cfg.Dir != "" }

// newest returns the key of the newest frame.
func (s *Store) newest() (k key, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.order) == 0 {
		return key{}, false
	}
	return s.order[len(s.order)-1].key, true
}

// put keeps a frame. Others may have to go for it. The envelope must not be
// changed any more.
func (s *Store) put(k key, c class, envelope []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := &stored{key: k, class: c, size: int64(segment.Overhead + keySize + len(envelope)), envelope: envelope}
	if e.size+int64(segment.HeaderSize) > s.cfg.MaxBytes {
		s.log.Error("frame is larger than the store", "seq", k.seq, "bytes", len(envelope))
		s.dropped(c)
		return
	}
	for s.waiting[plain]+s.waiting[event] >= s.cfg.MaxFrames || s.kept()+e.size > s.cfg.MaxBytes {
		if c == plain && s.waiting[plain] == 0 {
			s.log.Warn("store is full of frames with events, dropped one without", "seq", k.String())
			s.dropped(c)
			return
		}
		if !s.evict() {
			break // only trash is left, which the next flush removes
		}
	}
	for s.durable() && (s.inMem >= memoryFrames || s.memory+e.size > memoryBytes) && s.evictPending(plain, event) {
	}
	if at := len(s.order); at > 0 && s.order[at-1].key.compare(k) >= 0 {
		at, _ = slices.BinarySearchFunc(s.order, k, func(e *stored, k key) int { return e.key.compare(k) })
		s.order = slices.Insert(s.order, at, e)
	} else {
		s.order = append(s.order, e)
	}
	s.pending = append(s.pending, e)
	s.waiting[c]++
	s.inMem++
	s.memory += e.size
	if s.oldest.IsZero() {
		s.oldest = time.Now()
	}
	signal(s.wake)
	if s.inMem >= kickFrames {
		signal(s.kick)
	}
}

// signal leaves a token where there is none.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// kept is what counts against MaxBytes of what is not to be removed. Needs mu.
func (s *Store) kept() int64 {
	n := s.disk + s.memory
	for _, c := range s.trash {
		n -= c.size
	}
	return n
}

// dropped counts a frame that is lost. Needs mu.
func (s *Store) dropped(c class) {
	s.stats.Dropped++
	if c == event {
		s.stats.DroppedEvents++
	}
}

// evict makes room by the rule of the package: what it drops is logged and
// counted. It reports whether there was anything. Needs mu.
func (s *Store) evict() bool {
	for _, c := range []class{plain, event} {
		if len(s.chunks[c]) > 0 && s.evictChunk(s.chunks[c][0]) {
			return true
		}
		if s.evictPending(c) {
			return true
		}
	}
	return false
}

func (s *Store) evictChunk(c *chunk) bool {
	var gone []*stored
	for _, e := range s.order {
		if e.chunk == c && !e.dead {
			gone = append(gone, e)
		}
	}
	if len(gone) == 0 {
		return false // it is being written for the first time
	}
	for _, e := range gone {
		s.lose(e)
	}
	s.log.Warn("store is full, dropped the oldest frames", "kind", classNames[c.class], "count", len(gone), "from", gone[0].key.String(), "to", gone[len(gone)-1].key.String())
	return true
}

// evictPending drops the oldest frame in memory of the first class that has one.
func (s *Store) evictPending(classes ...class) bool {
	for _, c := range classes {
		for _, e := range s.pending {
			if e.class == c && !e.dead {
				s.lose(e)
				s.log.Warn("store is full, dropped the oldest frame", "kind", classNames[c], "seq", e.key.String())
				return true
			}
		}
	}
	return false
}

// lose drops a frame. Needs mu.
func (s *Store) lose(e *stored) {
	if e.flying {
		e.evicted = true
	} else {
		s.dropped(e.class)
	}
	s.kill(e)
}

// kill takes a frame out, without counting it. Needs mu.
func (s *Store) kill(e *stored) {
	e.dead = true
	s.waiting[e.class]--
	if e.chunk == nil {
		s.inMem--
		s.memory -= e.size
		e.envelope = nil
		if s.inMem == 0 {
			s.pending, s.oldest = nil, time.Time{}
		} else if len(s.pending) > 2*s.inMem+64 {
			s.pending = slices.DeleteFunc(s.pending, func(e *stored) bool { return e.dead })
		}
	} else {
		e.chunk.alive--
		s.discard(e.chunk)
	}
	s.dead++
	if alive := s.waiting[plain] + s.waiting[event]; s.dead > alive+64 || alive == 0 {
		s.order = slices.DeleteFunc(s.order, func(e *stored) bool { return e.dead })
		s.dead = 0
	}
}

// discard gives up a file in which nothing is alive. Needs mu.
func (s *Store) discard(c *chunk) {
	if c.alive > 0 || c.busy {
		return
	}
	i := slices.Index(s.chunks[c.class], c)
	if i < 0 {
		return
	}
	s.chunks[c.class] = slices.Delete(s.chunks[c.class], i, i+1)
	s.trash = append(s.trash, c)
}

// flight is a frame on its way.
type flight struct {
	*stored
	key      key // never changes
	envelope []byte
}

// next returns the oldest frame after a key, to be sent; [Store.answered] must
// be called for it.
func (s *Store) next(after key) (flight, bool) {
	for {
		s.mu.Lock()
		at, found := slices.BinarySearchFunc(s.order, after, func(e *stored, k key) int { return e.key.compare(k) })
		if found {
			at++
		}
		for at < len(s.order) && (s.order[at].dead || s.order[at].key == after) {
			at++
		}
		if at >= len(s.order) {
			s.mu.Unlock()
			return flight{}, false
		}
		e := s.order[at]
		e.flying = true
		f := flight{e, e.key, e.envelope}
		c, offset, record := e.chunk, e.offset, e.record
		s.mu.Unlock()
		if f.envelope != nil {
			return f, true
		}
		data, err := s.read(c, offset, record)
		if err == nil {
			f.envelope = data[keySize:]
			return f, true
		}
		s.mu.Lock()
		e.flying = false
		switch {
		case e.evicted: // and its file removed before it could be read
			s.dropped(e.class)
		case !e.dead:
			s.stats.Damaged++
			s.log.Error("stored frame cannot be read, dropped", "kind", classNames[e.class], "seq", e.key.String(), "err", err)
			s.lose(e)
		}
		s.mu.Unlock()
		after = f.key
	}
}

func (s *Store) read(c *chunk, offset int64, record uint64) (data []byte, err error) {
	f, err := os.Open(filepath.Join(s.cfg.Dir, c.name()))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	data, _, err = segment.ReadFrame(f, c.name(), offset, record)
	if err == nil && len(data) < keySize {
		err = errors.New("record is too short")
	}
	return data, err
}

// answered says what became of a frame that was sent: settled, or to be sent
// again.
func (s *Store) answered(f flight, settled bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := f.stored
	e.flying = false
	switch {
	case e.evicted:
		e.evicted = false
		if !settled {
			s.dropped(e.class)
		}
	case settled && !e.dead:
		s.kill(e)
	}
}

// left returns how many frames wait.
func (s *Store) left() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting[plain] + s.waiting[event]
}

// abandon counts as dropped what waits in a store that ends with the process.
func (s *Store) abandon() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range slices.Clone(s.order) {
		if !e.dead {
			s.lose(e)
		}
	}
}

// Files.

func (s *Store) hook(op, path string) error {
	if s.cfg.Hook == nil {
		return nil
	}
	return s.cfg.Hook(op, path)
}

// due reports whether something waits in memory for long enough, or is to be
// removed.
func (s *Store) due(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.oldest.IsZero() && now.Sub(s.oldest) >= s.cfg.Flush || len(s.trash) > 0
}

// flush removes what is no longer needed and writes all that waits in memory.
// It is durable on return without an error; after one, what was not written
// waits on.
func (s *Store) flush() error {
	if !s.durable() {
		return nil
	}
	s.io.Lock()
	defer s.io.Unlock()
	err := s.empty()
	for _, c := range []class{event, plain} {
		for err == nil {
			var more bool
			if more, err = s.write(c); !more {
				break
			}
		}
	}
	if err == nil {
		err = s.empty()
	}
	if err != nil {
		s.mu.Lock()
		s.stats.Errors++
		s.mu.Unlock()
		return fmt.Errorf("store %s: %w", s.cfg.Dir, err)
	}
	return nil
}

// run writes in time, until ctx ends and once more then. Where files cannot be
// written it tries again, ever less often.
func (s *Store) run(ctx context.Context) error {
	if !s.durable() {
		<-ctx.Done()
		return nil
	}
	const pauseMost = 30 * time.Second
	t := time.NewTicker(max(s.cfg.Flush/2, time.Millisecond))
	defer t.Stop()
	var pause time.Duration
	var not time.Time // before then
	for {
		now := false
		select {
		case <-ctx.Done():
			s.report(s.flush())
			return nil
		case <-s.kick:
			now = true
		case <-t.C:
		}
		if at := time.Now(); at.Before(not) || !now && !s.due(at) {
			continue
		}
		if err := s.flush(); err != nil {
			s.report(err)
			pause = min(max(2*pause, s.cfg.Flush), pauseMost)
			not = time.Now().Add(pause)
		} else {
			pause = 0
		}
	}
}

func (s *Store) report(err error) {
	if err != nil {
		s.log.Error("frames cannot be written, they wait in memory", "err", err)
	}
}

// empty removes the files in trash. A removal that a power cut undoes brings
// back frames that were settled, or dropped: nothing is lost by it. Needs io.
func (s *Store) empty() error {
	for {
		s.mu.Lock()
		if len(s.trash) == 0 {
			s.mu.Unlock()
			return nil
		}
		c := s.trash[0]
		s.mu.Unlock()
		path := filepath.Join(s.cfg.Dir, c.name())
		if err := s.hook("remove", path); err != nil {
			return err
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		s.mu.Lock()
		s.trash = slices.Delete(s.trash, 0, 1) // only empty takes from it
		s.disk -= c.size
		s.mu.Unlock()
	}
}

// write writes frames of a class that wait in memory, as many as one file takes,
// and reports whether more may wait. Needs io.
func (s *Store) write(cl class) (more bool, err error) {
	c, batch, b := s.plan(cl)
	if len(batch) == 0 {
		return false, nil
	}
	for s.full(int64(len(b))) {
		if err := s.empty(); err != nil {
			s.release(c)
			return false, err
		}
		if s.full(int64(len(b))) { // what was planned may be dropped for it
			s.release(c)
			return true, nil
		}
	}
	s.mu.Lock()
	// From here on, whatever a failure leaves of it.
	s.disk += int64(len(b))
	at := c.size
	c.size += int64(len(b))
	s.mu.Unlock()
	err = s.append(c, at, b)

	s.mu.Lock()
	defer s.mu.Unlock()
	c.busy = false
	if err != nil {
		c.full = true // what is in there is not known
	} else {
		if at == 0 {
			at = int64(segment.HeaderSize)
		}
		for _, e := range batch {
			e.offset, e.record = at, c.first()+c.records
			at += e.size
			c.records++
			if e.dead {
				continue // answered, or dropped, meanwhile
			}
			s.inMem--
			s.memory -= e.size
			e.chunk, e.envelope = c, nil
			c.alive++
			s.stats.Kept++
		}
		s.pending = slices.DeleteFunc(s.pending, func(e *stored) bool { return e.dead || e.chunk != nil })
		if len(s.pending) == 0 {
			s.oldest = time.Time{}
		}
	}
	s.discard(c)
	return err == nil, err
}

// release undoes a plan. Needs io.
func (s *Store) release(c *chunk) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.busy = false
	s.discard(c)
}

// full reports whether n bytes more would be too many, and makes room.
func (s *Store) full(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.disk+n <= s.cfg.MaxBytes {
		return false
	}
	if len(s.trash) == 0 {
		s.evict()
	}
	return true
}

// plan chooses a file and the frames that go into it, and encodes them.
func (s *Store) plan(cl class) (c *chunk, batch []*stored, b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := len(s.chunks[cl]) - 1; i >= 0 && !s.chunks[cl][i].full {
		c = s.chunks[cl][i]
	}
	if c == nil || c.size >= s.chunkBytes || c.records >= uint64(s.chunkFrames) {
		c = &chunk{id: s.nextID, class: cl}
	}
	if c.size == 0 {
		b = segment.AppendHeader(b, c.first())
	}
	record := c.first() + c.records
	for _, e := range s.pending {
		if e.dead || e.class != cl {
			continue
		}
		if n := c.records + uint64(len(batch)); n > 0 && (n >= uint64(s.chunkFrames) || c.size+int64(len(b)) >= s.chunkBytes) {
			break
		}
		data := binary.BigEndian.AppendUint64(make([]byte, 0, keySize+len(e.envelope)), e.key.epoch)
		data = append(binary.BigEndian.AppendUint64(data, e.key.seq), e.envelope...)
		// Each is an append of its own: one that is torn takes no other with it.
		b = segment.AppendFrames(b, record, data)
		record++
		batch = append(batch, e)
	}
	if len(batch) == 0 {
		return nil, nil, nil
	}
	if c.id == s.nextID {
		s.nextID++
		s.chunks[cl] = append(s.chunks[cl], c)
	}
	c.busy = true
	return c, batch, b
}

// append makes b the end of a file, durably.
func (s *Store) append(c *chunk, at int64, b []byte) (err error) {
	path := filepath.Join(s.cfg.Dir, c.name())
	flag, op := os.O_WRONLY, "write"
	if at == 0 {
		flag, op = flag|os.O_CREATE|os.O_EXCL, "create"
	}
	if err := s.hook(op, path); err != nil {
		return err
	}
	f, err := os.OpenFile(path, flag, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if at == 0 {
		if err := s.hook("write", path); err != nil {
			return err
		}
	}
	if _, err := f.WriteAt(b, at); err != nil {
		return err
	}
	if err := s.hook("sync", path); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if at > 0 {
		return nil
	}
	if err := s.hook("syncdir", s.cfg.Dir); err != nil {
		return err
	}
	d, err := os.Open(s.cfg.Dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// load reads the folder. Files that are there are never appended to, so that a
// torn end can stay where it is.
func (s *Store) load() error {
	entries, err := os.ReadDir(s.cfg.Dir)
	if err != nil {
		return err
	}
	for _, d := range entries {
		c, ok := parseChunk(d.Name())
		if !ok || d.IsDir() {
			continue
		}
		b, err := os.ReadFile(filepath.Join(s.cfg.Dir, d.Name()))
		if err != nil {
			return err
		}
		c.size, c.full = int64(len(b)), true
		s.nextID = max(s.nextID, c.id+1)
		s.disk += c.size
		s.chunks[c.class] = append(s.chunks[c.class], c)
		s.scan(c, b)
		s.discard(c)
	}
	for cl := range s.chunks {
		slices.SortFunc(s.chunks[cl], func(a, b *chunk) int { return cmp.Compare(a.id, b.id) })
	}
	slices.SortStableFunc(s.order, func(a, b *stored) int { return a.key.compare(b.key) })
	for i := 1; i < len(s.order); i++ {
		if a, b := s.order[i-1], s.order[i]; a.key == b.key {
			// Written again after a write that failed, and had not.
			a.dead = true
			s.waiting[a.class]--
			a.chunk.alive--
			s.discard(a.chunk)
		}
	}
	s.order = slices.DeleteFunc(s.order, func(e *stored) bool { return e.dead })
	s.stats.Found = uint64(len(s.order))
	if len(s.order) > 0 {
		s.log.Info("frames of before wait to be sent", "count", len(s.order), "from", s.order[0].key.String(), "to", s.order[len(s.order)-1].key.String())
	}
	// The bounds may have been lower than they are now.
	for (len(s.order)-s.dead > s.cfg.MaxFrames || s.kept() > s.cfg.MaxBytes) && s.evict() {
	}
	return s.empty()
}

func parseChunk(name string) (*chunk, bool) {
	digits, ext, _ := strings.Cut(name, ".")
	c := &chunk{class: class(slices.Index(classNames[:], ext))}
	if c.class < 0 {
		return nil, false
	}
	if _, err := fmt.Sscanf(digits, "%d", &c.id); err != nil || c.name() != name || c.id >= 1<<31 {
		return nil, false
	}
	return c, true
}

// scan takes in what can be read of a file.
func (s *Store) scan(c *chunk, b []byte) {
	name := c.name()
	r := strings.NewReader(string(b))
	bad := func(torn bool, at int64, err error) {
		if torn {
			s.stats.Torn++
			s.log.Info("store: the end of a file was not written whole", "err", err)
			return
		}
		s.stats.Damaged++
		s.log.Error("store is damaged, going on with what can be read", "file", name, "offset", at, "err", err)
	}
	at, record := int64(segment.HeaderSize), c.first()
	if _, err := segment.NewScanner(strings.NewReader(string(b)), name, c.first()); err != nil {
		bad(errors.Is(err, segment.ErrTorn), 0, err)
		at, record = resync(b, 0)
	}
	for at >= 0 && at < int64(len(b)) {
		data, next, err := segment.ReadFrame(r, name, at, record)
		if err == nil && len(data) < keySize {
			err = errors.New("record is too short")
		}
		if err != nil {
			to, rec := resync(b, at+1)
			if to < 0 { // nothing more; was it a torn append?
				sc := segment.ResumeScanner(strings.NewReader(string(b[at:])), name, at, record)
				if _, e := sc.Append(); e != nil {
					err = segment.Classify(sc, e, b[at:])
				}
			}
			bad(to < 0 && errors.Is(err, segment.ErrTorn), at, err)
			at, record = to, rec
			continue
		}
		s.order = append(s.order, &stored{
			key:   key{binary.BigEndian.Uint64(data), binary.BigEndian.Uint64(data[8:])},
			class: c.class, size: next - at, chunk: c, offset: at, record: record,
		})
		c.alive++
		s.waiting[c.class]++
		at, record = next, record+1
	}
}

// resync finds the next whole record from an offset on; -1: there is none.
func resync(b []byte, from int64) (at int64, record uint64) {
	mark := string(segment.AppendFrames(nil, 0, nil)[:4])
	text := string(b)
	r := strings.NewReader(text)
	for at = from; at < int64(len(b)); at++ {
		i := strings.Index(text[at:], mark)
		if i < 0 {
			return -1, 0
		}
		if at += int64(i); at+12 > int64(len(b)) {
			return -1, 0
		}
		record = binary.BigEndian.Uint64(b[at+4:])
		if data, _, err := segment.ReadFrame(r, "", at, record); err == nil && len(data) >= keySize {
			return at, record
		}
	}
	return -1, 0
}
