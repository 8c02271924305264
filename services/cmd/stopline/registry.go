package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	neturl "net/url"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/services/gateway"
	"github.com/stopline-traffic/stopline/services/internal/district"
)

var registryCommand = command{
	name: "registry",
	synopsis: `stopline registry show [TYPE [ID]] [--json] [--url URL]
stopline registry propose --type TYPE --id ID --file BODY --out PROPOSAL [--url URL]
stopline registry propose --type TYPE --id ID --revoke --out PROPOSAL [--url URL]
stopline registry sign --key FILE [--url URL] PROPOSAL
stopline registry submit --key FILE [--url URL] PROPOSAL`,
	summary: "show the registry, and change it with the signatures that it asks for",
	manual: `The registry holds what all parts of a district go by: junctions with their
plans, policies, devices, services, officials, agencies, validators, software
and what is shared with neighbours. Its governance entry says whose signatures
a change needs: which role, how many officials, of how many departments.

show prints the entries, of one type or one entry, and who may change what.

propose writes a change as a file that people can read, made to what is in force
now, and prints the difference. BODY is the entry's JSON; with --revoke there is
none. The file goes round by any way; nothing in it is secret.

sign prints what is signed, then adds an official's approval to the file. It is
for this change to this state of the entry, once: after any other change to the
same entry, or the block that the proposal stands until, it is worth nothing, and
the change must be proposed again.

submit sends the change in a record signed by the official of --key, who counts
as one of those needed, and waits until it is in force. Where the validators
refuse it, submit says why; enough officials who sign make it good.

A feature is a rule of the validators that begins at a block, so that they can be
given a new build one by one: an entry of type feature, whose ID is its name and
whose BODY is {"from": BLOCK}. A validator whose build does not know a feature
ends before that block, and says so.

Keys are files with 64 hex digits of an Ed25519 seed; those of a demo's three
officials are in its data folder: keys/registrar.key, keys/official-police.key
and keys/official-ambulance.key. Elsewhere every official keeps their own.`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		var o registryOptions
		fs.StringVar(&o.url, "url", "", "address `URL` of the running demo\nDefault: http://127.0.0.1:8080; sign asks nobody without it")
		fs.StringVar(&o.typ, "type", "", "propose: `TYPE` of the entry, as show lists them")
		fs.StringVar(&o.id, "id", "", "propose: `ID` of the entry")
		fs.StringVar(&o.file, "file", "", "propose: `FILE` with the entry's body, JSON")
		fs.BoolVar(&o.revoke, "revoke", false, "propose to revoke the entry instead")
		fs.Uint64Var(&o.blocks, "blocks", 5_000_000, "propose: for how many `BLOCKS` the proposal stands, 0 for ever;\n5000000 are some days, by how busy the district is")
		fs.StringVar(&o.out, "out", "", "propose: `FILE` to write, which must not be there yet")
		fs.StringVar(&o.key, "key", "", "sign, submit: `FILE` with an official's private key")
		fs.BoolVar(&o.json, "json", false, "show, submit: print JSON")
		fs.DurationVar(&o.wait, "wait", 10*time.Second, "submit: how long to wait until the change is in force")
		return func(ctx context.Context, args []string, s streams) error {
			verb := ""
			if len(args) > 0 {
				verb, args = args[0], args[1:]
			}
			o.given = o.url != ""
			o.url = strings.TrimSuffix(cmp.Or(o.url, "http://127.0.0.1:8080"), "/")
			switch verb {
			case "show":
				return o.show(ctx, args, s)
			case "propose":
				return o.propose(ctx, args, s)
			case "sign":
				return o.sign(ctx, args, s)
			case "submit":
				return o.submit(ctx, args, s)
			}
			return usageError("registry: show, propose, sign or submit is needed, got %q", verb)
		}
	},
}

type registryOptions struct {
	url, typ, id, file, out, key string
	blocks                       uint64
	revoke, json                 bool
	given                        bool // url, on the command line
	body                         []byte
	wait                         time.Duration
}

// getJSON reads a document of the gateway; found is false where it has none.
func getJSON(ctx context.Context, url string, v any) (found bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return false, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return false, fmt.Errorf("is the demo running? %w", err)
	}
	defer func() { _ = res.Body.Close() }() // read, or given up
	switch res.StatusCode {
	case http.StatusOK:
		return true, json.NewDecoder(io.LimitReader(res.Body, 64<<20)).Decode(v)
	case http.StatusNotFound:
		return false, nil
	}
	return false, fmt.Errorf("%s answered %s", url, res.Status)
}

// view reads the entries of a type, of all types where it is empty.
func (o *registryOptions) view(ctx context.Context, t identity.EntryType) (v gateway.RegistryView, err error) {
	found, err := getJSON(ctx, o.url+"/v1/registry?type="+neturl.QueryEscape(string(t)), &v)
	if err == nil && !found {
		err = fmt.Errorf("%s serves no registry", o.url)
	}
	return v, err
}

// governance reads who may change what.
func (o *registryOptions) governance(ctx context.Context) (*identity.Governance, error) {
	v, err := o.view(ctx, identity.TypeGovernance)
	if err != nil || len(v.Entries) == 0 {
		return nil, err
	}
	g := new(identity.Governance)
	if err := json.Unmarshal(v.Entries[0].Body, g); err != nil {
		return nil, fmt.Errorf("governance: %w", err)
	}
	return g, nil
}

// need reads what a change needs.
func (o *registryOptions) need(ctx context.Context, c *identity.Change) (identity.Need, error) {
	g, err := o.governance(ctx)
	if err != nil || g == nil {
		return rules(nil)[0].Need, err
	}
	return g.Need(c.Type, c.Action), nil
}

func (o *registryOptions) show(ctx context.Context, args []string, s streams) error {
	if len(args) > 2 {
		return usageError("registry show: a type and an id, at most; got %d arguments", len(args))
	}
	if len(args) == 2 {
		e, found, err := entry(ctx, o.url, identity.EntryType(args[0]), args[1])
		if err != nil {
			return err
		}
		if !found {
			return fmt.Errorf("the registry has no %s %q", args[0], args[1])
		}
		if o.json {
			return printJSON(s.out, e)
		}
		var body bytes.Buffer
		if err := json.Indent(&body, e.Body, "", "  "); err != nil {
			return err
		}
		_, err = fmt.Fprintf(s.out, "%s %s is %s since block %d\nhash %x\n%s\n", e.Type, clean(e.ID), e.Status, e.Since, []byte(e.Hash()), clean(body.String()))
		return err
	}
	var t identity.EntryType
	if len(args) == 1 {
		t = identity.EntryType(args[0])
	}
	v, err := o.view(ctx, t)
	if err != nil {
		return err
	}
	if o.json {
		return printJSON(s.out, v)
	}
	if t != "" && len(v.Entries) == 0 {
		return fmt.Errorf("the registry has no entry of the type %q", t)
	}
	w := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "district %s, version %d, hash %s\n\nTYPE\tID\tSTATUS\tSINCE\tWHAT\n", v.District, v.Version, v.Hash)
	for _, e := range v.Entries {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\n", e.Type, clean(e.ID), e.Status, e.Since, clean(about(e)))
	}
	g, err := o.governance(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "\nTO CHANGE\tACTION\tNEEDS\n")
	for _, r := range rules(g) {
		if t == "" || r.Type == t || r.Type == "" {
			fmt.Fprintf(w, "%s\t%s\t%s\n", cmp.Or(string(r.Type), "anything else"), cmp.Or(r.Action, "put, revoke"), clean(r.Need.String()))
		}
	}
	return w.Flush()
}

// rules returns all rules, the default as one without a type.
func rules(g *identity.Governance) []identity.Rule {
	if g == nil {
		return []identity.Rule{{Need: identity.Need{Role: identity.Registrar, Officials: 1, Departments: 1}}}
	}
	return append(slices.Clone(g.Rules), identity.Rule{Need: g.Default})
}

// about says in a few words what an entry is.
func about(e identity.Entry) string {
	var b struct {
		Junction, Department, Name, Version, Controller string
		Roles, Signs                                    []string
		Plan                                            struct{ Name string }
		From                                            uint64
	}
	// Fields of other types than these are no matter: it is a few words.
	if err := json.Unmarshal(e.Body, &b); err != nil {
		return ""
	}
	switch e.Type {
	case identity.TypeDevice:
		return "at " + b.Junction
	case identity.TypeService:
		return "signs " + strings.Join(b.Signs, ", ")
	case identity.TypeOfficial:
		return b.Department + ": " + strings.Join(b.Roles, ", ")
	case identity.TypeValidator:
		return b.Department
	case identity.TypeJunction:
		return strings.TrimSpace(b.Name + ", plan " + b.Plan.Name)
	case identity.TypePolicy:
		return b.Controller + " " + b.Version
	case identity.TypeFeature:
		return fmt.Sprintf("from block %d on", b.From)
	case identity.TypeAgency:
		return b.Name
	}
	return b.Version
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", " ")
	return e.Encode(v)
}

func (o *registryOptions) propose(ctx context.Context, args []string, s streams) error {
	if len(args) > 0 || o.typ == "" || o.id == "" || o.out == "" || (o.file == "" && o.body == nil) == !o.revoke {
		return usageError("registry propose: --type, --id, --out and either --file or --revoke are needed, and no arguments")
	}
	c := identity.Change{Action: identity.Put, Type: identity.EntryType(o.typ), ID: o.id}
	switch {
	case o.revoke:
		c.Action = identity.Revoke
	case o.body != nil:
		c.Body = o.body
	default:
		b, err := os.ReadFile(o.file)
		if err != nil {
			return err
		}
		if !json.Valid(b) {
			return fmt.Errorf("%s: is not JSON", o.file)
		}
		var body bytes.Buffer
		if err := json.Compact(&body, b); err != nil {
			return err
		}
		c.Body = body.Bytes()
	}
	var nonce [8]byte
	if _, err := rand.Read(nonce[:]); err != nil {
		return err
	}
	c.Nonce = binary.BigEndian.Uint64(nonce[:]) >> 11 // whole also for tools that know only doubles
	v, err := o.view(ctx, identity.TypeGovernance)
	if err != nil {
		return err
	}
	c.District = v.District
	if o.blocks > 0 {
		if c.Until = v.Height + o.blocks; c.Until < o.blocks {
			return fmt.Errorf("--blocks %d: is more than there will be", o.blocks)
		}
	}
	var inForce *identity.Entry
	e, found, err := entry(ctx, o.url, c.Type, c.ID)
	if err != nil {
		return err
	}
	if found {
		inForce = &e
	}
	if o.revoke && !found {
		return fmt.Errorf("the registry has no %s %q", o.typ, o.id)
	}
	p, err := identity.Propose(c, inForce)
	if err != nil {
		return err
	}
	doc, err := p.Marshal()
	if err != nil {
		return err
	}
	f, err := os.OpenFile(o.out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(doc)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(o.out))
	}
	if err := describe(s.out, p); err != nil {
		return err
	}
	need, err := o.need(ctx, &c)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(s.out, "needs %s\nwritten to %s\n", clean(need.String()), o.out)
	return err
}

// describe prints what a proposal would change.
func describe(w io.Writer, p *identity.Proposal) error {
	c := &p.Change
	what := "new"
	if p.Replaces != nil {
		what = fmt.Sprintf("%s since block %d", p.Replaces.Status, p.Replaces.Since)
	}
	fmt.Fprintf(w, "%s %s %s in district %s (%s)\nbase %x, nonce %d\n", c.Action, c.Type, clean(c.ID), clean(string(c.District)), what, []byte(c.Base), c.Nonce)
	if c.Until != 0 {
		fmt.Fprintf(w, "stands until block %d\n", c.Until)
	}
	if c.Action == identity.Revoke {
		return nil
	}
	var old []byte
	if p.Replaces != nil {
		old = p.Replaces.Body
	}
	lines, err := difference(old, c.Body)
	if err != nil {
		return err
	}
	if len(lines) == 0 {
		lines = []string{"no difference"}
	}
	for _, l := range lines {
		fmt.Fprintln(w, " ", l)
	}
	return nil
}

func readProposal(path string) (*identity.Proposal, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	p, err := identity.ParseProposal(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return p, nil
}

func (o *registryOptions) sign(ctx context.Context, args []string, s streams) error {
	if len(args) != 1 || o.key == "" {
		return usageError("registry sign: --key and one proposal are needed")
	}
	key, err := district.ReadKey(o.key)
	if err != nil {
		return err
	}
	p, err := readProposal(args[0])
	if err != nil {
		return err
	}
	if o.given {
		if err := o.current(ctx, p); err != nil {
			return err
		}
	}
	a, err := identity.Approve(key, p.Change)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(p.Change.Approvals, func(b identity.Approval) bool { return b.Key == a.Key }) {
		return fmt.Errorf("%s has signed this proposal already", a.Key)
	}
	if len(p.Change.Approvals) >= identity.MaxApprovals {
		return fmt.Errorf("%d officials have signed already, which is the most", identity.MaxApprovals)
	}
	if err := describe(s.out, p); err != nil {
		return err
	}
	p.Change.Approvals = append(p.Change.Approvals, a)
	doc, err := p.Marshal()
	if err != nil {
		return err
	}
	if err := district.WriteFile(args[0], doc, 0o644); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(s.out, "signed by %s, %d in all\n", a.Key, len(p.Change.Approvals)); err != nil || !o.given {
		return err
	}
	return o.progress(ctx, s.out, &p.Change)
}

// progress prints who has signed, and what is still needed.
func (o *registryOptions) progress(ctx context.Context, w io.Writer, c *identity.Change) error {
	need, err := o.need(ctx, c)
	if err != nil {
		return err
	}
	v, err := o.view(ctx, identity.TypeOfficial)
	if err != nil {
		return err
	}
	var departments []string
	for _, a := range c.Approvals {
		at := slices.IndexFunc(v.Entries, func(e identity.Entry) bool {
			k, err := e.Keys()
			return err == nil && len(k) == 1 && identity.IDOf(k[0]) == a.Key
		})
		var official identity.Official
		if at < 0 || json.Unmarshal(v.Entries[at].Body, &official) != nil {
			fmt.Fprintf(w, "  %s is no official\n", clean(string(a.Key)))
			continue
		}
		e, note := &v.Entries[at], ""
		switch {
		case e.Status != identity.Active:
			note = ", revoked"
		case !need.Counts(e.ID, official):
			note = ", does not count"
		default:
			departments = append(departments, official.Department)
		}
		fmt.Fprintf(w, "  %s of %s%s\n", clean(e.ID), clean(official.Department), note)
	}
	_, err = fmt.Fprintln(w, clean(need.Progress(departments)))
	return err
}

// current says early, and in words, that the entry has changed since.
func (o *registryOptions) current(ctx context.Context, p *identity.Proposal) error {
	e, found, err := entry(ctx, o.url, p.Change.Type, p.Change.ID)
	switch {
	case err != nil:
		return err
	case found && p.Replaces == nil:
		return fmt.Errorf("%s %q was filed at block %d, after this was proposed: propose it again", e.Type, e.ID, e.Since)
	case found && !bytes.Equal(e.Hash(), p.Change.Base):
		return fmt.Errorf("%s %q was changed at block %d, after this was proposed: propose it again", e.Type, e.ID, e.Since)
	case !found && p.Replaces != nil:
		return fmt.Errorf("the registry has no %s %q", p.Change.Type, p.Change.ID)
	}
	return nil
}

func (o *registryOptions) submit(ctx context.Context, args []string, s streams) error {
	if len(args) != 1 || o.key == "" {
		return usageError("registry submit: --key and one proposal are needed")
	}
	key, err := district.ReadKey(o.key)
	if err != nil {
		return err
	}
	p, err := readProposal(args[0])
	if err != nil {
		return err
	}
	c := p.Change
	own := identity.IDOf(key.Public().(ed25519.PublicKey))
	// The sender counts by the record's own signature.
	c.Approvals = slices.DeleteFunc(slices.Clone(c.Approvals), func(a identity.Approval) bool { return a.Key == own })
	payload, err := c.Marshal()
	if err != nil {
		return err
	}
	if n := len(payload); n > identity.MaxEnvelope-1024 {
		return fmt.Errorf("%s: a change of %d bytes, at most %d can be sent", args[0], n, identity.MaxEnvelope-1024)
	}
	ctx, cancel := context.WithTimeout(ctx, o.wait)
	defer cancel()
	// Early and in words; from here on, too, the entry can only come to look as
	// proposed because this change, or one just like it, has been carried out.
	if err := o.current(ctx, p); err != nil {
		return err
	}
	k := identity.KindRegistry
	if c.Type == identity.TypeRedaction {
		k = identity.KindRedaction
	}
	commitment, err := fileRecord(ctx, o.url, identity.Sign(key, k, identity.JSON, payload))
	if err != nil {
		return err
	}
	e, err := o.settled(ctx, &c, commitment)
	if err != nil {
		return err
	}
	if o.json {
		return printJSON(s.out, e)
	}
	_, err = fmt.Fprintf(s.out, "in force: %s %s is %s since block %d\n", e.Type, clean(e.ID), e.Status, e.Since)
	return err
}

// settled waits until a change is in force, or refused.
func (o *registryOptions) settled(ctx context.Context, c *identity.Change, commitment string) (identity.Entry, error) {
	for {
		f, err := refusal(ctx, o.url, commitment)
		if f != nil {
			return identity.Entry{}, fmt.Errorf("refused by the validators (%s): %s", f.Rule, f.Reason)
		}
		var e identity.Entry
		var found bool
		if err == nil {
			e, found, err = entry(ctx, o.url, c.Type, c.ID)
		}
		if err == nil && found && !bytes.Equal(e.Hash(), c.Base) &&
			(c.Action == identity.Revoke && e.Status == identity.Revoked || c.Action == identity.Put && bytes.Equal(e.Body, c.Body)) {
			return e, nil
		}
		select {
		case <-ctx.Done():
			if err != nil && !errors.Is(err, context.DeadlineExceeded) {
				return identity.Entry{}, err
			}
			return identity.Entry{}, fmt.Errorf("the record was stored, but it is neither in force nor refused after --wait %v; `stopline registry show %s %s` will tell", o.wait, c.Type, clean(c.ID))
		case <-time.After(100 * time.Millisecond):
		}
	}
}
