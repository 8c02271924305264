package consensus

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	protos "github.com/hyperledger-labs/SmartBFT/smartbftprotos"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// bench is one validator's core with hands for the other three's keys.
type bench struct {
	t   testing.TB
	c   Config
	k   *core
	n   *counters
	now time.Time
	val int
}

func newBench(t testing.TB) *bench { return newBenchOf(t, 4) }

func newBenchOf(t testing.TB, validators int) *bench {
	b := &bench{t: t, now: noon, val: validators}
	b.c = Config{District: harbour, Number: 1, VoteKey: voteKey(1), CosignKey: cosignKey(1), Genesis: genesis(t, validators, 8), Dir: t.TempDir(),
		Now: func() time.Time { return b.now }, Logger: slog.New(slog.DiscardHandler), SnapshotEvery: 3}
	b.open()
	t.Cleanup(func() {
		if err := b.k.close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

func (b *bench) open() {
	b.t.Helper()
	b.n = &counters{}
	k, err := openCore(b.c, smartCodec{}, b.n)
	if err != nil {
		b.t.Fatal(err)
	}
	b.k = k
}

func (b *bench) reopen() {
	b.t.Helper()
	if err := b.k.close(); err != nil {
		b.t.Fatal(err)
	}
	b.open()
}

func metadata(t testing.TB, view uint64, h ledger.Height) []byte {
	t.Helper()
	md, err := proto.Marshal(&protos.ViewMetadata{ViewId: view, LatestSequence: uint64(h)})
	if err != nil {
		t.Fatal(err)
	}
	return md
}

func (b *bench) at(view uint64, p phase) slot { return slot{view, b.k.height() + 1, p} }

// propose assembles the next block as a leader would.
func (b *bench) propose(batches ...[]byte) proposal {
	at := b.at(0, phasePropose)
	return b.k.assemble(at, metadata(b.t, at.View, at.Height), batches)
}

// decide applies a proposal with a quorum's votes.
func (b *bench) decide(p proposal) {
	b.t.Helper()
	if err := b.k.apply(p, b.votes(p, 3)); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) votes(p proposal, n int) []ledger.Vote {
	h, err := ledger.ParseHeader(p.Header)
	if err != nil {
		b.t.Fatal(err)
	}
	var out []ledger.Vote
	for i := n; i > 0; i-- {
		out = append(out, ledger.Vote{Validator: uint64(i), Signature: ed25519.Sign(voteKey(uint64(i)), ledger.VoteInput(h.Hash(), p.Metadata))})
	}
	return out
}

func (b *bench) verify(p proposal) error {
	_, err := b.k.verify(b.at(0, phasePrepare), ledger.Hash{1}, p)
	return err
}

func TestVerifyProposalRefuses(t *testing.T) {
	t.Parallel()
	rewrite := func(f func(h *ledger.Header)) func(*testing.T, *bench, proposal) proposal {
		return func(t *testing.T, _ *bench, p proposal) proposal {
			h, err := ledger.ParseHeader(p.Header)
			if err != nil {
				t.Fatal(err)
			}
			f(&h)
			p.Header = h.Marshal()
			return p
		}
	}
	payload := func(f func(b *bench, batches [][]byte) [][]byte) func(*testing.T, *bench, proposal) proposal {
		return func(t *testing.T, b *bench, p proposal) proposal {
			have, err := decodePayload(p.Payload)
			if err != nil {
				t.Fatal(err)
			}
			batches := f(b, have)
			var ids []ledger.Hash
			for _, x := range batches {
				ids = append(ids, ledger.RequestID(x))
			}
			p = rewrite(func(h *ledger.Header) { h.Requests = ledger.RequestsDigest(ids) })(t, b, p)
			p.Payload = encodePayload(batches)
			return p
		}
	}
	for _, tc := range []struct {
		name, reason, text string
		change             func(*testing.T, *bench, proposal) proposal
	}{
		{"time of the parent", refusedTime, "is not later than the parent's", rewrite(func(h *ledger.Header) { h.Time = noon })},
		{"time before the parent", refusedTime, "is not later than the parent's", rewrite(func(h *ledger.Header) { h.Time = noon.Add(-time.Second) })},
		{"time too far ahead", refusedTime, "more than 500ms ahead of the clock", rewrite(func(h *ledger.Header) { h.Time = noon.Add(time.Second + 501*time.Millisecond) })},
		{"registry hash", refusedHeader, "registry: 00", rewrite(func(h *ledger.Header) { h.Registry = ledger.Hash{} })},
		{"registry version", refusedHeader, "registry_version: 7, want 0", rewrite(func(h *ledger.Header) { h.RegistryVersion = 7 })},
		{"parent", refusedParent, "parent", rewrite(func(h *ledger.Header) { h.Parent[0] ^= 1 })},
		{"genesis", refusedParent, "parent", rewrite(func(h *ledger.Header) { h.Genesis[0] ^= 1 })},
		{"height", refusedPosition, "height: 3 in a proposal for 2", rewrite(func(h *ledger.Header) { h.Height = 3 })},
		{"verdicts", refusedHeader, "verdicts", rewrite(func(h *ledger.Header) { h.Verdicts[0] ^= 1 })},
		{"size", refusedHeader, "size: ", rewrite(func(h *ledger.Header) { h.Size++ })},
		{"leaves", refusedHeader, "leaves", rewrite(func(h *ledger.Header) { h.Leaves[0] ^= 1 })},
		{"root", refusedHeader, "root", rewrite(func(h *ledger.Header) { h.Root[0] ^= 1 })},
		{"other payload", refusedHeader, "requests: the payload is another", func(_ *testing.T, b *bench, p proposal) proposal {
			p.Payload = encodePayload([][]byte{batch(newUnit(5).frame(noon))})
			return p
		}},
		{"cut payload", refusedForm, "truncated", func(_ *testing.T, _ *bench, p proposal) proposal { p.Payload = p.Payload[:len(p.Payload)-1]; return p }},
		{"cut header", refusedForm, "header", func(_ *testing.T, _ *bench, p proposal) proposal { p.Header = p.Header[1:]; return p }},
		{"too large", refusedForm, "at most", func(_ *testing.T, b *bench, p proposal) proposal {
			p.Payload = make([]byte, b.k.members().limit+1)
			return p
		}},
		{"decided request", refusedDecided, "was decided before", payload(func(_ *bench, have [][]byte) [][]byte { return append(have, decidedBatch) })},
		{"request twice", refusedDecided, "was decided before", payload(func(_ *bench, have [][]byte) [][]byte { return append(have, have[0]) })},
		{"no batch", refusedRequest, "batches[2]: request: Batch", payload(func(_ *bench, have [][]byte) [][]byte { return append(have, []byte("junk")) })},
		{"empty batch", refusedRequest, "0 records", payload(func(_ *bench, have [][]byte) [][]byte { return append(have, nil) })},
		{"record added", refusedHeader, "the header does not", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBench(t)
			u := newUnit(1)
			decidedBatch = batch(u.frame(noon))
			b.decide(b.propose(decidedBatch))
			b.now = noon.Add(time.Second)
			good := b.propose(batch(u.frame(noon)), batch(newUnit(2).frame(noon)))
			bad := good
			if tc.change == nil { // one more batch, honestly hashed, but for verdicts and leaves
				tc.text = "verdicts"
				tc.change = payload(func(_ *bench, have [][]byte) [][]byte {
					var rs []*pb.Record
					for i := 3; i < 8; i++ {
						rs = append(rs, newUnit(i).frame(noon), newUnit(i).frame(noon))
					}
					return append(have, batch(rs...))
				})
			}
			bad = tc.change(t, b, bad)
			err := b.verify(bad)
			var r *refusal
			if !errors.As(err, &r) || r.reason != tc.reason || !strings.Contains(err.Error(), tc.text) {
				t.Fatalf("got %v, want it refused as %s with %q", err, tc.reason, tc.text)
			}
			if got := b.n.stats().Refused[tc.reason]; got != 1 {
				t.Errorf("refused %s: counted %d, want 1", tc.reason, got)
			}
			if err := b.verify(good); err != nil {
				t.Errorf("the good proposal after it: got %v, want it taken", err)
			}
		})
	}
}

var decidedBatch []byte

func TestVerifyingChangesNothing(t *testing.T) {
	b := newBench(t)
	before, err := b.k.state.marshal()
	if err != nil {
		t.Fatal(err)
	}
	p := b.propose(batch(newUnit(1).frame(noon), change(t, 1, "put", identity.TypeDevice, "d77", identity.Device{Junction: "j1", Key: pub(key("77"))})))
	clear(b.k.outcomes) // so that it is executed again
	if err := b.verify(p); err != nil {
		t.Fatal(err)
	}
	after, err := b.k.state.marshal()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, after) {
		t.Error("the state is another after a proposal was assembled and verified")
	}
	b.decide(p)
	if decided, err := b.k.state.marshal(); err != nil || bytes.Equal(before, decided) {
		t.Errorf("the state is the same after the decision, err %v", err)
	}
}

func TestALeaderSaysOneThingInASlot(t *testing.T) {
	b := newBench(t)
	u := newUnit(1)
	first := b.propose(batch(u.frame(noon)))
	b.now = b.now.Add(time.Second)
	if second := b.propose(batch(u.frame(noon))); !bytes.Equal(first.Header, second.Header) || !bytes.Equal(first.Payload, second.Payload) {
		t.Error("asked again for the same view and height, the leader proposes something else")
	}
	at := b.at(1, phasePropose)
	if other := b.k.assemble(at, metadata(t, 1, at.Height), nil); bytes.Equal(first.Header, other.Header) {
		t.Error("in another view, the old proposal with its old time comes again")
	}
}

func TestTimeMovesWhereTheClockStands(t *testing.T) {
	b := newBench(t)
	u := newUnit(1)
	for i := range 3 {
		p := b.propose(batch(u.frame(noon)))
		if err := b.verify(p); err != nil {
			t.Fatalf("block %d: %v", i+1, err)
		}
		b.decide(p)
	}
	if got, want := b.k.state.time(), noon.Add(2*time.Nanosecond); !got.Equal(want) {
		t.Errorf("time of the third block: got %v, want %v", got, want)
	}
}

func TestApplyRefusesWhatNoQuorumDecided(t *testing.T) {
	b := newBench(t)
	p := b.propose(batch(newUnit(1).frame(noon)))
	votes := b.votes(p, 3)
	for name, tc := range map[string]struct {
		votes []ledger.Vote
		p     func(proposal) proposal
	}{
		"two votes":              {votes[:2], nil},
		"one twice":              {[]ledger.Vote{votes[0], votes[1], votes[1]}, nil},
		"a stranger's":           {[]ledger.Vote{votes[0], votes[1], {Validator: 9, Signature: votes[2].Signature}}, nil},
		"other metadata":         {votes, func(p proposal) proposal { p.Metadata = metadata(t, 3, 1); return p }},
		"payload of another":     {votes, func(p proposal) proposal { p.Payload = nil; return p }},
		"a payload that is none": {votes, func(p proposal) proposal { p.Payload = []byte{1}; return p }},
	} {
		q := p
		if tc.p != nil {
			q = tc.p(p)
		}
		if err := b.k.apply(q, tc.votes); err == nil {
			t.Errorf("%s: applied, want an error", name)
		}
		if h := b.k.height(); h != 0 {
			t.Fatalf("%s: height %d after a refusal", name, h)
		}
	}
	if err := b.k.checkVote(p, votes[0]); err != nil {
		t.Errorf("a good vote: got %v", err)
	}
	if err := b.k.checkVote(proposal{p.Header, nil, p.Metadata}, votes[0]); err == nil {
		t.Error("a vote shown with another payload is taken")
	}
	b.decide(p)
}

func TestRecoveryGivesTheSameState(t *testing.T) {
	b := newBench(t)
	u := newUnit(1)
	for i := range 8 { // snapshots at 3 and 6, two blocks to replay
		rs := []*pb.Record{u.frame(b.now)}
		if i == 4 {
			rs = append(rs, change(t, 1, "put", identity.TypeDevice, "d77", identity.Device{Junction: "j1", Key: pub(key("77"))}))
		}
		b.decide(b.propose(batch(rs...)))
		b.now = b.now.Add(time.Second)
	}
	want, err := b.k.state.marshal()
	if err != nil {
		t.Fatal(err)
	}
	check := func(how string) {
		t.Helper()
		got, err := b.k.state.marshal()
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: the state is another", how)
		}
	}
	b.reopen()
	check("with a snapshot")
	if got := b.n.stats().Blocks; got != 2 {
		t.Errorf("blocks replayed after the snapshot: got %d, want 2", got)
	}
	// Snapshots at 3 and 6, each damaged in its turn: the newest first.
	for i, damage := range []func([]byte) []byte{
		func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
		func(b []byte) []byte { return b[:len(b)/2] },
		func(b []byte) []byte { return nil },
	} {
		for k, h := range []ledger.Height{6, 3} {
			path := b.k.shelf.path(h)
			good, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, damage(good), 0o600); err != nil {
				t.Fatal(err)
			}
			b.reopen()
			check("with a damaged snapshot")
			if got, want := b.n.stats().Blocks, uint64(5+3*k); got != want {
				t.Errorf("damage %d: blocks replayed: got %d, want %d", i, got, want)
			}
		}
		// Good ones again, from the state that was recovered.
		blocks, err := b.k.blocks(t.Context(), 1, 100, 1<<30, false)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.k.close(); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(b.c.Dir); err != nil {
			t.Fatal(err)
		}
		b.open()
		if n, err := b.k.applyBlocks(blocks, true, nil); n != 8 || err != nil {
			t.Fatalf("applied %d blocks, %v, want 8", n, err)
		}
		b.k.snapshots.Wait()
		check("from the blocks")
	}
}

// A crash between the payload and its block leaves a payload that the same
// decision finds again.
// TestFrozenStateStays: a snapshot is encoded while blocks go on.
func TestFrozenStateStays(t *testing.T) {
	b := newBench(t)
	u := newUnit(1)
	b.decide(b.propose(batch(u.frame(b.now))))
	want, err := b.k.state.marshal()
	if err != nil {
		t.Fatal(err)
	}
	frozen := b.k.state.freeze()
	for range 3 {
		// Beyond the time for which ids of requests are kept.
		b.now = b.now.Add(decidedFor)
		b.decide(b.propose(batch(u.frame(b.now))))
	}
	if got, err := frozen.marshal(); err != nil || !bytes.Equal(got, want) {
		t.Errorf("got another encoding, %v, than before the blocks that came after", err)
	}
	if now, err := b.k.state.marshal(); err != nil || bytes.Equal(now, want) {
		t.Errorf("the state itself has not changed, %v", err)
	}
}

func TestACrashBetweenPayloadAndBlock(t *testing.T) {
	b := newBench(t)
	p := b.propose(batch(newUnit(1).frame(noon)))
	o := b.k.outcomes[string(p.Header)]
	if _, err := b.k.store.payloads.Append(wire.EncodeBlock(&pb.Block{Batches: o.batches, Verdicts: o.verdicts})); err != nil {
		t.Fatal(err)
	}
	b.reopen()
	if h := b.k.height(); h != 0 {
		t.Fatalf("height: got %d, want 0: the block was never stored", h)
	}
	b.decide(p)
	b.reopen()
	if h := b.k.height(); h != 1 {
		t.Errorf("height: got %d, want 1", h)
	}
}

func TestDecidedIDsAreForgottenByBlockTime(t *testing.T) {
	d := newDecidedIDs()
	id := func(i int) ledger.Hash { return ledger.Hash{byte(i), byte(i >> 8), byte(i >> 16)} }
	d.add(noon, []ledger.Hash{id(1)})
	d.add(noon.Add(decidedFor), []ledger.Hash{id(2)})
	if !d.has(id(1)) {
		t.Error("forgotten too early")
	}
	d.add(noon.Add(decidedFor+time.Second), []ledger.Hash{id(3)})
	if d.has(id(1)) || !d.has(id(2)) || !d.has(id(3)) {
		t.Error("want the first forgotten and no other")
	}
	for i := range decidedMax {
		d.add(noon.Add(decidedFor+time.Second), []ledger.Hash{id(100 + i)})
	}
	if len(d.ids) != decidedMax || d.has(id(2)) {
		t.Errorf("ids kept: got %d, want %d without the oldest", len(d.ids), decidedMax)
	}
}

func TestTheLargestMessagesFit(t *testing.T) {
	for n := 4; n <= 10; n++ {
		limit := maxPayload(n)
		if limit < MaxRequest+4 {
			t.Fatalf("n=%d: a proposal holds %d bytes, the largest request %d", n, limit, MaxRequest)
		}
		big := &protos.Proposal{Header: make([]byte, ledger.HeaderSize), Payload: make([]byte, limit), Metadata: make([]byte, 64)}
		var sigs []*protos.Signature
		for range n {
			sigs = append(sigs, &protos.Signature{Signer: 1 << 63, Value: make([]byte, 64)})
		}
		vd, err := proto.Marshal(&protos.ViewData{NextView: 1 << 63, LastDecision: big, LastDecisionSignatures: sigs, InFlightProposal: big, InFlightPrepared: true})
		if err != nil {
			t.Fatal(err)
		}
		nv := &protos.NewView{}
		for range ledger.Quorum(n) {
			nv.SignedViewData = append(nv.SignedViewData, &protos.SignedViewData{RawViewData: vd, Signer: 1 << 63, Signature: make([]byte, 64)})
		}
		for name, m := range map[string]*protos.Message{
			"new view": {Content: &protos.Message_NewView{NewView: nv}},
			"proposal": {Content: &protos.Message_PrePrepare{PrePrepare: &protos.PrePrepare{View: 1 << 63, Seq: 1 << 63, Proposal: big}}},
		} {
			if size := parcelMin + proto.Size(m); size > topic.MaxPayload {
				t.Errorf("n=%d: the largest %s has %d bytes, a message at most %d", n, name, size, topic.MaxPayload)
			}
		}
	}
	c := newBench(t).c
	c.Genesis, c.Dir = genesis(t, 13, 1), t.TempDir()
	if _, err := openCore(c, smartCodec{}, &counters{}); err == nil || !strings.Contains(err.Error(), "13 validators are too many") {
		t.Errorf("13 validators: got %v, want it refused", err)
	}
}

func TestABlockIsBounded(t *testing.T) {
	b := newBench(t)
	junk := func(records, size int, seed byte) []byte {
		var rs []*pb.Record
		for range records {
			rs = append(rs, &pb.Record{Envelope: bytes.Repeat([]byte{seed}, size), Salt: make([]byte, 32)})
		}
		return batch(rs...)
	}
	var many, large [][]byte
	for i := range 5 {
		many = append(many, junk(MaxRequestRecords, 1, byte(i+1)))
		large = append(large, junk(4, 220<<10, byte(i+1)))
	}
	p := b.propose(many...)
	got, err := decodePayload(p.Payload)
	if err != nil || len(got) != MaxBlockRecords/MaxRequestRecords {
		t.Errorf("of 5 requests of %d records: got %d in a block, err %v; want %d", MaxRequestRecords, len(got), err, MaxBlockRecords/MaxRequestRecords)
	}
	b.decide(p)
	p = b.propose(large...)
	if got, err = decodePayload(p.Payload); err != nil || len(got) != 2 || len(p.Payload) > b.k.members().limit {
		t.Errorf("of 5 requests of 880 KiB: got %d in a block of %d bytes, err %v; want 2 within %d", len(got), len(p.Payload), err, b.k.members().limit)
	}
	if err := b.verify(p); err != nil {
		t.Errorf("the fullest block: got %v, want it taken", err)
	}
}

func TestConfigSaysAllThatIsWrong(t *testing.T) {
	err := Config{Timing: Timing{ViewChangeResend: time.Hour, Tick: -1}, SnapshotEvery: -1}.Validate()
	for _, want := range []string{"District", "Number", "VoteKey", "CosignKey", "Genesis", "Dir", "SnapshotEvery", "Timing.Tick", "Timing.ViewChangeResend"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to name %s", err, want)
		}
	}
	c := newBench(t).c
	if err := c.Validate(); err != nil {
		t.Errorf("a good configuration: got %v", err)
	}
	c.CosignKey = c.VoteKey
	if err := c.Validate(); err == nil || !strings.Contains(err.Error(), "must not be the vote key") {
		t.Errorf("one key for two purposes: got %v", err)
	}
	c.CosignKey, c.NextVoteKey = cosignKey(2), voteKey(7)
	if _, err := c.keysOf(entry(1)); err == nil || !strings.Contains(err.Error(), "the cosigning key is another") {
		t.Errorf("another's key: got %v", err)
	}
	if _, err := c.keysOf(entry(2)); err == nil || !strings.Contains(err.Error(), "the vote key is another") {
		t.Errorf("another's key: got %v", err)
	}
	rotated := entry(2)
	rotated.VoteKey = pub(voteKey(7))
	if k, err := c.keysOf(rotated); err != nil || !k.vote.Equal(voteKey(7)) || !k.cosign.Equal(cosignKey(2)) {
		t.Errorf("the next vote key: got %v", err)
	}
}
