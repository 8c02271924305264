package identity

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// snapshot is the stored form of a registry. It is not hashed or signed: who
// loads one compares [Registry.Hash] with a header's.
type snapshot struct {
	District traffic.DistrictID `json:"district"`
	Version  uint64             `json:"version"`
	// Entries in the form of [Entry.Marshal]: JSON inside JSON would not keep the
	// bytes that the hash is over.
	Entries [][]byte    `json:"entries"`
	Nonces  []usedNonce `json:"nonces"`
}

type usedNonce struct {
	Key   KeyID  `json:"key"`
	Nonce uint64 `json:"nonce"`
}

// Snapshot returns the whole state as bytes, the same for the same state.
func (r *Registry) Snapshot() []byte {
	r.build()
	s := snapshot{District: r.district, Version: r.version}
	for _, k := range r.order {
		s.Entries = append(s.Entries, r.entries[k].Marshal())
	}
	for n := range r.nonces {
		s.Nonces = append(s.Nonces, usedNonce{n.key, n.nonce})
	}
	slices.SortFunc(s.Nonces, func(a, b usedNonce) int {
		return cmp.Or(cmp.Compare(a.Key, b.Key), cmp.Compare(a.Nonce, b.Nonce))
	})
	b, err := json.Marshal(s)
	if err != nil {
		panic(fmt.Sprintf("identity: snapshot: %v", err)) // unreachable: bodies were checked to be JSON
	}
	return b
}

// ParseSnapshot returns the state that [Registry.Snapshot] wrote. Compare its
// [Registry.Hash] with a header that a quorum signed before trusting it.
func ParseSnapshot(b []byte) (*Registry, error) {
	var s snapshot
	if err := strict(b, &s); err != nil {
		return nil, fmt.Errorf("registry snapshot: %w", err)
	}
	r, err := NewRegistry(&Genesis{District: s.District})
	if err != nil {
		return nil, fmt.Errorf("registry snapshot: %w", err)
	}
	r.loading = true
	entries := make([]Entry, len(s.Entries))
	for i, b := range s.Entries {
		if entries[i], err = ParseEntry(b); err != nil {
			return nil, fmt.Errorf("registry snapshot: entries[%d]: %w", i, err)
		}
	}
	for pass := range passes {
		for i, e := range entries {
			if passOf(e.Type) != pass {
				continue
			}
			// Filed at height 0 so that validators, too, may come back; the true
			// height is restored right after.
			if err := r.put(0, e.Type, e.ID, e.Body); err != nil {
				return nil, fmt.Errorf("registry snapshot: entries[%d]: %w", i, err)
			}
			if e.Status == Revoked {
				if err := r.revoke(e.Since, e.Type, e.ID); err != nil {
					return nil, fmt.Errorf("registry snapshot: entries[%d]: %w", i, err)
				}
			}
			r.set(e)
		}
	}
	for _, n := range s.Nonces {
		r.nonces[nonceKey{n.Key, n.Nonce}] = true
	}
	r.version, r.loading = s.Version, false
	return r, nil
}
