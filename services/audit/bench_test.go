package audit

import (
	"context"
	"database/sql"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stopline-traffic/stopline/pkg/ledger/ledgertest"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// BenchmarkFollow makes the index of a folder: records/s.
func BenchmarkFollow(b *testing.B) {
	d := ledgertest.New("follow", 4)
	c := d.NewChain()
	const blocks, pairs = 40, 200
	var before *ledgertest.Record
	n := uint64(0)
	for range blocks {
		var rs []ledgertest.Record
		for range pairs {
			n++
			f := d.FrameWith(before, 1, n, second(int(n)), ledgertest.Showed("G", n-1, ""))
			before = &f
			rs = append(rs, f, d.CommandOn(n, n, 1, n, second(int(n))))
		}
		c.Decide(rs)
	}
	dir := b.TempDir()
	write(b, dir, c, blocks)
	s := service(b, config(d, dir))
	for b.Loop() {
		if err := s.Rebuild(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)*blocks*2*pairs/b.Elapsed().Seconds(), "records/s")
}

// size returns how many records a synthetic index has: 10,000,000 by
// STOPLINE_INDEX_RECORDS take some minutes to make.
func size(b *testing.B) int {
	n := 200_000
	if s := os.Getenv("STOPLINE_INDEX_RECORDS"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			b.Fatal(err)
		}
	}
	return n
}

const benchJunctions = 1000

// synthetic fills an index by its own database: each second every junction has a
// frame and a command on it, which the next frame reports. STOPLINE_INDEX_FILE
// keeps it from one run to the next.
func synthetic(b *testing.B, n int) *index {
	b.Helper()
	ctx := b.Context()
	file := os.Getenv("STOPLINE_INDEX_FILE")
	if file == "" {
		file = filepath.Join(b.TempDir(), "index.db")
	}
	x, _, err := openIndex(ctx, file)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := x.close(); err != nil {
			b.Error(err)
		}
	})
	at, err := x.place(ctx)
	if err != nil {
		b.Fatal(err)
	}
	if at.size == uint64(n) {
		return x
	}
	run := func(st string, args ...any) {
		if _, err := x.w.ExecContext(ctx, st, args...); err != nil {
			b.Fatalf("%s: %v", st, err)
		}
	}
	indexes := map[string]string{}
	rows, err := x.w.QueryContext(ctx, "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")
	if err != nil {
		b.Fatal(err)
	}
	for rows.Next() {
		var name string
		var st sql.NullString
		if err := rows.Scan(&name, &st); err != nil {
			b.Fatal(err)
		}
		indexes[name] = st.String
	}
	if err := rows.Close(); err != nil {
		b.Fatal(err)
	}
	for name := range indexes {
		run("DROP INDEX " + name)
	}
	start := second(0).UnixNano()
	// Record i is of second i/(2·J), junction i/2 mod J; even: a frame, odd: a
	// command. A block is of 1000 records.
	run(`WITH RECURSIVE s(h) AS (SELECT 1 UNION ALL SELECT h + 1 FROM s WHERE h < ?)
		INSERT INTO block SELECT h, ? + h * 500000000, (h - 1) * 1000, h * 1000, zeroblob(32), zeroblob(32) FROM s`, n/1000, start)
	run("CREATE TEMP TABLE number AS WITH RECURSIVE s(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM s WHERE i < 999999) SELECT i FROM s")
	for from := 0; from < n; from += 1_000_000 {
		args := []any{from, min(n, from+1_000_000), benchJunctions, start}
		nums := `(SELECT i + ?1 AS i, ((i + ?1) / 2) % ?3 AS j, (i + ?1) / (2 * ?3) AS t FROM temp.number WHERE i + ?1 < ?2)`
		run(`INSERT INTO record SELECT i, i / 1000 + 1, 'held', iif(i % 2 = 0, 'frame', 'command'), iif(i % 2 = 0, 'readings', 'control'), 'J' || j,
			iif(i % 2 = 0, 'rsu-J' || j, NULL), iif(i % 2 = 0, 'device rsu-J' || j, 'service signal-control'), iif(i % 2 = 0, 1, 0), t + 1,
			?4 + t * 1000000000 + (i % 2) * 300000000, iif(i % 2 = 0, NULL, 'extend green: vehicle present') FROM `+nums, args...)
		run(`INSERT INTO command SELECT i, 'J' || j, t + 1, ?4 + t * 1000000000 + 300000000, 1, i / 1000 + 1, 'rsu-J' || j, 1, t + 1, 'city', '1', 'adaptive', '2' FROM `+nums+` WHERE i % 2 = 1`, args...)
		run(`INSERT INTO outcome SELECT 'J' || j, t, i, 1, NULL FROM `+nums+` WHERE i % 2 = 0 AND t > 0 AND ?4 = ?4`, args...)
	}
	for _, st := range indexes {
		run(st)
	}
	if err := x.truncateLog(ctx); err != nil {
		b.Fatal(err)
	}
	return x
}

// BenchmarkChain asks why a junction did what it did, for junctions and times at
// random: p50 and p99.
func BenchmarkChain(b *testing.B) {
	n := size(b)
	x := synthetic(b, n)
	r := rand.New(rand.NewPCG(1, 2))
	seconds := n / (2 * benchJunctions)
	var took []time.Duration
	for b.Loop() {
		j := traffic.JunctionID(fmt.Sprintf("J%d", r.IntN(benchJunctions)))
		at := second(1).Add(time.Duration(r.IntN(seconds*1000)) * time.Millisecond)
		begin := time.Now()
		f, err := x.chain(context.Background(), j, at, uint64(n))
		if err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(begin))
		if len(f.steps) < 2 {
			b.Fatalf("%s at %v: got %d steps, %q", j, at, len(f.steps), f.missing)
		}
	}
	report(b, took)
	b.ReportMetric(float64(n), "records")
}

// BenchmarkQuery lists pages of 100 by the filters that people use.
func BenchmarkQuery(b *testing.B) {
	n := size(b)
	x := synthetic(b, n)
	for _, q := range []struct {
		name string
		q    Query
	}{
		{"junction", Query{Junction: "J500"}},
		{"junction+time", Query{Junction: "J500", From: second(40), To: second(90)}},
		{"kind", Query{Kind: "command"}},
		{"policy", Query{Policy: "city", PolicyVersion: "1"}},
		{"device", Query{Device: "rsu-J7"}},
		{"case", Query{Case: "none"}},
	} {
		b.Run(q.name, func(b *testing.B) {
			var took []time.Duration
			for b.Loop() {
				begin := time.Now()
				if _, err := x.find(context.Background(), q.q, uint64(n)); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(begin))
			}
			report(b, took)
		})
	}
}

func report(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	for _, p := range []int{50, 99} {
		b.ReportMetric(float64(took[(len(took)*p+99)/100-1])/1e6, fmt.Sprintf("p%d-ms", p))
	}
}
