package wire

import (
	"encoding/json"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// EncodeFallback returns the payload of a fall-back plan, which is JSON.
func EncodeFallback(f *traffic.Fallback) ([]byte, error) { return json.Marshal(f) }

// DecodeFallback decodes the payload of a fall-back plan. Errors are of kind
// Invalid.
func DecodeFallback(contentType string, payload []byte) (*traffic.Fallback, error) {
	if contentType != identity.JSON {
		return nil, kind.Errorf(kind.Invalid, "content_type: %.40q, a fall-back plan is %q", contentType, identity.JSON)
	}
	return traffic.ParseFallback(payload)
}
