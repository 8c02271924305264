package consensus

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
)

// council is a cluster whose members change while frames come in.
type council struct {
	*cluster
	mu    sync.Mutex
	units []*unit
	sent  [][]byte
	nonce uint64
	quiet func()
}

// newCouncil starts n validators under load: a batch of three frames every 5 ms,
// of which as many wait meanwhile as come.
func newCouncil(t *testing.T, n int) *council {
	t.Helper()
	if testing.Short() {
		t.Skip("takes seconds")
	}
	c := &council{cluster: newCluster(t, n)}
	c.timing.Meet = 20 * time.Millisecond
	for i := range 3 {
		c.units = append(c.units, newUnit(i+1))
	}
	c.start(c.all()...)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(5 * slower * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			<-tick.C
			now := time.Now()
			var rs []*pb.Record
			for _, u := range c.units {
				rs = append(rs, u.frame(now))
			}
			b := batch(rs...)
			id := ledger.RequestID(b)
			if err := c.bus.Publish(ctx, topic.Accepted(harbour), fmt.Sprintf("%x", id[:]), b); err != nil {
				if ctx.Err() == nil {
					t.Error(err)
				}
				return
			}
			c.mu.Lock()
			c.sent = append(c.sent, b)
			c.mu.Unlock()
		}
	}()
	var once sync.Once
	c.quiet = func() { once.Do(func() { cancel(); <-done }) }
	t.Cleanup(c.quiet)
	return c
}

// load returns how many batches were sent.
func (c *council) load() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.sent)
}

// entry is a validator's entry as a newcomer files it.
func entry(n uint64) identity.Validator {
	return identity.Validator{Number: n, Department: fmt.Sprintf("department %d", n), VoteKey: pub(voteKey(n)), CosignKey: pub(cosignKey(n))}
}

// change sends a change of the validators and waits for it to be decided by
// somebody; it returns the height and the verdict.
func (c *council) change(by uint64, action string, n uint64, body any) (height uint64, accepted bool) {
	c.t.Helper()
	c.nonce++
	b := batch(change(c.t, c.nonce, action, identity.TypeValidator, fmt.Sprint(n), body))
	c.submit(b)
	c.decided(b, by)
	_, h, verdict := where(c.t, c.blocks(by), b)
	return h, verdict == "1"
}

func (c *council) add(by, n uint64) {
	c.t.Helper()
	if _, ok := c.change(by, identity.Put, n, entry(n)); !ok {
		c.t.Fatalf("adding validator %d: refused", n)
	}
}

func (c *council) revoke(by, n uint64) {
	c.t.Helper()
	if _, ok := c.change(by, identity.Revoke, n, nil); !ok {
		c.t.Fatalf("revoking validator %d: refused", n)
	}
}

// candidate starts a validator that is no member yet.
func (c *council) candidate(n uint64, with func(*Config)) {
	c.t.Helper()
	for uint64(len(c.nodes)) < n {
		c.nodes = append(c.nodes, nil)
	}
	b, err := c.server.Connect(fmt.Sprint("validator ", n))
	if err != nil {
		c.t.Fatal(err)
	}
	cfg := c.config(n, b)
	if with != nil {
		with(&cfg)
	}
	v, err := New(cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	if c.prepare != nil {
		c.prepare(n, v)
	}
	ctx, cancel := context.WithCancel(context.Background())
	nd := &node{v: v, bus: b, stop: cancel, done: make(chan error, 1)}
	c.nodes[n-1] = nd
	go func() { nd.done <- v.Run(ctx) }()
}

// sit waits until exactly these validators take part, with the quorum that is
// due, and go on deciding.
func (c *council) sit(quorum int, ns ...uint64) {
	c.t.Helper()
	if got := ledger.Quorum(len(ns)); got != quorum {
		c.t.Fatalf("quorum of %d: got %d, want %d", len(ns), got, quorum)
	}
	for _, n := range ns {
		eventually(c.t, fmt.Sprintf("validator %d takes part with %v", n, ns), func() bool {
			select {
			case err := <-c.nodes[n-1].done:
				c.t.Fatalf("validator %d ended: %v", n, err)
			default:
			}
			return slices.Equal(c.nodes[n-1].v.Stats().Validators, ns)
		})
	}
	c.progress(ns...)
}

// progress waits until what is sent from now on is decided by all of them.
func (c *council) progress(ns ...uint64) {
	c.t.Helper()
	at := c.load()
	eventually(c.t, "load goes on", func() bool { return c.load() > at+1 })
	c.mu.Lock()
	b := c.sent[at+1]
	c.mu.Unlock()
	c.decided(b, ns...)
}

// left waits until a validator has ended by itself.
func (c *council) left(n uint64) {
	c.t.Helper()
	nd := c.nodes[n-1]
	select {
	case err := <-nd.done:
		if err != nil {
			c.t.Errorf("validator %d, revoked: got %v, want it to end without an error", n, err)
		}
	case <-time.After(20 * time.Second):
		c.t.Fatalf("validator %d does not end after it was revoked: %+v", n, nd.v.Stats())
	}
	c.nodes[n-1] = nil
	nd.bus.Close()
	if _, err := c.bus.JS.Consumer(context.Background(), topic.AcceptedStream, topic.ConsensusDurable(n)); !errors.Is(err, jetstream.ErrConsumerNotFound) {
		c.t.Errorf("consumer of validator %d: got %v, want it removed", n, err)
	}
}

// finish ends the load, and checks that every batch was decided once, with all
// of its records accepted, and that a follower from genesis verifies it all. The
// block of each height was voted for by a quorum of those in force.
func (c *council) finish(ns ...uint64) {
	c.t.Helper()
	c.quiet()
	c.mu.Lock()
	sent := c.sent
	c.mu.Unlock()
	c.decided(sent[len(sent)-1], ns...)
	for _, b := range sent {
		c.decided(b, ns...)
	}
	blocks := c.check()
	verdicts := map[ledger.Hash]int{}
	g, err := identity.ParseGenesis(c.genesis)
	if err != nil {
		c.t.Fatal(err)
	}
	reg, err := identity.NewRegistry(g)
	if err != nil {
		c.t.Fatal(err)
	}
	chain := decided.NewChain(sha256.Sum256(c.genesis), reg.Validators(), nil)
	var changed time.Time
	var waits []time.Duration // for the first block after a change
	for _, m := range blocks {
		force := chain.Validators()
		b, err := chain.Take(m, false)
		if err != nil {
			c.t.Fatalf("a follower: %v", err)
		}
		if !changed.IsZero() {
			waits = append(waits, b.Header.Time.Sub(changed).Round(time.Millisecond))
		}
		if changed = (time.Time{}); b.Validators != nil {
			changed = b.Header.Time
		}
		for _, v := range b.Votes {
			if !slices.ContainsFunc(force, func(o identity.Validator) bool { return o.Number == v.Validator }) {
				c.t.Errorf("block %d: a vote of %d, who is no validator", b.Header.Height, v.Validator)
			}
		}
		if len(b.Votes) < ledger.Quorum(len(force)) {
			c.t.Errorf("block %d: %d votes, want %d of %d", b.Header.Height, len(b.Votes), ledger.Quorum(len(force)), len(force))
		}
		for _, raw := range m.Batches {
			verdicts[ledger.RequestID(raw)]++
		}
		for _, r := range b.Records {
			if e, err := identity.ParseEnvelope(r.Raw); err == nil && e.Kind == identity.KindFrame && !r.Accepted {
				c.t.Errorf("block %d: a frame was refused", b.Header.Height)
			}
		}
	}
	for i, b := range sent {
		if n := verdicts[ledger.RequestID(b)]; n != 1 {
			c.t.Errorf("batch %d of %d: decided %d times, want once", i, len(sent), n)
		}
	}
	var equivocations uint64
	for _, n := range ns {
		equivocations += c.nodes[n-1].v.Stats().Equivocations
	}
	if equivocations != 0 {
		c.t.Errorf("equivocations: got %d, want none", equivocations)
	}
	c.t.Logf("%d batches in %d blocks; from a change to the block after it: %v", len(sent), len(blocks), waits)
}

// From four validators to seven, through five and six, and back to four others:
// no batch is lost, each step has the quorum of its number.
func TestMembersComeAndGo(t *testing.T) {
	t.Parallel()
	c := newCouncil(t, 4)
	for n := uint64(5); n <= 7; n++ {
		c.candidate(n, nil)
	}
	c.sit(3, 1, 2, 3, 4)
	c.add(1, 5)
	c.sit(4, 1, 2, 3, 4, 5)
	c.add(1, 6)
	c.sit(4, 1, 2, 3, 4, 5, 6)
	c.add(1, 7)
	c.sit(5, 1, 2, 3, 4, 5, 6, 7)
	c.revoke(3, 1) // who leads
	c.sit(4, 2, 3, 4, 5, 6, 7)
	c.left(1)
	c.revoke(3, 7)
	c.sit(4, 2, 3, 4, 5, 6)
	c.left(7)
	c.revoke(3, 2)
	c.sit(3, 3, 4, 5, 6)
	c.left(2)
	c.finish(3, 4, 5, 6)
}

// A validator votes and cosigns with other keys from one block to the next. What
// is signed with the old ones counts for nothing, and it may restart with the new
// ones alone.
func TestKeysAreRotatedUnderLoad(t *testing.T) {
	t.Parallel()
	c := newCouncil(t, 4)
	c.cluster.stop(2)
	c.candidate(2, func(cfg *Config) { cfg.NextVoteKey, cfg.NextCosignKey = key("next vote"), key("next cosign") })
	c.sit(3, 1, 2, 3, 4)
	next := entry(2)
	next.VoteKey, next.CosignKey = pub(key("next vote")), pub(key("next cosign"))
	next.Former = []identity.PublicKey{pub(voteKey(2)), pub(cosignKey(2))}
	height, ok := c.change(1, identity.Put, 2, next)
	if !ok {
		t.Fatal("rotating the keys of 2: refused")
	}
	for _, n := range []uint64{1, 2, 3, 4} {
		eventually(t, "members of the new keys", func() bool { return uint64(c.nodes[n-1].v.Stats().Members) == height })
	}
	c.progress(1, 2, 3, 4)
	eventually(t, "a vote with the new key", func() bool {
		bs := c.blocks(1)
		for _, m := range bs[height:] {
			b := header(t, m)
			for _, v := range m.Votes {
				if v.Validator == 2 && identity.VerifyBytes([]byte(next.VoteKey), ledger.VoteInput(b.Hash(), m.Metadata), v.Signature) {
					return true
				}
			}
		}
		return false
	})
	before := c.nodes[0].v.Stats().Invalid
	old := &parcel{Kind: kindMeet, From: 2, To: 1, Start: start{[16]byte{7}, 1 << 40}, Seq: 1}
	if err := c.bus.Send(topic.BFT(harbour, 1, 2), old.seal(voteKey(2), sha256.Sum256(c.genesis))); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a message with the old key refused", func() bool { return c.nodes[0].v.Stats().Invalid > before })
	c.cluster.stop(2)
	c.progress(1, 3, 4)
	c.candidate(2, func(cfg *Config) { cfg.VoteKey, cfg.CosignKey = key("next vote"), key("next cosign") })
	c.sit(3, 1, 2, 3, 4)
	c.finish(1, 2, 3, 4)
}

func header(t testing.TB, m *pb.Block) ledger.Header {
	t.Helper()
	h, err := ledger.ParseHeader(m.Header)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// Who was revoked goes on voting: its messages are counted and reach nobody, and
// a block with its vote in the place of a member's is refused.
func TestWhoWasRevokedVotesInVain(t *testing.T) {
	t.Parallel()
	c := newCouncil(t, 5)
	c.sit(4, 1, 2, 3, 4, 5)
	c.revoke(1, 5)
	c.sit(3, 1, 2, 3, 4)
	c.left(5)
	g := sha256.Sum256(c.genesis)
	before := c.nodes[0].v.Stats()
	for i := range uint64(20) {
		at := slot{before.View, before.Height + ledger.Height(i), phaseCommit}
		p := &parcel{Kind: kindEngine, From: 5, To: 1, Config: uint64(before.Members), Start: start{[16]byte{5}, 100}, Seq: i + 1, Vote: vote{at, ledger.Hash{byte(i)}}, Body: []byte("vote")}
		if err := c.bus.Send(topic.BFT(harbour, 1, 5), p.seal(voteKey(5), g)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "its messages refused and counted", func() bool { return c.nodes[0].v.Stats().Strangers >= before.Strangers+20 })
	// In the name of a member they are no better.
	p := &parcel{Kind: kindEngine, From: 2, To: 1, Config: uint64(before.Members), Start: start{[16]byte{5}, 100}, Seq: 1, Body: []byte("vote")}
	if err := c.bus.Send(topic.BFT(harbour, 1, 2), p.seal(voteKey(5), g)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a forged message refused", func() bool { return c.nodes[0].v.Stats().Invalid > before.Invalid })
	c.progress(1, 2, 3, 4)
	c.finish(1, 2, 3, 4)
	// Where it could not remove its consumer, the server does.
	if cons, err := c.bus.JS.Consumer(context.Background(), topic.AcceptedStream, topic.ConsensusDurable(1)); err != nil || cons.CachedInfo().Config.InactiveThreshold != forget {
		t.Errorf("consumer of validator 1: got %v, want it to end after %v", err, forget)
	}

	gen, err := identity.ParseGenesis(c.genesis)
	if err != nil {
		t.Fatal(err)
	}
	reg, err := identity.NewRegistry(gen)
	if err != nil {
		t.Fatal(err)
	}
	chain := decided.NewChain(g, reg.Validators(), nil)
	for _, m := range c.blocks(1) {
		if h := header(t, m); uint64(h.Height) > uint64(before.Members) {
			mine := &pb.VoteSignature{Validator: 5, Signature: ed25519.Sign(voteKey(5), ledger.VoteInput(h.Hash(), m.Metadata))}
			bad := proto.Clone(m).(*pb.Block)
			bad.Votes = []*pb.VoteSignature{m.Votes[0], m.Votes[1], mine}
			if _, err := chain.Take(bad, false); err == nil || !strings.Contains(err.Error(), "2 valid of the 3 needed from 4") {
				t.Errorf("block %d with the vote of 5: got %v, want 2 valid votes of the 3 needed", h.Height, err)
			}
		}
		if _, err := chain.Take(m, false); err != nil {
			t.Fatal(err)
		}
	}
}

// Of two changes in one block the second is refused, and taken when it is sent
// again.
func TestOneChangeOfMembersABlock(t *testing.T) {
	t.Parallel()
	c := newCouncil(t, 4)
	c.candidate(5, nil)
	c.candidate(6, nil)
	both := batch(change(t, 101, identity.Put, identity.TypeValidator, "5", entry(5)), change(t, 102, identity.Put, identity.TypeValidator, "6", entry(6)))
	c.submit(both)
	c.decided(both, 1)
	if _, _, v := where(t, c.blocks(1), both); v != "10" {
		t.Errorf("two changes at once: got verdicts %s, want 10", v)
	}
	c.sit(4, 1, 2, 3, 4, 5)
	if got := c.nodes[0].v.Stats().RecordsRefused[validate.RuleRegistry]; got != 1 {
		t.Errorf("refused by rule %s: got %d, want 1", validate.RuleRegistry, got)
	}
	c.add(1, 6)
	c.sit(4, 1, 2, 3, 4, 5, 6)
	if _, ok := c.change(1, identity.Put, 3, entry(3)); ok {
		t.Error("a number that is taken is given again")
	}
	c.finish(1, 2, 3, 4, 5, 6)
}

// Validators die while the members change, the leader among them, and one is
// away for several changes: whoever is there goes on, and they come back into
// their places.
func TestValidatorsDieWhileMembersChange(t *testing.T) {
	t.Parallel()
	c := newCouncil(t, 5)
	c.candidate(6, nil)
	c.nonce++
	b := batch(change(t, c.nonce, identity.Put, identity.TypeValidator, "6", entry(6)))
	c.submit(b)
	c.cluster.stop(1) // the leader; maybe before, maybe after it has proposed
	c.decided(b, 2, 3, 4, 5)
	for _, n := range []uint64{2, 3, 4, 5, 6} {
		eventually(t, "in place", func() bool { return len(c.nodes[n-1].v.Stats().Validators) == 6 })
	}
	c.progress(2, 3, 4, 5, 6)
	c.candidate(1, nil)
	c.sit(4, 1, 2, 3, 4, 5, 6)

	c.cluster.stop(2) // for several changes
	c.revoke(1, 6)
	c.left(6)
	c.candidate(7, nil)
	c.add(1, 7)
	c.progress(1, 3, 4, 5, 7)
	c.revoke(1, 1)
	c.left(1)
	c.progress(3, 4, 5, 7)
	c.candidate(2, nil)
	c.sit(4, 2, 3, 4, 5, 7)
	c.finish(2, 3, 4, 5, 7)
}

// A validator that was revoked while it was away ends when it hears of it, and so
// does one that is started again later.
func TestRevokedWhileAway(t *testing.T) {
	t.Parallel()
	c := newCouncil(t, 5)
	c.cluster.stop(5)
	c.revoke(1, 5)
	c.progress(1, 2, 3, 4)
	for range 2 {
		c.candidate(5, nil)
		c.left(5)
	}
	c.finish(1, 2, 3, 4)
}

// A validator whose peers speak for later members stops its engine when one of
// them must be honest, and not for a few liars.
func TestWhoIsLeftBehindHearsOfIt(t *testing.T) {
	b := newBenchOf(t, 7)
	s := &seat{Validator: &Validator{core: b.k, log: b.c.Logger}, members: b.k.members(), left: make(chan struct{}), ahead: map[uint64]bool{}}
	s.hear(2, 0) // as late as itself
	for range 5 {
		s.hear(3, 9)
	}
	if s.hear(4, 9); s.over() {
		t.Error("two liars of seven end it")
	}
	s.hear(5, 12)
	select {
	case <-s.left:
	default:
		t.Error("three of seven speak for later members, and it goes on")
	}
	// Nothing of its engine comes through any more.
	if _, err := s.verify(slot{}, ledger.Hash{}, proposal{}); err == nil {
		t.Error("it verifies a proposal")
	}
	if p := s.assemble(slot{}, []byte("m"), nil); p.Header != nil {
		t.Error("it makes a proposal")
	}
	if err := s.save([]byte("no entry"), false, nil); err != nil {
		t.Errorf("saving: got %v, want it left out", err)
	}
	s.fail(errors.New("of no matter"))
}

// The engine's entries belong to one set of members; the votes stay. A crash
// between a change and this leaves the entries, and they are dropped at the start.
func TestTheJournalBelongsToMembers(t *testing.T) {
	dir := t.TempDir()
	open := func() *journal {
		t.Helper()
		j, err := openJournal(dir, seglog.Options{}, func([]byte) ([]vote, error) { return nil, nil })
		if err != nil {
			t.Fatal(err)
		}
		return j
	}
	j := open()
	v := vote{slot{1, 7, phaseCommit}, ledger.Hash{1}}
	if err := errors.Join(j.save([]byte("entry"), true, nil), j.save([]byte("another"), false, nil), j.permit(v), j.close()); err != nil {
		t.Fatal(err)
	}
	j = open()
	if n := len(j.initial()); n != 2 {
		t.Fatalf("entries: got %d, want 2", n)
	}
	if err := j.configure(7); err != nil || len(j.initial()) != 0 {
		t.Errorf("with other members: got %d entries, %v, want none", len(j.initial()), err)
	}
	if err := errors.Join(j.save([]byte("of the new"), false, nil), j.close()); err != nil {
		t.Fatal(err)
	}
	j = open()
	if err := j.configure(7); err != nil || len(j.initial()) != 1 {
		t.Errorf("with the same members: got %d entries, %v, want 1", len(j.initial()), err)
	}
	if err := j.permit(vote{v.slot, ledger.Hash{2}}); !errors.Is(err, errTwoVotes) {
		t.Errorf("another vote in a slot of before: got %v, want it refused", err)
	}
	if err := j.configure(3); err == nil {
		t.Error("members of before the journal's are taken")
	}
	if err := errors.Join(j.save([]byte("cut"), true, nil), j.close()); err != nil { // what is before is let go of
		t.Fatal(err)
	}
	j = open()
	defer func() {
		if err := j.close(); err != nil {
			t.Error(err)
		}
	}()
	if j.config != 7 {
		t.Errorf("after a cut: got members since %d, want 7", j.config)
	}
}

// As many validators as the registry allows fit the messages, and no more.
func TestTheMostValidatorsFit(t *testing.T) {
	if got := maxPayload(identity.MaxValidators); got < MaxRequest+4 {
		t.Errorf("%d validators: a payload of %d bytes, want room for a request of %d", identity.MaxValidators, got, MaxRequest)
	}
	if got := maxPayload(identity.MaxValidators + 1); got >= MaxRequest+4 {
		t.Errorf("%d validators would fit as well", identity.MaxValidators+1)
	}
	for n, want := range map[int]int{4: 3, 5: 4, 6: 4, 7: 5, 8: 6, 9: 6, 10: 7} {
		if got := ledger.Quorum(n); got != want {
			t.Errorf("quorum of %d: got %d, want %d", n, got, want)
		}
	}
}

// A newcomer knows the validators of genesis, and all of them are gone: it asks
// those who publish decisions.
func TestANewcomerFindsThoseWhoAreThere(t *testing.T) {
	t.Parallel()
	c := newCouncil(t, 4)
	for n := uint64(5); n <= 8; n++ {
		c.candidate(n, nil)
		c.add(n-4, n)
		c.sit(4, n-4, n-3, n-2, n-1, n)
		c.revoke(n, n-4)
		c.sit(3, n-3, n-2, n-1, n)
		c.left(n - 4)
	}
	c.candidate(9, nil)
	c.add(5, 9)
	c.sit(4, 5, 6, 7, 8, 9)
	c.finish(5, 6, 7, 8, 9)
}
