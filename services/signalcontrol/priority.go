package signalcontrol

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"time"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/priority"
	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// Record is an accepted record with its leaf.
type Record struct {
	Index uint64
	*validate.Candidate
}

// Agreed tells the Core of all accepted records of a block, in their order, for
// what they say of requests for priority. It comes before [Core.Commands] or
// [Core.Observe] for the block. Blocks that came before change nothing.
func (c *Core) Agreed(n priority.Network, height ledger.Height, at time.Time, records []Record) {
	if uint64(height) <= c.book.Known() {
		return
	}
	c.book.Block(uint64(height), at)
	for _, r := range records {
		switch {
		case r.Request != nil:
			c.book.Request(n, r.Index, r.Request)
		case r.Frame != nil:
			c.book.Frame(n, r.Frame)
		case r.Command != nil:
			c.book.Command(r.Command)
		}
	}
}

// Book is what the Core knows of requests for priority. It must not be changed.
func (c *Core) Book() *priority.Book { return c.book }

// overridden says that a junction is in an operator's hand, so that it takes no
// command.
func overridden(f *traffic.Frame) string {
	if f.Signal.Override == "" {
		return ""
	}
	return "override " + f.Signal.Override + " is in force"
}

// prioritise puts a request that is to be served before what the controller wants.
// The controller remembers what was ordered, and goes on from there.
func (c *Core) prioritise(j *traffic.Junction, m timing.Memory, d timing.Decision) (timing.Memory, timing.Decision) {
	s, ok := c.book.Serve(j)
	if !ok {
		delete(c.serving, j.ID)
		return m, d
	}
	c.serving[j.ID] = serves{s.ID, s.Stage}
	d = timing.Decision{Stage: s.Stage, Rule: priority.CommandRule(s.ID, s.Class, s.Why)}
	m.Stage, m.Rule, m.DecidedMS = d.Stage, d.Rule, m.AtMS
	return m, d
}

// serves is what the newest command to a junction was for.
type serves struct {
	id    string
	stage int
}

// urgent returns commands to junctions that are to serve somebody else than their
// newest command said, and that no frame of this block asks about: nobody waits for
// the next one.
func (c *Core) urgent(now time.Time, height ledger.Height, done []traffic.Command, junction func(traffic.JunctionID) (*traffic.Junction, bool)) []traffic.Command {
	var out []traffic.Command
	for _, id := range c.book.Waiting() {
		j, ok := junction(id)
		if !ok || slices.ContainsFunc(done, func(d traffic.Command) bool { return d.Junction == id }) {
			continue
		}
		s, ok := c.book.Serve(j)
		if !ok || c.serving[id] == (serves{s.ID, s.Stage}) {
			continue
		}
		signal, frame, at, ok := c.book.Newest(id)
		if !ok || now.Sub(at) > MaxDecisionAge || signal.Override != "" {
			continue
		}
		c.serving[id] = serves{s.ID, s.Stage}
		out = append(out, c.command(now, uint64(height), c.next(id, uint64(height)*perBlock), j.ID, frame, timing.Decision{Stage: s.Stage, Rule: priority.CommandRule(s.ID, s.Class, s.Why)}))
		if m, ok := c.memory[id]; ok {
			m.Stage, m.Rule, m.DecidedMS = s.Stage, out[len(out)-1].Rule, m.AtMS
			c.memory[id] = m
		}
	}
	return out
}

// next returns the number of a junction's next command, at least as given.
func (c *Core) next(id traffic.JunctionID, seq uint64) uint64 {
	if last := c.last[id]; seq <= last {
		seq = last + 1
	}
	c.last[id] = seq
	return seq
}

func (c *Core) command(now time.Time, height, seq uint64, id traffic.JunctionID, frame traffic.FrameKey, d timing.Decision) traffic.Command {
	return traffic.Command{
		District: c.cfg.District, Junction: id, Seq: seq, Height: height, RestsOn: frame,
		Policy: c.cfg.Policy, PolicyVersion: c.cfg.PolicyVersion,
		Controller: c.cfg.Controller.Name, ControllerVersion: c.cfg.Controller.Version,
		Issued: now, Expires: now.Add(Validity), Stage: d.Stage, Rule: d.Rule,
	}
}

// sign makes an order of a command.
func (c *Core) order(cmd traffic.Command) Order {
	e := identity.Sign(c.cfg.Key, identity.KindCommand, identity.Protobuf, wire.EncodeCommand(&cmd))
	return Order{Command: cmd, Envelope: e.Marshal()}
}

// stall is what the service does about priority while nothing is agreed.
type stall struct {
	// asked are requests that came directly, the newest revision of each, until they
	// are agreed or too old.
	asked map[string]*asking
	// book is the one that was agreed with what was asked since; nil while decisions
	// are fresh. It is thrown away when they are back: then the log says what became
	// of whom.
	book *priority.Book
	next time.Time // when commands are due again
	// told are the overrides that are on record, until their units have them.
	told map[traffic.JunctionID]*telling
}

type asking struct {
	request *traffic.Request
	at      time.Time
}

type telling struct {
	o        *traffic.Override
	envelope []byte
	tries    int
}

const (
	// askedMost bounds the requests that wait to be agreed, askedAge for how long;
	// askedFresh is how old one may be when it comes.
	askedMost  = 1024
	askedAge   = 15 * time.Minute
	askedFresh = 30 * time.Second
	// degradedEvery is how often a junction is commanded while decisions are stale.
	degradedEvery = time.Second
	// degradedSeal is how long such a command is offered to ingest.
	degradedSeal = 15 * time.Minute
	tellMost     = 30
)

// Direct is where the gateway asks for priority besides putting it on record: the
// request's envelope, answered by a Priority. While decisions are fresh that says
// received, and what is agreed counts. While they are stale emergency vehicles are
// let in at once, by the same rules as ever; that is the policy for a stall. The
// request is on record, and so is each command, by a rule that says degraded.
const Direct = "priority"

// Books is where the book's content is asked for, see [priority.Book.Marshal].
const Books = "priority-book"

// answer serves both questions until ctx ends.
func (s *Service) answer(ctx context.Context, method string) error {
	return s.cfg.Bus.Serve(ctx, topic.Ask(s.cfg.District, topic.SignalControlUser, method), "", func(ctx context.Context, m *bus.Msg) []byte {
		if method == Books {
			s.coreMu.Lock()
			defer s.coreMu.Unlock()
			b, err := s.core.book.Marshal()
			if err != nil {
				s.log.Error("requests for priority not told", "err", err)
				return nil
			}
			return b
		}
		p, err := s.direct(ctx, m.Data)
		if err != nil {
			s.Counters.DirectRefused.Add(1)
			s.log.Warn("a request for priority that came directly is refused", "err", err)
			p = &pb.Priority{State: pb.PriorityState_PRIORITY_STATE_REJECTED, Progress: []*pb.PriorityProgress{{Rule: err.Error()}}}
		}
		return wire.EncodePriority(p)
	})
}

// direct takes a request that came directly.
func (s *Service) direct(ctx context.Context, envelope []byte) (*pb.Priority, error) {
	reg, now := s.cfg.State.Registry(), s.cfg.Now()
	r, err := openRequest(reg, now, envelope)
	if err != nil {
		return nil, err
	}
	s.coreMu.Lock()
	defer s.coreMu.Unlock()
	if e, ok := s.core.book.Entry(r.ID); ok && e.Request.Revision >= r.Revision {
		return wire.PriorityToProto(e), nil // agreed by now
	}
	if len(s.stall.asked) >= askedMost {
		return nil, kind.Errorf(kind.Unavailable, "%d requests wait to be agreed already", len(s.stall.asked))
	}
	if a := s.stall.asked[r.ID]; a == nil || a.request.Revision < r.Revision {
		s.stall.asked[r.ID] = &asking{r, now}
	}
	if s.stale.Load() {
		s.degraded(ctx, now, reg, true)
	}
	if s.stall.book != nil {
		if e, ok := s.stall.book.Entry(r.ID); ok {
			e.Request.Degraded = !e.State.Ended()
			return wire.PriorityToProto(e), nil
		}
	}
	return &pb.Priority{Request: wire.RequestToProto(r), State: pb.PriorityState_PRIORITY_STATE_RECEIVED}, nil
}

// openRequest checks a request that came directly as validators would, and that it
// is of now.
func openRequest(reg *identity.Registry, now time.Time, envelope []byte) (*traffic.Request, error) {
	c := wire.Candidate(envelope, make([]byte, 32))
	if c.Err != nil || c.Request == nil {
		return nil, kind.Errorf(kind.Invalid, "request: cannot be decoded: %v", c.Err)
	}
	if h, ok := reg.Holder(c.Envelope.Key); ok && len(h.Key) > 0 {
		c.SignatureValid = c.Envelope.Verify(h.Key)
	}
	if v := validate.NewState(validate.Edge()).Judge(reg, now, &c); !v.OK {
		return nil, kind.Errorf(kind.Denied, "request: %s: %s", v.Rule, v.Reason)
	}
	if age := now.Sub(c.Request.Time); age > askedFresh {
		return nil, kind.Errorf(kind.Stale, "request: time: %s ago, at most %s", age.Round(time.Second), askedFresh)
	}
	return c.Request, nil
}

// degraded serves emergency vehicles without agreement; coreMu is held.
func (s *Service) degraded(ctx context.Context, now time.Time, reg *identity.Registry, at bool) {
	st := &s.stall
	if st.book == nil {
		st.book = s.core.book.Clone()
		st.book.Changed()
		st.book.Block(st.book.Known()+1, now)
	}
	for _, id := range slices.Sorted(maps.Keys(st.asked)) {
		r := st.asked[id].request
		if e, ok := st.book.Entry(id); ok && e.Request.Revision >= r.Revision {
			continue
		}
		if r.Class != traffic.Emergency {
			continue // by the policy for a stall they wait
		}
		if _, ok := st.book.Entry(id); !ok && !r.Cancelled {
			s.Counters.Degraded.Add(1)
			s.log.Warn("priority is decided here alone: decisions are stale", "request", id, "agency", r.By.Agency, "vehicle", r.Vehicle)
		}
		st.book.Request(reg, 0, r)
	}
	if now.Before(st.next) && !at {
		return
	}
	st.next = now.Add(degradedEvery)
	st.book.Blind(reg, now)
	for _, id := range st.book.Waiting() {
		j, ok := reg.Junction(id)
		if !ok {
			continue
		}
		x, ok := st.book.Serve(j)
		_, frame, _, known := st.book.Newest(id)
		if !ok || !known || x.Class != traffic.Emergency {
			continue
		}
		height := s.core.book.Known()
		// Above every command on that block, below those on the next, and rising with
		// time also after a restart.
		since := uint64(min(max(now.Sub(s.core.book.At())/time.Second, 0), perBlock/2))
		o := s.core.order(s.core.command(now, height, s.core.next(id, height*perBlock+1+since), id, frame,
			timing.Decision{Stage: x.Stage, Rule: priority.CommandRule(x.ID, x.Class, x.Why+", degraded: decisions are stale")}))
		if err := s.sealFor(ctx, o, degradedSeal); err != nil {
			s.Counters.Unsealed.Add(1)
			s.log.Error("command not sent: no way to seal it", "intersection", id, "seq", o.Command.Seq, "err", err)
			continue
		}
		if err := s.cfg.Bus.Send(topic.Command(s.cfg.District, id), o.Envelope); err != nil {
			s.log.Error("command not sent", "intersection", id, "err", err)
			continue
		}
		s.Counters.SentDegraded.Add(1)
	}
	s.tellPriorities(st.book, true)
}

// tellPriorities publishes what has changed in a book.
func (s *Service) tellPriorities(b *priority.Book, degraded bool) {
	for _, id := range b.Changed() {
		e, ok := b.Entry(id)
		if !ok {
			continue
		}
		e.Request.Degraded = e.Request.Degraded || degraded
		if err := s.cfg.Bus.Send(topic.Priority(s.cfg.District, id), wire.EncodePriority(wire.PriorityToProto(e))); err != nil {
			s.log.Warn("how a request stands is not told", "request", id, "err", err)
		}
	}
}

// agree takes what a block says of requests and overrides; coreMu is held.
func (s *Service) agree(b *ledger.Block, reg *identity.Registry, records []Record, raw func(uint64) []byte) {
	s.core.Agreed(reg, b.Header.Height, b.Header.Time, records)
	for _, r := range records {
		switch {
		case r.Request != nil:
			if a := s.stall.asked[r.Request.ID]; a != nil && a.request.Revision <= r.Request.Revision {
				delete(s.stall.asked, r.Request.ID)
			}
		case r.Override != nil:
			if o := r.Override; o.Action == traffic.OverrideRelease || s.cfg.Now().Before(o.Expires) {
				s.stall.told[o.Junction] = &telling{o: o, envelope: bytes.Clone(raw(r.Index))}
			}
		case r.Frame != nil:
			if t := s.stall.told[r.Frame.Junction]; t != nil && t.has(r.Frame) {
				delete(s.stall.told, r.Frame.Junction)
			}
		}
	}
	s.tellPriorities(s.core.book, false)
}

// has reports whether a frame shows that the unit has an override.
func (t *telling) has(f *traffic.Frame) bool {
	if !f.Time.After(t.o.Time) {
		return false
	}
	if t.o.Action == traffic.OverrideRelease {
		return f.Signal.Override != t.o.Releases
	}
	return f.Signal.Override == t.o.ID
}

// urge is called every now and then: what is stalled goes on alone, and what units
// should have heard is said again.
func (s *Service) urge(ctx context.Context, now time.Time) {
	s.coreMu.Lock()
	defer s.coreMu.Unlock()
	for id, a := range s.stall.asked {
		if now.Sub(a.at) > askedAge {
			delete(s.stall.asked, id)
		}
	}
	switch stale := s.stale.Load(); {
	case stale && (s.stall.book != nil || len(s.stall.asked) > 0 || len(s.core.book.Waiting()) > 0):
		s.degraded(ctx, now, s.cfg.State.Registry(), false)
	case !stale:
		s.stall.book = nil
	}
	if now.Before(s.tellAt) {
		return
	}
	s.tellAt = now.Add(time.Second)
	for _, id := range slices.Sorted(maps.Keys(s.stall.told)) {
		t := s.stall.told[id]
		if t.tries++; t.tries > tellMost {
			delete(s.stall.told, id) // it was refused, or the unit is away
			continue
		}
		if err := s.cfg.Bus.Send(topic.Override(s.cfg.District, id), t.envelope); err != nil {
			s.log.Error("override not sent", "intersection", id, "override", t.o.ID, "err", err)
		}
	}
}

// bookFile is the stored form of what is known of requests.
type bookFile struct {
	Genesis []byte          `json:"genesis"`
	Book    json.RawMessage `json:"book"`
}

// bookPath names the file beside that of the place in the chain.
func (s *Service) bookPath() string {
	if p := s.cfg.State.Path(); p != "" {
		return p + ".priority"
	}
	return ""
}

// recallBook takes over what an earlier run knew of requests. Without it those
// under way are forgotten, and are asked for again: no reason not to start.
func (s *Service) recallBook() error {
	path := s.bookPath()
	if path == "" {
		return nil
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("signal-control: %w", err)
	}
	var f bookFile
	if err = json.Unmarshal(b, &f); err == nil {
		if !bytes.Equal(f.Genesis, s.cfg.Follow.GenesisHash[:]) {
			err = errors.New("is of another chain")
		} else {
			err = s.core.book.Restore(f.Book)
		}
	}
	if err != nil {
		s.log.Warn("what was known of requests for priority is lost", "path", path, "err", err)
		return nil
	}
	s.bookStored = true
	return nil
}

// rememberBook stores what is known of requests.
func (s *Service) rememberBook() error {
	path := s.bookPath()
	if path == "" || s.core.book.Empty() && !s.bookStored {
		return nil
	}
	book, err := s.core.book.Marshal()
	if err != nil {
		return fmt.Errorf("priority: %w", err)
	}
	b, err := json.Marshal(bookFile{s.cfg.Follow.GenesisHash[:], book})
	if err != nil {
		return fmt.Errorf("priority: %w", err)
	}
	s.bookStored = true
	return district.WriteFile(path, b, 0o644)
}
