package hires

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// fuzzRead reads a log whole and byte by byte, and holds both to the same events,
// and the events and the error to what is promised.
func fuzzRead(t *testing.T, data []byte, o Options) ([]Event, Summary, error) {
	t.Helper()
	read := func(r io.Reader) (events []Event, s Summary, err error) {
		s, err = Read(r, o, func(e Event) error {
			events = append(events, e)
			return nil
		})
		return events, s, err
	}
	events, s, err := read(bytes.NewReader(data))
	slow, _, slowErr := read(iotest.OneByteReader(bytes.NewReader(data)))
	if !slices.Equal(events, slow) || fmt.Sprint(err) != fmt.Sprint(slowErr) {
		t.Fatalf("byte by byte: got %d events, %v, want %d, %v", len(slow), slowErr, len(events), err)
	}
	if err != nil && kind.Of(err) != kind.Invalid {
		t.Fatalf("got kind %s, want invalid: %v", kind.Of(err), err)
	}
	if s.Events != len(events) {
		t.Fatalf("summary: got %d events, want %d", s.Events, len(events))
	}
	devices := map[string]bool{}
	unknown, late := 0, 0
	newest := map[string]int64{}
	first, last := int64(0), int64(0)
	for i, e := range events {
		if e.At < minTime || e.At >= maxTime || e.At%milli != 0 || e.Device == "" || len(e.Device) > 512 {
			t.Fatalf("got event %+v", e)
		}
		id := string(e.Device)
		devices[id] = true
		if !Known(e.Code) {
			unknown++
		}
		if e.At < newest[id] {
			late++
		}
		newest[id] = max(newest[id], e.At)
		if i == 0 || e.At < first {
			first = e.At
		}
		last = max(last, e.At)
	}
	if s.UnknownEvents() != unknown || s.OutOfOrder != late || s.First != first || s.Last != last {
		t.Fatalf("got %+v, want %d unknown, %d late, %d to %d", s, unknown, late, first, last)
	}
	if len(s.Devices) < len(devices) || len(s.Devices) > len(devices)+1 { // one more where its event was refused
		t.Fatalf("got devices %q, want %d", s.Devices, len(devices))
	}
	return events, s, err
}

// seeds adds the small files of the shared data where they are.
func seeds(f *testing.F, names ...string) {
	dir := os.Getenv("STOPLINE_SHARED")
	if dir == "" {
		dir = "../../../shared"
	}
	for _, n := range names {
		if b, err := os.ReadFile(dir + "/data/hires-udot/" + n); err == nil {
			f.Add(b[:min(len(b), 2000)])
		}
	}
}

// csvField quotes a field for CSV.
func csvField(s string) string { return `"` + strings.ReplaceAll(s, `"`, `""`) + `"` }

// FuzzCSV reads any CSV. What was read, written plainly, is read as the same.
func FuzzCSV(f *testing.F) {
	f.Add([]byte(logs()[FormatCSV]))
	f.Add([]byte("\xef\xbb\xbf227,2024-05-13 15:00:00.5000000,82,27\r\n227,2024-05-13T08:00:00.5-07:00,82,27"))
	f.Add([]byte("Location Id,Timestamp,Event Code,Event Parameter\n\"a \"\"b\"\", c\",5/13/2024 3:00:00.50 PM,82,-27\n"))
	f.Add([]byte("1628510400400500,82,1\n"))
	seeds(f, "7115Oct22PlanLogs.csv", "CycleEvents.csv", "PreemptDetaildata.csv", "7706PriorityData.csv")
	f.Fuzz(func(t *testing.T, data []byte) {
		if bytes.HasPrefix(data, []byte{0x1f, 0x8b}) || bytes.HasPrefix(data, []byte{0x78}) {
			t.Skip("FuzzRead does compression")
		}
		events, s, err := fuzzRead(t, data, Options{Device: "x", Round: true})
		if s.Format == FormatEconolite {
			t.Skip("FuzzEconolite does that")
		}
		if err != nil && !strings.HasPrefix(err.Error(), "line ") && len(data) > 0 {
			t.Fatalf("got %v, want an error that names the line", err)
		}
		var plain strings.Builder
		plain.WriteString("TimeStamp,DeviceId,EventId,Parameter\n")
		for _, e := range events {
			fmt.Fprintf(&plain, "%d,%s,%d,%d\n", e.At, csvField(string(e.Device)), e.Code, e.Param)
		}
		again, _, err := fuzzRead(t, []byte(plain.String()), Options{})
		if err != nil || !slices.Equal(again, events) {
			t.Fatalf("written and read again: got %v, %v, want %v", again, err, events)
		}
	})
}

// FuzzEconolite reads any records: each gives its event, and its tenths.
func FuzzEconolite(f *testing.F) {
	f.Add([]byte(rec(82, 27, 0) + rec(81, 27, 65535) + rec(0, 0, 3)))
	f.Add([]byte(rec(82, 27, 40000) + rec(81, 27, 1) + "\x01\x02\x03"))
	f.Add([]byte("\n\n\n\n\r\n\r\n"))
	f.Fuzz(func(t *testing.T, body []byte) {
		header := dat()
		events, s, err := fuzzRead(t, append([]byte(header), body...), Options{})
		if len(events) != len(body)/4 || s.Format != FormatEconolite {
			t.Fatalf("got %d events of %s, want %d", len(events), s.Format, len(body)/4)
		}
		switch rest := len(body) % 4; {
		case rest == 0 && err != nil:
			t.Fatal(err)
		case rest != 0:
			want := fmt.Sprintf("byte %d: record: %d bytes of 4: the log is cut off", len(header)+len(body)-rest, rest)
			if !errors.Is(err, ErrTruncated) || err.Error() != want {
				t.Fatalf("got %v, want %s", err, want)
			}
		}
		const begin = noon + 400*milli
		before := int64(0)
		for i, e := range events {
			r := body[4*i:]
			tenths := (e.At - begin) / (100 * milli)
			if e.Code != uint16(r[0]) || e.Param != uint16(r[1]) || tenths%turn != int64(r[2])<<8|int64(r[3]) || tenths < 0 {
				t.Fatalf("record %d: % x: got %+v, %d tenths", i, r[:4], e, tenths)
			}
			if step := tenths - before; step < -turn/2 || step >= turn-late {
				if before >= turn || step < 0 { // in the first turn nothing can be late from the one before
					t.Fatalf("record %d: a step of %d tenths", i, step)
				}
			}
			before = tenths
		}
	})
}

// FuzzRead reads anything. Packed, it is the same; packed and cut off, it is the
// beginning, and an error.
func FuzzRead(f *testing.F) {
	for _, log := range logs() {
		f.Add([]byte(log), uint16(30))
		f.Add(compress(f, "gzip", []byte(log)), uint16(0))
		f.Add(compress(f, "zlib", []byte(log)), uint16(1))
	}
	f.Add([]byte(dat()), uint16(5))
	f.Fuzz(func(t *testing.T, data []byte, cut uint16) {
		o := Options{Device: "x"}
		events, s, err := fuzzRead(t, data, o)
		if s.Size > int64(len(data)) || err == nil && s.Size != int64(len(data)) {
			t.Fatalf("got %d bytes read, %v, want all %d", s.Size, err, len(data))
		}
		if s.Compression != "" {
			return
		}
		for _, how := range []string{"gzip", "zlib"} {
			packed := compress(t, how, data)
			same, ps, perr := fuzzRead(t, packed, o)
			if bytes.HasPrefix(data, []byte{0x1f, 0x8b}) || bytes.HasPrefix(data, []byte{0x78}) {
				continue // its compression is damaged; packed, it is no log at all
			}
			if !slices.Equal(events, same) || ps.Compression != how || ps.Format != s.Format || (perr == nil) != (err == nil) {
				t.Fatalf("%s: got %d events of %s, %v, want %d of %s, %v", how, len(same), ps.Format, perr, len(events), s.Format, err)
			}
			part, _, cerr := fuzzRead(t, packed[:int(cut)%len(packed)], o)
			if cerr == nil || len(part) > len(events) || !slices.Equal(part, events[:len(part)]) {
				t.Fatalf("%s, cut off: got %d events, %v, want a beginning of %d, and an error", how, len(part), cerr, len(events))
			}
		}
	})
}
