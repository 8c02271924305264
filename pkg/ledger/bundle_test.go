package ledger_test

import (
	"archive/zip"
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
)

func publicKey(k ed25519.PrivateKey) ed25519.PublicKey { return k.Public().(ed25519.PublicKey) }

func policy(t testing.TB, b []byte) *ledger.Policy {
	t.Helper()
	p, err := ledger.ParsePolicy(b)
	if err != nil {
		t.Fatalf("policy: %v", err)
	}
	return p
}

// evidence returns a bundle with a reading and a command of block 2, and one of
// block 3.
func evidence(t testing.TB) (*ledgertest.District, *ledgertest.Chain, *ledger.Bundle) {
	t.Helper()
	d := ledgertest.New("bundle", 4)
	c := d.NewChain().Fill(5)
	p := c.Blocks[1].Header.PrevSize
	return d, c, c.Bundle(p+1, p+3, c.Blocks[2].Header.PrevSize+3)
}

func TestBundleVerifies(t *testing.T) {
	d, c, b := evidence(t)
	raw := b.Marshal()
	r, err := ledger.VerifyBundle(raw, policy(t, d.Policy))
	if err != nil || r.Outcome != ledger.Pass || r.ExitCode() != 0 {
		t.Fatalf("got %s, %v, want pass\n%s", r.Outcome, err, r.Text())
	}
	if len(r.Records) != 3 || r.Records[0].Kind != identity.KindFrame || r.Records[1].Kind != identity.KindCommand {
		t.Fatalf("records: got %+v, want a frame and two commands", r.Records)
	}
	if got, want := r.Records[0].Signer, "device rsu-J1"; got != want {
		t.Errorf("signer: got %q, want %q", got, want)
	}
	if got, want := r.Records[1].Claims.Summary, `command 2 to junction "J1": stage 1`; !strings.HasPrefix(got, want) {
		t.Errorf("summary: got %q, want it to begin with %q", got, want)
	}
	// Validators cosign at 0, 1, 2 and 3 s after the block; f is 1.
	if want := c.Blocks[4].Header.Time.Add(time.Second); r.ExistedBy == nil || !r.ExistedBy.Equal(want) {
		t.Errorf("existed by: got %v, want the second smallest, %v", r.ExistedBy, want)
	}
	if len(r.Signers) != 5 || r.Signers[2].Department != "police" {
		t.Errorf("signers: got %+v, want the log and four departments", r.Signers)
	}
	for _, want := range []string{"PASS", "record 5", "existed no later than 2026-11-01 08:00:06 UTC", "It does not prove", "signal-control"} {
		if !strings.Contains(r.Text(), want) {
			t.Errorf("text: %q is missing in\n%s", want, r.Text())
		}
	}
	var back ledger.Report
	if err := json.Unmarshal(r.JSON(), &back); err != nil || back.Outcome != ledger.Pass {
		t.Errorf("JSON: got %s, %v, want pass", back.Outcome, err)
	}
	again, err := ledger.ParseBundle(raw)
	if err != nil || !bytes.Equal(again.Marshal(), raw) {
		t.Errorf("parse and marshal: %v, and the bytes must be the same", err)
	}
	// Other programs read it, too.
	z, err := zip.NewReader(bytes.NewReader(raw), int64(len(raw)))
	if err != nil {
		t.Fatal(err)
	}
	f, err := z.Open("statement.txt")
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(f)
	if err != nil || !strings.Contains(string(text), "It does not prove") {
		t.Errorf("statement: %v\n%s", err, text)
	}
}

func TestBundleUntrustedWithoutPolicy(t *testing.T) {
	_, _, b := evidence(t)
	r, err := ledger.VerifyBundle(b.Marshal(), nil)
	if err != nil || r.Outcome != ledger.Untrusted || r.ExitCode() != 3 {
		t.Fatalf("got %s, %v, exit %d, want untrusted, exit 3", r.Outcome, err, r.ExitCode())
	}
	if len(r.Fingerprints) != 5 || len(r.Proves) != 0 || !strings.Contains(r.Text(), "fingerprints") {
		t.Errorf("got %d fingerprints and %d claims, want 5 and none:\n%s", len(r.Fingerprints), len(r.Proves), r.Text())
	}
}

// TestForgedDistrict makes keys, log, policy and bundle of a district with the
// same names: it is refused under the true policy, and never more than untrusted
// without one.
func TestForgedDistrict(t *testing.T) {
	d, _, _ := evidence(t)
	f := ledgertest.New("forger", 4)
	if f.Origin != d.Origin {
		t.Fatal("the forger must use the same names")
	}
	fc := f.NewChain().Fill(3)
	forged := fc.Bundle(1)
	r, err := ledger.VerifyBundle(forged.Marshal(), policy(t, d.Policy))
	if err == nil || r.Outcome != ledger.Fail || r.ExitCode() != 1 || r.Findings[0].File != "checkpoint" {
		t.Errorf("forged district: got %s, %v, want fail at the checkpoint", r.Outcome, err)
	}
	forged.Policy = d.Policy // the true policy as a hint changes nothing
	if r, err := ledger.VerifyBundle(forged.Marshal(), policy(t, d.Policy)); err == nil || r.Outcome != ledger.Fail {
		t.Errorf("with the true policy inside: got %s, %v, want fail", r.Outcome, err)
	}
	if r, err := ledger.VerifyBundle(forged.Marshal(), nil); err == nil || r.Outcome != ledger.Fail {
		t.Errorf("with the true policy as hint: got %s, %v, want fail", r.Outcome, err)
	}
	forged.Policy = f.Policy
	if r, _ := ledger.VerifyBundle(forged.Marshal(), nil); r.Outcome != ledger.Untrusted {
		t.Errorf("without a policy: got %s, want untrusted", r.Outcome)
	}
	// With the true log key stolen, and q−1 validators, it still fails.
	stolen := *f
	stolen.LogKey = d.LogKey
	stolen.Cosign = append(slices.Clone(d.Cosign[:2]), f.Cosign[2:]...)
	sc := stolen.NewChain().Fill(3)
	if r, err := ledger.VerifyBundle(sc.Bundle(1).Marshal(), policy(t, d.Policy)); err == nil || !strings.Contains(err.Error(), "quorum") {
		t.Errorf("log key and two validators stolen: got %s, %v, want fail for the quorum", r.Outcome, err)
	}
}

// TestQuorum: q−1 cosigners do not suffice, nor do strangers or one of them many
// times; the log's signature alone is worth nothing.
func TestQuorum(t *testing.T) {
	d, c, b := evidence(t)
	p := policy(t, d.Policy)
	last := c.Blocks[4]
	cp := last.Header.Checkpoint(d.Origin)
	at := last.Header.Time
	line := func(i int) string { return d.Cosignature(i, cp.Body(), at) }
	stranger := ledgertest.New("stranger", 4)
	seal := func(lines ...string) []byte {
		s, err := ledger.Seal(cp, d.LogSigner(), lines)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for _, tc := range []struct {
		name string
		note []byte
		want string // empty: passes
	}{
		{"three of four", seal(line(0), line(1), line(3)), ""},
		{"three and a stranger", seal(line(0), line(1), line(3), stranger.Cosignature(2, cp.Body(), at)), ""},
		{"two of four", seal(line(0), line(1)), "quorum"},
		{"two and strangers", seal(line(0), line(1), stranger.Cosignature(2, cp.Body(), at), stranger.Cosignature(3, cp.Body(), at)), "quorum"},
		{"one three times", seal(line(0), line(0), d.Cosignature(0, cp.Body(), at.Add(time.Second))), "quorum"},
		{"log only", seal(), "quorum"},
		{"other log key", func() []byte {
			s, _ := ledger.Seal(cp, stranger.LogSigner(), []string{line(0), line(1), line(2)})
			return s
		}(), "log"},
		{"of another size", func() []byte {
			o := cp
			o.Size--
			s, _ := ledger.Seal(o, d.LogSigner(), []string{line(0), line(1), line(2)})
			return s
		}(), "checkpoint"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			x := *b
			x.Checkpoint = tc.note
			r, err := ledger.VerifyBundle(x.Marshal(), p)
			if tc.want == "" && (err != nil || r.Outcome != ledger.Pass) {
				t.Errorf("got %s, %v, want pass", r.Outcome, err)
			}
			if tc.want != "" && (err == nil || r.Outcome != ledger.Fail || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("got %s, %v, want an error about %q", r.Outcome, err, tc.want)
			}
		})
	}
}

// TestBundleLies changes the content in one way at a time and makes a well-formed
// bundle of it, as a forger would.
func TestBundleLies(t *testing.T) {
	d, c, _ := evidence(t)
	other := ledgertest.New("forger", 4)
	weak := d.NewChain()
	weak.Voters = []int{0, 1}
	weak.Fill(5)
	p := policy(t, d.Policy)
	command, _ := identity.ParseEnvelope(c.Blocks[1].Records[3].Envelope)
	for _, tc := range []struct {
		name, want string
		lie        func(b *ledger.Bundle)
	}{
		{"payload", "records/5/: salt and envelope", func(b *ledger.Bundle) { b.Records[0].Envelope[60] ^= 1 }},
		{"salt", "salt and envelope", func(b *ledger.Bundle) { b.Records[0].Salt[0] ^= 1 }},
		{"other record's payload", "salt and envelope", func(b *ledger.Bundle) { b.Records[0].Envelope = b.Records[1].Envelope }},
		{"record of nowhere", "none of the bundle's blocks", func(b *ledger.Bundle) { b.Records[2].Index = 99 }},
		{"records moved", "salt and envelope", func(b *ledger.Bundle) { b.Records[0].Index++ }},
		{"proof", "does not lead", func(b *ledger.Bundle) { b.Records[0].Proof[0][0] ^= 1 }},
		{"proof longer", "does not lead", func(b *ledger.Bundle) { b.Records[0].Proof = append(b.Records[0].Proof, b.Records[0].Proof[0]) }},
		{"header time", "header is not in the log", func(b *ledger.Bundle) { b.Blocks[0].Header.Time = b.Blocks[0].Header.Time.Add(time.Second) }},
		{"header's registry", "header is not in the log", func(b *ledger.Bundle) { b.Blocks[0].Header.Registry[0] ^= 1 }},
		{"header proof", "header is not in the log", func(b *ledger.Bundle) { b.Blocks[0].Proof = b.Blocks[1].Proof }},
		{"votes of two", "votes", func(b *ledger.Bundle) { b.Blocks[0].Votes = weak.Blocks[1].Votes }},
		{"votes of others", "votes", func(b *ledger.Bundle) {
			o := other.NewChain().Fill(2)
			b.Blocks[0].Votes = o.Blocks[1].Votes
		}},
		{"metadata", "votes", func(b *ledger.Bundle) { b.Blocks[0].Metadata = []byte("view 7") }},
		{"a validator left out", "left out", func(b *ledger.Bundle) {
			b.Blocks[0].Registry = slices.DeleteFunc(slices.Clone(b.Blocks[0].Registry), func(x identity.Excerpt) bool {
				return bytes.Contains(x.Entry, []byte("validator\n2\n"))
			})
		}},
		{"last validators left out", "all validators", func(b *ledger.Bundle) {
			b.Blocks[0].Registry = slices.DeleteFunc(slices.Clone(b.Blocks[0].Registry), func(x identity.Excerpt) bool {
				return bytes.Contains(x.Entry, []byte("validator\n3\n")) || bytes.Contains(x.Entry, []byte("validator\n4\n"))
			})
			b.Blocks[0].Votes = b.Blocks[0].Votes[:2]
		}},
		{"first validators left out", "all validators", func(b *ledger.Bundle) {
			b.Blocks[0].Registry = slices.DeleteFunc(slices.Clone(b.Blocks[0].Registry), func(x identity.Excerpt) bool {
				return bytes.Contains(x.Entry, []byte("validator\n1\n"))
			})
		}},
		{"signer left out", "do not hold key", func(b *ledger.Bundle) {
			b.Blocks[0].Registry = slices.DeleteFunc(slices.Clone(b.Blocks[0].Registry), func(x identity.Excerpt) bool {
				return bytes.Contains(x.Entry, []byte("device\n"))
			})
		}},
		{"registry entry", "registry excerpt", func(b *ledger.Bundle) {
			x := &b.Blocks[0].Registry[0]
			x.Entry = bytes.Replace(x.Entry, []byte("active"), []byte("Active"), 1)
		}},
		{"no record", "no record", func(b *ledger.Bundle) { b.Records, b.Blocks = nil, nil }},
		{"block without record", "no record of this block", func(b *ledger.Bundle) { b.Records = b.Records[:2] }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, _, b := evidence(t)
			tc.lie(b)
			r, err := ledger.VerifyBundle(b.Marshal(), p)
			if err == nil || r.Outcome != ledger.Fail || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %s, %v, want an error about %q", r.Outcome, err, tc.want)
			}
		})
	}
	// Records that validators should never have accepted are refused all the same.
	for _, tc := range []struct {
		name, want string
		record     ledgertest.Record
	}{
		{"signed by a stranger", "do not hold key", ledgertest.NewRecord(other.DeviceKey, identity.KindFrame, identity.Protobuf, command.Payload)},
		{"command signed by a device", "may not sign a command", ledgertest.NewRecord(d.DeviceKey, identity.KindCommand, identity.Protobuf, command.Payload)},
		{"frame that names another device", "names device", ledgertest.NewRecord(d.DeviceKey, identity.KindFrame, identity.JSON, []byte(`{"device":"rsu-J9"}`))},
		{"signature of other bytes", "signature", func() ledgertest.Record {
			e := command
			e.Signature = append([]byte(nil), e.Signature...)
			e.Signature[3] ^= 1
			return ledgertest.Record{Envelope: e.Marshal()}
		}()},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := d.NewChain()
			good := d.Frame(1, ledgertest.Start)
			c.Decide([]ledgertest.Record{good, tc.record})
			c.Decide()
			b := c.Bundle(1)
			b.Records = append(b.Records, ledger.BundleRecord{Index: 2, Salt: tc.record.Salt, Envelope: tc.record.Envelope})
			var err error
			if b.Records[1].Proof, err = ledger.Prove(c, c.Blocks[1].Header.Size, 2); err != nil {
				t.Fatal(err)
			}
			control, _ := c.Judged[0].Holder(identity.IDOf(publicKey(d.ControlKey)))
			device, _ := c.Judged[0].Holder(identity.IDOf(publicKey(d.DeviceKey)))
			if b.Blocks[0].Registry, err = ledger.Excerpts(c.Judged[0], []identity.Holder{control, device}); err != nil {
				t.Fatal(err)
			}
			r, err := ledger.VerifyBundle(b.Marshal(), p)
			if err == nil || r.Outcome != ledger.Fail || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), "record 2") {
				t.Errorf("got %s, %v, want an error about record 2 and %q", r.Outcome, err, tc.want)
			}
		})
	}
}

// TestRevokedSigner: the registry after the parent decides.
func TestRevokedSigner(t *testing.T) {
	d := ledgertest.New("revoke", 4)
	c := d.NewChain()
	c.Decide([]ledgertest.Record{d.Frame(1, ledgertest.Start), d.Change(identity.Change{Action: "revoke", Type: identity.TypeDevice, ID: ledgertest.Device, Nonce: 1})})
	c.Decide([]ledgertest.Record{d.Frame(2, ledgertest.Start)})
	c.Decide()
	p := policy(t, d.Policy)
	if r, err := ledger.VerifyBundle(c.Bundle(1, 2).Marshal(), p); err != nil {
		t.Errorf("frame and change of the block that revokes: got %s, %v, want pass", r.Outcome, err)
	}
	if r, err := ledger.VerifyBundle(c.Bundle(4).Marshal(), p); err == nil || !strings.Contains(err.Error(), "revoked at block 1") {
		t.Errorf("frame of the block after: got %s, %v, want revoked", r.Outcome, err)
	}
}

// TestEveryByteOfBundle flips each byte, in the archive and, with the archive
// made well-formed again, in each file.
func TestEveryByteOfBundle(t *testing.T) {
	d := ledgertest.New("bundle", 2)
	c := d.NewChain().Fill(2)
	raw := c.Bundle(1).Marshal()
	p := policy(t, d.Policy)
	n := 0
	check := func(b []byte, what, file string) {
		t.Helper()
		for _, trusted := range []*ledger.Policy{p, nil} {
			r, err := ledger.VerifyBundle(b, trusted)
			if err == nil || r.Outcome != ledger.Fail {
				t.Fatalf("%s: got %s, want fail", what, r.Outcome)
			}
			if file != "" && r.Findings[0].File != file {
				t.Fatalf("%s: located in %q, want %q", what, r.Findings[0].File, file)
			}
			if n++; n%8 != 0 {
				break // without a policy now and then: it is the same code
			}
		}
	}
	step := 1
	if testing.Short() || sparse {
		step = 17
	}
	for i := 0; i < len(raw); i += step {
		b := bytes.Clone(raw)
		b[i] ^= 1 << (i % 8)
		check(b, fmt.Sprintf("byte %d", i), "")
	}
	for i := 0; i < len(raw); i += 61 {
		check(raw[:i], fmt.Sprintf("cut at %d", i), "")
	}
	check(append(bytes.Clone(raw), 0), "a byte more", "")
	files, err := ledger.ReadZip(raw)
	if err != nil {
		t.Fatal(err)
	}
	for k := range files {
		data := files[k].Data
		for i := 0; i < len(data); i += step {
			files[k].Data = bytes.Clone(data)
			files[k].Data[i] ^= 1 << (i % 8)
			want := files[k].Name
			if want == "bundle.json" {
				want = "" // it may look as if a file that it names were wrong
			}
			check(ledger.WriteZip(files), fmt.Sprintf("%s byte %d", files[k].Name, i), want)
			// A careful forger makes the digests fit again; a hint may say what it
			// likes, and a name in it is not checked by anything.
			if k > 0 && files[k].Name != "policy" {
				check(ledger.WriteZip(ledger.Remanifest(files)), fmt.Sprintf("%s byte %d, digests made anew", files[k].Name, i), "")
			}
		}
		files[k].Data = data
	}
}

// TestHostileArchives: what a zip can do, and a bundle must not.
func TestHostileArchives(t *testing.T) {
	d := ledgertest.New("bundle", 4)
	c := d.NewChain().Fill(2)
	raw := c.Bundle(1).Marshal()
	p := policy(t, d.Policy)
	files, err := ledger.ReadZip(raw)
	if err != nil {
		t.Fatal(err)
	}
	with := func(f ...ledger.ZipFile) []byte {
		return ledger.WriteZip(ledger.Remanifest(append(slices.Clone(files), f...)))
	}
	deflated := func() []byte {
		var b bytes.Buffer
		w := zip.NewWriter(&b)
		f, err := w.Create("bundle.json")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write(make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}()
	many := make([]ledger.ZipFile, 30_000)
	for i := range many {
		many[i].Name = fmt.Sprint(i)
	}
	huge := bytes.Clone(raw)
	copy(huge[18:26], "\xff\xff\xff\xff\xff\xff\xff\xff") // sizes of the first file
	for _, tc := range []struct {
		name, want string
		b          []byte
	}{
		{"nothing", "no evidence bundle", ledger.WriteZip(nil)},
		{"no archive", "archive", []byte("PK")},
		{"empty", "archive", nil},
		{"compressed", "archive", deflated},
		{"many files", "more than", ledger.WriteZip(many)},
		{"size beyond the end", "cut within", huge},
		{"too large", "at most", make([]byte, ledger.MaxBundle+1)},
		{"unknown file", "no place", with(ledger.ZipFile{Name: "extra", Data: nil})},
		{"path upwards", "no place", with(ledger.ZipFile{Name: "../../etc/passwd", Data: nil})},
		{"path upwards in records", "no place", with(ledger.ZipFile{Name: "records/../envelope", Data: nil})},
		{"absolute path", "no place", with(ledger.ZipFile{Name: "/records/1/envelope", Data: nil})},
		{"file twice", "not here", with(files[2])},
		{"record twice", "each once", with(files[len(files)-3:]...)},
		{"number not canonical", "each once", with(ledger.ZipFile{Name: "records/01/envelope", Data: files[len(files)-3].Data})},
		{"file left out", "", ledger.WriteZip(ledger.Remanifest(files[:len(files)-1]))},
		{"order", "", ledger.WriteZip(ledger.Remanifest(append([]ledger.ZipFile{files[0], files[2], files[1]}, files[3:]...)))},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r, err := ledger.VerifyBundle(tc.b, p)
			if err == nil || r.Outcome != ledger.Fail || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %s, %v, want an error about %q", r.Outcome, err, tc.want)
			}
		})
	}
}

func FuzzVerifyBundle(f *testing.F) {
	d := ledgertest.New("bundle", 4)
	raw := d.NewChain().Fill(2).Bundle(1, 3).Marshal()
	files, err := ledger.ReadZip(raw)
	if err != nil {
		f.Fatal(err)
	}
	p := policy(f, d.Policy)
	f.Add(raw, 0, 0, byte(0))
	for i := range files {
		f.Add(raw, i, 10, byte(1))
	}
	f.Fuzz(func(t *testing.T, b []byte, file, at int, mask byte) {
		if r, err := ledger.VerifyBundle(b, p); err == nil {
			again, perr := ledger.ParseBundle(b)
			if r.Outcome != ledger.Pass || perr != nil || !bytes.Equal(again.Marshal(), b) {
				t.Errorf("got %s and %v, want a bundle that parses to itself", r.Outcome, perr)
			}
		}
		// One byte changed in one file of a true bundle, and digests made to fit.
		if file <= 0 || file >= len(files) || at < 0 || at >= len(files[file].Data) || mask == 0 || files[file].Name == "policy" {
			return
		}
		fs := slices.Clone(files)
		fs[file].Data = bytes.Clone(fs[file].Data)
		fs[file].Data[at] ^= mask
		if r, err := ledger.VerifyBundle(ledger.WriteZip(ledger.Remanifest(fs)), p); err == nil {
			t.Errorf("%s byte %d ^ %#x: got %s, want fail", fs[file].Name, at, mask, r.Outcome)
		}
	})
}

func BenchmarkVerifyBundle(b *testing.B) {
	d := ledgertest.New("bundle", 4)
	raw := d.NewChain().Fill(100).Bundle(1).Marshal()
	p := policy(b, d.Policy)
	for b.Loop() {
		if _, err := ledger.VerifyBundle(raw, p); err != nil {
			b.Fatal(err)
		}
	}
}

// TestGoldenBundle keeps the format: a bundle that verified once verifies for
// ever. Write it anew, if it must be, with STOPLINE_GOLDEN=1.
func TestGoldenBundle(t *testing.T) {
	d, _, b := evidence(t)
	raw := b.Marshal()
	for name, data := range map[string][]byte{"testdata/evidence.zip": raw, "testdata/policy": d.Policy} {
		if os.Getenv("STOPLINE_GOLDEN") != "" {
			if err := os.MkdirAll("testdata", 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(name, data, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, data) {
			t.Errorf("%s: the format has changed: %d bytes, want %d", name, len(data), len(got))
		}
	}
	golden, err := os.ReadFile("testdata/evidence.zip")
	if err != nil {
		t.Fatal(err)
	}
	if r, err := ledger.VerifyBundle(golden, policy(t, d.Policy)); err != nil {
		t.Errorf("got %s, %v, want pass", r.Outcome, err)
	}
}

// TestBundleOfAnImport: what somebody else than the controller brought in is
// theirs, and the bundle says so.
func TestBundleOfAnImport(t *testing.T) {
	d := ledgertest.New("import", 4)
	c := d.NewChain()
	c.Decide([]ledgertest.Record{d.FileImporter(1)})
	at := c.Decide([]ledgertest.Record{d.Import(ledgertest.Importer, 7, 1, ledgertest.Start)}).Header.PrevSize
	c.Decide([]ledgertest.Record{d.Frame(1, ledgertest.Start)})
	raw := c.Bundle(at + 1).Marshal()
	r, err := ledger.VerifyBundle(raw, policy(t, d.Policy))
	if err != nil || r.Outcome != ledger.Pass {
		t.Fatalf("got %s, %v, want pass", r.Outcome, err)
	}
	if got, want := r.Records[0].Signer, "service importer"; got != want {
		t.Errorf("signer: got %q, want %q", got, want)
	}
	want := `import 1 of run 7 by "importer": 1 events over 1000 ms of the controller that the log "2026-11-01.csv" calls "227"; the controller did not sign them`
	if got := r.Records[0].Claims.Summary; got != want {
		t.Errorf("summary: got %q, want %q", got, want)
	}
	const not = "whoever brought the log in signed it, the controller did not"
	z, err := zip.NewReader(bytes.NewReader(raw), int64(len(raw)))
	if err != nil {
		t.Fatal(err)
	}
	var statement []byte
	for _, f := range z.File {
		if f.Name == "statement.txt" {
			if in, err := f.Open(); err == nil {
				statement, err = io.ReadAll(in)
				if err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	for what, text := range map[string]string{"report": r.Text(), "statement": string(statement)} {
		if strings.Count(text, not) != 1 {
			t.Errorf("%s: want it to say once %q, got\n%s", what, not, text)
		}
	}
	at = c.Decide([]ledgertest.Record{d.Import("somebody", 7, 2, ledgertest.Start)}).Header.PrevSize
	c.Decide([]ledgertest.Record{d.Frame(2, ledgertest.Start)})
	if r, err := ledger.VerifyBundle(c.Bundle(at+1).Marshal(), policy(t, d.Policy)); err == nil || !strings.Contains(err.Error(), "names importer") {
		t.Errorf("an import that names another importer: got %s, %v, want a failure", r.Outcome, err)
	}
	_, _, b := evidence(t)
	if r, _ := ledger.VerifyBundle(b.Marshal(), nil); strings.Contains(r.Text(), not) {
		t.Errorf("a bundle without an import says %q", not)
	}
}
