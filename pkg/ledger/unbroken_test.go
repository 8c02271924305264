package ledger_test

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
)

// stretch returns a chain of a start with five frames and of another with two,
// with a command among them; the fourth frame is JSON.
func stretch(t testing.TB) (*ledgertest.District, *ledgertest.Chain, []uint64) {
	t.Helper()
	d := ledgertest.New("stretch", 4)
	c := d.NewChain()
	at := func(i int) time.Time { return ledgertest.Start.Add(time.Duration(i) * time.Second) }
	f1 := d.FrameAfter(nil, 1, 1, at(1))
	f2 := d.FrameAfter(&f1, 1, 2, at(2))
	f3 := d.FrameWith(&f2, 1, 3, at(3), ledgertest.Showed("G", 1, ""))
	f4 := d.FrameJSON(&f3, 1, 4, at(4))
	f5 := d.FrameAfter(&f4, 1, 5, at(5))
	g1 := d.FrameAfter(nil, 2, 1, at(6))
	g2 := d.FrameAfter(&g1, 2, 2, at(7))
	c.Decide([]ledgertest.Record{f1, f2})
	c.Decide([]ledgertest.Record{d.CommandOn(1, 1, 1, 2, at(2)), f3})
	c.Decide([]ledgertest.Record{f4, f5})
	c.Decide([]ledgertest.Record{g1, g2})
	c.Decide()
	return d, c, []uint64{1, 2, 5, 7, 8, 10, 11} // leaves of the frames; 4 is the command
}

func TestUnbrokenStretch(t *testing.T) {
	d, c, frames := stretch(t)
	p := policy(t, d.Policy)
	claim := func(from, to uint64) ledger.Unbroken {
		return ledger.Unbroken{Device: ledgertest.Device, BootEpoch: 1, From: from, To: to}
	}
	b := c.Bundle(frames...)
	b.Unbroken = []ledger.Unbroken{claim(1, 5), {Device: ledgertest.Device, BootEpoch: 2, From: 1, To: 2}}
	r, err := ledger.VerifyBundle(b.Marshal(), p)
	if err != nil || len(r.Unbroken) != 2 {
		t.Fatalf("got %v and %d stretches, want pass and 2", err, len(r.Unbroken))
	}
	for _, want := range []string{"between its frames 1 and 5 (start 1) is left out", "but in the stretches named"} {
		if !strings.Contains(r.Text(), want) {
			t.Errorf("text: %q is missing in\n%s", want, r.Text())
		}
	}
	b.Unbroken = nil
	if r, err := ledger.VerifyBundle(b.Marshal(), p); err != nil || strings.Contains(r.Text(), "nothing that device") {
		t.Errorf("without the claim: got %v and\n%s", err, r.Text())
	}
	for _, tc := range []struct {
		name, want string
		records    []uint64
		claims     []ledger.Unbroken
	}{
		{"a frame left out", "frame 3 of device", []uint64{1, 2, 7, 8}, []ledger.Unbroken{claim(1, 4)}},
		{"the last left out", "frame 5 of device", []uint64{1, 2, 5, 7, 10, 11}, []ledger.Unbroken{claim(1, 5)}},
		{"more than there is", "the bundle holds 2 frames", []uint64{1, 2}, []ledger.Unbroken{claim(1, 1<<63)}},
		{"another device", "is left out", []uint64{1, 2, 5}, []ledger.Unbroken{{Device: "rsu-J2", BootEpoch: 1, From: 1, To: 2}}},
		{"another start", "is left out", []uint64{1, 2, 5}, []ledger.Unbroken{{Device: ledgertest.Device, BootEpoch: 3, From: 1, To: 2}}},
		{"one frame", "must be less", []uint64{1, 2}, []ledger.Unbroken{claim(2, 2)}},
		{"the same twice", "each once", []uint64{1, 2}, []ledger.Unbroken{claim(1, 2), claim(1, 2)}},
		{"empty list", "", []uint64{1, 2}, []ledger.Unbroken{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := c.Bundle(tc.records...)
			b.Unbroken = tc.claims
			r, err := ledger.VerifyBundle(b.Marshal(), p)
			if tc.want == "" {
				if err != nil || r.Unbroken != nil {
					t.Errorf("got %v, want pass without a claim", err)
				}
				return
			}
			if err == nil || r.Outcome != ledger.Fail || !strings.Contains(err.Error(), tc.want) || r.Findings[0].File != "unbroken.json" {
				t.Errorf("got %s, %v, want an error about %q in unbroken.json", r.Outcome, err, tc.want)
			}
		})
	}
	// A device that breaks its own chain, and one that signs two frames with one
	// number.
	at := ledgertest.Start
	f1 := d.FrameAfter(nil, 1, 1, at)
	x := d.NewChain()
	x.Decide([]ledgertest.Record{f1, d.FrameAfter(nil, 1, 2, at), d.FrameAfter(&f1, 1, 2, at)})
	x.Decide()
	for _, tc := range []struct {
		records []uint64
		want    string
	}{{[]uint64{1, 2}, "does not bear the hash of frame 1"}, {[]uint64{1, 2, 3}, "signed another frame 2"}, {[]uint64{1, 3}, ""}} {
		b := x.Bundle(tc.records...)
		b.Unbroken = []ledger.Unbroken{claim(1, 2)}
		_, err := ledger.VerifyBundle(b.Marshal(), p)
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("records %v: got %v, want %q", tc.records, err, tc.want)
		}
	}
}

// bury puts a tombstone in the place of a record.
func bury(b *ledger.Bundle, c *ledgertest.Chain, index uint64) {
	for i := range b.Records {
		if b.Records[i].Index != index {
			continue
		}
		l := ledger.Leaf{Class: ledger.ClassRecord, Commitment: ledger.Commit(b.Records[i].Salt, b.Records[i].Envelope)}
		b.Records[i] = ledger.BundleRecord{Index: index, Proof: b.Records[i].Proof, Tombstone: &l}
	}
	// The excerpt of a signer of nothing is not needed any more.
	for i, blk := range b.Blocks {
		need, err := ledger.Excerpts(c.Judged[blk.Header.Height-1], nil)
		if err != nil {
			panic(err)
		}
		left := false
		for _, r := range b.Records {
			left = left || r.Tombstone == nil && r.Index > blk.Header.PrevSize && r.Index < blk.Header.Size
		}
		if !left {
			b.Blocks[i].Registry = need
		}
	}
}

func TestTombstone(t *testing.T) {
	d, c, _ := stretch(t)
	p := policy(t, d.Policy)
	b := c.Bundle(1, 2, 10)
	bury(b, c, 2)
	bury(b, c, 10)
	r, err := ledger.VerifyBundle(b.Marshal(), p)
	if err != nil || len(r.Records) != 3 || !r.Records[1].LetGo || !r.Records[2].LetGo || r.Records[0].LetGo {
		t.Fatalf("got %v and %+v, want pass with two tombstones", err, r.Records)
	}
	for _, want := range []string{"record 2: a record whose content was let go", "why a record's content was let go"} {
		if !strings.Contains(r.Text(), want) {
			t.Errorf("text: %q is missing in\n%s", want, r.Text())
		}
	}
	for _, tc := range []struct {
		name, want string
		lie        func(b *ledger.Bundle)
	}{
		{"another leaf", "tombstone: is not what the log holds", func(b *ledger.Bundle) { b.Records[1].Tombstone.Commitment[3] ^= 1 }},
		{"a header's leaf", "leaf: is no record's", func(b *ledger.Bundle) { b.Records[1].Tombstone.Class = ledger.ClassHeader }},
		{"a tombstone in a whole stretch", "frame 2 of device", func(b *ledger.Bundle) {
			b.Unbroken = []ledger.Unbroken{{Device: ledgertest.Device, BootEpoch: 1, From: 1, To: 2}}
			b.Records = append(b.Records, c.Bundle(5).Records...)
			b.Blocks = slices.Insert(b.Blocks, 1, c.Bundle(5).Blocks...)
			slices.SortFunc(b.Records, func(x, y ledger.BundleRecord) int { return int(x.Index) - int(y.Index) })
		}},
	} {
		b := c.Bundle(1, 2, 10)
		bury(b, c, 2)
		tc.lie(b)
		if _, err := ledger.VerifyBundle(b.Marshal(), p); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want an error about %q", tc.name, err, tc.want)
		}
	}
}

// TestGoldenBundles: every form of a bundle, as it was once written. Write them
// anew, if it must be, with STOPLINE_GOLDEN=1.
func TestGoldenBundles(t *testing.T) {
	d, c, frames := stretch(t)
	chain := c.Bundle(2, 4, 5)
	chain.Unbroken = []ledger.Unbroken{{Device: ledgertest.Device, BootEpoch: 1, From: 2, To: 3}}
	whole := c.Bundle(frames...)
	whole.Unbroken = []ledger.Unbroken{{Device: ledgertest.Device, BootEpoch: 1, From: 1, To: 5}, {Device: ledgertest.Device, BootEpoch: 2, From: 1, To: 2}}
	grave := c.Bundle(1, 2)
	bury(grave, c, 2)
	golden := map[string][]byte{"chain.zip": chain.Marshal(), "unbroken.zip": whole.Marshal(), "tombstone.zip": grave.Marshal(), "stretch-policy": d.Policy}
	p := policy(t, d.Policy)
	for name, want := range golden {
		path := filepath.Join("testdata", name)
		if os.Getenv("STOPLINE_GOLDEN") != "" {
			if err := os.WriteFile(path, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: the format has changed: %d bytes are made, want the %d of the file", name, len(want), len(got))
			continue
		}
		if name == "stretch-policy" {
			continue
		}
		if r, err := ledger.VerifyBundle(got, p); err != nil || r.Outcome != ledger.Pass {
			t.Errorf("%s: got %s, %v, want pass", name, r.Outcome, err)
		}
		step := 13
		if testing.Short() || sparse {
			step = 307
		}
		for i := 0; i < len(got); i += step {
			b := bytes.Clone(got)
			b[i] ^= 1 << (i % 8)
			if r, err := ledger.VerifyBundle(b, p); err == nil || r.Outcome != ledger.Fail {
				t.Fatalf("%s, byte %d changed: got %s, want fail", name, i, r.Outcome)
			}
		}
		// Changed with a manifest that fits, as a forger would.
		files, err := ledger.ReadZip(got)
		if err != nil {
			t.Fatal(err)
		}
		for k := 1; k < len(files); k++ {
			data := files[k].Data
			files[k].Data = bytes.Clone(data)
			files[k].Data[len(data)/2] ^= 1
			if r, err := ledger.VerifyBundle(ledger.WriteZip(ledger.Remanifest(files)), p); err == nil || r.Outcome != ledger.Fail {
				t.Errorf("%s, %s changed: got %s, want fail", name, files[k].Name, r.Outcome)
			}
			files[k].Data = data
			without := slices.Delete(slices.Clone(files), k, k+1)
			if r, err := ledger.VerifyBundle(ledger.WriteZip(ledger.Remanifest(without)), p); err == nil || r.Outcome != ledger.Fail {
				t.Errorf("%s without %s: got %s, want fail", name, files[k].Name, r.Outcome)
			}
		}
		if _, err := ledger.VerifyBundle(append(bytes.Clone(got), 0), p); err == nil {
			t.Errorf("%s with a byte more: got pass", name)
		}
	}
}
