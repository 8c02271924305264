package consensus

import (
	"bytes"
	"encoding/hex"
	"errors"
	"testing"

	protos "github.com/hyperledger-labs/SmartBFT/smartbftprotos"
	"google.golang.org/protobuf/proto"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
)

func mustMarshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func hexOf(d ledger.Hash) string { return hex.EncodeToString(d[:]) }

func proposedEntry(t testing.TB, view, seq uint64, d ledger.Hash) []byte {
	return mustMarshal(t, &protos.SavedMessage{Content: &protos.SavedMessage_ProposedRecord{ProposedRecord: &protos.ProposedRecord{
		PrePrepare: &protos.PrePrepare{View: view, Seq: seq, Proposal: &protos.Proposal{Header: []byte{byte(seq)}, Metadata: metadata(t, view, ledger.Height(seq))}},
		Prepare:    &protos.Prepare{View: view, Seq: seq, Digest: hexOf(d)},
	}}})
}

func commitEntry(t testing.TB, view, seq uint64, d ledger.Hash) []byte {
	return mustMarshal(t, &protos.SavedMessage{Content: &protos.SavedMessage_Commit{Commit: &protos.Message{Content: &protos.Message_Commit{
		Commit: &protos.Commit{View: view, Seq: seq, Digest: hexOf(d), Signature: &protos.Signature{Signer: 1}},
	}}}})
}

func viewChangeEntry(t testing.TB, next uint64) []byte {
	return mustMarshal(t, &protos.SavedMessage{Content: &protos.SavedMessage_ViewChange{ViewChange: &protos.ViewChange{NextView: next}}})
}

func newViewEntry(t testing.TB, view, seq uint64) []byte {
	return mustMarshal(t, &protos.SavedMessage{Content: &protos.SavedMessage_NewView{NewView: &protos.ViewMetadata{ViewId: view, LatestSequence: seq}}})
}

func closeJournal(t testing.TB, j *journal) {
	t.Helper()
	if err := j.close(); err != nil {
		t.Error(err)
	}
}

// saveEntry saves as the engine does.
func saveEntry(t testing.TB, j *journal, entry []byte, truncate bool) error {
	t.Helper()
	votes, err := smartCodec{}.votes(entry)
	if err != nil {
		t.Fatal(err)
	}
	return j.save(entry, truncate, votes)
}

func TestAVoteIsGivenOnce(t *testing.T) {
	dir := t.TempDir()
	var j *journal
	open := func() {
		t.Helper()
		if j != nil {
			if err := j.close(); err != nil {
				t.Fatal(err)
			}
		}
		var err error
		// Small segments, so that truncation drops some.
		if j, err = openJournal(dir, seglog.Options{SegmentBytes: 256}, smartCodec{}.votes); err != nil {
			t.Fatal(err)
		}
	}
	open()
	t.Cleanup(func() { closeJournal(t, j) })
	a, b := ledger.Hash{1}, ledger.Hash{2}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Errorf("got %v, want it permitted", err)
		}
	}
	mustNot := func(err error) {
		t.Helper()
		if !errors.Is(err, errTwoVotes) {
			t.Errorf("got %v, want %v", err, errTwoVotes)
		}
	}
	at := func(view uint64, h ledger.Height, p phase) slot { return slot{view, h, p} }

	must(saveEntry(t, j, proposedEntry(t, 1, 5, a), true))
	for range 2 { // before and after it is opened again
		must(j.permit(vote{at(1, 5, phasePrepare), a}))
		must(j.permit(vote{at(1, 5, phasePropose), a}))
		mustNot(j.permit(vote{at(1, 5, phasePrepare), b}))
		mustNot(j.permit(vote{at(1, 5, phasePropose), b}))
		mustNot(j.allows(vote{at(1, 5, phasePrepare), b}))
		mustNot(saveEntry(t, j, proposedEntry(t, 1, 5, b), true))
		open()
	}
	// A vote that the engine does not save: only permit makes it durable.
	must(j.permit(vote{at(0, 5, phaseCommit), a}))
	open()
	mustNot(j.permit(vote{at(0, 5, phaseCommit), b}))
	// A view later another proposal may well be voted for, and the votes before
	// are not forgotten when the engine truncates its log.
	must(saveEntry(t, j, commitEntry(t, 1, 5, a), false))
	must(saveEntry(t, j, proposedEntry(t, 2, 5, b), true))
	open()
	mustNot(j.permit(vote{at(1, 5, phaseCommit), b}))
	mustNot(j.permit(vote{at(0, 5, phaseCommit), b}))
	mustNot(j.permit(vote{at(2, 5, phasePrepare), a}))
	must(saveEntry(t, j, commitEntry(t, 2, 5, b), false))
	if got := len(j.initial()); got != 2 {
		t.Errorf("engine's entries: got %d, want the two since the truncation", got)
	}
	// What is settled is not voted on any more, but what was said may be repeated.
	j.settled(5)
	must(j.permit(vote{at(2, 5, phaseCommit), b}))
	if err := j.permit(vote{at(3, 5, phaseCommit), a}); err == nil {
		t.Error("a new vote on a decided height is permitted")
	}
	must(j.permit(vote{at(2, 6, phasePrepare), a}))
	j.settled(6)
	if err := j.permit(vote{at(2, 5, phaseCommit), b}); err == nil {
		t.Error("a vote that is forgotten is permitted")
	}
}

// A vote is on disk before permit returns: whatever fails, none leaves that a
// restart would not know of.
func TestAVoteThatIsNotDurableIsNotPermitted(t *testing.T) {
	dir := t.TempDir()
	fail := false
	j, err := openJournal(dir, seglog.Options{Hook: func(op, _ string) error {
		if fail && op == "sync" {
			return errors.New("the disk is gone")
		}
		return nil
	}}, smartCodec{}.votes)
	if err != nil {
		t.Fatal(err)
	}
	v := vote{slot{0, 1, phaseCommit}, ledger.Hash{1}}
	fail = true
	if err := j.permit(v); err == nil {
		t.Error("permitted although it could not be synced")
	}
	if err := j.permit(v); err == nil {
		t.Error("permitted at the second try although it could not be synced")
	}
	if err := saveEntry(t, j, proposedEntry(t, 0, 1, ledger.Hash{1}), true); err == nil {
		t.Error("saved although it could not be synced")
	}
	if err := j.permit(vote{slot{0, 1, phasePrepare}, ledger.Hash{1}}); err == nil {
		t.Error("permitted after the engine's entry with it could not be synced")
	}
	_ = j.close() // says again that the disk is gone, or nothing
}

func TestStartsAreCounted(t *testing.T) {
	dir := t.TempDir()
	var last uint64
	for i := range 3 {
		j, err := openJournal(dir, seglog.Options{}, smartCodec{}.votes)
		if err != nil {
			t.Fatal(err)
		}
		s, err := j.begin([16]byte{byte(i)}, uint64(10*(i/2)))
		if err != nil {
			t.Fatal(err)
		}
		if s.Counter <= last || i == 2 && s.Counter != 11 {
			t.Errorf("start %d: counter %d after %d", i, s.Counter, last)
		}
		last = s.Counter
		if err := j.sawPeer(2, start{[16]byte{7}, uint64(i + 1)}, []byte{byte(i)}, i == 1); err != nil {
			t.Fatal(err)
		}
		if err := saveEntry(t, j, proposedEntry(t, 0, uint64(i+1), ledger.Hash{1}), true); err != nil {
			t.Fatal(err)
		}
		if err := j.close(); err != nil {
			t.Fatal(err)
		}
	}
	j, err := openJournal(dir, seglog.Options{}, smartCodec{}.votes)
	if err != nil {
		t.Fatal(err)
	}
	defer closeJournal(t, j)
	if p := j.peer(2); p.Counter != 3 || string(p.Proof) != "\x02" || p.Took.Counter != 2 || string(p.TookProof) != "\x01" {
		t.Errorf("peer: got %+v, want the third start, and that it took part in the second", p)
	}
}

func TestEnginesEntriesAtStart(t *testing.T) {
	a := ledger.Hash{1}
	prop, com := proposedEntry(t, 1, 5, a), commitEntry(t, 1, 5, a)
	vc, nv := viewChangeEntry(t, 1), newViewEntry(t, 2, 4)
	for _, tc := range []struct {
		name          string
		entries       [][]byte
		decided       uint64
		keep, restore [][]byte
	}{
		{"nothing", nil, 0, nil, nil},
		{"in progress", [][]byte{prop, com}, 4, [][]byte{prop, com}, nil},
		{"decided since", [][]byte{prop, com}, 5, nil, nil},
		{"decided, then a view change", [][]byte{prop, com, vc}, 5, [][]byte{vc}, nil},
		{"prepared, then a view change", [][]byte{prop, com, vc}, 4, [][]byte{prop, com, vc}, [][]byte{prop, prop, com}},
		{"proposed, then two view changes", [][]byte{prop, vc, vc}, 4, [][]byte{prop, vc, vc}, [][]byte{prop, prop, prop}},
		{"a new view after it", [][]byte{prop, com, vc, nv}, 4, [][]byte{prop, com, vc, nv}, nil},
		{"a new view, and the next change", [][]byte{prop, com, vc, nv, vc}, 4, [][]byte{prop, com, vc, nv, vc}, nil},
	} {
		keep, restore, err := relevantEntries(tc.entries, tc.decided)
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
		}
		same := func(what string, got, want [][]byte) {
			t.Helper()
			if len(got) != len(want) {
				t.Errorf("%s: %s: got %d entries, want %d", tc.name, what, len(got), len(want))
				return
			}
			for i := range got {
				if !bytes.Equal(got[i], want[i]) {
					t.Errorf("%s: %s: entry %d is another", tc.name, what, i)
				}
			}
		}
		same("keep", keep, tc.keep)
		same("restore", restore, tc.restore)
	}
	if _, _, err := relevantEntries([][]byte{{0xff}}, 0); err == nil {
		t.Error("an entry that is none: got no error")
	}
}
