package witness

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/district"
)

// Log is one log that a witness knows.
type Log struct {
	// Origin is the first line of its checkpoints. Required.
	Origin string
	// Keys are the verifier keys of which one must have signed them, in the form of
	// sumdb/note. At least one.
	Keys []string
}

// Config of a [Witness].
type Config struct {
	// Name of the key that cosigns: a URL without a scheme, such as
	// harbour.example/witness. Required.
	Name string
	// Key cosigns, and must sign nothing else. Required.
	Key ed25519.PrivateKey
	// Logs that are cosigned. At least one.
	Logs []Log
	// Dir is the data folder, made by [Create]. Required.
	Dir string
	// Now is the clock of cosignatures. time.Now.
	Now func() time.Time
	// Logger is optional.
	Logger *slog.Logger
}

// Validate reports everything that is wrong, joined.
func (c *Config) Validate() error {
	var errs []error
	if _, err := cosigner(c.Name, c.Key); err != nil {
		errs = append(errs, fmt.Errorf("witness: Name, Key: %w", err))
	}
	if c.Dir == "" {
		errs = append(errs, errors.New("witness: Dir: must be given"))
	}
	if len(c.Logs) == 0 {
		errs = append(errs, errors.New("witness: Logs: at least one is needed"))
	}
	seen := map[string]bool{}
	for i, l := range c.Logs {
		if _, err := l.verifiers(); err != nil {
			errs = append(errs, fmt.Errorf("witness: Logs[%d]: %w", i, err))
		}
		if seen[l.Origin] {
			errs = append(errs, fmt.Errorf("witness: Logs[%d]: origin %.80q is there twice", i, l.Origin))
		}
		seen[l.Origin] = true
	}
	return errors.Join(errs...)
}

func (l *Log) verifiers() (note.Verifiers, error) {
	if l.Origin == "" || strings.Contains(l.Origin, "\n") {
		return nil, errors.New("origin: must be one line, not empty")
	}
	if len(l.Keys) == 0 {
		return nil, errors.New("keys: at least one is needed")
	}
	var vs []note.Verifier
	for i, k := range l.Keys {
		v, err := note.NewVerifier(k)
		if err != nil {
			return nil, fmt.Errorf("keys[%d]: %w", i, err)
		}
		vs = append(vs, v)
	}
	return note.VerifierList(vs...), nil
}

func cosigner(name string, key ed25519.PrivateKey) (*ledger.Cosigner, error) {
	if len(key) != ed25519.PrivateKeySize {
		return nil, fmt.Errorf("key: %d bytes, want %d", len(key), ed25519.PrivateKeySize)
	}
	return ledger.NewCosigner(name, key.Public().(ed25519.PublicKey))
}

// Metrics count what a [Witness] has done since it started.
type Metrics struct {
	Cosigned uint64 `json:"cosigned"` // answered with a cosignature
	Grown    uint64 `json:"grown"`    // of which with a checkpoint that was new
	// Refused, by the status that C2SP tlog-witness gives the reason.
	BadRequest   uint64 `json:"bad_request"`
	UnknownLog   uint64 `json:"unknown_log"`
	NotSigned    uint64 `json:"not_signed"`
	OtherSize    uint64 `json:"other_size"`
	Inconsistent uint64 `json:"inconsistent"`
	// Forks are checkpoints that the log signed though the one of the same size
	// that is known has another root. They are in Inconsistent too.
	Forks  uint64 `json:"forks"`
	Failed uint64 `json:"failed"` // the disk did not take it
}

// Witness cosigns. Its methods may be called concurrently.
type Witness struct {
	c    Config
	log  *slog.Logger
	key  *ledger.Cosigner
	lock *os.File
	logs map[string]*known // by origin
	// write makes a file durable; replaced by tests.
	write func(path string, b []byte) error

	mu sync.Mutex
	m  Metrics // guarded by mu
}

// known is one log.
type known struct {
	Log
	verifiers note.Verifiers
	path      string

	mu   sync.Mutex // held from the check to the answer
	size uint64
	root ledger.Hash
	note []byte // as on disk; nil: never cosigned
}

// Create makes a data folder for a new key, which must not exist yet.
func Create(dir, name string, key ed25519.PrivateKey) error {
	k, err := cosigner(name, key)
	if err != nil {
		return fmt.Errorf("witness: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(dir, stateDir), 0o700); err != nil {
		return err
	}
	path := filepath.Join(dir, identityFile)
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(fmt.Errorf("%s: is there already", path), err)
	}
	return district.WriteFile(path, []byte(k.String()+"\n"), 0o600)
}

const (
	identityFile = "witness"
	stateDir     = "state"
	forksDir     = "forks"
	// maxForks bounds how many accusations are kept: one is enough.
	maxForks = 100
)

// New opens a data folder that [Create] has made, and keeps others out until
// Close. What is there must be of this witness, and whole.
func New(c Config) (_ *Witness, err error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	w := &Witness{c: c, log: c.Logger, logs: map[string]*known{},
		write: func(path string, b []byte) error { return district.WriteFile(path, b, 0o600) }}
	if w.key, err = cosigner(c.Name, c.Key); err != nil {
		return nil, err
	}
	path := filepath.Join(c.Dir, identityFile)
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("witness: %w: a witness that has lost its folder must not go on with the same key", err)
	case err != nil:
		return nil, err
	case strings.TrimSpace(string(b)) != w.key.String():
		return nil, fmt.Errorf("witness: %s: is the folder of %.200s, not of %s", path, strings.TrimSpace(string(b)), w.key)
	}
	if w.lock, err = lock(path); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Close())
		}
	}()
	for _, l := range c.Logs {
		k := &known{Log: l, path: filepath.Join(c.Dir, stateDir, hexOf(l.Origin)), root: sha256.Sum256(nil)}
		if k.verifiers, err = l.verifiers(); err != nil {
			return nil, err
		}
		if err := k.load(w.key); err != nil {
			return nil, err
		}
		w.logs[l.Origin] = k
	}
	return w, nil
}

// load reads what was cosigned last. The witness' own signature on it shows that
// it is whole.
func (k *known) load(own *ledger.Cosigner) error {
	b, err := os.ReadFile(k.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	fail := func(err error) error {
		return fmt.Errorf("witness: %s: the newest checkpoint of %s is damaged: %w", k.path, k.Origin, err)
	}
	text, sigs, ok := strings.Cut(string(b), "\n\n")
	lines := strings.SplitAfter(sigs, "\n")
	if !ok || len(lines) < 2 {
		return fail(errors.New("is no signed note"))
	}
	// The last line; the others are the log's.
	if _, err := own.CheckCosignature(text+"\n", lines[len(lines)-2]+lines[len(lines)-1]); err != nil {
		return fail(err)
	}
	c, err := ledger.ParseForeign(text + "\n")
	if err != nil {
		return fail(err)
	}
	if c.Origin != k.Origin {
		return fail(fmt.Errorf("is of %.80q", c.Origin))
	}
	k.size, k.root, k.note = c.Size, c.Root, b
	return nil
}

// Close lets the folder go.
func (w *Witness) Close() error { return w.lock.Close() }

// Key returns the verifier key, to be put into policies.
func (w *Witness) Key() string { return w.key.String() }

// Metrics returns a snapshot.
func (w *Witness) Metrics() Metrics {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.m
}

func (w *Witness) count(n *uint64) {
	w.mu.Lock()
	*n++
	w.mu.Unlock()
}

// Reasons why a checkpoint is not cosigned; see [Witness.Add].
var (
	ErrBadRequest   = errors.New("bad request")
	ErrUnknownLog   = errors.New("unknown log")
	ErrNotSigned    = errors.New("not signed by the log")
	ErrInconsistent = errors.New("inconsistent")
)

// SizeError says that a request goes on from another size than the one that is
// known; or, where Root is set, that it has another root at the size known.
type SizeError struct {
	Size uint64 // known
	Root bool
}

func (e *SizeError) Error() string {
	if e.Root {
		return fmt.Sprintf("the checkpoint of %d entries has another root than the one that was cosigned", e.Size)
	}
	return fmt.Sprintf("the newest checkpoint cosigned has %d entries", e.Size)
}

// Add cosigns a signed checkpoint that goes on from old entries, as the proof
// shows, and returns the signature line. It is durable then that no other history
// will be cosigned. The error is a [SizeError] or one of the reasons above, or
// the disk's.
func (w *Witness) Add(old uint64, proof []tlog.Hash, signed []byte) (line string, err error) {
	line, grown, err := w.add(old, proof, signed)
	var size *SizeError
	counter := &w.m.Failed
	switch {
	case err == nil:
		counter = &w.m.Cosigned
		if grown {
			w.count(&w.m.Grown)
		}
	case errors.As(err, &size) && size.Root:
		w.count(&w.m.Forks)
		counter = &w.m.Inconsistent
	case errors.As(err, &size):
		counter = &w.m.OtherSize
	case errors.Is(err, ErrBadRequest):
		counter = &w.m.BadRequest
	case errors.Is(err, ErrUnknownLog):
		counter = &w.m.UnknownLog
	case errors.Is(err, ErrNotSigned):
		counter = &w.m.NotSigned
	case errors.Is(err, ErrInconsistent):
		counter = &w.m.Inconsistent
	}
	w.count(counter)
	return line, err
}

func (w *Witness) add(old uint64, proof []tlog.Hash, signed []byte) (line string, grown bool, err error) {
	fail := func(err error) (string, bool, error) { return "", false, err }
	origin, _, ok := strings.Cut(string(signed), "\n")
	if !ok || len(signed) > ledger.MaxNote {
		return fail(fmt.Errorf("%w: the checkpoint is no signed note of at most %d bytes", ErrBadRequest, ledger.MaxNote))
	}
	k := w.logs[origin]
	if k == nil {
		return fail(fmt.Errorf("%w %.80q", ErrUnknownLog, origin))
	}
	n, err := note.Open(signed, k.verifiers)
	var unverified *note.UnverifiedNoteError
	var invalid *note.InvalidSignatureError
	switch {
	case errors.As(err, &unverified), errors.As(err, &invalid):
		return fail(fmt.Errorf("%w %.80q: %w", ErrNotSigned, origin, err))
	case err != nil:
		return fail(fmt.Errorf("%w: checkpoint: %w", ErrBadRequest, err))
	}
	c, err := ledger.ParseForeign(n.Text)
	switch {
	case err != nil:
		return fail(fmt.Errorf("%w: %w", ErrBadRequest, err))
	case old > c.Size:
		return fail(fmt.Errorf("%w: old size %d is beyond the checkpoint's %d", ErrBadRequest, old, c.Size))
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case old != k.size:
		return fail(&SizeError{Size: k.size})
	case c.Size == k.size && c.Root != k.root:
		w.fork(k, c, n)
		return fail(&SizeError{Size: k.size, Root: true})
	case (old == 0 || old == c.Size) && len(proof) > 0:
		return fail(fmt.Errorf("%w: from %d to %d entries there is nothing to prove", ErrInconsistent, old, c.Size))
	case old > 0 && old < c.Size:
		if err := tlog.CheckTree(proof, int64(c.Size), tlog.Hash(c.Root), int64(old), tlog.Hash(k.root)); err != nil {
			w.log.Error("witness: the proof does not show that the log has only grown", "origin", origin, "from", old, "to", c.Size, "root", hex.EncodeToString(c.Root[:]))
			return fail(fmt.Errorf("%w: the proof does not lead from %d entries to this checkpoint", ErrInconsistent, old))
		}
	}
	line, err = ledger.CosignForeign(w.c.Name, w.c.Key, n.Text, w.c.Now())
	if err != nil {
		return fail(err)
	}
	if k.note != nil && c.Size == k.size {
		return line, false, nil // as it is on disk
	}
	stored := []byte(n.Text + "\n")
	for _, s := range n.Sigs { // the log's, by which a fork can be proven
		stored = fmt.Appendf(stored, "— %s %s\n", s.Name, s.Base64)
	}
	stored = append(stored, line...)
	if err := w.write(k.path, stored); err != nil {
		// Which of the two is on disk is not known. Both are the log's own, and no
		// cosignature of the new one has gone out.
		w.log.Error("witness: checkpoint not stored", "origin", origin, "err", err)
		return fail(err)
	}
	k.size, k.root, k.note = c.Size, c.Root, stored
	return line, true, nil
}

// fork keeps what shows that a log has signed two histories. k.mu is held.
func (w *Witness) fork(k *known, c ledger.Checkpoint, n *note.Note) {
	w.log.Error("witness: the log has signed another checkpoint of the same size", "origin", k.Origin, "size", c.Size, "known", hex.EncodeToString(k.root[:]), "root", hex.EncodeToString(c.Root[:]))
	if k.note == nil { // the empty log: there is nothing of the log's to hold against it
		return
	}
	other := []byte(n.Text + "\n")
	for _, s := range n.Sigs {
		other = fmt.Appendf(other, "— %s %s\n", s.Name, s.Base64)
	}
	err := func() error {
		own := bytes.LastIndex(k.note[:len(k.note)-1], []byte("\n"))
		doc, err := ledger.NewCheckpointAccusation(k.note[:own+1], other).Marshal()
		if err != nil {
			return err
		}
		dir := filepath.Join(w.c.Dir, forksDir)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		if have, err := os.ReadDir(dir); err != nil || len(have) >= maxForks {
			return err
		}
		return w.write(filepath.Join(dir, fmt.Sprintf("%s-%d-%x.json", hexOf(k.Origin)[:16], c.Size, c.Root[:8])), doc)
	}()
	if err != nil {
		w.log.Error("witness: accusation not stored", "origin", k.Origin, "err", err)
	}
}

func hexOf(origin string) string {
	h := sha256.Sum256([]byte(origin))
	return hex.EncodeToString(h[:])
}
