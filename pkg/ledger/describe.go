package ledger

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
)

// Claims is what a record's payload says about itself, as far as this package
// reads it. It is the signer's word and no more.
type Claims struct {
	District string     `json:"district,omitempty"`
	Junction string     `json:"junction,omitempty"`
	Device   string     `json:"device,omitempty"`
	Seq      uint64     `json:"seq,omitempty"`
	Time     *time.Time `json:"time,omitempty"`
	Summary  string     `json:"summary"`
}

// Describe reads the claims of an envelope's payload: protobuf or JSON of the
// messages in api/stopline/v1. A payload that it cannot read is described as
// such: whether it is well-formed was for the validators to judge.
func Describe(e identity.Envelope) Claims {
	f, ok := readFields(e)
	if !ok {
		return Claims{Summary: fmt.Sprintf("%s of %d bytes, not readable here", e.Kind, len(e.Payload))}
	}
	switch e.Kind {
	case identity.KindFrame:
		c := Claims{District: f.text(1, "district"), Junction: f.text(2, "junction"), Device: f.text(3, "device"),
			Seq: f.number(5, "seq"), Time: f.time(7, "timeUnixNano")}
		c.Summary = fmt.Sprintf("reading %d of device %q at junction %q (start %d), over %d ms, %d detectors",
			c.Seq, c.Device, c.Junction, f.number(4, "bootEpoch"), f.number(8, "intervalMs"), f.count(9, "readings"))
		return c
	case identity.KindCommand:
		c := Claims{District: f.text(1, "district"), Junction: f.text(2, "junction"),
			Seq: f.number(3, "seq"), Time: f.time(10, "issuedUnixNano")}
		c.Summary = fmt.Sprintf("command %d to junction %q: stage %d, by controller %q version %q under policy %q version %q, resting on block %d; rule: %q",
			c.Seq, c.Junction, f.number(12, "stage"), f.text(8, "controller"), f.text(9, "controllerVersion"),
			f.text(6, "policy"), f.text(7, "policyVersion"), f.number(4, "height"), f.text(13, "rule"))
		return c
	case identity.KindImport:
		c := Claims{District: f.text(1, "district"), Device: f.text(7, "device"), Seq: f.number(4, "seq"), Time: f.time(8, "timeUnixNano")}
		c.Summary = fmt.Sprintf("import %d of run %d by %.128q: %d events over %d ms of the controller that the log %.256q calls %.128q; the controller did not sign them",
			c.Seq, f.number(3, "run"), f.text(2, "importer"), f.count(10, "events"), f.number(9, "intervalMs"), f.text(5, "log"), c.Device)
		return c
	case identity.KindHealth:
		c := Claims{District: f.text(1, "district"), Junction: f.text(2, "junction"), Seq: f.number(3, "seq"), Time: f.time(10, "timeUnixNano")}
		breaks := "ceased to break"
		if f.flag(7, "failed") {
			breaks = "begun to break"
		}
		c.Summary = fmt.Sprintf("detector %.128q at junction %q has %s the rule %.128q: %.256q; resting on block %d",
			f.text(6, "detector"), c.Junction, breaks, f.text(8, "rule"), f.text(9, "reason"), f.number(4, "height"))
		return c
	case identity.KindAccess:
		c := Claims{District: f.text(1, "district"), Seq: f.number(3, "seq"), Time: f.time(4, "timeUnixNano")}
		granted := "denied"
		if f.flag(12, "granted") {
			granted = "granted"
		}
		c.Summary = fmt.Sprintf("access %d: %.128q of %.128q called %.128q for purpose %.64q, case %.64q; %s",
			c.Seq, f.text(6, "subject"), f.text(5, "agency"), f.text(7, "method"), f.text(9, "purpose"), f.text(10, "caseNumber"), granted)
		return c
	case identity.KindRequest:
		c := Claims{District: f.text(1, "district"), Seq: f.number(3, "seq"), Time: f.time(4, "timeUnixNano")}
		what := "asks for priority at"
		if f.flag(17, "cancelled") {
			what = "is cancelled for"
		}
		c.Summary = fmt.Sprintf("request %.64q, revision %d, by %.128q of %.128q: vehicle %.128q %s %d junctions",
			f.text(5, "id"), f.number(6, "revision"), f.text(8, "requester"), f.text(7, "agency"), f.text(10, "vehicle"), what, f.count(13, "stops"))
		return c
	case identity.KindOverride:
		c := Claims{District: f.text(1, "district"), Junction: f.text(6, "junction"), Seq: f.number(3, "seq"), Time: f.time(4, "timeUnixNano")}
		c.Summary = fmt.Sprintf("override %.64q of junction %q by %.128q of %.128q, reason %.64q",
			f.text(5, "id"), c.Junction, f.text(12, "operator"), f.text(11, "agency"), f.text(10, "reason"))
		return c
	case identity.KindDeletion:
		c := Claims{District: f.text(1, "district")}
		c.Summary = fmt.Sprintf("receipt of deletion by %.128q: records let go of, because of: %.40q, class: %.40q",
			f.text(2, "holder"), f.text(3, "reason"), f.text(4, "class"))
		return c
	case identity.KindRedaction:
		return Claims{District: f.text(1, "district"),
			Summary: fmt.Sprintf("redaction of the record at leaf %.20q, with %d approvals", f.text(4, "id"), f.count(8, "approvals"))}
	case identity.KindRegistry:
		c := Claims{District: f.text(1, "district"),
			Summary: fmt.Sprintf("registry change: %.20q of %.20q %.128q", f.text(2, "action"), f.text(3, "type"), f.text(4, "id"))}
		if n := f.count(8, "approvals"); n > 0 {
			c.Summary += fmt.Sprintf(", with %d approvals", n)
		}
		return c
	}
	return Claims{Summary: fmt.Sprintf("%s of %d bytes", e.Kind, len(e.Payload))}
}

// fields are the top-level fields of a message, by protobuf number or JSON name.
type fields struct {
	numbers map[int]uint64
	texts   map[int]string // the last of each
	many    map[int][]string
	counts  map[int]int
	json    map[string]json.RawMessage
}

func readFields(e identity.Envelope) (*fields, bool) {
	if e.ContentType == identity.JSON {
		f := &fields{}
		return f, json.Unmarshal(e.Payload, &f.json) == nil
	}
	f := &fields{numbers: map[int]uint64{}, texts: map[int]string{}, many: map[int][]string{}, counts: map[int]int{}}
	for p := e.Payload; len(p) > 0; {
		tag, w := binary.Uvarint(p)
		if w <= 0 || tag>>3 == 0 || tag>>3 > 1<<20 {
			return nil, false
		}
		p = p[w:]
		n := int(tag >> 3)
		f.counts[n]++
		switch tag & 7 {
		case 0:
			v, w := binary.Uvarint(p)
			if w <= 0 {
				return nil, false
			}
			f.numbers[n], p = v, p[w:]
		case 1, 5:
			w := 8
			if tag&7 == 5 {
				w = 4
			}
			if len(p) < w {
				return nil, false
			}
			p = p[w:]
		case 2:
			l, w := binary.Uvarint(p)
			if w <= 0 || l > uint64(len(p)-w) {
				return nil, false
			}
			p = p[w:]
			f.texts[n], p = string(p[:l]), p[l:]
			f.many[n] = append(f.many[n], f.texts[n])
		default:
			return nil, false
		}
	}
	return f, true
}

// raw returns a JSON field by its name in lowerCamelCase or as in the proto file.
func (f *fields) raw(name string) json.RawMessage {
	if v, ok := f.json[name]; ok {
		return v
	}
	snake := ""
	for _, c := range name {
		if c >= 'A' && c <= 'Z' {
			snake += "_"
			c += 'a' - 'A'
		}
		snake += string(c)
	}
	return f.json[snake]
}

func (f *fields) text(n int, name string) string {
	if f.json == nil {
		return f.texts[n]
	}
	var s string
	if json.Unmarshal(f.raw(name), &s) != nil {
		return ""
	}
	return s
}

// bytes returns a field of bytes, which JSON has in base64.
func (f *fields) bytes(n int, name string) []byte {
	if f.json == nil {
		return []byte(f.texts[n])
	}
	// protojson takes both alphabets, with and without padding.
	s := strings.NewReplacer("-", "+", "_", "/").Replace(strings.TrimRight(f.text(n, name), "="))
	b, err := base64.RawStdEncoding.DecodeString(s)
	if err != nil {
		return nil
	}
	return b
}

func (f *fields) number(n int, name string) uint64 {
	if f.json == nil {
		return f.numbers[n]
	}
	raw := string(f.raw(name))
	if s, err := strconv.Unquote(raw); err == nil { // protojson writes 64-bit integers as strings
		raw = s
	}
	v, err := strconv.ParseUint(raw, 10, 64)
	if err != nil {
		return 0
	}
	return v
}

func (f *fields) flag(n int, name string) bool {
	if f.json == nil {
		return f.numbers[n] != 0
	}
	return string(f.raw(name)) == "true"
}

func (f *fields) count(n int, name string) int {
	if f.json == nil {
		return f.counts[n]
	}
	var l []json.RawMessage
	if json.Unmarshal(f.raw(name), &l) != nil {
		return 0
	}
	return len(l)
}

func (f *fields) time(n int, name string) *time.Time {
	v := int64(f.number(n, name))
	if v == 0 {
		return nil
	}
	t := time.Unix(0, v).UTC()
	return &t
}
