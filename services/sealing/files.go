package sealing

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/stopline-traffic/stopline/pkg/ledger"
)

// files writes the log's files. Each appears under its name whole or not at
// all: it is written and synced in the folder tmp first.
type files struct {
	root   string // the folder of checkpoint and tile
	hook   func(op, path string) error
	number atomic.Uint64
	inTurn bool // tiles are written one after another, as tests want it

	mu    sync.Mutex      // tiles, journal and checkpoints are written side by side
	known map[string]bool // folders that are there, durably
}

func newFiles(root string, hook func(op, path string) error) *files {
	if hook == nil {
		hook = func(string, string) error { return nil }
	}
	return &files{root: root, hook: hook, known: map[string]bool{}}
}

func (f *files) tmp() string { return filepath.Join(f.root, "tmp") }

// start makes the folders and removes what a crash left in tmp.
func (f *files) start() error {
	if err := f.mkdir(f.tmp()); err != nil {
		return err
	}
	es, err := os.ReadDir(f.tmp())
	if err != nil {
		return err
	}
	for _, e := range es {
		if err := f.remove(filepath.Join(f.tmp(), e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// mkdir makes a folder and its parents, durable before it returns: whoever
// finds a folder there may rely on it, also when another made it.
func (f *files) mkdir(dir string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mkdirLocked(dir)
}

func (f *files) mkdirLocked(dir string) error {
	if f.known[dir] {
		return nil
	}
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		parent := filepath.Dir(dir)
		if err := f.mkdirLocked(parent); err != nil {
			return err
		}
		if err := f.hook("create", dir); err != nil {
			return err
		}
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	// Also of a folder that is there: a crash may have come before this sync.
	if err := f.syncDirs(map[string]bool{filepath.Dir(dir): true}); err != nil {
		return err
	}
	f.known[dir] = true
	return nil
}

// put writes a file and renames it into place; its folder is not synced yet.
func (f *files) put(path string, b []byte) error {
	tmp := filepath.Join(f.tmp(), strconv.FormatUint(f.number.Add(1), 10))
	if err := f.hook("create", tmp); err != nil {
		return err
	}
	w, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	err = func() error {
		if err := f.hook("write", tmp); err != nil {
			return err
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
		if err := f.hook("sync", tmp); err != nil {
			return err
		}
		return w.Sync()
	}()
	if err := errors.Join(err, w.Close()); err != nil {
		return err
	}
	if err := f.hook("rename", path); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// write makes one file durable.
func (f *files) write(path string, b []byte) error {
	if err := f.mkdir(filepath.Dir(path)); err != nil {
		return err
	}
	if err := f.put(path, b); err != nil {
		return err
	}
	return f.syncDirs(map[string]bool{filepath.Dir(path): true})
}

// parallel bounds syncs at one time: they wait for the disk, not for us.
const parallel = 8

// writeTiles makes tiles durable: contents first, then the names.
func (f *files) writeTiles(tiles []ledger.TileFile) error {
	dirty := map[string]bool{}
	var g errgroup.Group
	g.SetLimit(parallel)
	for _, t := range tiles {
		path := filepath.Join(f.root, filepath.FromSlash(t.Path()))
		if err := f.mkdir(filepath.Dir(path)); err != nil {
			return errors.Join(err, g.Wait())
		}
		dirty[filepath.Dir(path)] = true
		if f.inTurn {
			if err := f.put(path, t.Data); err != nil {
				return err
			}
			continue
		}
		g.Go(func() error { return f.put(path, t.Data) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return f.syncDirs(dirty)
}

// syncDirs syncs folders, in any order: nothing that is in them is relied on before
// all are.
func (f *files) syncDirs(dirty map[string]bool) error {
	var g errgroup.Group
	g.SetLimit(parallel)
	for _, d := range slices.Sorted(maps.Keys(dirty)) {
		if f.inTurn {
			if err := f.syncDir(d); err != nil {
				return err
			}
			continue
		}
		g.Go(func() error { return f.syncDir(d) })
	}
	return g.Wait()
}

func (f *files) syncDir(dir string) error {
	if err := f.hook("syncdir", dir); err != nil {
		return err
	}
	h, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(h.Sync(), h.Close())
}

func (f *files) remove(path string) error {
	if err := f.hook("remove", path); err != nil {
		return err
	}
	return os.Remove(path)
}

// dropPartial removes all partial forms of a tile. It need not be durable: what
// comes back after a crash is still right.
func (f *files) dropPartial(id ledger.TileID) error {
	id.Width = 1
	dir := filepath.Dir(filepath.Join(f.root, filepath.FromSlash(id.Path())))
	es, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range es {
		if err := f.remove(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.known, dir)
	return f.remove(dir)
}
