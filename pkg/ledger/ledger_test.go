package ledger_test

import (
	"bytes"
	"crypto/ed25519"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"pgregory.net/rapid"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
)

// TestTilesAgainstTlog grows logs in steps of any size and compares every tile,
// root and proof with what golang.org/x/mod/sumdb/tlog makes of the same leaves.
func TestTilesAgainstTlog(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		var tl ledger.Tiler
		var front ledger.Frontier
		var hashes []tlog.Hash // tlog's stored hashes
		read := tlog.HashReaderFunc(func(idx []int64) ([]tlog.Hash, error) {
			out := make([]tlog.Hash, len(idx))
			for i, x := range idx {
				out[i] = hashes[x]
			}
			return out, nil
		})
		tiles := map[ledger.TileID][]byte{}
		var leaves []ledger.Leaf
		for range rapid.IntRange(1, 6).Draw(rt, "steps") {
			k := rapid.SampledFrom([]int{1, 2, 7, 255, 256, 257, 600}).Draw(rt, "leaves")
			for range k {
				l := ledger.Leaf{Class: ledger.ClassRecord}
				l.Commitment[0], l.Commitment[1] = byte(len(leaves)), byte(len(leaves)>>8)
				leaves = append(leaves, l)
				e := l.Marshal()
				hs, err := tlog.StoredHashes(int64(len(leaves)-1), e[:], read)
				if err != nil {
					rt.Fatal(err)
				}
				hashes = append(hashes, hs...)
			}
			tl.Append(leaves[len(leaves)-k:])
			front.Append(leaves[len(leaves)-k:])
			for _, f := range append(tl.Full(), tl.Partial()...) {
				tiles[f.TileID] = f.Data
			}
			n := int64(len(leaves))
			root, err := tlog.TreeHash(n, read)
			if err != nil {
				rt.Fatal(err)
			}
			if tl.Root() != ledger.Hash(root) || front.Root() != ledger.Hash(root) || !bytes.Equal(tl.Frontier().Marshal(), front.Marshal()) {
				rt.Fatalf("%d leaves: got another root than tlog", n)
			}
			for _, want := range tlog.NewTiles(ledger.TileHeight, 0, n) {
				b, err := tlog.ReadTileData(want, read)
				if err != nil {
					rt.Fatal(err)
				}
				id := ledger.TileID{Level: want.L, N: uint64(want.N), Width: want.W}
				if got := strings.Replace(want.Path(), "tile/8/", "tile/", 1); got != id.Path() {
					rt.Fatalf("path: got %s, want %s", id.Path(), got)
				}
				if !bytes.Equal(tiles[id], b) {
					rt.Fatalf("%d leaves: %s differs from tlog's", n, id.Path())
				}
			}
			r := ledger.TileReaderFunc(func(id ledger.TileID) ([]byte, error) {
				if b, ok := tiles[id]; ok {
					return b, nil
				}
				return nil, fs.ErrNotExist
			})
			i := uint64(rapid.IntRange(0, len(leaves)-1).Draw(rt, "leaf"))
			p, err := ledger.Prove(r, uint64(n), i)
			if err != nil {
				rt.Fatal(err)
			}
			if err := ledger.CheckInclusion(ledger.Checkpoint{Size: uint64(n), Root: tl.Root()}, i, leaves[i], p); err != nil {
				rt.Fatal(err)
			}
			got, err := ledger.ReadLeaf(r, uint64(n), i)
			if err != nil || got != leaves[i] {
				rt.Fatalf("leaf %d: got %v, %v", i, got, err)
			}
			// Loaded from its tiles, the log goes on the same.
			back, err := ledger.LoadTiler(r, uint64(n), tl.Root())
			if err != nil {
				rt.Fatal(err)
			}
			if rapid.Bool().Draw(rt, "go on from disk") {
				tl = *back
			}
		}
	})
}

func TestTilePaths(t *testing.T) {
	for _, tc := range []struct {
		id   ledger.TileID
		want string
	}{
		{ledger.TileID{Level: 0, N: 0, Width: 256}, "tile/0/000"},
		{ledger.TileID{Level: 2, N: 1234067, Width: 256}, "tile/2/x001/x234/067"},
		{ledger.TileID{Level: 0, N: 1234067, Width: 8}, "tile/0/x001/x234/067.p/8"},
		{ledger.TileID{Level: ledger.EntriesLevel, N: 999, Width: 255}, "tile/entries/999.p/255"},
		{ledger.TileID{Level: ledger.EntriesLevel, N: 1000, Width: 256}, "tile/entries/x001/000"},
	} {
		if got := tc.id.Path(); got != tc.want {
			t.Errorf("got %s, want %s", got, tc.want)
		}
		if got, err := ledger.ParseTilePath(tc.want); err != nil || got != tc.id {
			t.Errorf("parse %s: got %+v, %v", tc.want, got, err)
		}
	}
	for _, bad := range []string{"", "tile", "tile/0", "tile/0/0", "tile/0/0000", "tile/8/000", "tile/-1/000", "tile/00/000", "tile/0/000.p/0",
		"tile/0/000.p/256", "tile/0/000.p/01", "tile/0/x000/000", "tile/0/001/000", "tile/0/000/", "tile/0/../000", "tile/data/000", "/tile/0/000", "tile/0/+12"} {
		if got, err := ledger.ParseTilePath(bad); err == nil {
			t.Errorf("%q: got %+v, want an error", bad, got)
		}
	}
}

func TestPolicyParse(t *testing.T) {
	d := ledgertest.New("policy", 4)
	lines := strings.Split(strings.TrimSpace(string(d.Policy)), "\n")
	logLine, w := lines[0], lines[1:5]
	join := func(l ...string) string { return strings.Join(l, "\n") + "\n" }
	good := map[string]string{
		"as made":          string(d.Policy),
		"comments, tabs":   "# district\n" + strings.ReplaceAll(string(d.Policy), " ", "\t") + "# end",
		"with URLs":        join(logLine+" https://log.example/", w[0]+" https://witness.example/", "quorum traffic"),
		"any":              join(logLine, w[0], w[1], "group g any traffic police", "quorum g"),
		"all":              join(logLine, w[0], w[1], "group g all traffic police", "quorum g"),
		"groups of groups": join(logLine, w[0], w[1], w[2], "group g 1 traffic police", "group h all g ambulance", "quorum h"),
		"no witnesses":     join(logLine, "quorum none"),
	}
	for name, p := range good {
		if _, err := ledger.ParsePolicy([]byte(p)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, tc := range map[string]struct{ policy, want string }{
		"empty":                 {"", "log"},
		"no quorum":             {join(logLine, w[0]), "quorum"},
		"no log":                {join(w[0], "quorum traffic"), "log"},
		"unknown word":          {join(logLine, "witnes a b", "quorum none"), "unknown keyword"},
		"quorum twice":          {join(logLine, "quorum none", "quorum none"), "twice"},
		"quorum unknown":        {join(logLine, "quorum x"), "not defined"},
		"group of nothing":      {join(logLine, w[0], "group g 1", "quorum g"), "unknown keyword or too few"},
		"group unknown":         {join(logLine, "group g 1 x", "quorum g"), "not defined"},
		"group 0":               {join(logLine, w[0], "group g 0 traffic", "quorum g"), "threshold"},
		"group 2 of 1":          {join(logLine, w[0], "group g 2 traffic", "quorum g"), "threshold"},
		"group 01":              {join(logLine, w[0], "group g 01 traffic", "quorum g"), "threshold"},
		"one counted twice":     {join(logLine, w[0], "group g 2 traffic traffic", "quorum g"), "used twice"},
		"counted in two groups": {join(logLine, w[0], w[1], "group g any traffic", "group h all g traffic", "quorum h"), "used twice"},
		"key under two names":   {join(logLine, w[0], strings.Replace(w[0], "traffic", "other", 1), "quorum other"), "used twice"},
		"name twice":            {join(logLine, w[0], strings.Replace(w[1], "police", "traffic", 1), "quorum traffic"), "taken"},
		"named none":            {join(logLine, strings.Replace(w[0], "witness traffic", "witness none", 1), "quorum none"), "taken"},
		"log key as witness":    {join(logLine, "witness a "+strings.Fields(logLine)[1], "quorum a"), "cosignature/v1"},
		"witness key as log":    {join("log "+strings.Fields(w[0])[2], "quorum none"), "log"},
		"key hash":              {join(logLine, strings.Replace(w[0], "+", "+0", 1), "quorum traffic"), "hash"},
		"too long":              {strings.Repeat("#", ledger.MaxPolicy+1), "at most"},
		"more than a URL":       {join(logLine+" x", "quorum none"), "URL"},
	} {
		if _, err := ledger.ParsePolicy([]byte(tc.policy)); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want an error about %q", name, err, tc.want)
		}
	}
}

// TestExistedBy: the (f+1)-th smallest time, of cosignatures that count.
func TestExistedBy(t *testing.T) {
	for n := 1; n <= 7; n++ {
		d := ledgertest.New("policy", n)
		c := d.NewChain().Fill(1)
		p := policy(t, d.Policy)
		s, err := p.Open(c.Seal(c.Blocks[0]))
		if err != nil {
			t.Fatal(err)
		}
		at, ok := s.ExistedBy(p)
		if want := c.Blocks[0].Header.Time.Add(time.Duration(ledger.Faults(n)) * time.Second); !ok || !at.Equal(want) {
			t.Errorf("%d validators: got %v, %v, want %v", n, at, ok, want)
		}
	}
	// A witness outside the quorum may say what it likes.
	d := ledgertest.New("policy", 4)
	c := d.NewChain().Fill(1)
	outside := ledgertest.New("outside", 1)
	k, err := ledger.NewCosigner("outside", outside.Cosign[0].Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	p := policy(t, append(bytes.Clone(d.Policy), "witness outside "+k.String()+"\n"...))
	line, err := ledger.Cosign("outside", outside.Cosign[0], c.Blocks[0].Header.Checkpoint(d.Origin).Body(), time.Unix(1, 0))
	if err != nil {
		t.Fatal(err)
	}
	s, err := p.Open(append(c.Seal(c.Blocks[0]), line...))
	if err != nil {
		t.Fatal(err)
	}
	if at, ok := s.ExistedBy(p); len(s.Cosignatures) != 5 || !ok || !at.Equal(c.Blocks[0].Header.Time.Add(time.Second)) {
		t.Errorf("got %v, %v of %d cosignatures, want the second of the validators'", at, ok, len(s.Cosignatures))
	}
}

func TestCosignatures(t *testing.T) {
	d := ledgertest.New("policy", 2)
	cp := ledger.Checkpoint{Origin: d.Origin, Size: 9, Root: ledger.Hash{1}}
	name := ledger.CosignerName(d.Origin, 1)
	k, err := ledger.NewCosigner(name, d.Cosign[0].Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	line := d.Cosignature(0, cp.Body(), ledgertest.Start)
	if at, err := k.CheckCosignature(cp.Body(), line); err != nil || !at.Equal(ledgertest.Start) {
		t.Errorf("got %v, %v, want %v", at, err, ledgertest.Start)
	}
	other := cp
	other.Size++
	for what, l := range map[string]string{
		"of another checkpoint": d.Cosignature(0, other.Body(), ledgertest.Start),
		"of another validator":  d.Cosignature(1, cp.Body(), ledgertest.Start),
		"two lines":             line + line,
		"two cosigners":         line + d.Cosignature(1, cp.Body(), ledgertest.Start),
		"nothing":               "",
		"other time": func() string { // the time is under the signature
			b := []byte(line)
			i := strings.LastIndexByte(line, ' ') + 10
			b[i] = map[bool]byte{true: 'B', false: 'A'}[b[i] == 'A']
			return string(b)
		}(),
	} {
		if _, err := k.CheckCosignature(cp.Body(), l); err == nil {
			t.Errorf("%s: got no error", what)
		}
	}
	if _, err := ledger.Cosign(name, d.Cosign[0], "not a checkpoint\n", ledgertest.Start); err == nil {
		t.Error("cosigning what is no checkpoint: got no error")
	}
	for _, n := range []string{"", "a b", "a+b", "a\n"} {
		if _, err := ledger.NewCosigner(n, k.Key()); err == nil {
			t.Errorf("name %q: got no error", n)
		}
	}
	if _, err := note.NewVerifier(k.String()); err == nil {
		t.Error("a cosigner's key must not pass for a log's")
	}
}

func TestJournalRoundTrips(t *testing.T) {
	d := ledgertest.New("journal", 4)
	c := d.NewChain().Fill(2)
	b := c.Blocks[1]
	raw := b.Decided().Marshal()
	got, err := ledger.ParseDecided(raw)
	if err != nil || !bytes.Equal(got.Marshal(), raw) || got.Header != b.Header || len(got.Votes) != 4 || !slices.Equal(got.Leaves, b.Leaves) {
		t.Errorf("block: got %+v, %v", got, err)
	}
	for n := range len(raw) {
		if _, err := ledger.ParseDecided(raw[:n]); err == nil {
			t.Fatalf("block cut to %d: got no error", n)
		}
	}
	p := b.Payloads()[0]
	back, err := ledger.ParsePayload(p.Marshal())
	if err != nil || back.Leaf() != b.Leaves[1] || back.Index != p.Index || !back.Received.Equal(p.Received) {
		t.Errorf("payload: got %+v, %v", back, err)
	}
	s := ledger.SealedAt{Height: 2, Note: c.Seal(b)}
	if at, err := ledger.ParseSealedAt(s.Marshal()); err != nil || at.Height != 2 || !bytes.Equal(at.Note, s.Note) {
		t.Errorf("sealed: got %+v, %v", at, err)
	}
}

// reparses fails where what parses does not format to the same bytes again.
func reparses[T any](t *testing.T, b []byte, parse func([]byte) (T, error), format func(T) []byte) {
	if v, err := parse(b); err == nil && !bytes.Equal(format(v), b) {
		t.Errorf("%T: %q parses, and formats to %q", v, b, format(v))
	}
}

func FuzzFormats(f *testing.F) {
	d := ledgertest.New("fuzz", 4)
	c := d.NewChain().Fill(2)
	b := c.Blocks[1]
	note := c.Seal(b)
	at := ledger.SealedAt{Height: 2, Note: note}
	proof, err := ledger.Prove(c, b.Header.Size, 1)
	if err != nil {
		f.Fatal(err)
	}
	leaf := b.Leaves[1].Marshal()
	for _, seed := range [][]byte{b.Decided().Marshal(), b.Payloads()[0].Marshal(), at.Marshal(), []byte(b.Header.Checkpoint(d.Origin).Body()), note,
		b.Header.Marshal(), leaf[:], d.Policy, ledger.FormatProof(1, proof, note), []byte("tile/0/x001/234.p/17")} {
		f.Add(seed)
	}
	p := policy(f, d.Policy)
	f.Fuzz(func(t *testing.T, b []byte) {
		reparses(t, b, ledger.ParseDecided, (*ledger.Decided).Marshal)
		reparses(t, b, ledger.ParsePayload, (*ledger.Payload).Marshal)
		reparses(t, b, ledger.ParseSealedAt, (*ledger.SealedAt).Marshal)
		reparses(t, b, ledger.ParseHeader, ledger.Header.Marshal)
		reparses(t, b, func(b []byte) (ledger.Checkpoint, error) { return ledger.ParseCheckpoint(string(b)) }, func(c ledger.Checkpoint) []byte { return []byte(c.Body()) })
		reparses(t, b, func(b []byte) (ledger.TileID, error) { return ledger.ParseTilePath(string(b)) }, func(id ledger.TileID) []byte { return []byte(id.Path()) })
		reparses(t, b, ledger.ParseFrontier, (*ledger.Frontier).Marshal)
		if i, pr, s, err := ledger.ParseProof(b); err == nil {
			if j, pr2, s2, err := ledger.ParseProof(ledger.FormatProof(i, pr, s)); err != nil || i != j || !slices.Equal(pr, pr2) || !bytes.Equal(s, s2) {
				t.Errorf("proof: got %v", err)
			}
		}
		if q, err := ledger.ParsePolicy(b); err == nil {
			_, _ = q.Open(note) // must not panic
		}
		if s, err := p.Open(b); err == nil && !strings.HasPrefix(string(b), s.Body()) {
			t.Error("a checkpoint passes that is not in the note")
		}
	})
}

func ExampleVerifyBundle() {
	// A district publishes its policy; whoever is to verify gets it from someone
	// they trust, and the bundle from anybody.
	d := ledgertest.New("example", 4)
	trusted, err := ledger.ParsePolicy(d.Policy)
	if err != nil {
		fmt.Println(err)
		return
	}
	bundle := d.NewChain().Fill(2).Bundle(3).Marshal()
	r, err := ledger.VerifyBundle(bundle, trusted)
	fmt.Println(r.Outcome, err)
	fmt.Println(r.Records[0].Signer)
	bundle[len(bundle)/2] ^= 1
	r, _ = ledger.VerifyBundle(bundle, trusted)
	fmt.Println(r.Outcome)
	// Output:
	// pass <nil>
	// service signal-control
	// fail
}
