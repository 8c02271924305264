package ledger_test

import (
	"crypto/ed25519"
	"crypto/sha256"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
)

// neighbours returns n witnesses with their keys.
func neighbours(t *testing.T, n int) (out []ledger.Witness, keys []ed25519.PrivateKey) {
	t.Helper()
	for i := range n {
		seed := sha256.Sum256(fmt.Appendf(nil, "neighbour %d", i))
		k := ed25519.NewKeyFromSeed(seed[:])
		c, err := ledger.NewCosigner(fmt.Sprintf("witness.example/n%d", i), k.Public().(ed25519.PublicKey))
		if err != nil {
			t.Fatal(err)
		}
		out, keys = append(out, ledger.Witness{Name: fmt.Sprintf("n%d", i), Cosigner: c, URL: fmt.Sprintf("https://n%d.example/", i)}), append(keys, k)
	}
	return out, keys
}

// witnessed adds cosignatures of neighbours to a signed checkpoint.
func witnessed(t *testing.T, signed []byte, ws []ledger.Witness, keys []ed25519.PrivateKey, by ...int) []byte {
	t.Helper()
	body, _, _ := strings.Cut(string(signed), "\n\n")
	for _, i := range by {
		line, err := ledger.Cosign(ws[i].Cosigner.Name(), keys[i], body+"\n", ledgertest.Start.Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		signed = append(signed, line...)
	}
	return signed
}

// TestPolicyFile: what C2SP tlog-policy says of lines and characters.
func TestPolicyFile(t *testing.T) {
	d := ledgertest.New("policy", 4)
	lines := strings.Split(strings.TrimSpace(string(d.Policy)), "\n")
	join := func(l ...string) []byte { return []byte(strings.Join(l, "\n") + "\n") }
	key := strings.Fields(lines[1])[2]
	// Only a line that begins with # is a comment; names are octets.
	p, err := ledger.ParsePolicy(join("\t # district", lines[0], "witness a#b "+key+" https://w.example/#add", "witness \xc3\xa9 "+strings.Fields(lines[2])[2], "quorum a#b"))
	if err != nil {
		t.Fatal(err)
	}
	all := p.AllWitnesses()
	if len(all) != 2 || all[0].Name != "a#b" || all[0].URL != "https://w.example/#add" || all[1].URL != "" || len(p.Witnesses()) != 1 {
		t.Errorf("witnesses: got %+v, want a#b with its URL and another that is not needed", all)
	}
	for _, c := range []string{"\r", "\x00", "\x0b", "\x7f"} {
		if _, err := ledger.ParsePolicy(join(lines[0], "quorum none"+c)); err == nil || !strings.Contains(err.Error(), "control character") {
			t.Errorf("%q: got %v, want it refused", c, err)
		}
	}
	if _, err := ledger.ParsePolicy(join(lines[0], lines[1]+" # the port", "quorum none")); err == nil {
		t.Error("a comment at the end of a line: got no error")
	}
}

// TestDistrictPolicy: q of n validators and k of the neighbours, before and after
// the validators change.
func TestDistrictPolicy(t *testing.T) {
	c := councils("policy")
	ws, keys := neighbours(t, 3)
	for need := 0; need <= 3; need++ {
		text, err := ledger.DistrictPolicy(&c.Genesis, c.District.Validators, ws, need)
		if err != nil {
			t.Fatal(err)
		}
		p := policy(t, text)
		if got := len(p.AllWitnesses()); got != 7 {
			t.Errorf("need %d: got %d witnesses, want 7", need, got)
		}
		s, err := ledger.NewSuccession(&c.Genesis, p)
		if err != nil {
			t.Fatal(err)
		}
		for i := range c.Blocks {
			if since := c.Judged[i].MembersSince(); since > 0 {
				if err := s.Change(ledger.Height(since), c.Judged[i].Validators()); err != nil {
					t.Fatal(err)
				}
			}
		}
		for _, at := range []struct {
			block  int // from 0
			quorum []int
		}{{1, []int{0, 1, 3}}, {4, []int{0, 1, 2, 4}}, {7, []int{1, 2, 4}}} {
			b := c.Blocks[at.block]
			h := b.Header.Height
			c.Voters = at.quorum
			signed := c.Seal(b)
			if _, err := s.At(h).Quorum.Open(signed); err != nil {
				t.Errorf("need %d, block %d: validators alone: %v", need, h, err)
			}
			for n := 0; n <= 3; n++ {
				by := []int{0, 1, 2}[:n]
				sealed, err := s.Open(h, witnessed(t, signed, ws, keys, by...))
				if (err == nil) != (n >= need) {
					t.Errorf("need %d, block %d, %d neighbours: got %v", need, h, n, err)
				}
				if err == nil && len(sealed.Cosignatures) != len(at.quorum)+n {
					t.Errorf("need %d, block %d: got %d cosignatures, want %d", need, h, len(sealed.Cosignatures), len(at.quorum)+n)
				}
			}
			c.Voters = at.quorum[1:]
			if _, err := s.Open(h, witnessed(t, c.Seal(b), ws, keys, 0, 1, 2)); err == nil {
				t.Errorf("need %d, block %d: all neighbours and too few validators: got no error", need, h)
			}
		}
		var vs []ed25519.PublicKey
		for _, v := range c.District.Validators {
			vs = append(vs, ed25519.PublicKey(v.CosignKey))
		}
		if got := p.MetBy(vs[:3]...); got != (need == 0) {
			t.Errorf("need %d: met by three validators: got %v", need, got)
		}
		if got := p.MetBy(append(vs[:3:3], ws[0].Key(), ws[1].Key(), ws[2].Key())...); !got {
			t.Errorf("need %d: met by three validators and all neighbours: got false", need)
		}
	}
	for _, need := range []int{-1, 4} {
		if _, err := ledger.DistrictPolicy(&c.Genesis, c.District.Validators, ws, need); err == nil {
			t.Errorf("%d of 3 neighbours: got no error", need)
		}
	}
	// Validators that are not one group leave no place for others.
	text, err := ledger.DistrictPolicy(&c.Genesis, c.District.Validators, ws, 1)
	if err != nil {
		t.Fatal(err)
	}
	mixed := strings.Replace(string(text), "group validators 3 validator-1", "group half all validator-1 n0\ngroup validators 3 half", 1)
	mixed = strings.Replace(mixed, "neighbours 1 n0", "neighbours 1", 1)
	// The neighbours must be named before they are used.
	l := strings.SplitAfter(mixed, "\n")
	var first, second string
	for _, x := range l {
		if strings.HasPrefix(x, "log") || strings.HasPrefix(x, "witness") {
			first += x
		} else {
			second += x
		}
	}
	s, err := ledger.NewSuccession(&c.Genesis, policy(t, []byte(first+second)))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Change(3, c.Judged[4].Validators()); err == nil || !strings.Contains(err.Error(), "one group") {
		t.Errorf("validators in no group of their own: got %v", err)
	}
}

// TestSuccessionProof: who pinned genesis verifies the newest checkpoint.
func TestSuccessionProof(t *testing.T) {
	c := councils("proof")
	ws, keys := neighbours(t, 2)
	text, err := ledger.DistrictPolicy(&c.Genesis, c.District.Validators[:4], ws, 1)
	if err != nil {
		t.Fatal(err)
	}
	p := policy(t, text)
	proof := &ledger.SuccessionProof{Steps: stepsOf(t, c)}
	raw, err := proof.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := ledger.ParseSuccessionProof(raw)
	if err != nil {
		t.Fatal(err)
	}
	line, err := parsed.Verify(c.GenesisJSON, p)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []int{4, 4, 4, 5, 5, 5, 4, 4} { // block 3 adds one, block 6 revokes one
		b := c.Blocks[i]
		c.Voters = b.Voters
		sealed, set, err := line.OpenNewest(witnessed(t, c.Seal(b), ws, keys, 1))
		if err != nil || sealed.Size != b.Header.Size || len(set.Validators) != want {
			t.Errorf("checkpoint after block %d: got %d validators, %v, want %d", i+1, len(set.Validators), err, want)
		}
		if _, _, err := line.OpenNewest(c.Seal(b)); err == nil {
			t.Errorf("checkpoint after block %d without the witness: got no error", i+1)
		}
	}
	last := c.Blocks[7]
	c.Voters = []int{0, 1, 2} // those of the beginning, one of whom is gone
	if _, _, err := line.OpenNewest(witnessed(t, c.Seal(last), ws, keys, 0)); err == nil {
		t.Error("a validator that was revoked counts")
	}
	spoil := map[string]func(*ledger.SuccessionProof){
		"in another order": func(p *ledger.SuccessionProof) { p.Steps[0], p.Steps[1] = p.Steps[1], p.Steps[0] },
		"twice":            func(p *ledger.SuccessionProof) { p.Steps = append(p.Steps, p.Steps[1]) },
		"a vote forged":    func(p *ledger.SuccessionProof) { p.Steps[1].Votes[0].Signature[3] ^= 1 },
		"too few votes":    func(p *ledger.SuccessionProof) { p.Steps[0].Votes = p.Steps[0].Votes[:2] },
		"another record":   func(p *ledger.SuccessionProof) { p.Steps[0].Envelope = p.Steps[1].Envelope },
	}
	for name, f := range spoil {
		bad, err := ledger.ParseSuccessionProof(raw)
		if err != nil {
			t.Fatal(err)
		}
		f(bad)
		if _, err := bad.Verify(c.GenesisJSON, p); err == nil {
			t.Errorf("%s: got no error", name)
		}
	}
	other := ledgertest.New("another", 4)
	if _, err := parsed.Verify(other.GenesisJSON, policy(t, other.Policy)); err == nil {
		t.Error("another district: got no error")
	}
	for _, bad := range []string{"", "{}", `{"format":"stopline succession v2","steps":[]}`, string(raw) + "{}", `{"format":"stopline succession v1","steps":[],"more":1}`} {
		if _, err := ledger.ParseSuccessionProof([]byte(bad)); err == nil {
			t.Errorf("%.40q: got no error", bad)
		}
	}
}

// TestForeignCheckpoint: other logs' checkpoints may have extension lines.
func TestForeignCheckpoint(t *testing.T) {
	root := strings.Repeat("A", 43) + "="
	for body, good := range map[string]bool{
		"log.example\n7\n" + root + "\n":               true,
		"log.example\n7\n" + root + "\nextension\nx\n": true,
		"log.example\n7\n" + root + "\n\nx\n":          false,
		"log.example\n7\n" + root + "\nx":              false,
		"log.example\n07\n" + root + "\n":              false,
		"log.example\n7\n" + root:                      false,
		"\n7\n" + root + "\n":                          false,
		"log.example\n7\nAAAA\n":                       false,
	} {
		c, err := ledger.ParseForeign(body)
		if (err == nil) != good || good && (c.Origin != "log.example" || c.Size != 7) {
			t.Errorf("%q: got %v, %v, want taken %v", body, c, err, good)
		}
	}
	_, keys := neighbours(t, 1)
	if _, err := ledger.CosignForeign("w.example", keys[0], "log.example\n7\n"+root+"\nextension\n", ledgertest.Start); err != nil {
		t.Errorf("cosigning: %v", err)
	}
	if _, err := ledger.Cosign("w.example", keys[0], "log.example\n7\n"+root+"\nextension\n", ledgertest.Start); err == nil {
		t.Error("our own log has extension lines: got no error")
	}
}
