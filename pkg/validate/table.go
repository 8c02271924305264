package validate

// table is a map from names to values whose copies share everything that has
// not changed since: a fixed two-level trie over a hash of the name. Copying it
// costs a kilobyte, however many rows it has. Whoever changes something first
// copies what is not marked with its own owner token.
type table[V any] struct {
	pages [fan]*page[V]
	n     int
}

const fan = 64

// owner marks what one State alone may change. Not empty: pointers to empty
// structs need not differ.
type owner struct{ _ byte }

type page[V any] struct {
	owner   *owner
	buckets [fan]*bucket[V]
}

type bucket[V any] struct {
	owner *owner
	rows  []*row[V]
}

type row[V any] struct {
	owner *owner
	name  string
	v     V
}

// hash is 32-bit FNV-1a. Names come from the registry, so nobody from outside
// can pick them to collide.
func hash(s string) uint32 {
	h := uint32(2166136261)
	for i := range len(s) {
		h = (h ^ uint32(s[i])) * 16777619
	}
	return h ^ h>>16
}

// get returns the value of a name, or nil. It must not be changed.
func (t *table[V]) get(name string) *V {
	h := hash(name)
	p := t.pages[h%fan]
	if p == nil {
		return nil
	}
	b := p.buckets[h/fan%fan]
	if b == nil {
		return nil
	}
	for _, r := range b.rows {
		if r.name == name {
			return &r.v
		}
	}
	return nil
}

// edit returns the value of a name for o to change, the zero value if it is new.
func (t *table[V]) edit(name string, o *owner) *V {
	h := hash(name)
	p := t.pages[h%fan]
	switch {
	case p == nil:
		p = &page[V]{owner: o}
		t.pages[h%fan] = p
	case p.owner != o:
		c := *p
		c.owner = o
		p = &c
		t.pages[h%fan] = p
	}
	b := p.buckets[h/fan%fan]
	switch {
	case b == nil:
		b = &bucket[V]{owner: o}
		p.buckets[h/fan%fan] = b
	case b.owner != o:
		b = &bucket[V]{owner: o, rows: append(make([]*row[V], 0, len(b.rows)+1), b.rows...)}
		p.buckets[h/fan%fan] = b
	}
	for i, r := range b.rows {
		if r.name != name {
			continue
		}
		if r.owner != o {
			c := *r
			c.owner = o
			r = &c
			b.rows[i] = r
		}
		return &r.v
	}
	r := &row[V]{owner: o, name: name}
	b.rows = append(b.rows, r)
	t.n++
	return &r.v
}

// all calls f for every row, in no order that means anything.
func (t *table[V]) all(f func(name string, v *V)) {
	for _, p := range t.pages {
		if p == nil {
			continue
		}
		for _, b := range p.buckets {
			if b == nil {
				continue
			}
			for _, r := range b.rows {
				f(r.name, &r.v)
			}
		}
	}
}
