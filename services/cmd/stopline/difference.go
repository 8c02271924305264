package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode"
)

// difference lists, by path, in what two JSON documents differ; old may be empty.
// Officials decide by it, so it leaves nothing out: both must not have a name
// twice in one object, which proposals are checked for.
func difference(old, now []byte) ([]string, error) {
	b, err := document(now)
	if err != nil {
		return nil, err
	}
	if len(old) == 0 {
		var d differ
		d.all("+", "", b)
		return d, nil
	}
	a, err := document(old)
	if err != nil {
		return nil, err
	}
	var d differ
	d.compare("", a, b)
	return d, nil
}

func document(b []byte) (v any, err error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	return v, d.Decode(&v)
}

type differ []string

func (d *differ) compare(path string, a, b any) {
	switch a := a.(type) {
	case map[string]any:
		if b, ok := b.(map[string]any); ok {
			for _, k := range keys(a, b) {
				x, was := a[k]
				y, is := b[k]
				switch at := path + "." + printable(k); {
				case !is:
					d.all("-", at, x)
				case !was:
					d.all("+", at, y)
				default:
					d.compare(at, x, y)
				}
			}
			return
		}
	case []any:
		if b, ok := b.([]any); ok {
			for i := range max(len(a), len(b)) {
				switch at := fmt.Sprintf("%s[%d]", path, i); {
				case i >= len(b):
					d.all("-", at, a[i])
				case i >= len(a):
					d.all("+", at, b[i])
				default:
					d.compare(at, a[i], b[i])
				}
			}
			return
		}
	default:
		if a == b { // scalars of JSON, all comparable
			return
		}
	}
	if old, now := text(a), text(b); !compound(a) && !compound(b) {
		*d = append(*d, fmt.Sprintf("~ %s: %s -> %s", name(path), old, now))
		return
	}
	d.all("-", path, a)
	d.all("+", path, b)
}

// all lists every value under a path.
func (d *differ) all(sign, path string, v any) {
	switch v := v.(type) {
	case map[string]any:
		for _, k := range keys(v, nil) {
			d.all(sign, path+"."+printable(k), v[k])
		}
		if len(v) > 0 {
			return
		}
	case []any:
		for i, x := range v {
			d.all(sign, fmt.Sprintf("%s[%d]", path, i), x)
		}
		if len(v) > 0 {
			return
		}
	}
	*d = append(*d, fmt.Sprintf("%s %s: %s", sign, name(path), text(v)))
}

func compound(v any) bool {
	switch v.(type) {
	case map[string]any, []any:
		return true
	}
	return false
}

func keys(a, b map[string]any) []string {
	k := slices.AppendSeq(slices.Collect(maps.Keys(a)), maps.Keys(b))
	slices.Sort(k)
	return slices.Compact(k)
}

func name(path string) string {
	if path = strings.TrimPrefix(path, "."); path == "" {
		return "the document"
	}
	return path
}

func text(v any) string {
	switch v := v.(type) {
	case nil:
		return "null"
	case string:
		return fmt.Sprintf("%q", v)
	case map[string]any:
		return "{}" // only where it is empty
	case []any:
		return "[]"
	}
	return fmt.Sprint(v)
}

// printable quotes names that could be taken for something else in a path.
func printable(k string) string {
	if k == "" || strings.ContainsFunc(k, func(r rune) bool { return r != '_' && r != '-' && !unicode.IsLetter(r) && !unicode.IsDigit(r) }) {
		return fmt.Sprintf("%q", k)
	}
	return k
}

// clean makes text of others safe for a terminal: what does not print, but for
// line ends, is shown as an escape.
func clean(s string) string {
	if !strings.ContainsFunc(s, hidden) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if hidden(r) {
			q := fmt.Sprintf("%q", r)
			b.WriteString(q[1 : len(q)-1])
		} else {
			b.WriteRune(r)
		}
	}
	return b.String()
}

func hidden(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }
