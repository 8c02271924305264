package identity

import (
	"fmt"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// validator returns a validator's entry as a newcomer files it.
func validator(n uint64) Validator {
	return Validator{Number: n, Department: fmt.Sprintf("dept %d", n), VoteKey: testPub(fmt.Sprintf("vote %d", n)), CosignKey: testPub(fmt.Sprintf("cosign %d", n))}
}

// members applies changes of validators, each in a block of its own.
type members struct {
	t      *testing.T
	reg    *Registry
	height uint64
	nonce  uint64
}

func (m *members) apply(action string, n uint64, body any) error {
	m.t.Helper()
	m.nonce++
	c := Change{District: "harbour", Action: action, Type: TypeValidator, ID: fmt.Sprint(n), Nonce: m.nonce}
	if body != nil {
		c.Body = raw(m.t, body)
	}
	return m.reg.Apply(m.height, testID("registrar"), c)
}

// block applies one change in the next block.
func (m *members) block(action string, n uint64, body any) {
	m.t.Helper()
	m.height++
	if err := m.apply(action, n, body); err != nil {
		m.t.Fatalf("%s %d: %v", action, n, err)
	}
	if got := m.reg.MembersSince(); got != m.height {
		m.t.Fatalf("members since: got %d, want %d", got, m.height)
	}
}

// refused expects the next block's change to be refused, and to change nothing.
func (m *members) refused(k kind.Kind, want, action string, n uint64, body any) {
	m.t.Helper()
	m.height++
	before := string(m.reg.Snapshot())
	err := m.apply(action, n, body)
	if err == nil || err.Error() != want || kind.Of(err) != k {
		m.t.Errorf("%s %d: got %v of kind %v, want %s of kind %v", action, n, err, kind.Of(err), want, k)
	}
	if got := string(m.reg.Snapshot()); got != before {
		m.t.Errorf("%s %d: refused, and yet the registry has changed", action, n)
	}
}

func (m *members) numbers() string {
	var out []uint64
	for _, v := range m.reg.Validators() {
		out = append(out, v.Number)
	}
	return fmt.Sprint(out)
}

// TestMembers: from four validators to seven and back to four others; at each
// step a snapshot is the same registry.
func TestMembers(t *testing.T) {
	m := &members{t: t, reg: testRegistry(t), height: 10}
	check := func(want string) {
		t.Helper()
		if got := m.numbers(); got != want {
			t.Fatalf("validators: got %s, want %s", got, want)
		}
		back, err := ParseSnapshot(m.reg.Snapshot())
		if err != nil {
			t.Fatal(err)
		}
		if back.Hash() != m.reg.Hash() || back.MembersSince() != m.reg.MembersSince() || fmt.Sprint(back.Validators()) != fmt.Sprint(m.reg.Validators()) ||
			fmt.Sprint(len(back.holders)) != fmt.Sprint(len(m.reg.holders)) {
			t.Fatalf("a snapshot of %s is another registry", want)
		}
		for id, h := range m.reg.holders {
			if got := back.holders[id]; got.Status != h.Status || got.ID != h.ID {
				t.Fatalf("a snapshot's holder of %s: got %s %s, want %s %s", id, got.ID, got.Status, h.ID, h.Status)
			}
		}
	}
	check("[1 2 3 4]")
	if got := m.reg.MembersSince(); got != 0 {
		t.Errorf("members since, in genesis: got %d, want 0", got)
	}
	m.block(Put, 5, validator(5))
	m.block(Put, 6, validator(6))
	m.block(Put, 7, validator(7))
	check("[1 2 3 4 5 6 7]")
	m.block(Revoke, 2, nil)
	m.block(Revoke, 1, nil)
	m.block(Revoke, 7, nil)
	check("[3 4 5 6]")
	m.refused(kind.Conflict, "id: there are 4 validators, and 4 must remain: add another first", Revoke, 3, nil)
	for _, n := range []uint64{1, 2, 7} {
		m.refused(kind.Conflict, fmt.Sprintf("id: validator \"%d\" was used before; ids are never used again", n), Put, n, validator(n))
		if h, _ := m.reg.Holder(testID(fmt.Sprintf("vote %d", n))); h.Status != Revoked {
			t.Errorf("vote key of %d: got %s, want revoked", n, h.Status)
		}
		if h, _ := m.reg.Holder(testID(fmt.Sprintf("cosign %d", n))); h.Status != Revoked {
			t.Errorf("cosigning key of %d: got %s, want revoked", n, h.Status)
		}
	}
	again := validator(8)
	again.VoteKey = validator(2).VoteKey
	m.refused(kind.Conflict, fmt.Sprintf(`body.vote_key: %s belongs to validator "2" already`, testID("vote 2")), Put, 8, again)
}

// TestRotate: the same validator with other keys. The old ones stay in its
// entry, and are never used again.
func TestRotate(t *testing.T) {
	m := &members{t: t, reg: testRegistry(t), height: 10}
	v := validator(2)
	v.VoteKey, v.Former = testPub("vote 2 new"), []PublicKey{testPub("vote 2")}
	m.block(Put, 2, v)
	if got := m.numbers(); got != "[1 2 3 4]" {
		t.Errorf("validators: got %s, want the same four", got)
	}
	for name, want := range map[string]Status{"vote 2": Revoked, "vote 2 new": Active, "cosign 2": Active} {
		if h, ok := m.reg.Holder(testID(name)); !ok || h.Status != want || h.ID != "2" {
			t.Errorf("%s: got %+v, want %s, of 2", name, h, want)
		}
	}
	same := v
	same.Former = append(same.Former, testPub("vote 2 new"))
	m.refused(kind.Conflict, "body: validator 2 has these keys already", Put, 2, same)
	both := v
	both.VoteKey, both.CosignKey = testPub("vote 2 newer"), testPub("cosign 2 new")
	m.refused(kind.Invalid, "body.former: must be the 3 keys that the validator had before, the oldest first", Put, 2, both)
	both.Former = []PublicKey{testPub("vote 2"), testPub("vote 2 new"), testPub("cosign 2")}
	back := both
	back.VoteKey = testPub("vote 2")
	m.refused(kind.Conflict, fmt.Sprintf(`body.vote_key: %s belongs to validator "2" already`, testID("vote 2")), Put, 2, back)
	other := both
	other.Department = "dept 3"
	m.refused(kind.Conflict, `body.department: is "dept 2": another department's validator has a number of its own`, Put, 2, other)
	m.block(Put, 2, both)
	// The former keys are known from a snapshot alone.
	reg, err := ParseSnapshot(m.reg.Snapshot())
	if err != nil {
		t.Fatal(err)
	}
	m.reg = reg
	taken := validator(5)
	taken.CosignKey = testPub("vote 2")
	m.refused(kind.Conflict, fmt.Sprintf(`body.cosign_key: %s belongs to validator "2" already`, testID("vote 2")), Put, 5, taken)
}

// TestMembersRefused: one change a block, at most ten, and nothing that could
// make two validators one.
func TestMembersRefused(t *testing.T) {
	m := &members{t: t, reg: testRegistry(t), height: 10}
	m.block(Put, 5, validator(5))
	if err := m.apply(Put, 6, validator(6)); err == nil || err.Error() != "type: the validators were changed in this block already: send it again" {
		t.Errorf("a second change in a block: got %v", err)
	}
	if err := m.apply(Revoke, 1, nil); err == nil || kind.Of(err) != kind.Conflict {
		t.Errorf("a second change in a block: got %v, want a conflict", err)
	}
	m.block(Put, 6, validator(6))
	m.refused(kind.NotFound, `id: no validator "7"`, Revoke, 7, nil)
	former := validator(7)
	former.Former = []PublicKey{testPub("x")}
	m.refused(kind.Invalid, "body.former: must be the 0 keys that the validator had before, the oldest first", Put, 7, former)
	twin := validator(7)
	twin.CosignKey = twin.VoteKey
	m.refused(kind.Invalid, "body.cosign_key: must be a key, and not the vote key", Put, 7, twin)
	taken := validator(7)
	taken.VoteKey = validator(1).CosignKey
	m.refused(kind.Conflict, fmt.Sprintf(`body.vote_key: %s belongs to validator "1" already`, testID("cosign 1")), Put, 7, taken)
	for n := uint64(7); n <= MaxValidators; n++ {
		m.block(Put, n, validator(n))
	}
	m.refused(kind.Conflict, "id: there are 10 validators, at most 10: revoke one first", Put, 11, validator(11))
	m.block(Revoke, 10, nil)
	m.block(Put, 11, validator(11))

	g := testGenesis(t)
	g.Entries = append(g.Entries, entry(t, TypeValidator, "4", validator(4)))
	if _, err := NewRegistry(g); err == nil {
		t.Error("a genesis document with one validator twice is accepted")
	}
}
