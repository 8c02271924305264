package hires

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// shared opens a file of the shared data, STOPLINE_SHARED or ../shared beside the
// repository, or skips.
func shared(t testing.TB, name string) *os.File {
	t.Helper()
	dir := os.Getenv("STOPLINE_SHARED")
	if dir == "" { // seen from this package
		dir = filepath.Join("..", "..", "..", "shared")
	}
	f, err := os.Open(filepath.Join(dir, "data", filepath.FromSlash(name)))
	if err == nil {
		t.Cleanup(func() {
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		})
		return f
	}
	if os.Getenv("STOPLINE_REQUIRE_SHARED") == "1" {
		t.Fatalf("%v, and STOPLINE_REQUIRE_SHARED=1 says that it must be there", err)
	}
	t.Skipf("needs %s in the shared data (STOPLINE_SHARED, or ../shared beside the repository); STOPLINE_REQUIRE_SHARED=1 makes this a failure", name)
	return nil
}

func compress(t testing.TB, how string, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	var w io.WriteCloser
	switch how {
	case "gzip":
		w = gzip.NewWriter(&b)
	case "zlib":
		w = zlib.NewWriter(&b)
	default:
		return data
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestShared reads every log of the shared data. The figures were computed with
// another program.
func TestShared(t *testing.T) {
	for _, tt := range []struct {
		name        string
		format      string
		compression string
		events      int
		first, last int64 // ms
		devices     []traffic.DeviceID
		unknown     int // events
		codes       int // unknown codes
		late, neg   int
		sum         int // of all parameters of codes that are known
	}{
		{"hires-odot/odot_hires_test_data.csv.gz", FormatCSV, "gzip", 246413, 1715612400000, 1715623199900, []traffic.DeviceID{"227", "452", "454"}, 2643, 16, 0, 4, 0},
		{"hires-odot/odot_sample_raw_data.csv.gz", FormatCSV, "gzip", 37152, 1713182400000, 1713189598500, []traffic.DeviceID{"1136"}, 762, 12, 0, 0, 0},
		{"hires-udot/1210_ECON_10.204.7.239_2021_08_09_1841.datZ", FormatEconolite, "zlib", 275, 1628534526700, 1628534697100, []traffic.DeviceID{"10.204.7.239"}, 0, 0, 0, 0, 2331},
		{"hires-udot/4895_ECON_10.210.8.179_2024_02_21_1115.dat", FormatEconolite, "", 1914, 1708514101000, 1708514921600, []traffic.DeviceID{"10.210.8.179"}, 0, 0, 0, 0, 21774},
		{"hires-udot/7115Oct22PlanLogs.csv", FormatCSV, "", 291, 1664582400000, 1667174400000, []traffic.DeviceID{"7115"}, 0, 0, 260, 0, 0},
		{"hires-udot/7706PreemptData.csv", FormatCSV, "", 100, 1631903257100, 1655463886800, []traffic.DeviceID{"7706"}, 0, 0, 0, 0, 0},
		{"hires-udot/7706PriorityData.csv", FormatCSV, "", 100, 1631868023600, 1654430139700, []traffic.DeviceID{"7706"}, 0, 0, 0, 0, 0},
		{"hires-udot/CycleEvents.csv", FormatCSV, "", 73, 1681718446000, 1681722046000, []traffic.DeviceID{"7115"}, 0, 0, 0, 0, 0},
		{"hires-udot/PreemptDetaildata.csv", FormatCSV, "", 75, 1681732934500, 1681739668800, []traffic.DeviceID{"7573"}, 0, 0, 0, 0, 0},
	} {
		t.Run(filepath.Base(tt.name), func(t *testing.T) {
			f := shared(t, tt.name)
			n, sum := 0, 0
			s, err := Read(f, Options{}, func(e Event) error {
				n++
				sum += int(e.Param)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if s.Format != tt.format || s.Compression != tt.compression {
				t.Errorf("got %s, compression %q, want %s, %q", s.Format, s.Compression, tt.format, tt.compression)
			}
			if s.Events != tt.events || n != tt.events {
				t.Errorf("got %d events, handed out %d, want %d", s.Events, n, tt.events)
			}
			if s.First != tt.first*1e6 || s.Last != tt.last*1e6 {
				t.Errorf("got %d to %d, want %d to %d ms", s.First, s.Last, tt.first, tt.last)
			}
			if !slices.Equal(s.Devices, tt.devices) {
				t.Errorf("got devices %q, want %q", s.Devices, tt.devices)
			}
			if s.UnknownEvents() != tt.unknown || len(s.Unknown) != tt.codes {
				t.Errorf("got %d unknown events of %d codes, want %d of %d: %v", s.UnknownEvents(), len(s.Unknown), tt.unknown, tt.codes, s.Unknown)
			}
			if s.OutOfOrder != tt.late || s.Negative != tt.neg || s.Rounded != 0 {
				t.Errorf("got %d out of order, %d negative, %d rounded, want %d, %d, 0", s.OutOfOrder, s.Negative, s.Rounded, tt.late, tt.neg)
			}
			if tt.sum != 0 && sum != tt.sum {
				t.Errorf("got a sum of parameters of %d, want %d", sum, tt.sum)
			}
			if _, err := f.Seek(0, io.SeekStart); err != nil {
				t.Fatal(err)
			}
			h := sha256.New()
			size, err := io.Copy(h, f)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := hex.EncodeToString(s.SHA256[:]), hex.EncodeToString(h.Sum(nil)); got != want || s.Size != size {
				t.Errorf("got %s of %d bytes, want %s of %d", got, s.Size, want, size)
			}
		})
	}
}

// logs are one of each format, each with three events.
func logs() map[string]string {
	return map[string]string{
		FormatCSV:       "TimeStamp,DeviceId,EventId,Parameter\n1628510400400,a,82,1\n1628510400500,a,81,1\n1628510401000,b,300,-1\n",
		FormatEconolite: dat(rec(82, 1, 0), rec(81, 1, 1), rec(27, 1, 6)),
	}
}

// TestCompressed reads each format under each compression, all at once and byte
// by byte.
func TestCompressed(t *testing.T) {
	for format, log := range logs() {
		want, plain, err := readAll(t, log, Options{})
		if err != nil || len(want) != 3 {
			t.Fatalf("%s: got %q, %v, want three events", format, want, err)
		}
		for _, how := range []string{"", "gzip", "zlib"} {
			packed := compress(t, how, []byte(log))
			for name, r := range map[string]io.Reader{
				"at once":           bytes.NewReader(packed),
				"byte by byte":      iotest.OneByteReader(bytes.NewReader(packed)),
				"data with its end": iotest.DataErrReader(bytes.NewReader(packed)),
			} {
				var got []Event
				s, err := Read(r, Options{}, func(e Event) error {
					got = append(got, e)
					return nil
				})
				if err != nil {
					t.Errorf("%s %s %s: %v", format, how, name, err)
					continue
				}
				if s.Format != format || s.Compression != how || len(got) != 3 || s.Events != 3 || s.First != plain.First || s.Last != plain.Last || !maps.Equal(s.Unknown, plain.Unknown) {
					t.Errorf("%s %s %s: got %+v", format, how, name, s)
				}
				if s.SHA256 != sha256.Sum256(packed) || s.Size != int64(len(packed)) {
					t.Errorf("%s %s %s: the digest is not that of the %d bytes", format, how, name, len(packed))
				}
			}
		}
	}
}

// TestGzipMembers reads two gzip files one after the other, as gzip allows.
func TestGzipMembers(t *testing.T) {
	packed := append(compress(t, "gzip", []byte("a,2024-05-13 15:00:00,82,1\na,2024-05-13 15:")), compress(t, "gzip", []byte("00:01,81,1\n"))...)
	got, s, err := readAll(t, string(packed), Options{})
	if err != nil || len(got) != 2 || s.Size != int64(len(packed)) {
		t.Errorf("got %q, %v, want two events", got, err)
	}
}

// TestCutOff cuts compressed logs off after every byte: what was whole has been
// handed out, and the error says that the log is cut off.
func TestCutOff(t *testing.T) {
	for format, log := range logs() {
		for _, how := range []string{"gzip", "zlib"} {
			packed := compress(t, how, []byte(log))
			most := 0
			for n := range packed {
				if n == 1 {
					continue // one byte says nothing of compression
				}
				got, s, err := readAll(t, string(packed[:n]), Options{})
				if !errors.Is(err, ErrTruncated) || kind.Of(err) != kind.Invalid {
					t.Fatalf("%s %s: %d of %d bytes: got %v, want an error that says that the log is cut off", format, how, n, len(packed), err)
				}
				if s.Size != int64(n) || s.SHA256 != sha256.Sum256(packed[:n]) {
					t.Errorf("%s %s: %d of %d bytes: the digest is not that of what was there", format, how, n, len(packed))
				}
				most = max(most, len(got))
			}
			// Without the checksum at the end all events are there.
			if most != 3 {
				t.Errorf("%s %s: got at most %d events of a log that is cut off, want 3", format, how, most)
			}
		}
	}
	for _, tt := range []struct{ how, want string }{
		{"gzip", "line 5: byte 102: gzip ends too early: the log is cut off"},
		{"zlib", "line 5: byte 102: zlib ends too early: the log is cut off"},
	} {
		packed := compress(t, tt.how, []byte(logs()[FormatCSV]))
		if _, _, err := readAll(t, string(packed[:len(packed)-1]), Options{}); err == nil || err.Error() != tt.want {
			t.Errorf("got %v, want %s", err, tt.want)
		}
	}
}

func TestDamaged(t *testing.T) {
	gz, zl := compress(t, "gzip", []byte(logs()[FormatCSV])), compress(t, "zlib", []byte(logs()[FormatEconolite]))
	flip := func(b []byte, i int) string {
		b = bytes.Clone(b)
		b[i] ^= 0xff
		return string(b)
	}
	for _, tt := range []struct {
		name, log string
		events    int
		want      string
	}{
		{"gzip checksum", flip(gz, len(gz)-5), 3, "line 5: byte 102: gzip: invalid checksum"},
		{"gzip method", flip(gz, 2), 0, "byte 0: gzip: invalid header"},
		{"data after gzip", string(gz) + "hello, world", 3, "line 5: byte 102: gzip: invalid header"},
		{"zlib checksum", flip(zl, len(zl)-1), 3, fmt.Sprintf("byte %d: zlib: invalid checksum", len(dat())+12)},
		{"zlib dictionary", "\x78\xbb\x00\x00\x00\x00", 0, "byte 0: zlib: invalid dictionary"},
		{"data after zlib", string(zl) + "x", 3, "zlib: data after the end of the compressed log"},
		{"nothing in gzip", string(compress(t, "gzip", nil)), 0, "the log is empty: the log is cut off"},
		{"gzip in gzip", string(compress(t, "gzip", gz)), 0, "line 1: neither a header nor an event: this is not a log that we know"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, _, err := readAll(t, tt.log, Options{})
			if err == nil || err.Error() != tt.want {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
			if kind.Of(err) != kind.Invalid {
				t.Errorf("got kind %s, want invalid", kind.Of(err))
			}
			if len(got) != tt.events {
				t.Errorf("got %d events before the error, want %d", len(got), tt.events)
			}
		})
	}
}

// TestSourceFails lets the source fail after each byte: its error comes back, and
// is not taken for a fault of the log.
func TestSourceFails(t *testing.T) {
	broken := errors.New("disk on fire")
	for format, log := range logs() {
		for _, how := range []string{"", "gzip", "zlib"} {
			packed := compress(t, how, []byte(log))
			for n := 0; n <= len(packed); n++ {
				_, err := Read(io.MultiReader(bytes.NewReader(packed[:n]), iotest.ErrReader(broken)), Options{}, func(Event) error { return nil })
				if !errors.Is(err, broken) || errors.Is(err, ErrTruncated) || kind.Of(err) != kind.Internal || !strings.HasPrefix(err.Error(), "reading the log: ") {
					t.Fatalf("%s %q: after %d of %d bytes: got %v, want the error of the source", format, how, n, len(packed), err)
				}
			}
		}
	}
}

// TestStop ends the reading with an error of the function.
func TestStop(t *testing.T) {
	stop := errors.New("enough")
	for format, log := range logs() {
		n := 0
		s, err := Read(strings.NewReader(log), Options{}, func(Event) error {
			if n++; n == 2 {
				return stop
			}
			return nil
		})
		if !errors.Is(err, stop) || n != 2 || s.Events != 2 {
			t.Errorf("%s: got %v after %d events, summary %d, want the function's error after 2", format, err, n, s.Events)
		}
	}
}

// zeros are bytes without end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// TestBomb reads what unpacks to much more than it is: 32 MiB in a line, and
// 10 MB of good events, with little memory.
func TestBomb(t *testing.T) {
	if testing.Short() {
		t.Skip("packs 40 MB")
	}
	var line, events bytes.Buffer
	w := gzip.NewWriter(&line)
	if _, err := io.CopyN(w, zeros{}, 32<<20); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := readAll(t, line.String(), Options{}); err == nil || err.Error() != "line 1: longer than 4096 bytes" {
		t.Errorf("got %v", err)
	}

	w = gzip.NewWriter(&events)
	many := strings.Repeat("1628510400400,a,82,1\n", 5000)
	for range 100 {
		if _, err := io.WriteString(w, many); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	s, err := Read(&events, Options{}, func(Event) error { return nil })
	runtime.ReadMemStats(&after)
	if err != nil || s.Events != 500_000 {
		t.Errorf("got %d events, %v, want 500000", s.Events, err)
	}
	if got := after.TotalAlloc - before.TotalAlloc; got > 1<<20 {
		t.Errorf("reading 10 MB took %d bytes of memory in all, want at most 1 MiB", got)
	}
}

func BenchmarkRead(b *testing.B) {
	odot, err := io.ReadAll(shared(b, "hires-odot/odot_hires_test_data.csv.gz"))
	if err != nil {
		b.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(odot))
	if err != nil {
		b.Fatal(err)
	}
	plain, err := io.ReadAll(z)
	if err != nil {
		b.Fatal(err)
	}
	text := "227,2022-10-03 06:00:00.0000000,131,1\n" + strings.Repeat("227,2022-10-03 06:00:00.1000000,82,12\n", 100_000)
	records := dat(strings.Repeat(rec(82, 12, 4000), 100_000))
	for _, bb := range []struct {
		name string
		data []byte
		o    Options
	}{
		{"csv/gzip", odot, Options{}},
		{"csv/plain", plain, Options{}},
		{"csv/text", []byte(text), Options{}},
		{"csv/text/zone", []byte(text), Options{Zone: zone(b, "America/Denver")}},
		{"econolite", []byte(records), Options{}},
	} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				s, err := Read(bytes.NewReader(bb.data), bb.o, func(Event) error { return nil })
				if err != nil {
					b.Fatal(err)
				}
				n += s.Events
			}
			b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "events/s")
		})
	}
}
