package identity

import (
	"bytes"
	"cmp"
	"crypto/ed25519"
	"encoding/json"
	"slices"
	"strconv"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// Bounds of a district's validators. They are not asked of genesis, but for
// MaxValidators by the validators themselves.
const (
	// MinValidators is how many remain however many are revoked: with fewer, none
	// of them may fail.
	MinValidators = 4
	// MaxValidators is how many there may be: when a leader is replaced, the
	// largest proposal of each of a quorum fits one message.
	MaxValidators = 10
)

// MembersSince returns the height of the last block that changed the
// validators, 0 where none has: the set of [Registry.Validators] decides all
// blocks after that one.
func (r *Registry) MembersSince() uint64 { return r.membersSince }

// ChangeMembers carries out on a set of validators, ordered by number, a change
// that a registry has accepted: for those who follow the validators and not the
// registry. The set that is given stays as it is.
func ChangeMembers(now []Validator, c Change) ([]Validator, error) {
	n, err := strconv.ParseUint(c.ID, 10, 64)
	if err != nil {
		return nil, kind.Errorf(kind.Invalid, "id: %.20q: must be a validator's number", c.ID)
	}
	i, found := slices.BinarySearchFunc(now, n, func(v Validator, n uint64) int { return cmp.Compare(v.Number, n) })
	switch {
	case c.Action == "revoke" && found:
		return slices.Delete(slices.Clone(now), i, i+1), nil
	case c.Action == "revoke":
		return nil, kind.Errorf(kind.NotFound, "id: no validator %d", n)
	}
	var v Validator
	if err := parseBody(c.Body, &v); err != nil {
		return nil, err
	}
	if found {
		now = slices.Clone(now)
		now[i] = v
		return now, nil
	}
	return slices.Insert(slices.Clone(now), i, v), nil
}

// putValidator checks a validator's entry: a new one, whose number was never
// used, or the same validator with another voting or cosigning key, or both. It
// returns the keys that are new and what else changes.
//
// Which keys a validator had before stays in its entry, so that the registry's
// hash says it: a key is never used again either.
func (r *Registry) putValidator(height uint64, id string, body json.RawMessage) (v Validator, fresh []newKey, done func(), err error) {
	if err := parseBody(body, &v); err != nil {
		return v, nil, nil, err
	}
	if v.Number == 0 || strconv.FormatUint(v.Number, 10) != id {
		return v, nil, nil, kind.Errorf(kind.Invalid, "body.number: must be positive and equal to the id %q", id)
	}
	if len(v.CosignKey) != ed25519.PublicKeySize || bytes.Equal(v.VoteKey, v.CosignKey) {
		return v, nil, nil, kind.Errorf(kind.Invalid, "body.cosign_key: must be a key, and not the vote key")
	}
	old, rotates := r.validators[v.Number]
	if height != 0 {
		if err := r.oneChange(height); err != nil {
			return v, nil, nil, err
		}
		if n := len(r.validators); !rotates && n >= MaxValidators {
			return v, nil, nil, kind.Errorf(kind.Conflict, "id: there are %d validators, at most %d: revoke one first", n, MaxValidators)
		}
	}
	if rotates && height == 0 && !r.loading {
		return v, nil, nil, kind.Errorf(kind.Conflict, "id: validator %q was used before; ids are never used again", id)
	}
	former := old.Former
	var retired []PublicKey
	if rotates {
		if v.Department != old.Department {
			return v, nil, nil, kind.Errorf(kind.Conflict, "body.department: is %q: another department's validator has a number of its own", old.Department)
		}
		for _, k := range []struct{ old, new PublicKey }{{old.VoteKey, v.VoteKey}, {old.CosignKey, v.CosignKey}} {
			if !bytes.Equal(k.old, k.new) {
				retired = append(retired, k.old)
			}
		}
		if len(retired) == 0 {
			return v, nil, nil, kind.Errorf(kind.Conflict, "body: validator %d has these keys already", v.Number)
		}
		former = append(slices.Clone(former), retired...)
	}
	if !r.loading && !slices.EqualFunc(v.Former, former, func(a, b PublicKey) bool { return bytes.Equal(a, b) }) {
		return v, nil, nil, kind.Errorf(kind.Invalid, "body.former: must be the %d keys that the validator had before, the oldest first", len(former))
	}
	if !rotates || !bytes.Equal(old.VoteKey, v.VoteKey) {
		fresh = append(fresh, newKey{"body.vote_key", v.VoteKey, Active})
	}
	if !rotates || !bytes.Equal(old.CosignKey, v.CosignKey) {
		fresh = append(fresh, newKey{"body.cosign_key", v.CosignKey, Active})
	}
	if r.loading {
		for _, k := range v.Former {
			fresh = append(fresh, newKey{"body.former", k, Revoked})
		}
	}
	return v, fresh, func() {
		for _, k := range retired {
			h := r.holders[IDOf(ed25519.PublicKey(k))]
			h.Status = Revoked
			r.holders[IDOf(ed25519.PublicKey(k))] = h
		}
		r.validators[v.Number] = v
	}, nil
}

// newKey is a key that an entry brings into the registry.
type newKey struct {
	field  string
	key    PublicKey
	status Status
}

// mayLeave checks that a validator may be revoked.
func (r *Registry) mayLeave(height uint64) error {
	if r.loading {
		return nil
	}
	if err := r.oneChange(height); err != nil {
		return err
	}
	if n := len(r.validators); n <= MinValidators {
		return kind.Errorf(kind.Conflict, "id: there are %d validators, and %d must remain: add another first", n, MinValidators)
	}
	return nil
}

// oneChange refuses a second change of the validators in one block: each is
// decided by those that the one before left.
func (r *Registry) oneChange(height uint64) error {
	if r.membersSince >= height {
		return kind.Errorf(kind.Conflict, "type: the validators were changed in this block already: send it again")
	}
	return nil
}
