package plan

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"gopkg.in/yaml.v3"
)

// MaxBytes is the largest file that is read.
const MaxBytes = 1 << 20

// Parse reads a file. Everything that is wrong with its form, and then with
// [File.Check], is in the error as [Problems] with their lines.
func Parse(b []byte) (*File, error) {
	if len(b) > MaxBytes {
		return nil, Problems{{Line: 1, Field: "file", Rule: fmt.Sprintf("%d bytes, at most %d", len(b), MaxBytes)}}
	}
	// The library decodes more text than YAML 1.2 allows; what it would show
	// people must at least be text.
	if !utf8.Valid(b) {
		return nil, Problems{{Line: 1, Field: "file", Rule: "must be UTF-8"}}
	}
	var doc, more yaml.Node
	d := yaml.NewDecoder(bytes.NewReader(b))
	if err := d.Decode(&doc); err != nil {
		return nil, syntax(err)
	}
	if err := d.Decode(&more); !errors.Is(err, io.EOF) {
		return nil, Problems{{Line: max(more.Line, 1), Field: "file", Rule: "there must be one document"}}
	}
	if doc.Kind != yaml.DocumentNode || len(doc.Content) != 1 {
		return nil, Problems{{Line: 1, Field: "file", Rule: "must be a mapping"}}
	}
	r := &reader{checker: checker{f: &File{lines: map[string]int{}}}}
	r.file(doc.Content[0])
	if err := r.found.err(); err != nil {
		return nil, err
	}
	return r.f, r.f.Check()
}

var yamlLine = regexp.MustCompile(`line (\d+)`)

func syntax(err error) error {
	if errors.Is(err, io.EOF) {
		return Problems{{Line: 1, Field: "file", Rule: "is empty"}}
	}
	line := 1
	if m := yamlLine.FindStringSubmatch(err.Error()); m != nil {
		line, _ = strconv.Atoi(m[1]) // the pattern has digits only
	}
	return Problems{{Line: line, Field: "file", Rule: "is not YAML: " + strings.TrimPrefix(err.Error(), "yaml: ")}}
}

// reader turns nodes into a File. Every field's line is noted on the way.
type reader struct{ checker }

// field is one that a mapping may have.
type field struct {
	name     string
	required bool
	read     func(at string, n *yaml.Node)
}

// mapping reads a mapping, refusing what it does not know.
func (r *reader) mapping(at string, n *yaml.Node, fields ...field) {
	r.note(at, n)
	if n.Kind != yaml.MappingNode {
		r.bad(at, "must be a mapping")
		return
	}
	join := func(name string) string {
		if at == "file" {
			return name
		}
		return at + "." + name
	}
	var names []string
	for _, f := range fields {
		names = append(names, f.name)
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		k := slices.Index(names, key.Value)
		switch {
		case key.Kind != yaml.ScalarNode || k < 0:
			r.note(join(key.Value), key)
			r.bad(join(key.Value), "is unknown here; known are %s", strings.Join(names, ", "))
		case seen[key.Value]:
			r.note(join(key.Value), key)
			r.bad(join(key.Value), "is given twice")
		default:
			seen[key.Value] = true
			r.note(join(key.Value), value)
			fields[k].read(join(key.Value), value)
		}
	}
	for _, f := range fields {
		if f.required && !seen[f.name] {
			r.bad(join(f.name), "must be given")
		}
	}
}

func (r *reader) note(at string, n *yaml.Node) { r.f.lines[at] = n.Line }

func (r *reader) list(at string, n *yaml.Node, most int, each func(at string, n *yaml.Node)) {
	r.note(at, n)
	if n.Kind != yaml.SequenceNode {
		r.bad(at, "must be a list")
		return
	}
	if len(n.Content) > most {
		r.bad(at, "%d entries, at most %d", len(n.Content), most)
		return
	}
	for i, x := range n.Content {
		at := fmt.Sprintf("%s[%d]", at, i)
		r.note(at, x)
		each(at, x)
	}
}

// scalar returns a plain value's text. Aliases are not followed: a few lines of
// them can stand for gigabytes.
func (r *reader) scalar(at string, n *yaml.Node) (string, bool) {
	r.note(at, n)
	switch {
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		r.bad(at, "anchors and aliases are not allowed")
	case n.Kind != yaml.ScalarNode:
		r.bad(at, "must be a single value")
	case n.Tag == "!!null":
		r.bad(at, "must have a value")
	default:
		return n.Value, true
	}
	return "", false
}

func (r *reader) text(to *string) func(string, *yaml.Node) {
	return func(at string, n *yaml.Node) {
		s, ok := r.scalar(at, n)
		if !ok {
			return
		}
		if len(s) > mostText || strings.ContainsFunc(s, func(c rune) bool { return !unicode.IsPrint(c) }) || strings.TrimSpace(s) != s {
			r.bad(at, "must be at most %d bytes of printable text, without space around it", mostText)
			return
		}
		*to = s
	}
}

func (r *reader) texts(to *[]string) func(string, *yaml.Node) {
	return func(at string, n *yaml.Node) {
		r.list(at, n, mostGroups, func(at string, n *yaml.Node) {
			var s string
			r.text(&s)(at, n)
			*to = append(*to, s)
		})
	}
}

func (r *reader) number(to *int) func(string, *yaml.Node) {
	return func(at string, n *yaml.Node) {
		if s, ok := r.scalar(at, n); ok {
			v, err := strconv.Atoi(s)
			if err != nil || strconv.Itoa(v) != s {
				r.bad(at, "%q: must be a whole number", short(s))
				return
			}
			*to = v
		}
	}
}

var seconds = regexp.MustCompile(`^([0-9]{1,6})(?:\.([0-9]{1,3}))?$`)

func (r *reader) time(to *int64) func(string, *yaml.Node) {
	return func(at string, n *yaml.Node) {
		s, ok := r.scalar(at, n)
		if !ok {
			return
		}
		m := seconds.FindStringSubmatch(s)
		if m == nil {
			r.bad(at, "%q: must be seconds, with at most three decimals", short(s))
			return
		}
		whole, _ := strconv.ParseInt(m[1], 10, 64) // digits, and few
		part, _ := strconv.ParseInt((m[2] + "000")[:3], 10, 64)
		*to = whole*1000 + part
	}
}

func short(s string) string {
	if len(s) > 40 {
		return strings.ToValidUTF8(s[:40], "") + "…"
	}
	return s
}

func (r *reader) file(n *yaml.Node) {
	f, version := r.f, 0
	r.mapping("file", n,
		field{"version", true, r.number(&version)},
		field{"junction", true, r.text((*string)(&f.Junction))},
		field{"name", false, r.text(&f.Name)},
		field{"zone", false, r.text(&f.Zone)},
		field{"phases", true, func(at string, n *yaml.Node) {
			r.list(at, n, mostPhases, func(at string, n *yaml.Node) {
				f.Phases = append(f.Phases, Phase{})
				p := &f.Phases[len(f.Phases)-1]
				r.mapping(at, n,
					field{"phase", true, r.number(&p.Number)},
					field{"name", false, r.text(&p.Name)},
					field{"groups", false, r.texts(&p.Groups)},
					field{"permissive", false, r.texts(&p.Permissive)},
					field{"min_green", true, r.time(&p.MinGreenMS)},
					field{"yellow", true, r.time(&p.YellowMS)},
					field{"all_red", true, r.time(&p.AllRed)},
					field{"walk", false, r.time(&p.WalkMS)},
					field{"ped_clear", false, r.time(&p.PedClearMS)})
			})
		}},
		field{"rings", true, func(at string, n *yaml.Node) {
			r.list(at, n, mostRings, func(at string, n *yaml.Node) {
				var ring Ring
				r.list(at, n, mostPhases, func(at string, n *yaml.Node) {
					var section []int
					r.list(at, n, mostPhases, func(at string, n *yaml.Node) {
						var v int
						r.number(&v)(at, n)
						section = append(section, v)
					})
					ring = append(ring, section)
				})
				f.Rings = append(f.Rings, ring)
			})
		}},
		field{"plans", true, func(at string, n *yaml.Node) {
			r.list(at, n, mostPlans, func(at string, n *yaml.Node) {
				f.Plans = append(f.Plans, Timing{Splits: map[int]int64{}})
				p := &f.Plans[len(f.Plans)-1]
				r.mapping(at, n,
					field{"name", true, r.text(&p.Name)},
					field{"cycle", true, r.time(&p.CycleMS)},
					field{"offset", true, r.time(&p.OffsetMS)},
					field{"splits", true, func(at string, n *yaml.Node) { r.splits(at, n, p) }})
			})
		}},
		field{"schedule", true, func(at string, n *yaml.Node) {
			r.list(at, n, mostPeriods, func(at string, n *yaml.Node) {
				f.Schedule = append(f.Schedule, Period{})
				p := &f.Schedule[len(f.Schedule)-1]
				r.mapping(at, n,
					field{"days", true, r.days(&p.Days)},
					field{"from", true, r.minute(&p.FromMinute)},
					field{"to", true, r.minute(&p.ToMinute)},
					field{"plan", true, r.text(&p.Plan)})
			})
		}},
	)
	if version != 1 && len(r.found) == 0 {
		r.bad("version", "%d: must be 1", version)
	}
}

func (r *reader) splits(at string, n *yaml.Node, p *Timing) {
	if n.Kind != yaml.MappingNode {
		r.bad(at, "must be a mapping of phases to seconds")
		return
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		at := at + "." + short(key.Value)
		var phase int
		r.number(&phase)(at, key)
		if _, ok := p.Splits[phase]; ok {
			r.bad(at, "is given twice")
		}
		var ms int64
		r.time(&ms)(at, n.Content[i+1])
		p.Splits[phase] = ms
	}
}

var dayNames = [7]string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}

// dayWords are names of several days.
var dayWords = []struct {
	name string
	days [7]bool
}{
	{"all", [7]bool{true, true, true, true, true, true, true}},
	{"weekdays", [7]bool{time.Monday: true, time.Tuesday: true, time.Wednesday: true, time.Thursday: true, time.Friday: true}},
	{"weekend", [7]bool{time.Saturday: true, time.Sunday: true}},
}

func (r *reader) days(to *[7]bool) func(string, *yaml.Node) {
	return func(at string, n *yaml.Node) {
		if n.Kind == yaml.ScalarNode {
			if s, ok := r.scalar(at, n); ok {
				for _, w := range dayWords {
					if w.name == s {
						*to = w.days
						return
					}
				}
				r.bad(at, "%q: must be all, weekdays, weekend, or a list of %s", short(s), strings.Join(dayNames[:], ", "))
			}
			return
		}
		r.list(at, n, 7, func(at string, n *yaml.Node) {
			s, ok := r.scalar(at, n)
			d := slices.Index(dayNames[:], s)
			switch {
			case !ok:
			case d < 0:
				r.bad(at, "%q: must be one of %s", short(s), strings.Join(dayNames[:], ", "))
			case to[d]:
				r.bad(at, "%s is named twice", s)
			default:
				to[d] = true
			}
		})
	}
}

var clockText = regexp.MustCompile(`^([0-9]{2}):([0-9]{2})$`)

func (r *reader) minute(to *int) func(string, *yaml.Node) {
	return func(at string, n *yaml.Node) {
		s, ok := r.scalar(at, n)
		if !ok {
			return
		}
		if m := clockText.FindStringSubmatch(s); m != nil {
			h, _ := strconv.Atoi(m[1]) // two digits each
			min, _ := strconv.Atoi(m[2])
			if min < 60 && h*60+min <= dayMinutes {
				*to = h*60 + min
				return
			}
		}
		r.bad(at, `%q: must be a time of day between "00:00" and "24:00"`, short(s))
	}
}

// Format writes the file. Parse reads it back as it is.
func (f *File) Format() []byte {
	doc := mapping(
		"version", plain("1"),
		"junction", str(string(f.Junction)),
	)
	put := func(m *yaml.Node, name string, v *yaml.Node) { m.Content = append(m.Content, plain(name), v) }
	if f.Name != "" {
		put(doc, "name", str(f.Name))
	}
	if f.Zone != "" {
		put(doc, "zone", str(f.Zone))
	}
	strs := func(l []string) *yaml.Node {
		n := list(yaml.FlowStyle)
		for _, s := range l {
			n.Content = append(n.Content, str(s))
		}
		return n
	}
	phases := list(0)
	for _, p := range f.Phases {
		m := mapping("phase", plain(strconv.Itoa(p.Number)))
		if p.Name != "" {
			put(m, "name", str(p.Name))
		}
		if len(p.Groups) > 0 {
			put(m, "groups", strs(p.Groups))
		}
		if len(p.Permissive) > 0 {
			put(m, "permissive", strs(p.Permissive))
		}
		put(m, "min_green", plain(sec(p.MinGreenMS)))
		put(m, "yellow", plain(sec(p.YellowMS)))
		put(m, "all_red", plain(sec(p.AllRed)))
		if p.WalkMS != 0 {
			put(m, "walk", plain(sec(p.WalkMS)))
		}
		if p.PedClearMS != 0 {
			put(m, "ped_clear", plain(sec(p.PedClearMS)))
		}
		phases.Content = append(phases.Content, m)
	}
	rings := list(0)
	for _, ring := range f.Rings {
		r := list(yaml.FlowStyle)
		for _, section := range ring {
			s := list(yaml.FlowStyle)
			for _, n := range section {
				s.Content = append(s.Content, plain(strconv.Itoa(n)))
			}
			r.Content = append(r.Content, s)
		}
		rings.Content = append(rings.Content, r)
	}
	plans := list(0)
	for _, p := range f.Plans {
		splits := mapping()
		splits.Style = yaml.FlowStyle
		for _, n := range phasesOf(p.Splits) {
			put(splits, strconv.Itoa(n), plain(sec(p.Splits[n])))
		}
		plans.Content = append(plans.Content, mapping("name", str(p.Name), "cycle", plain(sec(p.CycleMS)), "offset", plain(sec(p.OffsetMS)), "splits", splits))
	}
	schedule := list(0)
	for _, p := range f.Schedule {
		days := list(yaml.FlowStyle)
		for d := range p.Days {
			if d := (d + 1) % 7; p.Days[d] { // weeks begin on Monday
				days.Content = append(days.Content, plain(dayNames[d]))
			}
		}
		for _, w := range dayWords {
			if w.days == p.Days {
				days = plain(w.name)
			}
		}
		m := mapping("days", days, "from", quoted(clock(p.FromMinute)), "to", quoted(clock(p.ToMinute)), "plan", str(p.Plan))
		m.Style = yaml.FlowStyle
		schedule.Content = append(schedule.Content, m)
	}
	put(doc, "phases", phases)
	put(doc, "rings", rings)
	put(doc, "plans", plans)
	put(doc, "schedule", schedule)
	var out bytes.Buffer
	e := yaml.NewEncoder(&out)
	e.SetIndent(2)
	// A buffer takes everything, and the nodes are all of our own making.
	_ = e.Encode(&yaml.Node{Kind: yaml.DocumentNode, Content: []*yaml.Node{doc}})
	_ = e.Close()
	return out.Bytes()
}

func phasesOf(m map[int]int64) []int {
	var out []int
	for n := range m {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

func plain(s string) *yaml.Node { return &yaml.Node{Kind: yaml.ScalarNode, Value: s} }

// str lets the library quote what would be something else than text.
func str(s string) *yaml.Node {
	n := &yaml.Node{}
	n.SetString(s)
	return n
}

func quoted(s string) *yaml.Node {
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: s, Style: yaml.DoubleQuotedStyle}
}

func list(style yaml.Style) *yaml.Node { return &yaml.Node{Kind: yaml.SequenceNode, Style: style} }

func mapping(pairs ...any) *yaml.Node {
	n := &yaml.Node{Kind: yaml.MappingNode}
	for i := 0; i < len(pairs); i += 2 {
		n.Content = append(n.Content, plain(pairs[i].(string)), pairs[i+1].(*yaml.Node))
	}
	return n
}
