package ledger

import (
	"bytes"
	"encoding/binary"
	"reflect"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/identity"
)

// Who checks a log reads approvals from protobuf as the validators do.
func TestReadChange(t *testing.T) {
	field := func(n byte, v string) []byte {
		return append(binary.AppendUvarint([]byte{n<<3 | 2}, uint64(len(v))), v...)
	}
	base, sigs := bytes.Repeat([]byte{7}, 32), [2][]byte{bytes.Repeat([]byte{1}, 64), bytes.Repeat([]byte{2}, 64)}
	want := identity.Change{District: "harbour", Action: "put", Type: "policy", ID: "day", Body: []byte("{}"), Nonce: 5, Base: base, Until: 7,
		Approvals: []identity.Approval{{Key: "aa", Signature: sigs[0]}, {Key: "bb", Signature: sigs[1]}}}
	p := bytes.Join([][]byte{field(1, "harbour"), field(2, "put"), field(3, "policy"), field(4, "day"), field(5, "{}"), {6 << 3, 5}, field(7, string(base)),
		field(8, string(append(field(1, "aa"), field(2, string(sigs[0]))...))), field(8, string(append(field(1, "bb"), field(2, string(sigs[1]))...))), {9 << 3, 7}}, nil)
	got, err := readChange(identity.Envelope{ContentType: identity.Protobuf, Payload: p})
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v\nwant %+v", got, err, want)
	}
	payload, err := want.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range []identity.Envelope{{ContentType: identity.Protobuf, Payload: p}, {ContentType: identity.JSON, Payload: payload}} {
		e.Kind = identity.KindRegistry
		if got := Describe(e).Summary; got != `registry change: "put" of "policy" "day", with 2 approvals` {
			t.Errorf("%s: got %s", e.ContentType, got)
		}
	}
	if got, err := readChange(identity.Envelope{ContentType: identity.Protobuf, Payload: append(p, 8<<3|2, 1, 0xff)}); err == nil {
		t.Errorf("got %+v from a broken approval", got)
	}
	if got, err := readChange(identity.Envelope{ContentType: identity.Protobuf, Payload: p[:len(p)-1]}); err == nil {
		t.Errorf("got %+v from a truncated change", got)
	}
}

func TestWhoMaySign(t *testing.T) {
	for _, tt := range []struct {
		entry identity.Entry
		kind  identity.RecordKind
		want  bool
	}{
		{identity.Entry{Type: identity.TypeOfficial, Body: []byte(`{"roles":["planner"]}`)}, identity.KindRegistry, true},
		{identity.Entry{Type: identity.TypeOfficial, Body: []byte(`{"roles":[]}`)}, identity.KindRegistry, false},
		{identity.Entry{Type: identity.TypeOfficial, Body: []byte(`{"roles":["planner"]}`)}, identity.KindCommand, false},
		{identity.Entry{Type: identity.TypeAgency, Body: []byte(`{}`)}, identity.KindRequest, true},
		{identity.Entry{Type: identity.TypeAgency, Body: []byte(`{}`)}, identity.KindRegistry, false},
		{identity.Entry{Type: identity.TypeGovernance, Body: []byte(`{}`)}, identity.KindRegistry, false},
	} {
		if got := maySign(tt.entry, tt.kind); got != tt.want {
			t.Errorf("%s %s may sign a %s: got %v, want %v", tt.entry.Type, tt.entry.Body, tt.kind, got, tt.want)
		}
	}
}
