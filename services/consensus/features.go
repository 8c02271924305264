package consensus

import (
	"fmt"
	"strings"

	"github.com/stopline-traffic/stopline/pkg/ledger"
)

// Whoever does not know a feature of the state machine cannot compute the blocks
// from its height on: see [identity.Registry.Unknown]. It must not guess, and it
// must not vote, so it ends before the first of them, and the others go on. With
// more than f such validators the district stands still, in agreement, until
// they have been given a newer build.

// unknownFeatures is why a validator cannot go on.
type unknownFeatures struct {
	height ledger.Height
	names  []string
}

func (e *unknownFeatures) Error() string {
	return fmt.Sprintf("block %d: features: %s: in force and not known to this build, which stops rather than compute another state: install one that knows them",
		e.height, strings.Join(e.names, ", "))
}

// knows reports, as an error, which features in force for the next block are not
// known here. It needs mu.
func (k *core) knows() error {
	h := k.state.height() + 1
	if names := k.state.registry.Unknown(k.features, uint64(h)); len(names) > 0 {
		return &unknownFeatures{h, names}
	}
	return nil
}

// foresee tells, once for each registry, of features to come that are not known
// here. It needs mu.
func (k *core) foresee() {
	for _, name := range k.state.registry.Unknown(k.features, ^uint64(0)) {
		from, _ := k.state.registry.FeatureFrom(name)
		k.log.Error("a feature will be in force that this build does not know: install one that does before then",
			"feature", name, "from", from, "height", uint64(k.state.height()))
	}
}

// upToDate returns what [core.knows] does.
func (k *core) upToDate() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.knows()
}
