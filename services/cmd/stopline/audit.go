package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	neturl "net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/audit"
	"github.com/stopline-traffic/stopline/services/internal/district"
)

var auditCommand = command{
	name: "audit",
	synopsis: `stopline audit query --data DIR [FILTERS] [--json]
stopline audit chain --data DIR --junction ID --at TIME [--out FILE] [--json]
stopline audit bundle --data DIR --out FILE [--unbroken DEVICE] RECORD...
stopline audit alarms --data DIR [--all] [--json]
stopline audit rebuild --data DIR`,
	summary: "ask a district's log what happened and why, and take the proof along",
	manual: `query lists records, the newest first, by any of the filters together. A RECORD is
a leaf's number in the log, in the first column.

chain answers "why did this junction do that at 08:14?": the reading, the block
that agreed on it, the decision with its rule and versions, and the frame in which
the junction says what it did, with its lamps. --out writes the bundle that proves
all of it, for ` + "`stopline verify`" + `; where it can be claimed, with every frame
between reading and response, so that one sees that none was left out.

bundle writes one bundle of the records given. With --unbroken all frames of the
device between the first and the last of its frames among them are in it, with
the claim that none is left out, which verify checks.

alarms lists what the auditor of a running district has found to be wrong with the
log: forks, roll-backs, stretches that are missing. --all: also what has cleared.

rebuild empties the index and makes it again from log and payloads.

The index is DIR/audit/index.db; it is brought up to date first, and made if there
is none. Nothing in it is evidence: bundles are made from the log, and verified
before they are written. The district may be running meanwhile.

A TIME is as in RFC 3339, such as 2026-11-01T08:14:00Z; or 08:14, 08:14:05 or
08:14:05.5 for that time (UTC) on the day of the newest record.

EXIT STATUS
    0  done
    1  not found, or could not be done; alarms: some stand
    2  wrong usage`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		var o auditOptions
		fs.StringVar(&o.dir, "data", "", "data `DIR` of the district")
		fs.StringVar(&o.out, "out", "", "chain, bundle: `FILE` to write the bundle to")
		fs.StringVar(&o.at, "at", "", "chain: the `TIME` that is asked about")
		fs.StringVar(&o.unbroken, "unbroken", "", "bundle: the `DEVICE` of which nothing is left out")
		fs.BoolVar(&o.all, "all", false, "alarms: all that ever were")
		fs.BoolVar(&o.json, "json", false, "print one JSON object")
		o.filters = map[string]*string{}
		for _, f := range []struct{ name, flag, what string }{
			{"kind", "kind", "`KIND` of record, such as frame or command"}, {"class", "class", "retention `CLASS`"}, {"junction", "junction", "junction's `ID`"},
			{"device", "device", "device's `ID`"}, {"signer", "signer", "`WHO` signed, type and id: \"service signal-control\""},
			{"requester", "requester", "`WHO` asked"}, {"case", "case", "`NUMBER` of the case"}, {"height", "height", "block's `HEIGHT`"},
			{"seq", "seq", "`NUMBER` of the frame or command"}, {"policy", "policy", "policy's `ID`"}, {"policy_version", "policy-version", "policy's `VERSION`"},
			{"controller", "controller", "controller's `NAME`"}, {"rule", "rule", "the whole `RULE` of a command, finding or change"},
			{"outcome", "outcome", "of commands: `applied` or refused"}, {"state", "state", "of the payload: `held`, gone or redacted"},
			{"from", "from", "records of this `TIME` or later"}, {"to", "to", "records before this `TIME`"},
			{"order", "order", "`newest` or oldest first"}, {"limit", "limit", "at most so `MANY`, up to 1000; 100 if not given"},
			{"after", "after", "`MARK` of the page before, which is printed below it"},
		} {
			o.filters[f.name] = fs.String(f.flag, "", "query: "+f.what)
		}
		return func(ctx context.Context, args []string, s streams) error {
			if len(args) == 0 {
				return usageError("audit: query, chain, bundle, alarms or rebuild is needed; `stopline audit -h` explains")
			}
			return o.run(ctx, s, args[0], args[1:])
		}
	},
}

type auditOptions struct {
	dir, out, at, unbroken string
	all, json              bool
	filters                map[string]*string
}

func (o *auditOptions) run(ctx context.Context, s streams, verb string, args []string) (err error) {
	do, ok := map[string]func(context.Context, streams, *audit.Service, []string) error{
		"query": o.query, "chain": o.chain, "bundle": o.bundle, "alarms": o.alarms, "rebuild": o.rebuild,
	}[verb]
	switch {
	case !ok:
		return usageError("audit: no %q; there are query, chain, bundle, alarms and rebuild", verb)
	case verb != "bundle" && len(args) > 0:
		return usageError("audit %s: %q: no arguments are taken", verb, args[0])
	case o.dir == "":
		return usageError("audit: --data: a data folder is needed")
	}
	c := audit.Config{Dir: o.dir, Quiet: true}
	for name, into := range map[string]*[]byte{"genesis.json": &c.GenesisJSON, "policy": &c.Policy} {
		if *into, err = os.ReadFile(filepath.Join(o.dir, name)); err != nil {
			return usageError("audit: %s is no data folder: %v", o.dir, err)
		}
	}
	a, err := audit.New(c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.Close()) }()
	if verb != "rebuild" && verb != "alarms" {
		if err := a.Refresh(); err != nil {
			return err
		}
	}
	err = do(ctx, s, a, args)
	if kind.Of(err) == kind.Invalid {
		return usageError("audit %s: %v", verb, err)
	}
	return err
}

func (o *auditOptions) print(s streams, v any) error {
	e := json.NewEncoder(s.out)
	e.SetIndent("", " ")
	return e.Encode(v)
}

// time reads a TIME, as the manual page says.
func (o *auditOptions) time(ctx context.Context, a *audit.Service, name, v string) (time.Time, error) {
	if t, err := time.Parse(time.RFC3339Nano, v); err == nil {
		return t, nil
	}
	for _, form := range []string{"15:04", "15:04:05.999999999"} {
		t, err := time.Parse(form, v)
		if err != nil {
			continue
		}
		p, err := a.Query(ctx, audit.Query{Limit: 1})
		if err != nil {
			return t, err
		}
		if len(p.Records) == 0 {
			return t, kind.Errorf(kind.NotFound, "--%s: the log has no record whose day could be meant", name)
		}
		y, m, d := p.Records[0].Time.Date()
		return time.Date(y, m, d, t.Hour(), t.Minute(), t.Second(), t.Nanosecond(), time.UTC), nil
	}
	return time.Time{}, kind.Errorf(kind.Invalid, "--%s: %.40q, must be a time such as 08:14 or 2026-11-01T08:14:00Z", name, v)
}

func (o *auditOptions) query(ctx context.Context, s streams, a *audit.Service, _ []string) error {
	v := neturl.Values{}
	for name, value := range o.filters {
		if *value == "" {
			continue
		}
		if name == "from" || name == "to" {
			t, err := o.time(ctx, a, name, *value)
			if err != nil {
				return err
			}
			*value = t.Format(time.RFC3339Nano)
		}
		v.Set(name, *value)
	}
	q, err := audit.ParseQuery(v)
	if err != nil {
		return err
	}
	p, err := a.Query(ctx, q)
	if err != nil {
		return err
	}
	if o.json {
		return o.print(s, p)
	}
	w := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "RECORD\tTIME (UTC)\tBLOCK\tKIND\tJUNCTION\tSIGNED BY\tNUMBER\tWHAT")
	for _, r := range p.Records {
		k := string(r.Kind)
		if r.State != "" {
			k = r.State
		}
		number := ""
		if r.Seq > 0 {
			number = strconv.FormatUint(r.Seq, 10)
		}
		fmt.Fprintf(w, "%d\t%s\t%d\t%s\t%s\t%s\t%s\t%s\n", r.Index, r.Time.Format("2006-01-02 15:04:05.000"), r.Height, k, r.Junction, r.Signer, number, what(r))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if p.Next != "" {
		_, err = fmt.Fprintf(s.out, "there are more: --after %s\n", p.Next)
	}
	return err
}

// what says of a record what the index knows of it, on one line.
func what(r audit.Record) string {
	var out []string
	if c := r.Command; c != nil {
		out = append(out, fmt.Sprintf("stage %d", c.Stage))
		if c.Outcome != "" {
			out = append(out, strings.TrimSpace(c.Outcome+" "+c.Reason))
		}
	}
	if r.Rule != "" {
		out = append(out, r.Rule)
	}
	if r.Requester != "" || r.Case != "" {
		out = append(out, fmt.Sprintf("by %s, case %s", r.Requester, r.Case))
	}
	return strings.Join(out, "; ")
}

func (o *auditOptions) chain(ctx context.Context, s streams, a *audit.Service, _ []string) error {
	if o.at == "" || *o.filters["junction"] == "" {
		return usageError("audit chain: --junction and --at are needed")
	}
	at, err := o.time(ctx, a, "at", o.at)
	if err != nil {
		return err
	}
	c, err := a.Chain(ctx, traffic.JunctionID(*o.filters["junction"]), at)
	if err != nil {
		return err
	}
	if o.out != "" {
		b, err := a.ChainBundle(ctx, c)
		if err != nil {
			return err
		}
		if err := district.WriteFile(o.out, b, 0o644); err != nil {
			return err
		}
	}
	if o.json {
		return o.print(s, c)
	}
	if _, err := fmt.Fprintf(s.out, "%s\n\n", c.Summary); err != nil {
		return err
	}
	w := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "STEP\tRECORD\tTIME (UTC)\tBLOCK\tBLOCK TIME\tSIGNED BY\tLAMPS\tPROOF")
	for _, st := range c.Steps {
		lamps, proof := "", "not sealed yet"
		if st.Signal != nil {
			lamps = string(st.Signal.State)
		}
		switch {
		case st.Provable:
			proof = "yes"
		case st.State != "":
			proof = "of its place only: " + st.State
		}
		fmt.Fprintf(w, "%s\t%d\t%s\t%d\t%s\t%s\t%s\t%s\n", st.Role, st.Index, st.Time.Format("15:04:05.000"), st.Height, st.BlockTime.Format("15:04:05.000"), st.Signer, lamps, proof)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, st := range c.Steps {
		if st.Says != "" {
			if _, err := fmt.Fprintf(s.out, "\n%s, record %d: %s\n", st.Role, st.Index, st.Says); err != nil {
				return err
			}
		}
	}
	for _, m := range c.Missing {
		if _, err := fmt.Fprintf(s.out, "\nmissing: %s\n", m); err != nil {
			return err
		}
	}
	if o.out != "" {
		_, err = fmt.Fprintf(s.out, "\nproof of all of it: %s\n", o.out)
	}
	return err
}

func (o *auditOptions) bundle(ctx context.Context, s streams, a *audit.Service, args []string) error {
	if o.out == "" || len(args) == 0 {
		return usageError("audit bundle: --out and at least one record are needed")
	}
	var indexes []uint64
	for _, arg := range args {
		i, err := strconv.ParseUint(arg, 10, 62)
		if err != nil {
			return usageError("audit bundle: %.40q: a record is a leaf's number in the log", arg)
		}
		indexes = append(indexes, i)
	}
	var b []byte
	var err error
	if o.unbroken != "" {
		b, err = a.UnbrokenBundle(ctx, traffic.DeviceID(o.unbroken), indexes...)
	} else {
		b, err = a.Bundle(ctx, indexes...)
	}
	if err != nil {
		return err
	}
	if err := district.WriteFile(o.out, b, 0o644); err != nil {
		return err
	}
	_, err = fmt.Fprintf(s.out, "%s: %d bytes; check it with: stopline verify --policy FILE %s\n", o.out, len(b), o.out)
	return err
}

func (o *auditOptions) alarms(_ context.Context, s streams, a *audit.Service, _ []string) error {
	standing := a.Alarms()
	out := standing
	if o.all {
		var err error
		if out, err = a.AlarmHistory(); err != nil {
			return err
		}
	}
	if o.json {
		if err := o.print(s, map[string]any{"alarms": out}); err != nil {
			return err
		}
	} else {
		for _, al := range out {
			state := "stands"
			if al.Cleared != nil {
				state = "cleared " + al.Cleared.Format(time.RFC3339)
			}
			if _, err := fmt.Fprintf(s.out, "%s  %s  %s\n    %s\n", al.Since.Format(time.RFC3339), al.Rule, state, al.Detail); err != nil {
				return err
			}
			if al.Evidence != "" {
				if _, err := fmt.Fprintf(s.out, "    proof: %s\n", filepath.Join(o.dir, "audit", al.Evidence)); err != nil {
					return err
				}
			}
		}
		if len(out) == 0 {
			if _, err := io.WriteString(s.out, "nothing is wrong that the auditor knows of\n"); err != nil {
				return err
			}
		}
	}
	if len(standing) > 0 {
		return exitError{code: exitFailed}
	}
	return nil
}

func (o *auditOptions) rebuild(ctx context.Context, s streams, a *audit.Service, _ []string) error {
	begin := time.Now()
	if err := a.Rebuild(ctx); err != nil {
		return err
	}
	m := a.Metrics()
	_, err := fmt.Fprintf(s.out, "%d records of %d blocks indexed in %v\n", m.Indexed, m.Blocks, time.Since(begin).Round(time.Millisecond))
	return err
}
