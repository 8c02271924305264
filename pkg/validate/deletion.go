package validate

import (
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/retention"
)

// maxDeletion bounds a receipt of deletion, bytes: [retention.MaxRanges] fit.
const maxDeletion = 64 << 10

// deletion judges a holder's receipt. What it says cannot be checked here: it is
// the holder's word, and on record.
func deletion(reg *identity.Registry, r *retention.Receipt, h *identity.Holder) Verdict {
	if r.District != reg.District() {
		return refuse(RuleDistrict, "district: %.40q, this is %q", string(r.District), string(reg.District()))
	}
	id := h.ID
	if h.Type == identity.TypeValidator {
		id = "validator-" + id // [identity.DeletionID]
	}
	if r.Holder != id {
		return refuse(RuleDevice, "holder: %.40q, the signer is %s %s", r.Holder, h.Type, h.ID)
	}
	return ok
}
