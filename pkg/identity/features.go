package identity

import (
	"encoding/json"
	"slices"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// A feature is a rule of the state machine that begins at a height which the
// registry names: until then every build does as before, from then on as the
// feature says. So validators can be given a new build one after another, and
// none of them computes what the others do not. Who runs a build that does not
// know a feature must not decide from its height on; see [Registry.Unknown].
const (
	// FeatureBaseRequired has every change to the registry name what it was made
	// to, as those with approvals must anyway: nobody overwrites what they have not
	// seen. See [Change.Base].
	FeatureBaseRequired = "base-required"
)

// Features lists what this build knows, in order.
func Features() []string {
	return []string{FeatureAccess, FeatureBaseRequired, FeatureEnrolment, FeatureRetention}
}

// Feature is the body of a feature's entry, whose id is its name.
type Feature struct {
	// From is the first block that is decided by it.
	From uint64 `json:"from"`
}

// MaxFeatureName is the longest name of a feature, bytes.
const MaxFeatureName = 64

// Active reports whether a feature is in force for a block. Names that no entry
// has are not.
func (r *Registry) Active(feature string, height uint64) bool {
	from, ok := r.features[feature]
	return ok && height >= from
}

// FeatureFrom returns the first height at which a feature is in force, and
// whether there is one.
func (r *Registry) FeatureFrom(feature string) (height uint64, ok bool) {
	height, ok = r.features[feature]
	return height, ok
}

// Unknown returns the features in force for a block that are not among those
// known, in order.
func (r *Registry) Unknown(known []string, height uint64) []string {
	var out []string
	for name, from := range r.features {
		if height >= from && !slices.Contains(known, name) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// putFeature checks a feature's entry. Until its height it may be set to another;
// from then on it stays: blocks have been decided by it.
func (r *Registry) putFeature(height uint64, name string, body json.RawMessage) (done func(), err error) {
	var f Feature
	if err := parseBody(body, &f); err != nil {
		return nil, err
	}
	bad := func(c rune) bool { return (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' }
	if len(name) > MaxFeatureName || slices.ContainsFunc([]rune(name), bad) {
		return nil, kind.Errorf(kind.Invalid, "id: %.80q: a feature's name is at most %d of a to z, 0 to 9 and -", name, MaxFeatureName)
	}
	if height != 0 { // not in genesis or a snapshot
		if err := r.pending(height, name); err != nil {
			return nil, err
		}
		if f.From <= height {
			return nil, kind.Errorf(kind.Invalid, "body.from: %d: must be later than block %d, which holds the change", f.From, height)
		}
	}
	return func() { r.features[name] = f.From }, nil
}

// pending refuses to change a feature that is in force, or is so from the next
// block on.
func (r *Registry) pending(height uint64, name string) error {
	if from, ok := r.features[name]; ok && from <= height+1 {
		return kind.Errorf(kind.Conflict, "id: feature %q is in force from block %d on and stays", name, from)
	}
	return nil
}
