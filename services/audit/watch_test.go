package audit

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
	"google.golang.org/protobuf/proto"
)

// watched returns a configuration in which what is missing is an alarm soon.
func watched(d *ledgertest.District, dir string) Config {
	c := config(d, dir)
	c.Patience, c.Poll = 100*time.Millisecond, 10*time.Millisecond
	return c
}

// alarms looks until an alarm with a rule stands, and returns all that stand.
func alarms(t testing.TB, s *Service, rule string) []Alarm {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		_ = s.Refresh() // its error is an alarm as well
		as := s.Alarms()
		if slices.ContainsFunc(as, func(a Alarm) bool { return a.Rule == rule }) {
			return as
		}
	}
	t.Fatalf("waited in vain for the alarm %q; there are %+v", rule, s.Alarms())
	return nil
}

// calm looks for longer than patience lasts, and wants no alarm ever raised.
func calm(t testing.TB, s *Service) {
	t.Helper()
	for end := time.Now().Add(3 * s.c.Patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if err := s.Refresh(); err != nil {
			t.Fatal(err)
		}
	}
	all, err := s.AlarmHistory()
	if err != nil || len(all) > 0 {
		t.Fatalf("got the alarms %+v, %v, want none", all, err)
	}
}

func verified(t testing.TB, s *Service, want uint64) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if err := s.Refresh(); err != nil {
			t.Fatal(err)
		}
		if s.Metrics().Verified == want {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("got %+v, want the checkpoint of size %d verified", s.Metrics(), want)
		}
	}
}

// grow writes a folder as it grows, block by block.
func grow(t testing.TB, dir string, c *ledgertest.Chain, from, to int, each func(n int)) {
	t.Helper()
	part := *c
	for n := from; n <= to; n++ {
		part.Blocks = c.Blocks[:n]
		write(t, dir, &part, n)
		if each != nil {
			each(n)
		}
	}
}

// fork returns two chains of one district that part after n blocks: all its keys
// sign both.
func fork(seed string, n, more int) (d *ledgertest.District, a, b *ledgertest.Chain) {
	d = ledgertest.New(seed, 4)
	a, b = d.NewChain().Fill(n), d.NewChain().Fill(n)
	a.Decide([]ledgertest.Record{d.Frame(5001, second(n+1))})
	b.Decide([]ledgertest.Record{d.Frame(6001, second(n+1))})
	return d, a.Fill(more), b.Fill(more)
}

// replace puts another data folder in the place of one, but for what audit keeps.
func replace(t testing.TB, dir string, c *ledgertest.Chain, sealed int) {
	t.Helper()
	for _, name := range []string{"log", "payload"} {
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	write(t, dir, c, sealed)
}

func TestHonestLogIsCalm(t *testing.T) {
	d := ledgertest.New("calm", 4)
	c := d.NewChain().Fill(24)
	dir := t.TempDir()
	s := service(t, watched(d, dir))
	calm(t, s) // nothing there yet
	s.c.Patience = maxPatience
	grow(t, dir, c, 1, 24, func(int) {
		if err := s.Refresh(); err != nil {
			t.Fatal(err)
		}
	})
	verified(t, s, c.Blocks[23].Header.Size)
	for _, n := range []int{3, 10, 24} {
		if v, err := s.Saw("neighbour", c.Seal(c.Blocks[n-1])); err != nil || v != Consistent {
			t.Errorf("a neighbour's checkpoint of block %d: got %s, %v, want consistent", n, v, err)
		}
	}
	s.c.Patience = 100 * time.Millisecond
	calm(t, s)
	// Opened anew it goes on from what it kept.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	c.Fill(5)
	write(t, dir, c, 29)
	again, err := New(watched(d, dir))
	if err != nil {
		t.Fatal(err)
	}
	verified(t, again, c.Blocks[28].Header.Size)
	calm(t, again)
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestHonestChangesOfMembers: one validator joins, another leaves; checkpoints of
// all sets are taken, in order and as others saw them.
func TestHonestChangesOfMembers(t *testing.T) {
	d := ledgertest.New("members", 4)
	c := d.NewChain().Fill(3)
	c.Decide([]ledgertest.Record{d.Join(1)})
	c.Voters = append(c.Voters, 4)
	c.Fill(3)
	c.Decide([]ledgertest.Record{d.Leave(0, 2)})
	c.Voters = []int{1, 2, 3, 4}
	c.Fill(4)
	dir := t.TempDir()
	s := service(t, watched(d, dir))
	s.c.Patience = maxPatience // while it grows, however slow this machine is
	n := len(c.Blocks)
	var notes [][]byte
	for _, b := range c.Blocks {
		note := c.Folder(int(b.Header.Height))["log/checkpoint"]
		notes = append(notes, note)
	}
	grow(t, dir, c, 1, n, func(k int) {
		// Others are ahead of what is here, also by a set that is not known yet.
		if k+1 < n {
			if v, err := s.Saw(fmt.Sprint("other ", k), notes[k]); err != nil && kind.Of(err) != kind.Invalid || v == Forked {
				t.Errorf("block %d: got %s, %v", k+1, v, err)
			}
		}
		if err := s.Refresh(); err != nil {
			t.Fatal(err)
		}
	})
	verified(t, s, c.Blocks[n-1].Header.Size)
	for i, note := range notes {
		if v, err := s.Saw("other", note); err != nil || v != Consistent {
			t.Errorf("block %d: got %s, %v, want consistent", i+1, v, err)
		}
	}
	s.c.Patience = 100 * time.Millisecond
	calm(t, s)
}

// TestForkedFolder: the log was replaced by another with all signatures.
func TestForkedFolder(t *testing.T) {
	for _, running := range []bool{true, false} {
		d, a, b := fork("forked", 5, 4)
		dir := t.TempDir()
		write(t, dir, a, 10)
		s := service(t, watched(d, dir))
		verified(t, s, a.Blocks[9].Header.Size)
		if !running {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		}
		b.Fill(3)
		replace(t, dir, b, 13)
		if !running {
			s = service(t, watched(d, dir))
		}
		as := alarms(t, s, Fork)
		if as[0].Detail == "" || as[0].Since.IsZero() {
			t.Errorf("running %v: got %+v, want a detail and a time", running, as)
		}
	}
}

// TestForkSeenByOthers: two checkpoints of one size; the proof convicts by the
// policy alone.
func TestForkSeenByOthers(t *testing.T) {
	d, a, b := fork("seen", 5, 4)
	dir := t.TempDir()
	write(t, dir, a, 10)
	cfg := watched(d, dir)
	s := service(t, cfg)
	verified(t, s, a.Blocks[9].Header.Size)
	if v, err := s.Saw("neighbour", b.Seal(b.Blocks[3])); err != nil || v != Consistent {
		t.Errorf("before the fork: got %s, %v, want consistent", v, err)
	}
	if v, err := s.Saw("neighbour", b.Seal(b.Blocks[7])); err != nil || v != Forked {
		t.Errorf("after the fork: got %s, %v, want fork", v, err)
	}
	as := s.Alarms()
	if len(as) != 1 || as[0].Rule != Fork || as[0].Evidence == "" {
		t.Fatalf("got %+v, want one fork with evidence", as)
	}
	doc, err := os.ReadFile(filepath.Join(dir, "audit", as[0].Evidence))
	if err != nil {
		t.Fatal(err)
	}
	acc, err := ledger.ParseAccusation(doc)
	if err != nil {
		t.Fatal(err)
	}
	policy, err := ledger.ParsePolicy(d.Policy)
	if err != nil {
		t.Fatal(err)
	}
	if j, err := acc.Judge(ledger.Trust{Policy: policy}); err != nil || j.Outcome != ledger.Pass {
		t.Errorf("the evidence: got %s, %v, want that it holds", j.Outcome, err)
	}
	// It stands, also for who comes later, until somebody has looked at it.
	if err := s.Refresh(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if as := service(t, cfg).Alarms(); len(as) != 1 || as[0].Rule != Fork {
		t.Errorf("opened anew: got %+v, want the fork", as)
	}
}

// TestForkAhead: a neighbour saw the other branch before our own was as long.
func TestForkAhead(t *testing.T) {
	d, a, b := fork("ahead", 5, 4)
	dir := t.TempDir()
	write(t, dir, a, 5)
	short := *a
	short.Blocks = a.Blocks[:5]
	replace(t, dir, &short, 5)
	cfg := watched(d, dir)
	cfg.Patience = 30 * time.Second
	s := service(t, cfg)
	if v, err := s.Saw("neighbour", b.Seal(b.Blocks[7])); err != nil || v != Ahead {
		t.Fatalf("got %s, %v, want ahead", v, err)
	}
	if err := s.Refresh(); err != nil || len(s.Alarms()) != 0 {
		t.Fatalf("got %+v, %v, want no alarm yet", s.Alarms(), err)
	}
	grow(t, dir, a, 6, 10, nil)
	alarms(t, s, Fork)
}

// TestRolledBackFolder: an older state of the folder, as from a backup.
func TestRolledBackFolder(t *testing.T) {
	for _, running := range []bool{true, false} {
		d := ledgertest.New("rolled", 4)
		c := d.NewChain().Fill(10)
		dir := t.TempDir()
		write(t, dir, c, 10)
		cfg := watched(d, dir)
		cfg.Memory = t.TempDir() // elsewhere, so that it is not set back, too
		s := service(t, cfg)
		verified(t, s, c.Blocks[9].Header.Size)
		if !running {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if err := os.RemoveAll(filepath.Join(dir, "audit")); err != nil {
				t.Fatal(err)
			}
		}
		old := *c
		old.Blocks = c.Blocks[:6]
		replace(t, dir, &old, 6)
		if !running {
			s = service(t, cfg)
		}
		if as := alarms(t, s, RollBack); !strings.Contains(fmt.Sprint(as), "was seen") {
			t.Errorf("running %v: got %+v", running, as)
		}
		// Made whole again, it clears.
		replace(t, dir, c, 10)
		for end := time.Now().Add(20 * time.Second); len(s.Alarms()) > 0; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("running %v: got %+v, want that it clears", running, s.Alarms())
			}
			_ = s.Refresh()
		}
	}
}

// TestOnlyTheCheckpointRolledBack: an older checkpoint is served than was.
func TestOnlyTheCheckpointRolledBack(t *testing.T) {
	d := ledgertest.New("served", 4)
	c := d.NewChain().Fill(6)
	dir := t.TempDir()
	write(t, dir, c, 6)
	s := service(t, watched(d, dir))
	verified(t, s, c.Blocks[5].Header.Size)
	if err := os.WriteFile(filepath.Join(dir, "log/checkpoint"), c.Seal(c.Blocks[3]), 0o644); err != nil {
		t.Fatal(err)
	}
	alarms(t, s, RollBack)
}

// TestWithheldStretch: what is sealed is not here, in each way.
func TestWithheldStretch(t *testing.T) {
	d := ledgertest.New("withheld", 4)
	c := d.NewChain().Fill(70)
	last := c.Blocks[69]
	full := c.Folder(70)
	part := *c
	part.Blocks = c.Blocks[:40]
	short := part.Folder(40)
	replaced := func(t *testing.T, dir string) {
		for _, name := range []string{"log", "payload"} {
			if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		lay(t, dir, short)
	}
	remove := func(names ...string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			for _, name := range names {
				if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	for i, tc := range []struct {
		name, rule string
		before     func(t *testing.T, dir string) // what is withheld from a folder of 70 blocks
		saw        []byte
	}{
		{"blocks at the end", Missing, func(t *testing.T, dir string) {
			replaced(t, dir)
			for name, b := range full {
				if strings.HasPrefix(name, "log/checkpoint") {
					path := filepath.Join(dir, name)
					if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
						t.Fatal(err)
					}
					if err := os.WriteFile(path, b, 0o644); err != nil {
						t.Fatal(err)
					}
				}
			}
		}, nil},
		{"everything after a block, others saw more", Missing, replaced, c.Seal(last)},
		{"a full tile", Missing, remove("log/tile/entries/000"), nil},
		{"a partial tile", Missing, remove("log/tile/0/001.p"), nil},
		{"a segment of the journal", Damage, remove("log/blocks/00000000000000000008.seg"), nil},
		{"payloads in the middle", Damage, remove("payload/record/00000000000000000012.seg"), nil},
		{"the served checkpoint", "", remove("log/checkpoint"), nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if testing.Short() && i%3 != 0 {
				t.Skip("some of them")
			}
			dir := t.TempDir()
			lay(t, dir, full)
			tc.before(t, dir)
			s := service(t, watched(d, dir))
			if tc.saw != nil {
				if v, err := s.Saw("neighbour", tc.saw); err != nil || v != Ahead {
					t.Fatalf("got %s, %v, want ahead", v, err)
				}
			}
			if tc.rule == "" { // nothing was verified before, and history says it all
				verified(t, s, last.Header.Size)
				alarms(t, s, Missing)
				return
			}
			alarms(t, s, tc.rule)
		})
	}
}

// TestStretchThatComesLate is no alarm.
func TestStretchThatComesLate(t *testing.T) {
	d := ledgertest.New("late", 4)
	c := d.NewChain().Fill(9)
	dir := t.TempDir()
	short := *c
	short.Blocks = c.Blocks[:5]
	write(t, dir, &short, 5)
	cfg := watched(d, dir)
	cfg.Patience = 30 * time.Second
	s := service(t, cfg)
	if v, err := s.Saw("neighbour", c.Seal(c.Blocks[8])); err != nil || v != Ahead {
		t.Fatalf("got %s, %v, want ahead", v, err)
	}
	grow(t, dir, c, 6, 9, nil)
	verified(t, s, c.Blocks[8].Header.Size)
	if all, err := s.AlarmHistory(); err != nil || len(all) != 0 {
		t.Errorf("got %+v, %v, want no alarm", all, err)
	}
	s.watch.mu.Lock()
	defer s.watch.mu.Unlock()
	if len(s.watch.pending) != 0 {
		t.Errorf("got %d still waiting, want none", len(s.watch.pending))
	}
}

// TestChangedFiles: bytes that were changed, and a checkpoint without a quorum.
func TestChangedFiles(t *testing.T) {
	d := ledgertest.New("changed", 4)
	c := d.NewChain().Fill(70)
	weak := *c
	weak.Blocks = slices.Clone(c.Blocks)
	b := *c.Blocks[69]
	b.Voters = []int{0, 1} // who cosign its checkpoint
	weak.Blocks[69] = &b
	whole, lacking := c.Folder(70), weak.Folder(70)
	for i, tc := range []struct {
		name, file, rule string
		files            map[string][]byte
	}{
		{"a full tile", "log/tile/0/000", Damage, whole},
		{"a partial tile", "log/tile/1/000.p/1", Damage, whole},
		{"entries", "log/tile/entries/000", Damage, whole},
		{"the journal", "log/blocks/00000000000000000012.seg", Damage, whole},
		{"the served checkpoint", "log/checkpoint", Unsigned, whole},
		{"a checkpoint by two of four", "", Damage, lacking},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if testing.Short() && i%3 != 0 {
				t.Skip("some of them")
			}
			dir := t.TempDir()
			lay(t, dir, tc.files)
			if tc.file != "" {
				path := filepath.Join(dir, tc.file)
				raw, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				raw[len(raw)-20] ^= 1
				if err := os.WriteFile(path, raw, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			alarms(t, service(t, watched(d, dir)), tc.rule)
		})
	}
}

func TestStrangersCheckpointsSayNothing(t *testing.T) {
	d := ledgertest.New("strangers", 4)
	c := d.NewChain().Fill(5)
	dir := t.TempDir()
	write(t, dir, c, 5)
	s := service(t, watched(d, dir))
	other := ledgertest.New("forger", 4).NewChain().Fill(9)
	c.Voters = []int{0, 1}
	for name, note := range map[string][]byte{"forger": other.Seal(other.Blocks[8]), "two of four": c.Seal(c.Blocks[2]), "rubbish": []byte("x"), "empty": nil} {
		if v, err := s.Saw("somebody", note); kind.Of(err) != kind.Invalid {
			t.Errorf("%s: got %s, %v, want it refused as invalid", name, v, err)
		}
	}
	calm(t, s)
	if m := s.Metrics(); m.Strange != 4 || m.Seen != 0 {
		t.Errorf("got %+v, want 4 refused", m)
	}
}

// TestAlarmIsTold: on the subject, as a metric, over HTTP; and the checkpoints of
// others are heard on theirs.
func TestAlarmIsTold(t *testing.T) {
	d, a, b := fork("told", 5, 4)
	dir := t.TempDir()
	write(t, dir, a, 10)
	nc := servicetest.District(t, d.ID)
	cfg := watched(d, dir)
	cfg.Bus, cfg.Logger = nc, servicetest.Logger(t)
	heard := make(chan Alarm, 16)
	stop, err := nc.Listen(topic.Alarm(d.ID), "", func(m *nats.Msg) {
		var a Alarm
		if err := json.Unmarshal(m.Data, &a); err != nil {
			t.Error(err)
		}
		heard <- a
	})
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	s := service(t, cfg)
	verified(t, s, a.Blocks[9].Header.Size)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	seal, err := proto.Marshal(&pb.Seal{Height: 8, Size: b.Blocks[7].Header.Size, Checkpoint: b.Seal(b.Blocks[7])})
	if err != nil {
		t.Fatal(err)
	}
	tell := map[string][]byte{topic.Seen(d.ID, "harbour north"): b.Seal(b.Blocks[6]), topic.Seal(d.ID): seal}
	got := map[string]bool{}
	for end := time.After(20 * time.Second); len(got) < 2; {
		for subject, data := range tell { // until Run listens
			if err := nc.Send(subject, data); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case a := <-heard:
			if a.Rule != Fork {
				t.Errorf("got %+v, want a fork", a)
			}
			got[a.ID] = true
		case <-time.After(50 * time.Millisecond):
		case <-end:
			t.Fatalf("waited in vain: heard %v", got)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if m := s.Metrics(); m.Alarms != 2 || m.Standing != 2 || m.Seen < 2 {
		t.Errorf("got %+v, want two alarms", m)
	}
	get := func(method, path, body string) string {
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
		return fmt.Sprint(w.Code, " ", w.Body)
	}
	for _, tc := range []struct{ method, path, body, want string }{
		{http.MethodGet, "/v1/alarms", "", `"rule":"fork"`},
		{http.MethodGet, "/v1/alarms?all=1", "", `"rule":"fork"`},
		{http.MethodGet, "/v1/audit", "", `"alarms_standing":2`},
		{http.MethodPost, "/v1/checkpoints?from=me", string(a.Seal(a.Blocks[4])), `200 {"verdict":"consistent"}`},
		{http.MethodPost, "/v1/checkpoints?from=me", string(b.Seal(b.Blocks[8])), `200 {"verdict":"fork"}`},
		{http.MethodPost, "/v1/checkpoints?from=me", "x", "400 "},
		{http.MethodPost, "/v1/checkpoints", "x", "400 "},
		{http.MethodPost, "/v1/checkpoints?from=me", strings.Repeat("x", ledger.MaxNote+1), "400 "},
	} {
		if got := get(tc.method, tc.path, tc.body); !strings.Contains(got, tc.want) {
			t.Errorf("%s %s: got %.300s, want %q", tc.method, tc.path, got, tc.want)
		}
	}
}
