package sealing

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/retention"
	"github.com/stopline-traffic/stopline/services/internal/payload"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
)

// Survey is what a data folder keeps, and what of it is due.
type Survey struct {
	Height ledger.Height `json:"height"`
	Time   time.Time     `json:"time"` // of the last block
	// Policy is the hash of the retention entry; empty where there is none.
	Policy  identity.Digest `json:"policy,omitempty"`
	Classes []ClassSurvey   `json:"classes"`
	// Holds in force, by id.
	Holds      map[string]*identity.Hold `json:"holds,omitempty"`
	Tombstones []identity.Tombstone      `json:"-"`
	// Pending are deletions whose receipts are not in the log yet.
	Pending []*retention.Pending `json:"pending,omitempty"`
}

// ClassSurvey is what a data folder keeps of one class.
type ClassSurvey struct {
	Class retention.Class `json:"class"`
	// Floor and Ceiling in seconds; nil where the class is kept for good.
	FloorS   *int64 `json:"floor_s,omitempty"`
	CeilingS *int64 `json:"ceiling_s,omitempty"`
	// Records that are there, and of them due and held past their ceiling.
	Records uint64 `json:"records"`
	Due     uint64 `json:"due"`
	Held    uint64 `json:"held"`
	// Ranges of what is due, by leaf.
	Ranges []retention.Range `json:"ranges,omitempty"`
}

// SurveyFolder reads a data folder, which sealing may be writing, and changes
// nothing.
func SurveyFolder(dir string) (_ *Survey, err error) {
	g, err := os.ReadFile(filepath.Join(dir, "genesis.json"))
	if err != nil {
		return nil, err
	}
	s := &Store{o: StoreOptions{Dir: dir, GenesisJSON: g}}
	if s.genesis, err = identity.ParseGenesis(g); err != nil {
		return nil, err
	}
	if s.blocks, err = seglog.OpenReader(filepath.Join(dir, blocksDir)); err != nil {
		return nil, err
	}
	// Payloads are written before their blocks.
	if s.payloads, err = payload.OpenReader(dir); err != nil {
		return nil, errors.Join(err, s.blocks.Close())
	}
	defer func() { err = errors.Join(err, s.payloads.Close(), s.blocks.Close()) }()
	if n := s.blocks.Next(); n > 0 {
		if s.head, err = s.header(ledger.Height(n)); err != nil {
			return nil, err
		}
	}
	if s.agreed, err = s.loadAgreed(); err != nil {
		return nil, err
	}
	reg, err := s.agreed.registry()
	if err != nil {
		return nil, err
	}
	out := &Survey{Holds: reg.Holds(), Tombstones: reg.Tombstones(0)}
	k := &keeper{store: s, dir: filepath.Join(dir, retention.PendingDir), readOnly: true}
	pending, err := k.pending()
	if err != nil {
		return nil, err
	}
	for _, p := range pending {
		out.Pending = append(out.Pending, p)
	}
	counts := map[retention.Class]uint64{}
	err = s.payloads.Scan(0, func(_ retention.Class, p *ledger.Payload) error {
		c, err := payload.ClassOf(p)
		counts[c]++
		return err
	})
	if err != nil {
		return nil, err
	}
	rules, entry, ok := reg.Retention()
	due := map[retention.Class]retention.Due{}
	if s.head != nil {
		out.Height, out.Time = s.head.Height, s.head.Time
		if ok {
			out.Policy = entry.Hash()
			for _, d := range retention.DueAt(rules, s.head.Time) {
				due[d.Class] = d
			}
		}
	}
	for _, c := range retention.Classes() {
		cs := ClassSurvey{Class: c, Records: counts[c]}
		if d, ok := due[c]; ok {
			for _, r := range rules.Classes {
				if r.Class == string(c) {
					cs.FloorS, cs.CeilingS = &r.FloorS, &r.CeilingS
				}
			}
			plan, err := s.plan(d, reg)
			if err != nil {
				return nil, err
			}
			plan.Dry = true
			got, err := s.payloads.Drop(plan)
			if err != nil {
				return nil, fmt.Errorf("what is due of %s: %w", c, err)
			}
			cs.Due, cs.Held, cs.Ranges = got.Count, got.Held, got.Ranges
		}
		out.Classes = append(out.Classes, cs)
	}
	return out, nil
}
