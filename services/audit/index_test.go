package audit

import (
	"bytes"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

func second(n int) time.Time { return ledgertest.Start.Add(time.Duration(n) * time.Second) }

// morning returns a chain in which junction J1 runs: each second a frame, a
// command on it, and the next frame reports it; the fourth command is refused.
func morning(t testing.TB, seconds int) (*ledgertest.District, *ledgertest.Chain) {
	t.Helper()
	d := ledgertest.New("morning", 4)
	c := d.NewChain()
	before := d.FrameAfter(nil, 1, 1, second(1))
	c.Decide([]ledgertest.Record{before})
	for n := 1; n < seconds; n++ {
		reason := ""
		if n == 4 {
			reason = "interlock: stage 1 conflicts"
		}
		command := d.CommandOn(uint64(n), uint64(n), 1, uint64(n), second(n).Add(300*time.Millisecond))
		before = d.FrameWith(&before, 1, uint64(n+1), second(n+1), ledgertest.Showed("G", uint64(n), reason))
		c.Decide([]ledgertest.Record{command, before})
	}
	c.Decide()
	return d, c
}

func dump(t testing.TB, s *Service) string {
	t.Helper()
	var b bytes.Buffer
	if err := s.index.dump(t.Context(), &b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestRebuild: an index that grew with the folder, in whatever steps, one that was
// left and taken up again, and one made at once are the same, row by row; so is one
// whose file was destroyed.
func TestRebuild(t *testing.T) {
	d, c := morning(t, 12)
	c.Decide([]ledgertest.Record{d.FileImporter(1)})
	c.Decide([]ledgertest.Record{d.Import(ledgertest.Importer, 7, 1, second(20)), d.Change(identity.Change{Action: identity.Revoke, Type: identity.TypeDevice, ID: ledgertest.Device, Nonce: 2})})
	c.Decide()
	n := len(c.Blocks)
	whole := t.TempDir()
	write(t, whole, c, n)
	want := dump(t, service(t, config(d, whole)))
	if got := strings.Count(want, "\n"); got < 50 || !strings.Contains(want, "outcome") || !strings.Contains(want, `rule="revoke device"`) {
		t.Fatalf("dump of %d lines:\n%s", got, want)
	}

	dir := t.TempDir()
	short := *c
	for _, k := range []int{1, 4, 5, n} { // opened anew each time
		short.Blocks = c.Blocks[:k]
		write(t, dir, &short, k)
		s, err := New(config(d, dir))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Refresh(); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	s := service(t, config(d, dir))
	if got := dump(t, s); got != want {
		t.Errorf("grown in steps: got\n%s\nwant\n%s", got, want)
	}
	// By name.
	if err := s.Rebuild(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := dump(t, s); got != want {
		t.Errorf("rebuilt: got\n%s\nwant\n%s", got, want)
	}
	if _, err := s.Evidence(t.Context(), 3); err != nil {
		t.Errorf("evidence after rebuilding: %v", err)
	}
	// Of a damaged file.
	file := filepath.Join(whole, indexFile)
	for _, damage := range []func() error{
		func() error { return os.WriteFile(file, []byte("this is no database, and never was one"), 0o644) },
		func() error { return os.Remove(file) },
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(file + "-wal"); err != nil {
			t.Fatal(err)
		}
		again, err := New(config(d, whole))
		if err != nil {
			t.Fatal(err)
		}
		if got := dump(t, again); got != want {
			t.Errorf("made anew: got\n%s\nwant\n%s", got, want)
		}
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTwoWriters: two that follow one folder into one index do not get in each
// other's way.
func TestTwoWriters(t *testing.T) {
	d, c := morning(t, 9)
	dir := t.TempDir()
	write(t, dir, c, 3)
	quiet := config(d, dir)
	quiet.Quiet = true
	one, two := service(t, config(d, dir)), service(t, quiet)
	write(t, dir, c, len(c.Blocks))
	for _, s := range []*Service{two, one} {
		if err := s.Refresh(); err != nil {
			t.Fatal(err)
		}
	}
	if a, b := dump(t, one), dump(t, two); a != b || one.Metrics().Blocks != uint64(len(c.Blocks)) {
		t.Errorf("got %+v and %+v, want the same", one.Metrics(), two.Metrics())
	}
	if one.Metrics().Verified <= two.Metrics().Verified {
		t.Errorf("got %+v and %+v, want that the quiet one verifies nothing", one.Metrics(), two.Metrics())
	}
}

func TestQuery(t *testing.T) {
	d, c := morning(t, 12)
	dir := t.TempDir()
	write(t, dir, c, len(c.Blocks))
	s := service(t, config(d, dir))
	seq := func(n uint64) *uint64 { return &n }
	for _, tc := range []struct {
		name  string
		q     Query
		count int
		first string // kind and sequence of the first
	}{
		{"everything", Query{}, 23, "frame 12"},
		{"oldest first", Query{Oldest: true}, 23, "frame 1"},
		{"commands", Query{Kind: identity.KindCommand}, 11, "command 11"},
		{"junction", Query{Junction: ledgertest.Junction}, 23, "frame 12"},
		{"another junction", Query{Junction: "J2"}, 0, ""},
		{"device", Query{Device: ledgertest.Device}, 12, "frame 12"},
		{"signer", Query{Signer: "service " + ledgertest.Control}, 11, "command 11"},
		{"class", Query{Class: "control"}, 11, "command 11"},
		{"sequence of a device", Query{Device: ledgertest.Device, Seq: seq(5)}, 1, "frame 5"},
		{"time", Query{From: second(3), To: second(5)}, 4, "command 4"},
		{"time, junction, kind", Query{Junction: ledgertest.Junction, Kind: identity.KindFrame, From: second(3), To: second(5)}, 2, "frame 4"},
		{"block", Query{Height: 4}, 2, "frame 4"},
		{"policy version", Query{Policy: "day", PolicyVersion: "1"}, 11, "command 11"},
		{"policy version that is not", Query{PolicyVersion: "2"}, 0, ""},
		{"controller at a junction", Query{Controller: "actuated", Junction: ledgertest.Junction}, 11, "command 11"},
		{"rule", Query{Rule: "extend green: vehicle present"}, 11, "command 11"},
		{"refused", Query{Outcome: Refused}, 1, "command 4"},
		{"applied", Query{Outcome: Applied}, 10, "command 11"},
		{"case", Query{Case: "none"}, 0, ""},
		{"requester", Query{Requester: "none", Case: "none"}, 0, ""},
		{"a kind that there is not", Query{Kind: identity.KindRegistry}, 0, ""},
		{"held", Query{State: Held}, 23, "frame 12"},
		{"let go", Query{State: Gone}, 0, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p, err := s.Query(t.Context(), tc.q)
			if err != nil {
				t.Fatal(err)
			}
			if len(p.Records) != tc.count || p.Next != "" {
				t.Fatalf("got %d records, want %d", len(p.Records), tc.count)
			}
			if tc.count > 0 {
				if got := fmt.Sprintf("%s %d", p.Records[0].Kind, p.Records[0].Seq); got != tc.first {
					t.Errorf("got %q first, want %q", got, tc.first)
				}
			}
			// Page by page it is the same.
			for limit := 1; limit < 8; limit += 3 {
				q := tc.q
				q.Limit = limit
				var got []Record
				for {
					page, err := s.Query(t.Context(), q)
					if err != nil {
						t.Fatal(err)
					}
					if len(page.Records) > limit {
						t.Fatalf("got a page of %d, want at most %d", len(page.Records), limit)
					}
					got = append(got, page.Records...)
					if q.After = page.Next; q.After == "" {
						break
					}
				}
				a, _ := json.Marshal(got)
				b, _ := json.Marshal(p.Records)
				if len(got) != len(p.Records) || len(got) > 0 && !bytes.Equal(a, b) {
					t.Errorf("pages of %d: got %d records, want the %d in their order", limit, len(got), len(p.Records))
				}
			}
		})
	}
	r := s.Find(identity.KindCommand, "", 20)[7]
	want := CommandInfo{Stage: 1, RestsHeight: 4, RestsOn: traffic.FrameKey{Device: ledgertest.Device, BootEpoch: 1, Seq: 4},
		Policy: "day", PolicyVersion: "1", Controller: "actuated", ControllerVersion: "1", Outcome: Refused, Reason: "interlock: stage 1 conflicts", ReportedBy: 13}
	if r.Command == nil || *r.Command != want {
		t.Errorf("command 4: got %+v, want %+v", r.Command, want)
	}
	for _, q := range []Query{{Kind: "nonsense"}, {Limit: -1}, {Limit: MaxPage + 1}, {Outcome: "maybe"}, {State: "lost"}, {After: "!"}, {After: "e30x"},
		{From: second(2), To: second(2)}, {Rule: strings.Repeat("x", 513)}} {
		if _, err := s.Query(t.Context(), q); kind.Of(err) != kind.Invalid {
			t.Errorf("%+v: got %v, want it refused as invalid", q, err)
		}
	}
}

// TestWhyAt: the question for which the index is there.
func TestWhyAt(t *testing.T) {
	d, c := morning(t, 12)
	dir := t.TempDir()
	write(t, dir, c, len(c.Blocks))
	s := service(t, config(d, dir))
	policy, err := ledger.ParsePolicy(d.Policy)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		at    time.Time
		steps string // role, kind and sequence of each
		says  string
		lacks int
	}{
		{second(8).Add(time.Millisecond), "reading frame 7, decision command 7, response frame 8", `stage 1, because "extend green: vehicle present" (controller actuated 1, policy day 1), resting on block 7; the junction applied it`, 0},
		{second(7).Add(999 * time.Millisecond), "reading frame 7, decision command 7, response frame 8", "newest command to J1 was number 7 of 08:00:07.300", 0},
		// The fourth was refused: the third was in force.
		{second(5).Add(time.Millisecond), "reading frame 3, decision command 3, response frame 4, lamps frame 5", "number 3", 0},
		{second(1).Add(time.Millisecond), "lamps frame 1", "ran its own plan", 1},
		{second(100), "reading frame 11, decision command 11, response frame 12", "number 11", 0},
	} {
		c, err := s.Chain(t.Context(), ledgertest.Junction, tc.at)
		if err != nil {
			t.Fatalf("%v: %v", tc.at, err)
		}
		var got []string
		for _, st := range c.Steps {
			got = append(got, fmt.Sprintf("%s %s %d", st.Role, st.Kind, st.Seq))
			if st.Says == "" || st.Evidence != fmt.Sprintf("/v1/evidence/%d", st.Index) || st.Kind == identity.KindFrame && st.Signal == nil {
				t.Errorf("%v: step %+v lacks what it says", tc.at, st)
			}
		}
		if strings.Join(got, ", ") != tc.steps || !strings.Contains(c.Summary, tc.says) || len(c.Missing) != tc.lacks || !c.Provable {
			t.Errorf("%v: got %q, %q, missing %q, want %q and %q", tc.at, got, c.Summary, c.Missing, tc.steps, tc.says)
		}
		b, err := s.ChainBundle(t.Context(), c)
		if err != nil {
			t.Fatalf("%v: %v", tc.at, err)
		}
		r, err := ledger.VerifyBundle(b, policy)
		if err != nil || len(r.Records) < len(c.Steps) {
			t.Errorf("%v: bundle: got %v with %d records, want %d", tc.at, err, len(r.Records), len(c.Steps))
		}
		if len(c.Steps) > 2 && len(r.Unbroken) != 1 {
			t.Errorf("%v: bundle: got %v, want the claim that no frame is left out", tc.at, r.Unbroken)
		}
	}
	if c, err := s.Chain(t.Context(), ledgertest.Junction, second(5).Add(time.Millisecond)); err != nil || len(c.Refused) != 1 || c.Refused[0].Seq != 4 {
		t.Errorf("refused commands: got %+v, %v, want number 4", c, err)
	}
	for _, tc := range []struct {
		j    traffic.JunctionID
		at   time.Time
		want kind.Kind
	}{{"J2", second(5), kind.NotFound}, {ledgertest.Junction, second(0), kind.NotFound}, {"", second(5), kind.Invalid}, {"J1", time.Time{}, kind.Invalid}} {
		if _, err := s.Chain(t.Context(), tc.j, tc.at); kind.Of(err) != tc.want {
			t.Errorf("%s at %v: got %v, want kind %v", tc.j, tc.at, err, tc.want)
		}
	}
	b, err := s.UnbrokenBundle(t.Context(), ledgertest.Device, s.leaf(t, "frame", 2), s.leaf(t, "frame", 9))
	if err != nil {
		t.Fatal(err)
	}
	if r, err := ledger.VerifyBundle(b, policy); err != nil || len(r.Records) != 8 || len(r.Unbroken) != 1 {
		t.Errorf("frames 2 to 9: got %v and %d records, want 8", err, len(r.Records))
	}
	for _, indexes := range [][]uint64{{s.leaf(t, "frame", 2)}, {s.leaf(t, "command", 2), s.leaf(t, "command", 3)}} {
		if _, err := s.UnbrokenBundle(t.Context(), ledgertest.Device, indexes...); kind.Of(err) != kind.Invalid {
			t.Errorf("unbroken %v: got %v, want it refused as invalid", indexes, err)
		}
	}
}

// leaf returns the index of a record of junction J1 by its kind and sequence.
func (s *Service) leaf(t testing.TB, k identity.RecordKind, seq uint64) uint64 {
	t.Helper()
	p, err := s.Query(t.Context(), Query{Kind: k, Junction: ledgertest.Junction, Seq: &seq})
	if err != nil || len(p.Records) != 1 {
		t.Fatalf("%s %d: got %d records, %v, want one", k, seq, len(p.Records), err)
	}
	return p.Records[0].Index
}

// TestQueriesUseIndexes: no query that people ask scans the table of records.
func TestQueriesUseIndexes(t *testing.T) {
	x, _, err := openIndex(t.Context(), filepath.Join(t.TempDir(), "index.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := x.close(); err != nil {
			t.Error(err)
		}
	}()
	for _, q := range []Query{
		{Junction: "J"}, {Junction: "J", From: second(1), To: second(2)}, {Device: "D", Seq: new(uint64)}, {Kind: identity.KindRegistry},
		{Case: "c"}, {Requester: "r"}, {Policy: "p", PolicyVersion: "v"}, {Height: 3}, {State: Gone}, {From: second(1), To: second(2)}, {},
	} {
		st, args, err := q.statement()
		if err != nil {
			t.Fatal(err)
		}
		plan := explain(t, x.r, "EXPLAIN QUERY PLAN "+st, args...)
		for _, line := range strings.Split(plan, "\n") {
			// A scan along an index ends with the page; one without reads everything.
			if strings.Contains(line, "SCAN k") && !strings.Contains(line, "USING INDEX") && !strings.Contains(line, "USING COVERING INDEX") {
				t.Errorf("%+v: scans records:\n%s", q, plan)
			}
		}
	}
}

func explain(t testing.TB, db *sql.DB, st string, args ...any) string {
	t.Helper()
	rows, err := db.QueryContext(t.Context(), st, args...)
	if err != nil {
		t.Fatalf("%s: %v", st, err)
	}
	defer func() {
		if err := rows.Close(); err != nil {
			t.Error(err)
		}
	}()
	var out []string
	for rows.Next() {
		var id, parent, unused int
		var detail string
		if err := rows.Scan(&id, &parent, &unused, &detail); err != nil {
			t.Fatal(err)
		}
		out = append(out, detail)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return strings.Join(out, "\n")
}

// TestDialects: the scripts hold no type or word that only one of the databases
// knows, and parameters are numbered where they must be.
func TestDialects(t *testing.T) {
	for _, d := range []dialect{sqliteDialect, postgresDialect} {
		scripts, err := d.migrations()
		if err != nil || len(scripts) == 0 {
			t.Fatalf("%s: got %d scripts, %v", d.driver, len(scripts), err)
		}
		for i, s := range scripts {
			for line := range strings.Lines(s) {
				line, _, _ = strings.Cut(line, "--")
				if strings.ContainsAny(line, "{}`\"[]") {
					t.Errorf("%s: script %d: %q has something that was not replaced or is of one dialect", d.driver, i+1, line)
				}
				for _, word := range []string{"AUTOINCREMENT", "WITHOUT ROWID", "SERIAL", "PRAGMA", "REPLACE", "STRICT", "BIGSERIAL"} {
					if strings.Contains(strings.ToUpper(line), word) {
						t.Errorf("%s: script %d: %q uses %s", d.driver, i+1, line, word)
					}
				}
			}
		}
	}
	if got, want := postgresDialect.sql("a = ? AND b = ?"), "a = $1 AND b = $2"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := sqliteDialect.sql("a = ?"); got != "a = ?" {
		t.Errorf("got %q", got)
	}
}

// TestForget: what is taken out of the index is in none of its files.
func TestForget(t *testing.T) {
	d, c := morning(t, 6)
	dir := t.TempDir()
	write(t, dir, c, len(c.Blocks))
	s := service(t, config(d, dir))
	secret := []byte("interlock: stage 1 conflicts")
	holds := func() bool {
		found := false
		for _, suffix := range []string{"", "-wal", "-shm"} {
			b, err := os.ReadFile(filepath.Join(dir, indexFile) + suffix)
			if err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
			found = found || bytes.Contains(b, secret)
		}
		return found
	}
	if !holds() {
		t.Fatal("the reason is not in the index to begin with")
	}
	i := s.leaf(t, "frame", 5) // reports the fourth command
	if err := errors.Join(s.index.forget(t.Context(), Redacted, "", i, i), s.index.truncateLog(t.Context())); err != nil {
		t.Fatal(err)
	}
	if holds() {
		t.Error("the reason is still in a file of the index")
	}
	p, err := s.Query(t.Context(), Query{State: Redacted})
	if err != nil || len(p.Records) != 1 || p.Records[0].Index != i || p.Records[0].Kind != "" || p.Records[0].Device != "" || p.Records[0].Provable {
		t.Errorf("got %+v, %v, want one empty record", p.Records, err)
	}
	if _, err := s.Chain(t.Context(), ledgertest.Junction, second(5)); err != nil {
		t.Error(err)
	}
}
