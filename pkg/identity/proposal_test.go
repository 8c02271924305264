package identity

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// A proposal goes round as a file that people read, and comes back as what they
// signed: also where JSON has two ways to write a letter.
func TestProposalGoesRound(t *testing.T) {
	r := governed(t)
	old, _ := r.Entry(TypeJunction, "j1")
	c := plan(t, 5)
	c.Body = bytes.Replace(c.Body, []byte("evening"), []byte("caf\u00e9 <&>\u2028"), 1)
	p, err := Propose(c, &old)
	if err != nil {
		t.Fatal(err)
	}
	for _, who := range []string{"bob", "cem"} {
		doc, err := p.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(doc, []byte("caf\u00e9 <&>")) || !bytes.Contains(doc, []byte("\n  \"body\": {\n")) {
			t.Fatalf("people cannot read\n%s", doc)
		}
		if p, err = ParseProposal(doc); err != nil {
			t.Fatal(err)
		}
		a, err := Approve(testKey(who), p.Change)
		if err != nil {
			t.Fatal(err)
		}
		p.Change.Approvals = append(p.Change.Approvals, a)
	}
	payload, err := p.Change.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	sent, err := ParseChange(payload)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Apply(3, testID("registrar"), sent); err != nil {
		t.Fatalf("the validators refuse what went round: %v", err)
	}
	now, _ := r.Entry(TypeJunction, "j1")
	if !bytes.Equal(now.Body, p.Change.Body) {
		t.Errorf("got body %s\nwant %s", now.Body, p.Change.Body)
	}
	// A change to nothing replaces nothing.
	p, err = Propose(Change{District: "harbour", Action: Put, Type: TypeSoftware, ID: "v9", Body: json.RawMessage("{}")}, nil)
	if err != nil || p.Replaces != nil || !bytes.Equal(p.Change.Base, make([]byte, 32)) {
		t.Errorf("got %+v, %v", p, err)
	}
}

func TestParseProposalRefuses(t *testing.T) {
	r := governed(t)
	old, _ := r.Entry(TypePolicy, "day")
	good := func() *Proposal {
		e := old
		p, err := Propose(Change{District: "harbour", Action: Put, Type: TypePolicy, ID: "day", Body: json.RawMessage(`{"version":"2","controller":"fixed","rules":""}`), Nonce: 3}, &e)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	for _, tt := range []struct {
		name string
		mod  func(p *Proposal)
		want string
	}{
		{"format", func(p *Proposal) { p.Format = "x" }, `format: "x", must be "stopline registry proposal v1"`},
		{"district", func(p *Proposal) { p.Change.District = "" }, "change.district: must not be empty"},
		{"action", func(p *Proposal) { p.Change.Action = "drop" }, `change.action: "drop": must be put or revoke`},
		{"type", func(p *Proposal) { p.Change.Type = "plan" }, `change.type: "plan" is unknown`},
		{"id", func(p *Proposal) { p.Change.ID = "" }, `change.id: "": 1 to 512 bytes without control characters`},
		{"line in the id", func(p *Proposal) { p.Change.ID = "a\nb" }, `change.id: "a\nb": 1 to 512 bytes without control characters`},
		{"no body", func(p *Proposal) { p.Change.Body = nil }, "change.body: must be given to put"},
		{"body to revoke", func(p *Proposal) { p.Change.Action = Revoke }, "change.body: must not be given to revoke"},
		{"too many", func(p *Proposal) {
			for i := range MaxApprovals + 1 {
				p.Change.Approvals = append(p.Change.Approvals, Approval{Key: KeyID(fmt.Sprint(i)), Signature: make(Signature, 64)})
			}
		}, "change.approvals: 17, at most 16"},
		{"signed twice", func(p *Proposal) {
			p.Change.Approvals = []Approval{{"a", make(Signature, 64)}, {"b", make(Signature, 64)}, {"a", make(Signature, 64)}}
		}, "change.approvals[2]: a has signed already"},
		{"shows another entry", func(p *Proposal) { p.Replaces.ID = "night" }, `replaces: is policy "night", the change is to policy "day"`},
		{"shows another body", func(p *Proposal) { p.Replaces.Body = json.RawMessage(`{"version":"0"}`) }, "change.base: "},
		{"shows nothing", func(p *Proposal) { p.Replaces = nil }, "change.base: "},
		{"base", func(p *Proposal) { p.Change.Base = make(Digest, 32) }, "change.base: 0000000000000000 is not the hash of what it replaces, "},
		{"no base", func(p *Proposal) { p.Change.Base = nil }, "change.base: "},
		{"a name twice", func(p *Proposal) { p.Change.Body = json.RawMessage(`{"a":[{"v":1},{"v":2,"w":{},"v":3}]}`) }, `change.body: the name "v" occurs twice in one object`},
		{"a name in capitals", func(p *Proposal) { p.Change.Body = json.RawMessage(`{"version":"1","VERſION":"2"}`) }, "change.body: the name \"VERſION\" occurs twice in one object"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := good()
			tt.mod(p)
			doc, err := p.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := ParseProposal(doc); err == nil || !strings.HasPrefix(err.Error(), "proposal: "+tt.want) || kind.Of(err) != kind.Invalid {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
	if _, err := Propose(Change{}, nil); err == nil {
		t.Error("nothing could be proposed")
	}
	for in, want := range map[string]string{
		"":                         "proposal: EOF",
		"{}":                       `proposal: format: ""`,
		`{"colour":1}`:             `proposal: json: unknown field "colour"`,
		`{"change":{"base":"00"}}`: "proposal: digest: must be 64 hex digits",
		`{"change":{"approvals":[{"signature":"0"}]}}`: "proposal: signature: must be 128 hex digits",
		strings.Repeat(" ", 4*MaxEnvelope+1):           "proposal: 1048577 bytes, at most 1048576",
	} {
		if _, err := ParseProposal([]byte(in)); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%.60q: got %v, want %s", in, err, want)
		}
	}
	// Names may come again in other objects.
	p := good()
	p.Change.Body = json.RawMessage(`{"a":{"a":[{"a":"a"},{"a":"a"}]},"b":"a"}`)
	if err := p.check(); err != nil {
		t.Errorf("got %v for names that are used once in each object", err)
	}
}

// FuzzProposal: what can be read is what was signed, however often it is written.
func FuzzProposal(f *testing.F) {
	r := governed(f)
	old, _ := r.Entry(TypeJunction, "j1")
	p, err := Propose(plan(f, 5), &old)
	if err != nil {
		f.Fatal(err)
	}
	a, err := Approve(testKey("bob"), p.Change)
	if err != nil {
		f.Fatal(err)
	}
	p.Change.Approvals = []Approval{a}
	doc, err := p.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(doc)
	f.Add([]byte(`{"format":"stopline registry proposal v1","change":{"district":"d","action":"revoke","type":"device","id":"x","nonce":1,"base":"` + strings.Repeat("0", 64) + `"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ParseProposal(b)
		if err != nil {
			if kind.Of(err) != kind.Invalid {
				t.Errorf("got an error of kind %v: %v", kind.Of(err), err)
			}
			return
		}
		signed, err := ApprovalInput(p.Change)
		if err != nil {
			t.Fatalf("a proposal that nobody can approve: %v", err)
		}
		doc, err := p.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseProposal(doc)
		if err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		payload, err := again.Change.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		c, err := ParseChange(payload)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := ApprovalInput(c); err != nil || !bytes.Equal(got, signed) {
			t.Errorf("got %q, %v after a round trip, want %q", got, err, signed)
		}
	})
}
