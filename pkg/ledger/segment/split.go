package segment

import (
	"bytes"
	"encoding/binary"
)

// ParseHeader decodes a segment's header, and says whether there is one.
func ParseHeader(b []byte) (first uint64, ok bool) {
	if len(b) < HeaderSize {
		return 0, false
	}
	first = binary.BigEndian.Uint64(b[len(magic):])
	return first, bytes.Equal(b[:HeaderSize], AppendHeader(nil, first))
}

// Split reads the first frame of b, which must be that of a record. Data shares
// memory with b. size is what the frame takes; it is 0 where b ends within the
// frame, and then more says how many bytes b must have to go on. A rule says what
// is wrong; data is what the frame holds all the same where only its checksum or
// end mark is wrong.
func Split(b []byte, record uint64) (data []byte, size, more int, rule string) {
	if len(b) < frameHead {
		return nil, 0, frameHead, ""
	}
	h, ok := parseHead(b)
	switch {
	case !ok:
		return nil, 0, 0, "frame header: marker or checksum is wrong"
	case h.record != record:
		return nil, 0, 0, "frame header: is of another record"
	}
	size = h.length + Overhead
	if len(b) < size {
		return nil, 0, size, ""
	}
	body := b[frameHead:size]
	return body[:h.length:h.length], size, 0, h.check(body)
}

// Find returns where in b the next frame begins that is of record from or a later
// one, below limit: reading goes on there after damage. Data may hold bytes that
// look like a frame; what is read must be checked by other means than its place.
func Find(b []byte, from, limit uint64) (at int, record uint64, ok bool) {
	for at < len(b) {
		i := bytes.Index(b[at:], marker[:])
		if i < 0 {
			break
		}
		at += i
		if h, good := parseHead(b[at:]); good && h.record >= from && h.record < limit {
			return at, h.record, true
		}
		at++
	}
	return 0, 0, false
}
