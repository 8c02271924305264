package ledger

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// zipFile is one file of an archive.
type zipFile struct {
	name string
	data []byte
}

// Records of the ZIP format (APPNOTE.TXT 6.3.10, §4.3) and the values that every
// field without meaning here has: version 1.0, MS-DOS date 1980-01-01.
const (
	zipLocal   = 0x04034b50
	zipCentral = 0x02014b50
	zipEnd     = 0x06054b50
	zipVersion = 10
	zipDate    = 1<<5 | 1
)

// writeZip makes the one archive that these files have: stored in the order
// given, without times, attributes, comments or extra fields. The reader accepts
// no other, so that nothing can hide between the parts that are read.
func writeZip(files []zipFile) []byte {
	le := binary.LittleEndian
	common := func(b []byte, f zipFile) []byte {
		b = le.AppendUint16(b, zipVersion)
		b = le.AppendUint16(b, 0) // flags
		b = le.AppendUint16(b, 0) // method: stored
		b = le.AppendUint16(b, 0) // time
		b = le.AppendUint16(b, zipDate)
		b = le.AppendUint32(b, crc32.ChecksumIEEE(f.data))
		b = le.AppendUint32(b, uint32(len(f.data)))
		b = le.AppendUint32(b, uint32(len(f.data)))
		b = le.AppendUint16(b, uint16(len(f.name)))
		return le.AppendUint16(b, 0) // extra
	}
	var b, dir []byte
	for _, f := range files {
		at := len(b)
		b = le.AppendUint32(b, zipLocal)
		b = common(b, f)
		b = append(b, f.name...)
		b = append(b, f.data...)
		dir = le.AppendUint32(dir, zipCentral)
		dir = le.AppendUint16(dir, zipVersion) // made by
		dir = common(dir, f)
		dir = append(dir, make([]byte, 2+2+2+4)...) // comment, disk, attributes
		dir = le.AppendUint32(dir, uint32(at))
		dir = append(dir, f.name...)
	}
	at, n := len(b), uint16(len(files))
	b = append(b, dir...)
	b = le.AppendUint32(b, zipEnd)
	b = append(b, make([]byte, 4)...) // disks
	b = le.AppendUint16(b, n)
	b = le.AppendUint16(b, n)
	b = le.AppendUint32(b, uint32(len(dir)))
	b = le.AppendUint32(b, uint32(at))
	return le.AppendUint16(b, 0) // comment
}

// readZip reads what writeZip wrote, and nothing else. The files share memory
// with b.
func readZip(b []byte, maxFiles int) ([]zipFile, *Finding) {
	const head = 30
	le := binary.LittleEndian
	var files []zipFile
	p := b
	for len(p) >= head && le.Uint32(p) == zipLocal {
		size, n := uint64(le.Uint32(p[18:])), uint64(le.Uint16(p[26:]))
		if len(files) == maxFiles {
			return nil, &Finding{Reason: fmt.Sprintf("archive: more than %d files", maxFiles)}
		}
		at := len(b) - len(p)
		if uint64(len(p)) < head+n+size {
			return nil, &Finding{Reason: fmt.Sprintf("archive: cut within the file at offset %d", at)}
		}
		f := zipFile{name: string(p[head : head+n]), data: p[head+n : head+n+size : head+n+size]}
		if crc32.ChecksumIEEE(f.data) != le.Uint32(p[14:]) {
			return nil, &Finding{File: f.name, Reason: "archive: checksum of the file is wrong"}
		}
		files = append(files, f)
		p = p[head+n+size:]
	}
	want := writeZip(files)
	if !bytes.Equal(want, b) {
		at := 0
		for at < len(b) && at < len(want) && b[at] == want[at] {
			at++
		}
		return nil, &Finding{Reason: fmt.Sprintf("archive: differs at offset %d from the one form that bundles have", at)}
	}
	return files, nil
}
