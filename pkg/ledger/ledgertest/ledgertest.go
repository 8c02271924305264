// Package ledgertest makes districts and chains of blocks for tests, without a
// network, a disk or an engine: keys from a seed, votes and cosignatures by all
// validators. The same seed gives the same bytes.
package ledgertest

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Names of what every district of this package has.
const (
	Junction  = "J1"
	Device    = "rsu-J1"
	Control   = "signal-control"
	Registrar = "registrar"
	Importer  = "importer"
)

// Start is the time at which districts are created.
var Start = time.Date(2026, 11, 1, 8, 0, 0, 0, time.UTC)

// Departments name the validators in the policy, in order.
var Departments = []string{"traffic", "police", "ambulance", "audit", "transit", "fire", "courts"}

// District is a district with all its keys.
type District struct {
	ID          traffic.DistrictID
	Origin      string
	Genesis     identity.Genesis
	GenesisJSON []byte
	GenesisHash ledger.Hash
	Policy      []byte // tlog-policy: the log, the validators, quorum q of n
	LogKey      string // the log's signing key, note form
	Vote        []ed25519.PrivateKey
	Cosign      []ed25519.PrivateKey
	DeviceKey   ed25519.PrivateKey
	ControlKey  ed25519.PrivateKey
	Registrar   ed25519.PrivateKey
	ImporterKey ed25519.PrivateKey
	Validators  []identity.Validator
}

// Rand returns a deterministic source of bytes.
func Rand(seed string) io.Reader { return rand.NewChaCha8(sha256.Sum256([]byte(seed))) }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func key(r io.Reader) ed25519.PrivateKey {
	seed := make([]byte, ed25519.SeedSize)
	must(io.ReadFull(r, seed))
	return ed25519.NewKeyFromSeed(seed)
}

func public(k ed25519.PrivateKey) identity.PublicKey {
	return identity.PublicKey(k.Public().(ed25519.PublicKey))
}

// New returns a district with n validators, 1 to 7, one junction with one
// roadside unit, signal-control and a registrar.
func New(seed string, n int) *District {
	r := Rand(seed)
	d := &District{ID: "harbour"}
	d.Origin = ledger.Origin(d.ID)
	// note.GenerateKey reads exactly a seed; crypto/ed25519 may ignore its reader.
	logSeed := key(r)
	var vkey string
	d.LogKey, vkey = noteKey(d.Origin, logSeed)
	d.Genesis = identity.Genesis{District: d.ID, Origin: d.Origin, LogKey: vkey, CreatedUnixMS: Start.UnixMilli()}
	entry := func(t identity.EntryType, id string, body any) {
		d.Genesis.Entries = append(d.Genesis.Entries,
			identity.Entry{Type: t, ID: id, Status: identity.Active, Body: must(json.Marshal(body))})
	}
	var policy bytes.Buffer
	fmt.Fprintf(&policy, "log %s\n", vkey)
	for i := range n {
		vote, cosign := key(r), key(r)
		v := identity.Validator{Number: uint64(i + 1), Department: Departments[i], VoteKey: public(vote), CosignKey: public(cosign)}
		d.Vote, d.Cosign, d.Validators = append(d.Vote, vote), append(d.Cosign, cosign), append(d.Validators, v)
		entry(identity.TypeValidator, fmt.Sprint(i+1), v)
		c := must(ledger.NewCosigner(ledger.CosignerName(d.Origin, v.Number), ed25519.PublicKey(v.CosignKey)))
		fmt.Fprintf(&policy, "witness %s %s\n", Departments[i], c)
	}
	fmt.Fprintf(&policy, "group validators %d %s\nquorum validators\n", ledger.Quorum(n), strings.Join(Departments[:n], " "))
	d.Policy = policy.Bytes()
	d.DeviceKey, d.ControlKey, d.Registrar, d.ImporterKey = key(r), key(r), key(r), key(r)
	entry(identity.TypeJunction, Junction, &traffic.Junction{
		ID: Junction, Name: "Quay Street", LatE6: 59_910_000, LonE6: 10_750_000,
		Lanes:     []traffic.Lane{{ID: "in", LengthCM: 10_000, SpeedCMS: 1389, Capacity: 13}, {ID: "out", LengthCM: 10_000, SpeedCMS: 1389, Capacity: 13}},
		Groups:    []traffic.Group{{Name: "A", Kind: traffic.Vehicles}},
		Movements: []traffic.Movement{{From: "in", To: "out", Group: 0, SaturationPerHour: 1800}},
		Detectors: []traffic.Detector{{ID: "D1", Kind: traffic.StopLine, Lane: "in", LengthCM: 200, Movements: []int{0}, Group: -1}},
		Stages:    []traffic.Stage{{Name: "all red", State: "r"}, {Name: "A", State: "G"}},
		Conflicts: [][]int{{}},
		Timing:    traffic.Timing{MinGreenMS: 5000, YellowMS: 3000, AllRedMS: 1000},
		Plan:      traffic.Plan{Name: "day", Steps: []traffic.PlanStep{{Stage: 1, DurationMS: 30_000, IntergreenMS: 4000}, {Stage: 0, DurationMS: 10_000, IntergreenMS: 1000}}},
	})
	entry(identity.TypeDevice, Device, identity.Device{Junction: Junction, Key: public(d.DeviceKey)})
	entry(identity.TypeService, Control, identity.Service{Key: public(d.ControlKey), Signs: []identity.RecordKind{identity.KindCommand}})
	entry(identity.TypeOfficial, Registrar, identity.Official{Key: public(d.Registrar), Department: "traffic", Roles: []string{identity.Registrar}})
	d.GenesisJSON = must(json.MarshalIndent(d.Genesis, "", " "))
	// Indenting has changed the bodies' bytes: what counts is what is in the file.
	d.Genesis = *must(identity.ParseGenesis(d.GenesisJSON))
	d.GenesisHash = sha256.Sum256(d.GenesisJSON)
	return d
}

func noteKey(name string, k ed25519.PrivateKey) (skey, vkey string) {
	skey, vkey, err := note.GenerateKey(bytes.NewReader(k.Seed()), name)
	if err != nil {
		panic(err)
	}
	return skey, vkey
}

// LogSigner returns the log's signer.
func (d *District) LogSigner() note.Signer { return must(note.NewSigner(d.LogKey)) }

// Record is one record of a batch.
type Record struct {
	Envelope []byte
	Salt     ledger.Salt
	Received time.Time
	Refused  bool // the validators' verdict
}

// NewRecord signs a payload; the salt follows from the payload.
func NewRecord(k ed25519.PrivateKey, kind identity.RecordKind, contentType string, payload []byte) Record {
	return Record{Envelope: identity.Sign(k, kind, contentType, payload).Marshal(), Salt: sha256.Sum256(append([]byte("salt"), payload...)), Received: Start}
}

// field appends a protobuf field: a varint or length-delimited bytes.
func field(b []byte, n int, v any) []byte {
	switch v := v.(type) {
	case uint64:
		if v == 0 {
			return b
		}
		return binary.AppendUvarint(binary.AppendUvarint(b, uint64(n)<<3), v)
	case string:
		if v == "" {
			return b
		}
		return append(binary.AppendUvarint(binary.AppendUvarint(b, uint64(n)<<3|2), uint64(len(v))), v...)
	}
	panic("ledgertest: field type")
}

// Frame returns a frame of the district's roadside unit, as protobuf.
func (d *District) Frame(seq uint64, at time.Time) Record {
	b := field(nil, 1, string(d.ID))
	b = field(b, 2, Junction)
	b = field(b, 3, Device)
	b = field(b, 4, uint64(1))
	b = field(b, 5, seq)
	if seq > 1 {
		b = field(b, 6, strings.Repeat("p", 32))
	}
	b = field(b, 7, uint64(at.UnixNano()))
	b = field(b, 8, uint64(1000))
	reading := field(field(nil, 1, "D1"), 2, uint64(1))
	b = field(b, 9, string(reading))
	return NewRecord(d.DeviceKey, identity.KindFrame, identity.Protobuf, b)
}

// FileImporter returns the change that files the service [Importer]; genesis does
// not know it.
func (d *District) FileImporter(nonce uint64) Record {
	body := must(json.Marshal(identity.Service{Key: public(d.ImporterKey), Signs: []identity.RecordKind{identity.KindImport}}))
	return d.Change(identity.Change{Action: "put", Type: identity.TypeService, ID: Importer, Body: body, Nonce: nonce})
}

// Import returns one second of a controller's log that the service of that name
// has brought in, as protobuf. It is signed by the district's importer, whatever
// it says.
func (d *District) Import(importer string, run, seq uint64, at time.Time) Record {
	b := field(nil, 1, string(d.ID))
	b = field(b, 2, importer)
	b = field(b, 3, run)
	b = field(b, 4, seq)
	b = field(b, 5, "2026-11-01.csv")
	b = field(b, 6, strings.Repeat("s", 32))
	b = field(b, 7, "227")
	b = field(b, 8, uint64(at.UnixNano()))
	b = field(b, 9, uint64(1000))
	event := field(field(field(nil, 1, uint64(82)), 2, uint64(27)), 3, uint64(100))
	b = field(b, 10, string(event))
	return NewRecord(d.ImporterKey, identity.KindImport, identity.Protobuf, b)
}

// Command returns a command of signal-control, as protobuf.
func (d *District) Command(seq, height uint64, at time.Time) Record {
	b := field(nil, 1, string(d.ID))
	b = field(b, 2, Junction)
	b = field(b, 3, seq)
	b = field(b, 4, height)
	b = field(b, 6, "day")
	b = field(b, 7, "1")
	b = field(b, 8, "actuated")
	b = field(b, 9, "1")
	b = field(b, 10, uint64(at.UnixNano()))
	b = field(b, 11, uint64(at.Add(2*time.Second).UnixNano()))
	b = field(b, 12, uint64(1))
	b = field(b, 13, "extend green: vehicle present")
	return NewRecord(d.ControlKey, identity.KindCommand, identity.Protobuf, b)
}

// Change returns a registry record signed by the registrar.
func (d *District) Change(c identity.Change) Record {
	c.District = d.ID
	return NewRecord(d.Registrar, identity.KindRegistry, identity.JSON, must(json.Marshal(c)))
}

// Join returns the change that makes a validator of a newcomer, who can vote and
// cosign from the next block on: see [Chain.Voters].
func (d *District) Join(nonce uint64) Record {
	i := len(d.Vote)
	r := Rand(fmt.Sprintf("%s newcomer %d", d.ID, i))
	d.Vote, d.Cosign = append(d.Vote, key(r)), append(d.Cosign, key(r))
	v := identity.Validator{Number: uint64(i + 1), Department: fmt.Sprintf("newcomer %d", i+1), VoteKey: public(d.Vote[i]), CosignKey: public(d.Cosign[i])}
	return d.Change(identity.Change{Action: identity.Put, Type: identity.TypeValidator, ID: fmt.Sprint(i + 1), Body: must(json.Marshal(v)), Nonce: nonce})
}

// Leave returns the change that revokes validator i, from 0.
func (d *District) Leave(i int, nonce uint64) Record {
	return d.Change(identity.Change{Action: identity.Revoke, Type: identity.TypeValidator, ID: fmt.Sprint(i + 1), Nonce: nonce})
}

// Batch encodes records as stopline.v1.Batch.
func Batch(records ...Record) []byte {
	var b []byte
	for _, r := range records {
		m := field(nil, 1, string(r.Envelope))
		m = field(m, 2, string(r.Salt[:]))
		m = field(m, 3, uint64(r.Received.UnixNano()))
		b = field(b, 1, string(m))
	}
	return b
}

// Block is a decided block with its payload.
type Block struct {
	ledger.Block
	Batches  [][]byte
	Records  []Record // of all batches
	Verdicts ledger.Verdicts
	// Voters are the validators, from 0, that voted and cosign its checkpoint in
	// [Chain.Folder].
	Voters []int
}

// Decided returns the block as sealing journals it.
func (b *Block) Decided() *ledger.Decided {
	d := &ledger.Decided{Block: b.Block, Verdicts: b.Verdicts}
	for _, raw := range b.Batches {
		d.Requests = append(d.Requests, ledger.RequestID(raw))
	}
	return d
}

// Payloads returns the block's entries of the payload store.
func (b *Block) Payloads() []*ledger.Payload {
	var out []*ledger.Payload
	i := b.Header.PrevSize
	for _, r := range b.Records {
		if r.Refused {
			continue
		}
		i++
		out = append(out, &ledger.Payload{Index: i, Height: b.Header.Height, Received: r.Received, Salt: r.Salt, Envelope: r.Envelope})
	}
	return out
}

// Chain decides blocks.
type Chain struct {
	*District
	// Registry is the state after the newest block.
	Registry *identity.Registry
	// Voters are the validators that vote and cosign; all of them at first.
	Voters []int
	Blocks []*Block
	// Judged holds, for each block, the registry by which its records were judged.
	Judged []*identity.Registry
	tree   ledger.Frontier
	tiler  ledger.Tiler
	tiles  map[ledger.TileID][]byte
}

// NewChain returns a chain without blocks.
func (d *District) NewChain() *Chain {
	c := &Chain{District: d, tiles: map[ledger.TileID][]byte{}, Registry: must(identity.NewRegistry(&d.Genesis))}
	for i := range d.Vote {
		c.Voters = append(c.Voters, i)
	}
	return c
}

// Decide appends a block of batches, a second later than the one before.
// Registry records take effect, where the registry allows them.
func (c *Chain) Decide(batches ...[]Record) *Block {
	c.Judged = append(c.Judged, c.Registry.Clone())
	b := &Block{}
	h := ledger.Header{
		Height: 1, Time: Start.Add(time.Second), Genesis: c.GenesisHash, Parent: c.GenesisHash, PrevSize: c.tree.Size(),
		RegistryVersion: c.Registry.Version(), Registry: ledger.Hash(c.Registry.Hash()),
	}
	if n := len(c.Blocks); n > 0 {
		p := c.Blocks[n-1].Header
		h.Height, h.Time, h.Parent = p.Height+1, p.Time.Add(time.Second), p.Hash()
	}
	b.Leaves = []ledger.Leaf{{Class: ledger.ClassHeader, Commitment: h.Parent}}
	var ids []ledger.Hash
	for _, rs := range batches {
		raw := Batch(rs...)
		b.Batches, ids = append(b.Batches, raw), append(ids, ledger.RequestID(raw))
		b.Records = append(b.Records, rs...)
	}
	b.Verdicts = ledger.NewVerdicts(len(b.Records))
	for i, r := range b.Records {
		if r.Refused {
			continue
		}
		e := must(identity.ParseEnvelope(r.Envelope))
		if e.Kind.ChangesRegistry() {
			if err := c.Registry.Apply(uint64(h.Height), e.Key, must(identity.ParseChange(e.Payload))); err != nil {
				b.Records[i].Refused = true
				continue
			}
		}
		b.Verdicts.Accept(i)
		b.Leaves = append(b.Leaves, ledger.Leaf{Class: ledger.ClassRecord, Commitment: ledger.Commit(r.Salt, r.Envelope)})
	}
	c.tree.Append(b.Leaves)
	c.tiler.Append(b.Leaves)
	for _, f := range append(c.tiler.Full(), c.tiler.Partial()...) {
		c.tiles[f.TileID] = f.Data
	}
	h.Size, h.Root = c.tree.Size(), c.tree.Root()
	h.Leaves, h.Verdicts, h.Requests = ledger.LeavesDigest(b.Leaves), b.Verdicts.Digest(), ledger.RequestsDigest(ids)
	b.Header = h
	b.Metadata = fmt.Appendf(nil, "view 0 height %d", h.Height)
	c.Vote(b)
	c.Blocks = append(c.Blocks, b)
	return b
}

// Vote replaces the block's votes by those of the voters, over what its header
// says now.
func (c *Chain) Vote(b *Block) {
	b.Votes, b.Voters = nil, slices.Clone(c.Voters)
	for _, i := range c.Voters {
		b.Votes = append(b.Votes, ledger.Vote{Validator: uint64(i + 1),
			Signature: ed25519.Sign(c.District.Vote[i], ledger.VoteInput(b.Header.Hash(), b.Metadata))})
	}
}

// Cosignature returns validator i's (from 0) cosignature line.
func (d *District) Cosignature(i int, body string, at time.Time) string {
	return must(ledger.Cosign(ledger.CosignerName(d.Origin, uint64(i+1)), d.Cosign[i], body, at))
}

// Seal returns the checkpoint after a block, cosigned by the voters: validator i
// at the block's time and i seconds.
func (c *Chain) Seal(b *Block) []byte { return c.seal(b, c.Voters) }

func (c *Chain) seal(b *Block, by []int) []byte {
	cp := b.Header.Checkpoint(c.Origin)
	var lines []string
	for _, i := range by {
		lines = append(lines, c.Cosignature(i, cp.Body(), b.Header.Time.Add(time.Duration(i)*time.Second)))
	}
	return must(ledger.Seal(cp, c.LogSigner(), lines))
}

// Fill decides n blocks with frames and commands, and returns the chain.
func (c *Chain) Fill(n int) *Chain {
	for range n {
		h := uint64(len(c.Blocks) + 1)
		at := Start.Add(time.Duration(h) * time.Second)
		refused := c.Frame(1000+h, at)
		refused.Refused = true
		c.Decide([]Record{c.Frame(2*h-1, at), refused, c.Frame(2*h, at)}, []Record{c.Command(h, h, at)})
	}
	return c
}

// ReadTile makes the chain a [ledger.TileReader] of the log at each block's end.
func (c *Chain) ReadTile(t ledger.TileID) ([]byte, error) {
	b, ok := c.tiles[t]
	if !ok {
		return nil, fmt.Errorf("%s: %w", t.Path(), fs.ErrNotExist)
	}
	return b, nil
}

// Bundle returns evidence for records by leaf index, sealed by the checkpoint at
// the end of the newest block. The block after each record's must exist.
func (c *Chain) Bundle(indexes ...uint64) *ledger.Bundle {
	last := c.Blocks[len(c.Blocks)-1]
	size := last.Header.Size
	out := &ledger.Bundle{Checkpoint: c.Seal(last), Policy: c.Policy}
	for i, blk := range c.Blocks {
		var signers []identity.Holder
		for _, p := range blk.Payloads() {
			if !slices.Contains(indexes, p.Index) {
				continue
			}
			e := must(identity.ParseEnvelope(p.Envelope))
			h, _ := c.Judged[i].Holder(e.Key)
			signers = append(signers, h)
			out.Records = append(out.Records, ledger.BundleRecord{Index: p.Index, Salt: p.Salt, Envelope: p.Envelope,
				Proof: must(ledger.Prove(c, size, p.Index))})
		}
		if len(signers) > 0 {
			out.Blocks = append(out.Blocks, ledger.BundleBlock{Header: blk.Header, Metadata: blk.Metadata, Votes: blk.Votes,
				Proof: must(ledger.Prove(c, size, blk.Header.Size)), Registry: must(ledger.Excerpts(c.Judged[i], signers))})
		}
	}
	return out
}
