package consensus

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/seglog"
)

// phase of the agreement on one height that a message belongs to.
type phase uint8

const (
	phaseNone phase = iota // not a vote
	phasePropose
	phasePrepare
	phaseCommit
)

func (p phase) String() string {
	if int(p) < len(phaseNames) {
		return phaseNames[p]
	}
	return fmt.Sprintf("phase(%d)", uint8(p))
}

var phaseNames = [...]string{"none", "propose", "prepare", "commit"}

// slot is a place in which a validator votes once.
type slot struct {
	View   uint64        `json:"view"`
	Height ledger.Height `json:"height"`
	Phase  phase         `json:"phase"`
}

func (s slot) String() string {
	return fmt.Sprintf("view %d height %d %s", s.View, s.Height, s.Phase)
}

// vote says what was voted for in a slot.
type vote struct {
	slot
	Digest ledger.Hash `json:"digest"`
}

// start identifies one run of a validator: a random incarnation, and a counter
// that each start raises on disk before the first message leaves.
type start struct {
	Incarnation [16]byte `json:"incarnation"`
	Counter     uint64   `json:"counter"`
}

// errTwoVotes refuses a second, different vote in one slot.
var errTwoVotes = errors.New("another vote was made in this slot before")

// journal is the engine's write-ahead log and the memory of our votes, in one
// file with one sync for both. The rule that it keeps: a vote is durable before
// a message with it leaves, and there is one for each (view, height, phase).
//
// The engine saves a proposal before it prepares and a commit before it sends
// it, so these records are the vote; [journal.permit], which every outgoing
// message passes, adds those that the engine does not save (a commit on a
// proposal left over from an earlier view) and refuses what contradicts.
type journal struct {
	log *seglog.Log

	mu      sync.Mutex
	entries [][]byte      // the engine's, since its last truncation point
	votes   map[slot]vote // of heights from floor on
	floor   ledger.Height
	own     start
	config  uint64               // the members that the entries belong to
	took    start                // our newest start in which we took part
	peers   map[uint64]peerStart // the newest start seen of each
}

// Records begin with one byte.
const (
	recEntry    = 'e' // an engine's entry
	recTruncate = 't' // an engine's entry that makes those before superfluous
	recVote     = 'v' // JSON of a vote
	recStart    = 's' // JSON of a start of ours
	recPeer     = 'p' // JSON of a peerStart
	recConfig   = 'c' // JSON of a number: other members, entries before are of no use
	recTook     = 'k' // JSON of a start of ours, in which we take part from then on
	recMemory   = 'm' // JSON of memory: all of our own that the records before say
)

type peerStart struct {
	Peer uint64 `json:"peer"`
	start
	// Proof is the head, with its signature, of a parcel of that start.
	Proof []byte `json:"proof,omitempty"`
	// Took is the newest start in which the peer took part in agreeing, as the head
	// TookProof of an engine's message says.
	Took      start  `json:"took,omitzero"`
	TookProof []byte `json:"took_proof,omitempty"`
}

type memory struct {
	Own    start       `json:"own"`
	Took   start       `json:"took,omitzero"`
	Config uint64      `json:"config"`
	Votes  []vote      `json:"votes"`
	Peers  []peerStart `json:"peers"`
}

// votesIn reads the votes that saving an engine's entry amounts to.
type votesIn func(entry []byte) ([]vote, error)

func openJournal(dir string, o seglog.Options, read votesIn) (*journal, error) {
	l, err := seglog.Open(dir, o)
	if err != nil {
		return nil, err
	}
	j := &journal{log: l, votes: map[slot]vote{}, peers: map[uint64]peerStart{}}
	err = l.Scan(l.First(), func(i uint64, rec []byte) error {
		if err := j.replay(rec, read); err != nil {
			return fmt.Errorf("journal: record %d: %w", i, err)
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return j, nil
}

func (j *journal) replay(rec []byte, read votesIn) error {
	if len(rec) == 0 {
		return errors.New("empty")
	}
	body := rec[1:]
	switch rec[0] {
	case recTruncate, recEntry:
		if rec[0] == recTruncate {
			j.entries = nil
		}
		j.entries = append(j.entries, slices.Clone(body))
		votes, err := read(body)
		if err != nil {
			return err
		}
		for _, v := range votes {
			j.votes[v.slot] = v
		}
		return nil
	case recVote:
		var v vote
		if err := json.Unmarshal(body, &v); err != nil {
			return err
		}
		j.votes[v.slot] = v
		return nil
	case recStart:
		return json.Unmarshal(body, &j.own)
	case recTook:
		return json.Unmarshal(body, &j.took)
	case recPeer:
		var p peerStart
		if err := json.Unmarshal(body, &p); err != nil {
			return err
		}
		j.peers[p.Peer] = p
		return nil
	case recConfig:
		j.entries = nil
		return json.Unmarshal(body, &j.config)
	case recMemory:
		var m memory
		if err := json.Unmarshal(body, &m); err != nil {
			return err
		}
		j.own, j.took, j.config = m.Own, m.Took, m.Config
		for _, v := range m.Votes {
			j.votes[v.slot] = v
		}
		for _, p := range m.Peers {
			j.peers[p.Peer] = p
		}
		return nil
	}
	return fmt.Errorf("kind %q is unknown", rec[0])
}

func (j *journal) close() error { return j.log.Close() }

// appendJSON needs mu.
func (j *journal) appendJSON(kind byte, v any) error {
	rec, err := encodeRecord(kind, v)
	if err != nil {
		return err
	}
	_, err = j.log.Append(rec)
	return err
}

func encodeRecord(kind byte, v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return append([]byte{kind}, b...), nil
}

// begin raises the start counter on disk, to above what peers know of too, and
// returns this run's start.
func (j *journal) begin(incarnation [16]byte, above uint64) (start, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	s := start{incarnation, max(j.own.Counter, above) + 1}
	if err := j.appendJSON(recStart, s); err != nil {
		return start{}, err
	}
	j.own = s
	return s, nil
}

// takePart notes that messages of the engine may leave from now on in the start
// in hand.
func (j *journal) takePart() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.appendJSON(recTook, j.own); err != nil {
		return err
	}
	j.took = j.own
	return nil
}

// forgot reports whether a start, in which this validator took part as others
// know, is none that the journal knows of: then it is an old copy. The count of
// starts alone would not tell: a copy that is started often enough catches up
// with it.
func (j *journal) forgot(took start) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return took.Counter > j.took.Counter || took.Counter == j.took.Counter && took != j.took
}

// peer returns what was seen of a peer.
func (j *journal) peer(n uint64) peerStart {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.peers[n]
}

// sawPeer remembers a peer's newer start, with the bytes that prove it, and
// whether it takes part.
func (j *journal) sawPeer(n uint64, s start, proof []byte, takesPart bool) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	p := j.peers[n]
	p.Peer, p.start, p.Proof = n, s, proof
	if takesPart {
		p.Took, p.TookProof = s, proof
	}
	if err := j.appendJSON(recPeer, p); err != nil {
		return err
	}
	j.peers[n] = p
	return nil
}

// save makes an engine's entry durable, and with it the votes in it.
func (j *journal) save(entry []byte, truncate bool, votes []vote) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, v := range votes {
		if err := j.conflict(v); err != nil {
			return err
		}
	}
	durable := func() { // nothing is in memory that is not on disk
		for _, v := range votes {
			j.votes[v.slot] = v
		}
	}
	if !truncate {
		rec := append(append(make([]byte, 0, 1+len(entry)), recEntry), entry...)
		if _, err := j.log.Append(rec); err != nil {
			return err
		}
		j.entries = append(j.entries, rec[1:])
		durable()
		return nil
	}
	m := memory{Own: j.own, Took: j.took, Config: j.config}
	for _, v := range j.votes {
		m.Votes = append(m.Votes, v)
	}
	for _, p := range j.peers {
		m.Peers = append(m.Peers, p)
	}
	mem, err := encodeRecord(recMemory, m)
	if err != nil {
		return err
	}
	rec := append(append(make([]byte, 0, 1+len(entry)), recTruncate), entry...)
	first, err := j.log.Append(rec, mem)
	if err != nil {
		return err
	}
	j.entries = [][]byte{rec[1:]}
	durable()
	return j.log.DropBefore(first)
}

// conflict needs mu.
func (j *journal) conflict(v vote) error {
	if have, ok := j.votes[v.slot]; ok && have.Digest != v.Digest {
		return fmt.Errorf("%s: %w", v.slot, errTwoVotes)
	}
	return nil
}

// allows reports whether a vote would not contradict one made before.
func (j *journal) allows(v vote) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.conflict(v)
}

// permit returns once the vote is durable, or an error if it must not leave: it
// contradicts another, or its height is settled and it is not known that it was
// made before.
func (j *journal) permit(v vote) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.conflict(v); err != nil {
		return err
	}
	if _, ok := j.votes[v.slot]; ok {
		return nil
	}
	if v.Height < j.floor {
		return fmt.Errorf("%s: the height is settled", v.slot)
	}
	if err := j.appendJSON(recVote, v); err != nil {
		return err
	}
	j.votes[v.slot] = v
	return nil
}

// configure drops the engine's entries if they belong to other members than
// those of a configuration: their engine is gone. The votes stay.
func (j *journal) configure(config uint64) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.config == config {
		return nil
	}
	if j.config > config {
		return fmt.Errorf("journal: is of the members since block %d, the blocks are of those since %d: the disk is not whole", j.config, config)
	}
	if err := j.appendJSON(recConfig, config); err != nil {
		return err
	}
	j.config, j.entries = config, nil
	return nil
}

// settled forgets the votes of heights long decided. Those of the last decided
// height stay: peers that lag are helped with them.
func (j *journal) settled(h ledger.Height) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.floor = h + 1
	for s := range j.votes {
		if s.Height < h {
			delete(j.votes, s)
		}
	}
}

// initial returns the engine's entries since its last truncation point.
func (j *journal) initial() [][]byte {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.entries)
}
