package consensus

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/stopline-traffic/stopline/pkg/ledger"
)

// Bounds on what is kept: one proof is enough, and liars must not be able to
// fill the disk, nor one of them to leave no room for the next.
const (
	evidenceMost    = 64
	evidenceMostOne = 8 // against one validator
)

// evidenceLog keeps accusations as files of a folder, each as
// [ledger.ParseAccusation] takes it, named by what it is about:
// votes-<validator>-<height>-<view>-<phase>.json, blocks-<height>.json and
// checkpoints-<validator>-<size>.json, with the smaller size. There is one about
// each.
type evidenceLog struct {
	dir string

	mu    sync.Mutex
	names []string // in order
	kept  map[string]*ledger.Accusation
}

// openEvidence reads what was kept. A file that cannot be read is left alone and
// told of: it must not keep a validator from starting.
func openEvidence(dir string, log *slog.Logger) (*evidenceLog, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	e := &evidenceLog{dir: dir, kept: map[string]*ledger.Accusation{}}
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		var a *ledger.Accusation
		if err == nil {
			a, err = ledger.ParseAccusation(b)
		}
		if err != nil {
			log.Error("evidence cannot be read", "file", f, "err", err)
			continue
		}
		e.put(filepath.Base(f), a)
	}
	return e, nil
}

func (e *evidenceLog) put(name string, a *ledger.Accusation) {
	e.names = append(e.names, name)
	slices.Sort(e.names)
	e.kept[name] = a
}

// fileOf names an accusation. against is the part of the name that bounds how
// many there may be of it.
func fileOf(a *ledger.Accusation) (name, against string, err error) {
	switch a.Kind {
	case ledger.AccusedVotes:
		m, err := ledger.ParseMessage(a.Votes[0])
		if err != nil {
			return "", "", err
		}
		against = fmt.Sprintf("votes-%d-", m.From)
		return fmt.Sprintf("%s%d-%d-%d.json", against, m.Height, m.View, m.Phase), against, nil
	case ledger.AccusedBlocks:
		h, err := ledger.ParseHeader(a.Blocks[0].Header)
		if err != nil {
			return "", "", err
		}
		return fmt.Sprintf("blocks-%d.json", h.Height), "blocks-", nil
	case ledger.AccusedCheckpoints:
		var sizes [2]uint64
		for i, c := range a.Checkpoints {
			body, _, _ := strings.Cut(c.Note, "\n\n")
			cp, err := ledger.ParseCheckpoint(body + "\n")
			if err != nil {
				return "", "", err
			}
			sizes[i] = cp.Size
		}
		_, line, _ := strings.Cut(a.Checkpoints[0].Note, "\n\n— ")
		name, _, _ := strings.Cut(line, " ")
		n, err := strconv.ParseUint(name[strings.LastIndexByte(name, '-')+1:], 10, 64)
		if err != nil {
			return "", "", fmt.Errorf("evidence: checkpoint signed first by %.80q, who is no validator", name)
		}
		against = fmt.Sprintf("checkpoints-%d-", n)
		return fmt.Sprintf("%s%d.json", against, min(sizes[0], sizes[1])), against, nil
	}
	return "", "", fmt.Errorf("evidence of kind %q is not found here", a.Kind)
}

// add keeps an accusation, durable on return, and reports whether there was none
// like it. Beyond the bounds it keeps nothing.
func (e *evidenceLog) add(a *ledger.Accusation) (news bool, err error) {
	name, against, err := fileOf(a)
	if err != nil {
		return false, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	same := 0
	for _, n := range e.names {
		if strings.HasPrefix(n, against) {
			same++
		}
	}
	if e.kept[name] != nil || len(e.names) >= evidenceMost || same >= evidenceMostOne {
		return false, nil
	}
	path := filepath.Join(e.dir, name)
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return false, errors.Join(fmt.Errorf("evidence %s: there is a file of that name that could not be read", name), err)
	}
	b, err := a.Marshal()
	if err != nil {
		return false, err
	}
	if err := replaceFile(path, b); err != nil {
		return false, err
	}
	e.put(name, a)
	return true, nil
}

func (e *evidenceLog) all() []*ledger.Accusation {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make([]*ledger.Accusation, len(e.names))
	for i, n := range e.names {
		out[i] = e.kept[n]
	}
	return out
}
