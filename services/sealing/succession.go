package sealing

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/decided"
)

// successionFile, below the data folder, lists the sets of validators after that
// of genesis. It can be made again from the blocks; with it, opening need not.
const successionFile = "succession.json"

type council struct {
	Since      ledger.Height        `json:"since"`
	Validators []identity.Validator `json:"validators"`
}

// loadSuccession is called once, by OpenStore.
func (s *Store) loadSuccession() error {
	path := filepath.Join(s.o.Dir, successionFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var list []council
	if err := json.Unmarshal(b, &list); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	for _, c := range list {
		if err := s.succession.Change(c.Since, c.Validators); err != nil {
			return fmt.Errorf("%s: since %d: %w", path, c.Since, err)
		}
	}
	return nil
}

// succeed makes durable who the validators are after some blocks. A crash before
// the blocks are journalled leaves what they will say again.
func (s *Store) succeed(blocks []*decided.Block) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	changed := false
	for _, b := range blocks {
		if b.Validators == nil {
			continue
		}
		if err := s.succession.Change(b.Header.Height, b.Validators); err != nil {
			return fmt.Errorf("block %d: %w", b.Header.Height, err)
		}
		changed = true
	}
	if !changed {
		return nil
	}
	var list []council
	for _, c := range s.succession.Sets()[1:] {
		list = append(list, council{c.Since, c.Validators})
	}
	out, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		return err
	}
	return s.files.write(filepath.Join(s.o.Dir, successionFile), append(out, '\n'))
}

// pinnable reports whether enough of the first validators are among those of a
// set, with the same keys, for the district's policy to be met.
func (s *Store) pinnable(c ledger.Council) bool {
	first := s.Council(0).Validators
	n := 0
	for _, v := range c.Validators {
		if slices.ContainsFunc(first, func(o identity.Validator) bool { return bytes.Equal(o.CosignKey, v.CosignKey) }) {
			n++
		}
	}
	return n >= ledger.Quorum(len(first))
}
