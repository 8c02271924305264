package gateway

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// defaultPage is how many things a page has where the request does not say.
const defaultPage = 100

func pageSize(n int32) int {
	if n == 0 {
		return defaultPage
	}
	return int(n)
}

// A page token is where the next page begins, bound to the request whose pages
// they are: with another filter it is refused. It is no secret and no authority:
// what it leads to passes the policy like everything else.
type pageToken struct {
	Of   []byte `json:"of"` // the request but for its token and size
	Next string `json:"next"`
}

// ofRequest is a digest of a request without what differs between its pages.
func ofRequest(req proto.Message) []byte {
	m := proto.Clone(req).ProtoReflect()
	for _, name := range []protoreflect.Name{"page_token", "page_size", "read_mask"} {
		if f := m.Descriptor().Fields().ByName(name); f != nil {
			m.Clear(f)
		}
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m.Interface())
	if err != nil {
		return nil // unreachable: it was decoded a moment ago
	}
	h := sha256.Sum256(append([]byte(m.Descriptor().FullName()+"\n"), b...))
	return h[:8]
}

// nextPage makes the token of the page that begins at next, empty for none.
func nextPage(req proto.Message, next string) string {
	if next == "" {
		return ""
	}
	b, err := json.Marshal(pageToken{ofRequest(req), next})
	if err != nil {
		return "" // unreachable: strings
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

// pageAt reads the place in a token, empty for the first page.
func pageAt(req proto.Message, token string) (string, error) {
	if token == "" {
		return "", nil
	}
	var t pageToken
	b, err := base64.RawURLEncoding.DecodeString(token)
	if err == nil {
		err = json.Unmarshal(b, &t)
	}
	if err != nil || string(t.Of) != string(ofRequest(req)) || t.Next == "" {
		return "", invalidField("page_token", "other-request", "must be the next_page_token of the same request")
	}
	return t.Next, nil
}

// checkMask refuses a mask with paths that a message does not have.
func checkMask(mask *fieldmaskpb.FieldMask, of proto.Message) error {
	if mask == nil {
		return nil
	}
	if len(mask.Paths) > 64 {
		return invalidField("read_mask", "max_paths", "has more than 64 paths")
	}
	for _, p := range mask.Paths {
		if _, err := fieldmaskpb.New(of, p); err != nil {
			return invalidField("read_mask", "unknown", fmt.Sprintf("%.64q is no field of %s", p, of.ProtoReflect().Descriptor().Name()))
		}
	}
	return nil
}

// masked returns a message with the fields of a mask, which was checked, and no
// others; the message itself where there is no mask.
func masked[M proto.Message](m M, mask *fieldmaskpb.FieldMask) M {
	if mask == nil || len(mask.Paths) == 0 {
		return m
	}
	out := proto.Clone(m).(M)
	keep := &maskNode{}
	for _, p := range mask.Paths {
		keep.add(p)
	}
	keep.prune(out.ProtoReflect())
	return out
}

// maskNode is a tree of field names; one without children keeps everything.
type maskNode struct{ under map[string]*maskNode }

func (n *maskNode) add(path string) {
	for at := n; ; {
		name, rest := path, ""
		for i := range len(path) {
			if path[i] == '.' {
				name, rest = path[:i], path[i+1:]
				break
			}
		}
		next, known := at.under[name]
		if known && len(next.under) == 0 {
			return // all of it is kept already
		}
		if !known {
			if at.under == nil {
				at.under = map[string]*maskNode{}
			}
			next = &maskNode{}
			at.under[name] = next
		}
		if rest == "" {
			next.under = nil
			return
		}
		at, path = next, rest
	}
}

func (n *maskNode) prune(m protoreflect.Message) {
	if len(n.under) == 0 {
		return
	}
	var drop []protoreflect.FieldDescriptor
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		under, ok := n.under[string(f.Name())]
		switch {
		case !ok:
			drop = append(drop, f)
		case f.Message() != nil && !f.IsList() && !f.IsMap():
			under.prune(v.Message())
		}
		return true
	})
	for _, f := range drop {
		m.Clear(f)
	}
}

// timestamp is a time, nil for none.
func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// asTime reads a timestamp, zero for none; one that is no time is refused.
func asTime(field string, t *timestamppb.Timestamp) (time.Time, error) {
	if t == nil {
		return time.Time{}, nil
	}
	if err := t.CheckValid(); err != nil {
		return time.Time{}, invalidField(field, "timestamp", "is out of range")
	}
	at := t.AsTime()
	if y := at.Year(); y < 2000 || y > 2200 { // nanoseconds of it are a number
		return time.Time{}, invalidField(field, "timestamp", "must be between the years 2000 and 2200")
	}
	return at, nil
}
