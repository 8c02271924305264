package wire

import (
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/retention"
)

// DecodeDeletion decodes the payload of a deletion record, which is JSON: see
// [retention.Receipt].
func DecodeDeletion(contentType string, payload []byte) (*retention.Receipt, error) {
	if contentType != identity.JSON {
		return nil, kind.Errorf(kind.Invalid, "content_type: %.60q: a receipt of deletion is %s", contentType, identity.JSON)
	}
	r, err := retention.ParseReceipt(payload)
	if err != nil {
		return nil, kind.Errorf(kind.Invalid, "%w", err)
	}
	return r, nil
}
