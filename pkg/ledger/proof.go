package ledger

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
)

const proofMagic = "c2sp.org/tlog-proof@v1\n"

// maxProof is the longest inclusion proof: one hash a level.
const maxProof = 63

// FormatProof writes an inclusion proof with the signed checkpoint that it
// leads to: C2SP tlog-proof.
func FormatProof(index uint64, proof []tlog.Hash, signed []byte) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%sindex %d\n", proofMagic, index)
	for _, h := range proof {
		fmt.Fprintf(&b, "%s\n", base64.StdEncoding.EncodeToString(h[:]))
	}
	b.WriteByte('\n')
	b.Write(signed)
	return b.Bytes()
}

// ParseProof decodes what [FormatProof] wrote. A line of extra data, which the
// specification allows, is refused: nothing here would check it.
func ParseProof(b []byte) (index uint64, proof []tlog.Hash, signed []byte, err error) {
	fail := func(what string) (uint64, []tlog.Hash, []byte, error) {
		return 0, nil, nil, errors.New("tlog-proof: " + what)
	}
	head, rest, ok := strings.Cut(string(b), "\n\n")
	lines := strings.Split(head, "\n")
	if !ok || len(lines) < 2 || lines[0]+"\n" != proofMagic {
		return fail("must begin with " + strings.TrimSpace(proofMagic) + " and an index")
	}
	n, found := strings.CutPrefix(lines[1], "index ")
	if index, err = strconv.ParseUint(n, 10, 63); !found || err != nil {
		return fail("index: must be a decimal number")
	}
	if len(lines)-2 > maxProof {
		return fail("too many hashes")
	}
	for _, l := range lines[2:] {
		h, err := base64.StdEncoding.DecodeString(l)
		if err != nil || len(h) != tlog.HashSize {
			return fail("a hash must be 32 bytes in base64")
		}
		proof = append(proof, tlog.Hash(h))
	}
	return index, proof, []byte(rest), nil
}

// CheckInclusion verifies that a leaf stands at an index of a checkpoint's log.
func CheckInclusion(c Checkpoint, index uint64, leaf Leaf, proof []tlog.Hash) error {
	if index >= c.Size || len(proof) > maxProof || c.Size > 1<<62 {
		return fmt.Errorf("leaf %d: not in a log of %d", index, c.Size)
	}
	e := leaf.Marshal()
	if err := tlog.CheckRecord(proof, int64(c.Size), tlog.Hash(c.Root), int64(index), tlog.RecordHash(e[:])); err != nil {
		return fmt.Errorf("leaf %d: the proof does not lead to the checkpoint's root", index)
	}
	return nil
}
