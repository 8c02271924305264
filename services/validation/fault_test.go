package validation

import (
	"slices"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

// TestFault: a record by which the program panics, wherever it does, is kept
// with its own rule, and its neighbours in the same message and the same group
// get the verdicts that they would have had without it. A restart finds nothing
// to do.
func TestFault(t *testing.T) {
	for _, step := range []string{"decode", "verify", "judge", "judged"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			b := servicetest.District(t, district)
			r := newRegistry(t, 2)
			in := newIngress(t, b)
			d0, d1 := newDevice(0), newDevice(1)

			// Of d1 nothing that follows may be taken for a repeat: had the state of the
			// record that fails remained, the good frame under its number were another
			// body under one number.
			var raws [][]byte
			raws = append(raws, d0.good(), d1.good())
			evil := []string{string(d1.bad(func(f *traffic.Frame) { f.Readings = f.Readings[:3] }).Marshal())}
			raws = append(raws, []byte(evil[0]))
			again := d0.good()
			raws = append(raws, again, d1.good(), again) // the last is a duplicate
			evil = append(evil, string(d0.bad(func(f *traffic.Frame) { f.Readings = f.Readings[:4] }).Marshal()))
			raws = append(raws, []byte(evil[1]), d0.good(), d1.good())
			salts := in.put(noon, raws...)
			salts = append(salts, in.put(noon, d0.good(), d1.good())...)

			faulty := func() *Service {
				s := newService(t, b, r, nil)
				s.fault = func(at string, raw []byte) {
					if at == step && slices.Contains(evil, string(raw)) {
						var none []int
						_ = none[len(raw)]
					}
				}
				return s
			}
			s := faulty()
			stop := start(t, s)
			c := await(t, s, uint64(len(salts)))
			if c.Quarantined != 3 || c.ByRule[validate.RuleInternal] != 2 || c.ByRule[validate.RuleDuplicate] != 1 || c.Accepted != 8 || c.Gaps != 0 {
				t.Errorf("got counts %+v, want 8 accepted, 2 refused by %s and 1 by %s", c, validate.RuleInternal, validate.RuleDuplicate)
			}
			if err := stop(); err != nil {
				t.Fatal(err)
			}
			s = faulty()
			start(t, s)
			salts = append(salts, in.put(noon, d0.good())...)
			await(t, s, 1)

			o := read(t, b)
			o.checkOnce(t, in)
			for i, salt := range salts {
				want := ""
				switch i {
				case 2, 6:
					want = string(validate.RuleInternal)
				case 5:
					want = string(validate.RuleDuplicate)
				}
				q := o.quarantined[salt]
				switch {
				case want == "" && o.accepted[salt] != 1:
					t.Errorf("record %d: got %v, want it accepted", i, q)
				case want != "" && (len(q) != 1 || q[0].Rule != want):
					t.Errorf("record %d: got %v, want it refused by %s", i, q, want)
				case want == string(validate.RuleInternal) && (!strings.Contains(q[0].Reason, "index out of range") || string(q[0].Envelope) != string(raws[i])):
					t.Errorf("record %d: got %v, want its bytes and what failed", i, q[0])
				}
			}
		})
	}
}
