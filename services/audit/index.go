package audit

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// indexFile is the index, below the data folder.
const indexFile = "audit/index.db"

// index is the queryable part of audit: a database that follows from log and
// payloads, and can be made again from them. Any number of processes may have it
// open; whoever writes makes sure that nobody else has gone on meanwhile.
type index struct {
	d    dialect
	file string
	w, r *sql.DB // w has one connection

	inserts map[string]*inserter
}

// Payload states of a record.
const (
	Held     = "held"
	Gone     = "gone"     // let go when its time was over, or never here
	Redacted = "redacted" // by a redaction record
)

// row is one record as the index holds it.
type row struct {
	index    uint64
	height   ledger.Height
	state    string
	kind     identity.RecordKind
	class    string
	junction traffic.JunctionID
	device   traffic.DeviceID
	signer   string
	boot     uint64
	seq      uint64
	measured time.Time
	rule     string

	command  *traffic.Command
	results  []traffic.CommandResult
	who      string // requester
	caseName string
}

// blockRows is one block with its records.
type blockRows struct {
	header ledger.Header
	hash   ledger.Hash
	rows   []row
}

// place is up to where an index has come.
type place struct {
	height ledger.Height // 0: nothing yet
	size   uint64
	hash   ledger.Hash // of the header of height
}

// openIndex opens the index of a data folder, and makes it if there is none. One
// that is damaged, or of another version, is begun anew: fresh is set then.
func openIndex(ctx context.Context, file string) (x *index, fresh bool, err error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return nil, false, err
	}
	_, err = os.Stat(file)
	fresh = errors.Is(err, fs.ErrNotExist)
	x, err = tryOpen(ctx, file)
	if err != nil && (ruined(err) || errors.Is(err, errVersion)) {
		if err := removeIndex(file); err != nil {
			return nil, false, err
		}
		fresh = true
		x, err = tryOpen(ctx, file)
	}
	if err != nil {
		return nil, false, fmt.Errorf("index %s: %w", file, err)
	}
	return x, fresh, nil
}

// removeIndex deletes an index that nobody has open.
func removeIndex(file string) error {
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.Remove(file + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

var errVersion = errors.New("made by a newer version of this program")

func tryOpen(ctx context.Context, file string) (_ *index, err error) {
	x := &index{d: sqliteDialect, file: file, inserts: map[string]*inserter{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, x.close())
		}
	}()
	if x.w, err = sql.Open(x.d.driver, sqliteSource(file, false)); err != nil {
		return nil, err
	}
	x.w.SetMaxOpenConns(1)
	if err := x.migrate(ctx); err != nil {
		return nil, err
	}
	if x.r, err = sql.Open(x.d.driver, sqliteSource(file, true)); err != nil {
		return nil, err
	}
	x.r.SetMaxOpenConns(4)
	for table, columns := range map[string]int{"block": 6, "record": 12, "command": 13, "outcome": 5, "matter": 4} {
		x.inserts[table] = &inserter{table: table, columns: columns}
	}
	_, err = x.place(ctx)
	return x, err
}

func (x *index) close() error {
	var errs []error
	for _, db := range []*sql.DB{x.r, x.w} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	return errors.Join(errs...)
}

// migrate runs the scripts that the database has not seen, each in a transaction.
func (x *index) migrate(ctx context.Context) error {
	scripts, err := x.d.migrations()
	if err != nil {
		return err
	}
	if _, err := x.w.ExecContext(ctx, "CREATE TABLE IF NOT EXISTS migration (version INTEGER PRIMARY KEY)"); err != nil {
		return err
	}
	for {
		done, err := x.migrateOne(ctx, scripts)
		if err != nil || done {
			return err
		}
	}
}

func (x *index) migrateOne(ctx context.Context, scripts []string) (done bool, err error) {
	tx, err := x.w.BeginTx(ctx, nil)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, rollback(tx)) }()
	var version int
	if err := tx.QueryRowContext(ctx, "SELECT COALESCE(MAX(version), 0) FROM migration").Scan(&version); err != nil {
		return false, err
	}
	if version > len(scripts) {
		return false, errVersion
	}
	if version == len(scripts) {
		return true, nil
	}
	if _, err := tx.ExecContext(ctx, scripts[version]); err != nil {
		return false, fmt.Errorf("migration %d: %w", version+1, err)
	}
	if _, err := tx.ExecContext(ctx, x.d.sql("INSERT INTO migration (version) VALUES (?)"), version+1); err != nil {
		return false, err
	}
	return false, tx.Commit()
}

// rollback ends a transaction that may have been committed.
func rollback(tx *sql.Tx) error {
	if err := tx.Rollback(); err != nil && !errors.Is(err, sql.ErrTxDone) {
		return err
	}
	return nil
}

type querier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

func (x *index) place(ctx context.Context) (place, error) { return x.placeIn(ctx, x.w) }

func (x *index) placeIn(ctx context.Context, q querier) (place, error) {
	var p place
	var h, size int64
	var hash []byte
	err := q.QueryRowContext(ctx, "SELECT height, size, hash FROM block ORDER BY height DESC LIMIT 1").Scan(&h, &size, &hash)
	if errors.Is(err, sql.ErrNoRows) {
		return p, nil
	}
	if err != nil {
		return p, err
	}
	if len(hash) != len(p.hash) {
		return p, errors.New("index: block hash of a wrong length")
	}
	return place{ledger.Height(h), uint64(size), ledger.Hash(hash)}, nil
}

// errMoved says that another process has gone on with the index meanwhile: ask
// for its place again.
var errMoved = errors.New("index: somebody else writes it, too")

// add appends blocks after the place from, in one transaction.
func (x *index) add(ctx context.Context, from place, blocks []blockRows) (err error) {
	tx, err := x.w.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, rollback(tx))
		for _, in := range x.inserts {
			in.args = in.args[:0]
		}
	}()
	now, err := x.placeIn(ctx, tx)
	if err != nil {
		return err
	}
	if now != from {
		return errMoved
	}
	for i := range blocks {
		b := &blocks[i]
		x.inserts["block"].add(int64(b.header.Height), b.header.Time.UnixNano(), int64(b.header.PrevSize), int64(b.header.Size), b.hash[:], b.header.Root[:])
		for k := range b.rows {
			x.stage(&b.rows[k])
		}
	}
	for _, in := range x.inserts {
		if err := in.flush(ctx, x.d, tx); err != nil {
			return err
		}
	}
	return tx.Commit()
}

// stage hands a row to the inserters.
func (x *index) stage(r *row) {
	x.inserts["record"].add(int64(r.index), int64(r.height), r.state, string(r.kind), r.class,
		text(string(r.junction)), text(string(r.device)), text(r.signer), int64(r.boot), int64(r.seq), r.measured.UnixNano(), text(r.rule))
	if c := r.command; c != nil {
		x.inserts["command"].add(int64(r.index), string(c.Junction), int64(c.Seq), c.Issued.UnixNano(), int64(c.Stage), int64(c.Height),
			string(c.RestsOn.Device), int64(c.RestsOn.BootEpoch), int64(c.RestsOn.Seq), c.Policy, c.PolicyVersion, c.Controller, c.ControllerVersion)
	}
	seen := map[uint64]bool{}
	for _, res := range r.results {
		if res.Seq == 0 || seen[res.Seq] { // 0: nobody had signed it
			continue
		}
		if len(r.results) > 1 {
			seen[res.Seq] = true
		}
		x.inserts["outcome"].add(string(r.junction), int64(res.Seq), int64(r.index), truth(res.Applied), text(res.Reason))
	}
	if r.who != "" || r.caseName != "" {
		x.inserts["matter"].add(int64(r.index), r.measured.UnixNano(), text(r.who), text(r.caseName))
	}
}

func text(s string) any {
	if s == "" {
		return nil
	}
	return s
}

func truth(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

// inserter collects rows of a table, and inserts many by one statement. It is
// used by one transaction at a time.
type inserter struct {
	table   string
	columns int
	args    []any
}

// rowsAtOnce is how many rows one statement inserts.
const rowsAtOnce = 40

func (in *inserter) add(values ...any) { in.args = append(in.args, values...) }

func (in *inserter) statement(rows int) string {
	values := "(" + strings.TrimSuffix(strings.Repeat("?,", in.columns), ",") + ")"
	return "INSERT INTO " + in.table + " VALUES " + strings.TrimSuffix(strings.Repeat(values+",", rows), ",")
}

// flush inserts what was collected, and forgets it, also if it fails.
func (in *inserter) flush(ctx context.Context, d dialect, tx *sql.Tx) error {
	args := in.args
	defer func() { in.args = in.args[:0] }()
	for _, rows := range []int{rowsAtOnce, 1} {
		n := rows * in.columns
		if len(args) < n {
			continue
		}
		st, err := tx.PrepareContext(ctx, d.sql(in.statement(rows)))
		if err != nil {
			return fmt.Errorf("%s: %w", in.table, err)
		}
		for ; len(args) >= n && err == nil; args = args[n:] {
			_, err = st.ExecContext(ctx, args[:n]...)
		}
		if err := errors.Join(err, st.Close()); err != nil {
			return fmt.Errorf("%s: %w", in.table, err)
		}
	}
	return nil
}

// forgetAtOnce bounds one transaction of [index.forget].
const forgetAtOnce = 20_000

// forget replaces what is known of the records from first to last, of one class or
// of all if class is empty, by their place and the state given. What was deleted is
// overwritten; see also [index.truncateLog].
func (x *index) forget(ctx context.Context, state, class string, first, last uint64) error {
	for from := first; from <= last; from += forgetAtOnce {
		if err := x.forgetSome(ctx, state, class, from, min(last, from+forgetAtOnce-1)); err != nil {
			return err
		}
		if last-from < forgetAtOnce {
			return nil
		}
	}
	return nil
}

func (x *index) forgetSome(ctx context.Context, state, class string, first, last uint64) (err error) {
	tx, err := x.w.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rollback(tx)) }()
	of, args := "idx >= ? AND idx <= ? AND kind <> 'registry' AND kind <> 'redaction' AND kind <> 'deletion'", []any{int64(first), int64(last)}
	if class != "" {
		of, args = of+" AND class = ?", append(args, class)
	}
	for _, table := range []string{"command", "outcome", "matter"} {
		st := "DELETE FROM " + table + " WHERE idx >= ? AND idx <= ? AND idx IN (SELECT idx FROM record WHERE " + of + ")"
		if _, err := tx.ExecContext(ctx, x.d.sql(st), append([]any{int64(first), int64(last)}, args...)...); err != nil {
			return err
		}
	}
	st := `UPDATE record SET state = ?, kind = '', class = '', junction = NULL, device = NULL, signer = NULL, boot = 0, seq = 0, rule = NULL,
		measured = (SELECT time FROM block WHERE block.height = record.height) WHERE ` + of
	if _, err := tx.ExecContext(ctx, x.d.sql(st), append([]any{state}, args...)...); err != nil {
		return err
	}
	return tx.Commit()
}

// reconciled is the height up to which everything that was let go of is out of the
// index.
func (x *index) reconciled(ctx context.Context) (ledger.Height, error) {
	var h int64
	err := x.w.QueryRowContext(ctx, "SELECT height FROM reconciled").Scan(&h)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, nil
	}
	return ledger.Height(h), err
}

func (x *index) setReconciled(ctx context.Context, h ledger.Height) (err error) {
	tx, err := x.w.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rollback(tx)) }()
	if _, err := tx.ExecContext(ctx, "DELETE FROM reconciled"); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, x.d.sql("INSERT INTO reconciled (height) VALUES (?)"), int64(h)); err != nil {
		return err
	}
	return tx.Commit()
}

// empty removes everything, in one transaction.
func (x *index) empty(ctx context.Context) (err error) {
	tx, err := x.w.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rollback(tx)) }()
	for _, table := range []string{"block", "record", "command", "outcome", "matter", "reconciled"} {
		if _, err := tx.ExecContext(ctx, "DELETE FROM "+table); err != nil {
			return err
		}
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	return x.truncateLog(ctx)
}

// truncateLog empties the write-ahead log into the database file.
func (x *index) truncateLog(ctx context.Context) error {
	if x.d.emptyLog == "" {
		return nil
	}
	var busy, log, moved int
	if err := x.w.QueryRowContext(ctx, x.d.emptyLog).Scan(&busy, &log, &moved); err != nil {
		return err
	}
	if busy != 0 {
		return errors.New("index: its write-ahead log is being read and could not be emptied; try again")
	}
	return nil
}

// dump writes all that the index holds in one form, a line a row.
func (x *index) dump(ctx context.Context, w io.Writer) (err error) {
	out := bufio.NewWriter(w)
	for _, t := range []struct{ table, order string }{
		{"block", "height"}, {"record", "idx"}, {"command", "idx"}, {"outcome", "idx, command"}, {"matter", "idx"},
	} {
		if err := x.dumpTable(ctx, out, t.table, t.order); err != nil {
			return err
		}
	}
	return out.Flush()
}

func (x *index) dumpTable(ctx context.Context, w io.Writer, table, order string) (err error) {
	rows, err := x.r.QueryContext(ctx, "SELECT * FROM "+table+" ORDER BY "+order)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	names, err := rows.Columns()
	if err != nil {
		return err
	}
	values, into := make([]any, len(names)), make([]any, len(names))
	for i := range values {
		into[i] = &values[i]
	}
	for rows.Next() {
		if err := rows.Scan(into...); err != nil {
			return err
		}
		if _, err := io.WriteString(w, table); err != nil {
			return err
		}
		for i, v := range values {
			form := " %s=%v"
			switch v.(type) {
			case nil:
				continue
			case []byte:
				form = " %s=%x"
			case string:
				form = " %s=%q"
			}
			if _, err := fmt.Fprintf(w, form, names[i], v); err != nil {
				return err
			}
		}
		if _, err := io.WriteString(w, "\n"); err != nil {
			return err
		}
	}
	return rows.Err()
}
