package repair

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// stageDir holds, below the data folder, what is to take the place of damaged
// files. What is found there at the beginning is of a repair that was cut short.
const stageDir = "repair.tmp"

// stage is a data folder as it would be with some files replaced and some taken
// away. It is an [fs.FS]; the folder itself stays as it is.
type stage struct {
	dir    string            // the data folder
	files  map[string]staged // by path
	gone   map[string]bool
	writes int
}

type staged struct {
	at   string // where its content is on disk
	from string // who gave it
}

func newStage(dir string) (*stage, error) {
	s := &stage{dir: dir, files: map[string]staged{}, gone: map[string]bool{}}
	if err := s.drop(); err != nil {
		return nil, err
	}
	return s, os.MkdirAll(filepath.Join(dir, stageDir), 0o755)
}

// drop removes the stage.
func (s *stage) drop() error { return os.RemoveAll(filepath.Join(s.dir, stageDir)) }

// put stages a file's content, durably.
func (s *stage) put(name string, b []byte, from string) error {
	s.writes++
	at := filepath.Join(s.dir, stageDir, fmt.Sprint(s.writes))
	if err := writeSync(at, b); err != nil {
		return err
	}
	s.files[name] = staged{at, from}
	delete(s.gone, name)
	return nil
}

func writeSync(name string, b []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

// take stages that a file is taken away.
func (s *stage) take(name string) {
	delete(s.files, name)
	s.gone[name] = true
}

// mark and back undo what was staged in between.
func (s *stage) mark() *stage {
	return &stage{files: maps.Clone(s.files), gone: maps.Clone(s.gone)}
}

func (s *stage) back(m *stage) { s.files, s.gone = m.files, m.gone }

// since returns what was staged after a mark.
func (s *stage) since(m *stage) (names []string) {
	for n, f := range s.files {
		if m.files[n] != f {
			names = append(names, n)
		}
	}
	for n := range s.gone {
		if !m.gone[n] {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	return names
}

// Open implements [fs.FS].
func (s *stage) Open(name string) (fs.File, error) {
	if !fs.ValidPath(name) {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
	}
	if s.gone[name] {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	if f, ok := s.files[name]; ok {
		return os.Open(f.at)
	}
	f, err := os.Open(filepath.Join(s.dir, filepath.FromSlash(name)))
	if errors.Is(err, fs.ErrNotExist) && s.holds(name) {
		return os.Open(filepath.Join(s.dir, stageDir)) // a folder there will be
	}
	return f, err
}

// holds reports whether something staged is below a folder.
func (s *stage) holds(dir string) bool {
	for n := range s.files {
		if strings.HasPrefix(n, dir+"/") {
			return true
		}
	}
	return false
}

// ReadDir implements [fs.ReadDirFS].
func (s *stage) ReadDir(dir string) ([]fs.DirEntry, error) {
	es, err := os.ReadDir(filepath.Join(s.dir, filepath.FromSlash(dir)))
	if errors.Is(err, fs.ErrNotExist) && s.holds(dir) {
		es, err = nil, nil
	}
	if err != nil {
		return nil, err
	}
	out := map[string]fs.DirEntry{}
	for _, e := range es {
		if !s.gone[path.Join(dir, e.Name())] {
			out[e.Name()] = e
		}
	}
	for n, f := range s.files {
		rest, ok := strings.CutPrefix(n, dir+"/")
		if dir == "." {
			rest, ok = n, true
		}
		if !ok {
			continue
		}
		first, _, deeper := strings.Cut(rest, "/")
		at := f.at
		if deeper {
			if out[first] != nil {
				continue
			}
			at = filepath.Join(s.dir, stageDir)
		}
		i, err := os.Stat(at)
		if err != nil {
			return nil, err
		}
		out[first] = fs.FileInfoToDirEntry(named{i, first})
	}
	names := slices.Sorted(maps.Keys(out))
	list := make([]fs.DirEntry, len(names))
	for i, n := range names {
		list[i] = out[n]
	}
	return list, nil
}

// named is a file under another name.
type named struct {
	fs.FileInfo
	name string
}

func (n named) Name() string { return n.name }

// order is in which order files are put in place: as sealing writes them, so that
// nothing covers what is not there.
var order = []string{"genesis.json", "policy", "succession.json", "payload/", "log/blocks/", "log/tile/", "log/checkpoints/", "log/checkpoint"}

func rank(name string) int {
	i := slices.IndexFunc(order, func(p string) bool { return name == p || strings.HasSuffix(p, "/") && strings.HasPrefix(name, p) })
	if i < 0 {
		return len(order)
	}
	return i
}

// names returns all that is staged, in the order of its application.
func (s *stage) names() []string {
	names := append(slices.Collect(maps.Keys(s.files)), slices.Collect(maps.Keys(s.gone))...)
	slices.SortFunc(names, func(a, b string) int {
		if d := rank(a) - rank(b); d != 0 {
			return d
		}
		return strings.Compare(a, b)
	})
	return names
}

// apply puts everything in place, and each original below aside, a folder in the
// data folder. At any moment each file is as it was or as it is to be: what a crash
// leaves is repaired by doing it again.
func (s *stage) apply(aside string, hook func(op, path string) error) error {
	for _, name := range s.names() {
		at := filepath.Join(s.dir, filepath.FromSlash(name))
		old := filepath.Join(s.dir, aside, filepath.FromSlash(name))
		if _, err := os.Lstat(at); err == nil {
			if err := s.mkdir(filepath.Dir(old)); err != nil {
				return err
			}
			if err := hook("link", old); err != nil {
				return err
			}
			if err := keep(at, old); err != nil {
				return err
			}
			if err := syncDir(filepath.Dir(old)); err != nil {
				return err
			}
		}
		f, replaced := s.files[name]
		if replaced {
			if err := s.mkdir(filepath.Dir(at)); err != nil {
				return err
			}
			if err := hook("rename", at); err != nil {
				return err
			}
			if err := os.Rename(f.at, at); err != nil {
				return err
			}
		} else {
			if err := hook("remove", at); err != nil {
				return err
			}
			if err := os.RemoveAll(at); err != nil {
				return err
			}
		}
		if err := syncDir(filepath.Dir(at)); err != nil {
			return err
		}
	}
	return nil
}

// keep makes old another name of a file or folder, or a copy where the file system
// has no second names.
func keep(at, old string) error {
	i, err := os.Lstat(at)
	if err != nil {
		return err
	}
	if i.IsDir() {
		return filepath.WalkDir(at, func(p string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(at, p)
			if err != nil {
				return err
			}
			if e.IsDir() {
				return os.MkdirAll(filepath.Join(old, rel), 0o755)
			}
			return keep(p, filepath.Join(old, rel))
		})
	}
	if err := os.Link(at, old); err == nil || errors.Is(err, fs.ErrExist) {
		return nil // there already: a repair was cut short just here
	}
	b, err := os.ReadFile(at)
	if err != nil {
		return err
	}
	return writeSync(old, b)
}

// mkdir makes folders, durably.
func (s *stage) mkdir(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if err := s.mkdir(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// same reports whether a staged file is what there was.
func (s *stage) same(name string) bool {
	a, err := os.ReadFile(filepath.Join(s.dir, filepath.FromSlash(name)))
	if err != nil {
		return false
	}
	b, err := fs.ReadFile(s, name)
	return err == nil && bytes.Equal(a, b)
}
