package ledger

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
)

// Tiles are 8 levels high: C2SP tlog-tiles.
const (
	TileHeight = 8
	TileWidth  = 1 << TileHeight
	// EntriesLevel is the level of entry bundles in [TileID].
	EntriesLevel = -1
)

// TileID names one tile.
type TileID struct {
	Level int    // 0 is right above the leaves, EntriesLevel holds the entries
	N     uint64 // which of its level, from the left
	Width int    // 1 to 256; less than 256: partial
}

// Path returns the tile's path below the log, for instance
// "tile/0/x001/234.p/17" or "tile/entries/000".
func (t TileID) Path() string {
	level := fmt.Sprint(t.Level)
	if t.Level == EntriesLevel {
		level = "entries"
	}
	n := fmt.Sprintf("%03d", t.N%1000)
	for k := t.N / 1000; k > 0; k /= 1000 {
		n = fmt.Sprintf("x%03d/%s", k%1000, n)
	}
	if t.Width < TileWidth {
		return fmt.Sprintf("tile/%s/%s.p/%d", level, n, t.Width)
	}
	return fmt.Sprintf("tile/%s/%s", level, n)
}

// ParseTilePath is the reverse of [TileID.Path].
func ParseTilePath(path string) (TileID, error) {
	bad := fmt.Errorf("tile path %.100q: is not one of C2SP tlog-tiles", path)
	if len(path) > 100 {
		return TileID{}, bad
	}
	p := strings.Split(path, "/")
	if len(p) < 3 || p[0] != "tile" {
		return TileID{}, bad
	}
	var t TileID
	if p[1] == "entries" {
		t.Level = EntriesLevel
	} else if _, err := fmt.Sscanf(p[1], "%d", &t.Level); err != nil || t.Level < 0 || t.Level > 7 {
		return TileID{}, bad
	}
	p = p[2:]
	t.Width = TileWidth
	if k := len(p) - 2; k >= 0 && strings.HasSuffix(p[k], ".p") {
		if _, err := fmt.Sscanf(p[k+1], "%d", &t.Width); err != nil || t.Width < 1 || t.Width >= TileWidth {
			return TileID{}, bad
		}
		p = p[:k+1]
		p[k] = strings.TrimSuffix(p[k], ".p")
	}
	for _, s := range p {
		var d uint64
		if _, err := fmt.Sscanf(strings.TrimPrefix(s, "x"), "%03d", &d); err != nil || t.N > 1<<50 {
			return TileID{}, bad
		}
		t.N = t.N*1000 + d
	}
	if t.Path() != path {
		return TileID{}, bad
	}
	return t, nil
}

// TileReader gives tiles of one log. An implementation over a disk, HTTP or
// memory returns an error that wraps [io/fs.ErrNotExist] for a tile that it does
// not have. What it returns is not trusted.
type TileReader interface {
	ReadTile(t TileID) ([]byte, error)
}

// TileReaderFunc makes a function a [TileReader].
type TileReaderFunc func(t TileID) ([]byte, error)

// ReadTile calls f.
func (f TileReaderFunc) ReadTile(t TileID) ([]byte, error) { return f(t) }

// TileFile is a tile with its content.
type TileFile struct {
	TileID
	Data []byte
}

// Tiler makes the tiles of a growing log. It holds the tiles at the right edge,
// and no more. The zero Tiler is an empty log.
type Tiler struct {
	size    uint64
	entries []byte        // of the last, partial bundle
	levels  [][]tlog.Hash // of the partial tile at each level
	full    []TileFile
}

// Size returns the number of leaves.
func (t *Tiler) Size() uint64 { return t.size }

// Append adds leaves. Tiles that become full wait for [Tiler.Full].
func (t *Tiler) Append(leaves []Leaf) {
	for _, l := range leaves {
		e := l.Marshal()
		t.entries = AppendEntry(t.entries, e[:])
		n := t.size / TileWidth
		t.size++
		if t.size%TileWidth == 0 {
			t.full = append(t.full, TileFile{TileID{EntriesLevel, n, TileWidth}, t.entries})
			t.entries = nil
		}
		t.push(0, tlog.RecordHash(e[:]))
	}
}

// push adds a hash to a level's tile, and the tile's root to the level above
// when it is full.
func (t *Tiler) push(level int, h tlog.Hash) {
	if level == len(t.levels) {
		t.levels = append(t.levels, nil)
	}
	t.levels[level] = append(t.levels[level], h)
	if len(t.levels[level]) < TileWidth {
		return
	}
	hs := t.levels[level]
	t.full = append(t.full, TileFile{TileID{level, t.size>>(TileHeight*(level+1)) - 1, TileWidth}, hashTile(hs)})
	t.levels[level] = nil
	t.push(level+1, perfectRoot(hs))
}

func hashTile(hs []tlog.Hash) []byte {
	b := make([]byte, 0, len(hs)*tlog.HashSize)
	for _, h := range hs {
		b = append(b, h[:]...)
	}
	return b
}

// perfectRoot is the root over a power of two of nodes.
func perfectRoot(hs []tlog.Hash) tlog.Hash {
	hs = append([]tlog.Hash(nil), hs...)
	for len(hs) > 1 {
		for i := range len(hs) / 2 {
			hs[i] = tlog.NodeHash(hs[2*i], hs[2*i+1])
		}
		hs = hs[:len(hs)/2]
	}
	return hs[0]
}

// Full returns the tiles that have become full since it was last called.
func (t *Tiler) Full() []TileFile {
	f := t.full
	t.full = nil
	return f
}

// Partial returns the partial tiles of the log as it is now.
func (t *Tiler) Partial() []TileFile {
	var out []TileFile
	for _, id := range PartialTiles(t.size) {
		data := t.entries
		if id.Level >= 0 {
			data = hashTile(t.levels[id.Level])
		}
		out = append(out, TileFile{id, append([]byte(nil), data...)})
	}
	return out
}

// PartialTiles names the partial tiles of a log of a size: those at its right
// edge that are not full.
func PartialTiles(size uint64) []TileID {
	var out []TileID
	if w := int(size % TileWidth); w > 0 {
		out = append(out, TileID{EntriesLevel, size / TileWidth, w})
	}
	for level := 0; size > 0; level++ {
		if w := int(size % TileWidth); w > 0 {
			out = append(out, TileID{level, size / TileWidth, w})
		}
		size /= TileWidth
	}
	return out
}

// Frontier returns the log's right edge.
func (t *Tiler) Frontier() *Frontier {
	f := &Frontier{size: t.size}
	for level, hs := range t.levels {
		// Bit i of the width is a perfect subtree of 2^i nodes of this tile.
		for i := TileHeight - 1; i >= 0; i-- {
			if len(hs)>>i&1 == 1 {
				f.perfect[level*TileHeight+i] = perfectRoot(hs[:1<<i])
				hs = hs[1<<i:]
			}
		}
	}
	return f
}

// Root returns the tree head.
func (t *Tiler) Root() Hash { return t.Frontier().Root() }

// LoadTiler reads the right edge of a log of a size, and checks it against the
// root, so that appending goes on from what was signed.
func LoadTiler(r TileReader, size uint64, root Hash) (*Tiler, error) {
	t := &Tiler{size: size}
	for n := size; n > 0; n /= TileWidth {
		t.levels = append(t.levels, nil)
	}
	for _, id := range PartialTiles(size) {
		b, err := r.ReadTile(id)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", id.Path(), err)
		}
		if id.Level == EntriesLevel {
			t.entries = b
			continue
		}
		if len(b) != id.Width*tlog.HashSize {
			return nil, fmt.Errorf("%s: %d bytes, want %d", id.Path(), len(b), id.Width*tlog.HashSize)
		}
		hs := make([]tlog.Hash, id.Width)
		for i := range hs {
			hs[i] = tlog.Hash(b[i*tlog.HashSize:])
		}
		t.levels[id.Level] = hs
	}
	es, err := ReadEntries(t.entries)
	if err != nil {
		return nil, err
	}
	if len(es) != int(size%TileWidth) {
		return nil, fmt.Errorf("entries: %d at the right edge of a log of %d, want %d", len(es), size, size%TileWidth)
	}
	for i, e := range es {
		if tlog.RecordHash(e) != t.levels[0][i] {
			return nil, fmt.Errorf("entries and hashes differ at leaf %d", size-uint64(len(es)-i))
		}
	}
	if got := t.Root(); got != root {
		return nil, fmt.Errorf("tiles of size %d do not give the root that was signed", size)
	}
	return t, nil
}

// AppendEntry appends one entry to a bundle: 16-bit length, then the bytes.
func AppendEntry(bundle, entry []byte) []byte {
	bundle = binary.BigEndian.AppendUint16(bundle, uint16(len(entry)))
	return append(bundle, entry...)
}

// ReadEntries splits a bundle.
func ReadEntries(bundle []byte) ([][]byte, error) {
	var out [][]byte
	for len(bundle) > 0 {
		if len(bundle) < 2 {
			return nil, errors.New("entries: truncated")
		}
		n := int(binary.BigEndian.Uint16(bundle))
		bundle = bundle[2:]
		if len(bundle) < n {
			return nil, errors.New("entries: truncated")
		}
		out = append(out, bundle[:n:n])
		bundle = bundle[n:]
	}
	return out, nil
}

// hashReader reads the nodes of a log of a size from its tiles. What it returns
// is not verified: proofs made from it are, by whoever checks them.
type hashReader struct {
	r     TileReader
	size  uint64
	cache map[TileID][]byte
}

// NewHashReader makes a [tlog.HashReader] of the tiles of a log of a size. It is
// for one request: it caches every tile that it reads. A partial tile that is
// gone, because it became full meanwhile, is read from the full one.
func NewHashReader(r TileReader, size uint64) tlog.HashReader {
	return &hashReader{r, size, map[TileID][]byte{}}
}

func (h *hashReader) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		level, n := tlog.SplitStoredHashIndex(x)
		tl := level / TileHeight
		within := level % TileHeight
		first := uint64(n) << within // node of the tile's bottom row, across the level
		tile, err := h.tile(TileID{Level: tl, N: first / TileWidth})
		if err != nil {
			return nil, err
		}
		at, count := int(first%TileWidth), 1<<within
		if (at+count)*tlog.HashSize > len(tile) {
			return nil, fmt.Errorf("tile level %d, %d: too short for node %d", tl, first/TileWidth, x)
		}
		hs := make([]tlog.Hash, count)
		for k := range hs {
			hs[k] = tlog.Hash(tile[(at+k)*tlog.HashSize:])
		}
		out[i] = perfectRoot(hs)
	}
	return out, nil
}

// tile reads the tile as wide as the log's size makes it.
func (h *hashReader) tile(id TileID) ([]byte, error) {
	return readTile(h.r, h.size, id, h.cache)
}

func readTile(r TileReader, size uint64, id TileID, cache map[TileID][]byte) ([]byte, error) {
	level := max(id.Level, 0)
	id.Width = int(min(TileWidth, size>>(TileHeight*level)-id.N*TileWidth))
	if size>>(TileHeight*level) <= id.N*TileWidth {
		return nil, fmt.Errorf("%s: beyond a log of %d", id.Path(), size)
	}
	if b, ok := cache[id]; ok {
		return b, nil
	}
	b, err := r.ReadTile(id)
	if err != nil && id.Width < TileWidth {
		full := id
		full.Width = TileWidth
		if fb, ferr := r.ReadTile(full); ferr == nil {
			b, err = fb, nil
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", id.Path(), err)
	}
	if cache != nil {
		cache[id] = b
	}
	return b, nil
}

// ReadLeaf reads one entry of a log of a size. It is not verified.
func ReadLeaf(r TileReader, size, index uint64) (Leaf, error) {
	b, err := readTile(r, size, TileID{Level: EntriesLevel, N: index / TileWidth}, nil)
	if err != nil {
		return Leaf{}, err
	}
	es, err := ReadEntries(b)
	if err != nil {
		return Leaf{}, err
	}
	if int(index%TileWidth) >= len(es) {
		return Leaf{}, fmt.Errorf("entries: leaf %d is missing", index)
	}
	return ParseLeaf(es[index%TileWidth])
}

// Prove returns the inclusion proof of a leaf in the log of a size, RFC 6962
// §2.1.1.
func Prove(r TileReader, size, index uint64) ([]tlog.Hash, error) {
	if index >= size || size > 1<<62 {
		return nil, fmt.Errorf("proof: leaf %d of a log of %d", index, size)
	}
	return tlog.ProveRecord(int64(size), int64(index), NewHashReader(r, size))
}
