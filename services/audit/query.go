package audit

import (
	"context"
	"database/sql"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Record is one line of the index. What it says beside Index, Height, BlockTime,
// State and Signer is the signer's word.
type Record struct {
	Index     uint64              `json:"index"`
	Height    ledger.Height       `json:"height"`
	Kind      identity.RecordKind `json:"kind"`
	Junction  traffic.JunctionID  `json:"junction,omitempty"`
	Device    traffic.DeviceID    `json:"device,omitempty"`
	Seq       uint64              `json:"seq,omitempty"`
	Time      time.Time           `json:"time"` // of the record, or else of its block
	BlockTime time.Time           `json:"block_time"`
	Class     string              `json:"class,omitempty"` // of retention
	Signer    string              `json:"signer,omitempty"`
	Boot      uint64              `json:"boot_epoch,omitempty"` // of a frame; the run of an import
	Rule      string              `json:"rule,omitempty"`
	Requester string              `json:"requester,omitempty"`
	Case      string              `json:"case,omitempty"`
	// Command is set of commands.
	Command *CommandInfo `json:"command,omitempty"`
	// State is empty while the payload is held, else [Gone] or [Redacted].
	State string `json:"state,omitempty"`
	// Provable: a bundle can be had now.
	Provable bool `json:"provable"`
}

// CommandInfo is what the index knows of a command.
type CommandInfo struct {
	Stage             int              `json:"stage"`
	RestsHeight       ledger.Height    `json:"rests_on_height"`
	RestsOn           traffic.FrameKey `json:"rests_on"`
	Policy            string           `json:"policy"`
	PolicyVersion     string           `json:"policy_version"`
	Controller        string           `json:"controller"`
	ControllerVersion string           `json:"controller_version"`
	// Outcome is what the junction's frames said of it: applied, refused, or
	// nothing yet.
	Outcome string `json:"outcome,omitempty"`
	// Reason, where it was refused.
	Reason string `json:"reason,omitempty"`
	// ReportedBy is the leaf of the frame that said so.
	ReportedBy uint64 `json:"reported_by,omitempty"`
}

// Outcomes of a command.
const (
	Applied = "applied"
	Refused = "refused"
)

// Query says which records to list. An empty field matches all; several fields
// all have to match.
type Query struct {
	Kind      identity.RecordKind
	Class     string
	Junction  traffic.JunctionID
	Device    traffic.DeviceID
	Signer    string // type and id, such as "service signal-control"
	Requester string
	// Agency matches all requesters of an agency.
	Agency        string
	Case          string
	Height        ledger.Height
	Seq           *uint64 // of a frame, command or other numbered record
	Policy        string
	PolicyVersion string
	Controller    string
	Rule          string // the whole rule
	Outcome       string // of commands: Applied or Refused
	State         string // Held, Gone or Redacted
	// From and To bound the record's own time: From ≤ time < To.
	From, To time.Time
	// Oldest has the oldest first, not the newest: by the records' own time, and
	// those of a device in the order in which it made them.
	Oldest bool
	// After is [Page.Next] of the page before.
	After string
	// Limit is how many records a page has, 1 to MaxPage; 0 is 100.
	Limit int
}

// MaxPage bounds one page of records.
const MaxPage = 1000

// Page is one page of records.
type Page struct {
	Records []Record `json:"records"`
	// Next is where the next page begins; empty at the end.
	Next string `json:"next,omitempty"`
}

// Validate reports everything that is wrong with a query, joined, with kind
// Invalid.
func (q *Query) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if q.Kind != "" && !q.Kind.Valid() {
		bad("kind: %.40q is unknown", string(q.Kind))
	}
	if q.Limit < 0 || q.Limit > MaxPage {
		bad("limit: must be 1 to %d", MaxPage)
	}
	if q.Outcome != "" && q.Outcome != Applied && q.Outcome != Refused {
		bad("outcome: %.40q, must be %s or %s", q.Outcome, Applied, Refused)
	}
	if q.State != "" && q.State != Held && q.State != Gone && q.State != Redacted {
		bad("state: %.40q, must be %s, %s or %s", q.State, Held, Gone, Redacted)
	}
	if !q.From.IsZero() && !q.To.IsZero() && !q.From.Before(q.To) {
		bad("to: must be later than from")
	}
	for name, s := range map[string]string{"class": q.Class, "junction": string(q.Junction), "device": string(q.Device), "signer": q.Signer, "requester": q.Requester, "agency": q.Agency,
		"case": q.Case, "policy": q.Policy, "policy_version": q.PolicyVersion, "controller": q.Controller, "rule": q.Rule, "after": q.After} {
		if len(s) > 512 {
			bad("%s: longer than 512 bytes", name)
		}
	}
	if _, err := q.place(); err != nil {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return kind.Errorf(kind.Invalid, "query: %w", err)
	}
	return nil
}

// mark is where a page ended: the record's time and index, or what [Query.byDevice]
// orders by.
type mark struct {
	Time  int64  `json:"t"`
	Boot  uint64 `json:"b,omitempty"`
	Seq   uint64 `json:"s,omitempty"`
	Index uint64 `json:"i"`
}

// byDevice reports whether the records are listed in the order in which a device
// made them: that is how the index has them.
func (q *Query) byDevice() bool {
	return q.Device != "" && q.Junction == "" && q.Requester == "" && q.Case == "" && q.From.IsZero() && q.To.IsZero()
}

func (m mark) String() string {
	b, err := json.Marshal(m)
	if err != nil {
		panic(err) // unreachable: numbers only
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

func (q *Query) place() (*mark, error) {
	if q.After == "" {
		return nil, nil
	}
	b, err := base64.RawURLEncoding.DecodeString(q.After)
	var m mark
	if err != nil || json.Unmarshal(b, &m) != nil {
		return nil, errors.New("after: is no page's end")
	}
	return &m, nil
}

// where collects conditions with their arguments.
type where struct {
	terms []string
	args  []any
}

func (w *where) and(term string, args ...any) {
	w.terms = append(w.terms, term)
	w.args = append(w.args, args...)
}

func (w *where) String() string {
	if len(w.terms) == 0 {
		return ""
	}
	return " WHERE " + strings.Join(w.terms, " AND ")
}

// columns are what [scanRecord] reads.
const columns = `r.idx, r.height, r.state, r.kind, r.class, r.junction, r.device, r.signer, r.boot, r.seq, r.measured, r.rule,
	b.time, b.size, m.requester, m.case_number,
	c.stage, c.rests_height, c.rests_device, c.rests_boot, c.rests_seq, c.policy, c.policy_version, c.controller, c.controller_version,
	o.applied, o.reason, o.idx`

// others are what belongs to a record in other tables. Of several frames that
// report one command the first counts.
const others = ` JOIN block b ON b.height = r.height
	LEFT JOIN matter m ON m.idx = r.idx
	LEFT JOIN command c ON c.idx = r.idx
	LEFT JOIN outcome o ON o.junction = c.junction AND o.command = c.seq
		AND o.idx = (SELECT MIN(f.idx) FROM outcome f WHERE f.junction = c.junction AND f.command = c.seq)`

// select of a query: first the keys of the page by the index that fits, then what
// belongs to them.
func (q *Query) statement() (string, []any, error) {
	var w where
	from, time := "record k", "k.measured"
	if q.Requester != "" || q.Case != "" || q.Agency != "" {
		from, time = "matter km JOIN record k ON k.idx = km.idx", "km.measured"
		if q.Requester != "" {
			w.and("km.requester = ?", q.Requester)
		}
		if q.Agency != "" { // agency or agency/name; after "/" comes "0"
			w.and("(km.requester = ? OR km.requester >= ? AND km.requester < ?)", q.Agency, q.Agency+"/", q.Agency+"0")
		}
		if q.Case != "" {
			w.and("km.case_number = ?", q.Case)
		}
	}
	if q.Policy != "" || q.PolicyVersion != "" || q.Controller != "" || q.Outcome != "" {
		if from == "record k" && q.Junction == "" {
			from, time = "command kc JOIN record k ON k.idx = kc.idx", "kc.issued"
		} else {
			from += " JOIN command kc ON kc.idx = k.idx"
		}
		if q.Policy != "" {
			w.and("kc.policy = ?", q.Policy)
		}
		if q.PolicyVersion != "" {
			w.and("kc.policy_version = ?", q.PolicyVersion)
		}
		if q.Controller != "" {
			w.and("kc.controller = ?", q.Controller)
		}
		if q.Outcome != "" {
			w.and("EXISTS (SELECT 1 FROM outcome ko WHERE ko.junction = kc.junction AND ko.command = kc.seq AND ko.applied = ?)", truth(q.Outcome == Applied))
		}
	}
	if q.Kind != "" {
		w.and("k.kind = ?", string(q.Kind))
		if q.Kind != identity.KindFrame && q.Kind != identity.KindCommand {
			w.and("k.kind <> 'frame' AND k.kind <> 'command'") // so that the index on the others can be used
		}
	}
	for _, f := range []struct{ column, value string }{
		{"class", q.Class}, {"junction", string(q.Junction)}, {"device", string(q.Device)}, {"signer", q.Signer}, {"rule", q.Rule}, {"state", q.State},
	} {
		if f.value != "" {
			w.and("k."+f.column+" = ?", f.value)
		}
	}
	if q.State == Gone || q.State == Redacted {
		w.and("k.state <> 'held'")
	}
	if q.Seq != nil {
		w.and("k.seq = ?", int64(*q.Seq))
	}
	if q.Height != 0 {
		// Leaf indexes of a block follow one another.
		w.and("k.idx >= (SELECT first FROM block WHERE height = ?)", int64(q.Height))
		w.and("k.idx < (SELECT size FROM block WHERE height = ?)", int64(q.Height))
	}
	if !q.From.IsZero() {
		w.and(time+" >= ?", q.From.UnixNano())
	}
	if !q.To.IsZero() {
		w.and(time+" < ?", q.To.UnixNano())
	}
	after, err := q.place()
	if err != nil {
		return "", nil, err
	}
	order, beyond := "DESC", "<"
	if q.Oldest {
		order, beyond = "ASC", ">"
	}
	by := []string{time, "k.idx"}
	if q.byDevice() {
		by = []string{"k.boot", "k.seq", "k.idx"}
	}
	if after != nil {
		term := fmt.Sprintf("(%s) %s (?%s)", strings.Join(by, ", "), beyond, strings.Repeat(", ?", len(by)-1))
		if q.byDevice() {
			w.and(term, int64(after.Boot), int64(after.Seq), int64(after.Index))
		} else {
			w.and(term, after.Time, int64(after.Index))
		}
	}
	limit := q.Limit
	if limit == 0 {
		limit = 100
	}
	var keys, inner, outer []string
	for i, column := range by {
		keys = append(keys, fmt.Sprintf("%s AS o%d", column, i))
		inner = append(inner, column+" "+order)
		outer = append(outer, fmt.Sprintf("p.o%d %s", i, order))
	}
	page := "SELECT " + strings.Join(keys, ", ") + " FROM " + from + w.String() + " ORDER BY " + strings.Join(inner, ", ") + fmt.Sprintf(" LIMIT %d", limit+1)
	return "SELECT " + columns + " FROM (" + page + fmt.Sprintf(") p JOIN record r ON r.idx = p.o%d", len(by)-1) + others + " ORDER BY " + strings.Join(outer, ", "), w.args, nil
}

// find lists records.
func (x *index) find(ctx context.Context, q Query, sealed uint64) (Page, error) {
	st, args, err := q.statement()
	if err != nil {
		return Page{}, kind.Errorf(kind.Invalid, "query: %w", err)
	}
	p := Page{Records: []Record{}}
	limit := q.Limit
	if limit == 0 {
		limit = 100
	}
	err = x.each(ctx, st, args, sealed, func(r Record) { p.Records = append(p.Records, r) })
	if err != nil {
		return Page{}, err
	}
	if len(p.Records) > limit {
		p.Records = p.Records[:limit]
		last := p.Records[limit-1]
		p.Next = mark{last.Time.UnixNano(), last.Boot, last.Seq, last.Index}.String()
	}
	return p, nil
}

// each calls f with the records that a statement selects by columns.
func (x *index) each(ctx context.Context, st string, args []any, sealed uint64, f func(Record)) (err error) {
	rows, err := x.r.QueryContext(ctx, x.d.sql(st), args...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		r, err := scanRecord(rows, sealed)
		if err != nil {
			return err
		}
		f(r)
	}
	return rows.Err()
}

func scanRecord(rows *sql.Rows, sealed uint64) (Record, error) {
	var r Record
	var idx, height, measured, blockTime, blockSize int64
	var k, state string
	var junction, device, signer, rule, requester, caseNumber, restsDevice, policy, policyVersion, controller, controllerVersion, reason sql.NullString
	var boot, seq, stage, restsHeight, restsBoot, restsSeq, applied, by sql.NullInt64
	if err := rows.Scan(&idx, &height, &state, &k, &r.Class, &junction, &device, &signer, &boot, &seq, &measured, &rule,
		&blockTime, &blockSize, &requester, &caseNumber,
		&stage, &restsHeight, &restsDevice, &restsBoot, &restsSeq, &policy, &policyVersion, &controller, &controllerVersion,
		&applied, &reason, &by); err != nil {
		return r, err
	}
	r.Index, r.Height, r.Kind = uint64(idx), ledger.Height(height), identity.RecordKind(k)
	r.Junction, r.Device, r.Signer = traffic.JunctionID(junction.String), traffic.DeviceID(device.String), signer.String
	r.Boot, r.Seq, r.Rule = uint64(boot.Int64), uint64(seq.Int64), rule.String
	r.Time, r.BlockTime = time.Unix(0, measured).UTC(), time.Unix(0, blockTime).UTC()
	r.Requester, r.Case = requester.String, caseNumber.String
	if state != Held {
		r.State = state
	}
	r.Provable = uint64(blockSize) < sealed && state == Held
	if stage.Valid {
		c := &CommandInfo{Stage: int(stage.Int64), RestsHeight: ledger.Height(restsHeight.Int64),
			RestsOn: traffic.FrameKey{Device: traffic.DeviceID(restsDevice.String), BootEpoch: uint64(restsBoot.Int64), Seq: uint64(restsSeq.Int64)},
			Policy:  policy.String, PolicyVersion: policyVersion.String, Controller: controller.String, ControllerVersion: controllerVersion.String}
		if by.Valid {
			c.Outcome, c.Reason, c.ReportedBy = Refused, reason.String, uint64(by.Int64)
			if applied.Int64 == 1 {
				c.Outcome = Applied
			}
		}
		r.Command = c
	}
	return r, nil
}

// one returns the first record that a condition on record k matches, in an order.
func (x *index) one(ctx context.Context, sealed uint64, from, order string, args ...any) (r Record, ok bool, err error) {
	st := "SELECT " + columns + " FROM (SELECT k.idx AS idx FROM " + from + " ORDER BY " + order + " LIMIT 1) p JOIN record r ON r.idx = p.idx" + others
	err = x.each(ctx, st, args, sealed, func(got Record) { r, ok = got, true })
	return r, ok, err
}

// blockOf returns the block that holds a leaf, and the log's size after it.
func (x *index) blockOf(ctx context.Context, leaf uint64) (h ledger.Height, size uint64, err error) {
	var hh, ss int64
	err = x.r.QueryRowContext(ctx, x.d.sql("SELECT height, size FROM block WHERE size > ? ORDER BY size LIMIT 1"), int64(leaf)).Scan(&hh, &ss)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, 0, kind.Errorf(kind.NotFound, "no leaf %d in the log", leaf)
	}
	return ledger.Height(hh), uint64(ss), err
}

// registryRecords lists the records that changed the registry, by index.
func (x *index) registryRecords(ctx context.Context) (out []Record, err error) {
	st := "SELECT " + columns + " FROM record r" + others + " WHERE r.kind IN (?, ?) AND r.kind <> 'frame' AND r.kind <> 'command' ORDER BY r.idx"
	err = x.each(ctx, st, []any{string(identity.KindRegistry), string(identity.KindRedaction)}, 0, func(r Record) { out = append(out, r) })
	return out, err
}

// Query lists records of the index. Errors of the query have kind Invalid.
func (s *Service) Query(ctx context.Context, q Query) (Page, error) {
	if err := q.Validate(); err != nil {
		return Page{}, err
	}
	return s.index.find(ctx, q, s.sealedSize())
}

func (s *Service) sealedSize() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.sealed == nil {
		return 0
	}
	return s.sealed.Size
}

// Find returns the newest records first, at most limit of them. An empty kind or
// junction matches all. It is [Service.Query] for those who cannot go on without
// an answer: an index that cannot be read is logged, and has none.
func (s *Service) Find(k identity.RecordKind, j traffic.JunctionID, limit int) []Record {
	p, err := s.index.find(context.Background(), Query{Kind: k, Junction: j, Limit: limit}, s.sealedSize())
	if err != nil {
		s.log.Error("audit: index", "err", err)
		return []Record{}
	}
	return p.Records
}

// rootAt returns the log's root at a size where a block ends.
func (x *index) rootAt(ctx context.Context, size uint64) (root ledger.Hash, ok bool, err error) {
	var b []byte
	err = x.r.QueryRowContext(ctx, x.d.sql("SELECT root FROM block WHERE size = ?"), int64(size)).Scan(&b)
	if errors.Is(err, sql.ErrNoRows) {
		return root, false, nil
	}
	if err == nil && len(b) != len(root) {
		err = errors.New("index: root of a wrong length")
	}
	if err != nil {
		return root, false, err
	}
	return ledger.Hash(b), true, nil
}

// frames returns the leaves of a device's frames of one start, by sequence.
func (x *index) frames(ctx context.Context, d traffic.DeviceID, boot, from, to uint64) (out []uint64, err error) {
	rows, err := x.r.QueryContext(ctx, x.d.sql("SELECT idx FROM record WHERE device = ? AND boot = ? AND seq >= ? AND seq <= ? AND kind = 'frame' ORDER BY seq, idx LIMIT ?"),
		string(d), int64(boot), int64(from), int64(to), ledger.MaxBundleRecords+1)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var i int64
		if err := rows.Scan(&i); err != nil {
			return nil, err
		}
		out = append(out, uint64(i))
	}
	return out, rows.Err()
}

// receipts lists the records of deletions in blocks after one.
func (x *index) receipts(ctx context.Context, after ledger.Height) (out []Record, err error) {
	st := "SELECT " + columns + " FROM record r" + others + " WHERE r.kind = ? AND r.kind <> 'frame' AND r.kind <> 'command' AND r.height > ? ORDER BY r.idx"
	err = x.each(ctx, st, []any{string(identity.KindDeletion), int64(after)}, 0, func(r Record) { out = append(out, r) })
	return out, err
}

// redactionOf returns the leaf of the record by which another was redacted.
func (x *index) redactionOf(ctx context.Context, leaf uint64) (uint64, bool, error) {
	r, ok, err := x.one(ctx, 0, "record k WHERE k.kind = ? AND k.kind <> 'frame' AND k.kind <> 'command' AND k.seq = ?", "k.idx", string(identity.KindRedaction), int64(leaf))
	return r.Index, ok, err
}
