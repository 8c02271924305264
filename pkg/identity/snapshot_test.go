package identity

import (
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"testing"
)

// A snapshot must keep the very bytes that the hash is over, also where JSON
// leaves a choice: white space, and characters that Go's encoder escapes.
func TestSnapshotKeepsTheHash(t *testing.T) {
	pub, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	official := fmt.Sprintf(`{ "key": "%s",
		"department": "roads <& signals>", "roles": ["registrar"] }`, hex.EncodeToString(pub))
	r, err := NewRegistry(&Genesis{District: "d", Entries: []Entry{{Type: TypeOfficial, ID: "o", Body: []byte(official)}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Apply(3, IDOf(pub), Change{District: "d", Action: "put", Type: TypeSoftware, ID: "s", Body: json.RawMessage(`{"a" : "<b>"}`), Nonce: 7}); err != nil {
		t.Fatal(err)
	}
	again, err := ParseSnapshot(r.Snapshot())
	if err != nil {
		t.Fatal(err)
	}
	if again.Hash() != r.Hash() || again.Version() != r.Version() {
		t.Errorf("got hash %x at version %d, want %x at %d", again.Hash(), again.Version(), r.Hash(), r.Version())
	}
	if err := again.Apply(4, IDOf(pub), Change{District: "d", Action: "put", Type: TypeSoftware, ID: "t", Body: json.RawMessage(`{}`), Nonce: 7}); err == nil {
		t.Error("a nonce could be used again after a snapshot")
	}
}
