package hires

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
	_ "time/tzdata"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// readAll returns the events of a log as text, one a line.
func readAll(t *testing.T, log string, o Options) ([]string, Summary, error) {
	t.Helper()
	var got []string
	s, err := Read(strings.NewReader(log), o, func(e Event) error {
		got = append(got, fmt.Sprintf("%s %s %d %d", time.Unix(0, e.At).UTC().Format("2006-01-02T15:04:05.999999999"), e.Device, e.Code, e.Param))
		return nil
	})
	if s.Events != len(got) {
		t.Errorf("summary: got %d events, %d were handed out", s.Events, len(got))
	}
	return got, s, err
}

func zone(t testing.TB, name string) *time.Location {
	t.Helper()
	z, err := time.LoadLocation(name)
	if err != nil {
		t.Fatal(err)
	}
	return z
}

func TestCSV(t *testing.T) {
	denver := zone(t, "America/Denver")
	const event = "2024-05-13T15:00:00.5 227 82 27"
	for _, tt := range []struct {
		name, log string
		o         Options
		want      string // events, joined by ;
	}{
		{"nanoseconds", "TimeStamp,DeviceId,EventId,Parameter\n1715612400500000000,227,82,27\n", Options{}, event},
		{"microseconds", "TimeStamp,DeviceId,EventId,Parameter\n1715612400500000,227,82,27\n", Options{}, event},
		{"milliseconds", "TimeStamp,DeviceId,EventId,Parameter\n1715612400500,227,82,27\n", Options{}, event},
		{"seconds", "TimeStamp,DeviceId,EventId,Parameter\n1715612400,227,82,27\n", Options{}, "2024-05-13T15:00:00 227 82 27"},
		{"smallest of each unit", "time,device,code,param\n100000000,a,1,1\n100000000000,a,1,1\n100000000000000,a,1,1\n100000000000000000,a,1,1\n", Options{},
			strings.TrimSuffix(strings.Repeat("1973-03-03T09:46:40 a 1 1;", 4), ";")},
		{"no header, device first", "227,2024-05-13 15:00:00.5000000,82,27\n", Options{}, event},
		{"no header, time first", "1715612400500000000,227,82,27\n", Options{}, event},
		{"no header, no device", "1715612400500000000,82,27\n", Options{Device: "227"}, event},
		{"device of the file wins", "227,2024-05-13 15:00:00.5,82,27\n", Options{Device: "x"}, event},
		{"byte order mark", "\xef\xbb\xbf227,2024-05-13 15:00:00.5,82,27\n", Options{}, event},
		{"byte order mark and header", "\xef\xbb\xbfTimeStamp,DeviceId,EventId,Parameter\n1715612400500,227,82,27\n", Options{}, event},
		{"names of Utah", "Location Id,Timestamp,Event Code,Event Parameter\n227,5/13/2024 15:00:00.50,82,27\n", Options{}, event},
		{"names of Utah, joined", "locationId,Timestamp,EventCode,EventParameter\n227,5/13/2024 15:0:0.50,82,27\n", Options{}, event},
		{"another order and more columns", ",Param,Signal_ID,Remark,EVENT CODE,Date-Time\n0,27,227,none,82,2024-05-13 15:00:00.5\n", Options{}, event},
		{"no column for the device", "Timestamp,EventId,Parameter\n1715612400500,82,27\n", Options{Device: "227"}, event},
		{"quotes", "\"TimeStamp\",\"DeviceId\",EventId,Parameter\n\"5/13/2024 3:00:00.5 PM\",\"a \"\"b\"\", c\",82,\"27\"\n", Options{}, `2024-05-13T15:00:00.5 a "b", c 82 27`},
		{"quoted and empty at the end", "TimeStamp,DeviceId,EventId,Parameter,Remark\n1715612400500,227,82,27,\"\"\n1715612400500,227,82,27,\n", Options{}, event + ";" + event},
		{"blanks, blank lines, CR LF", "\r\nTimeStamp , DeviceId, EventId, Parameter\r\n\r\n 1715612400500 , 227 , 82 , 27 \r\n\n", Options{}, event},
		{"no end of line", "227,2024-05-13 15:00:00.5,82,27", Options{}, event},
		{"zone", "227,2024-05-13 09:00:00.5,82,27\n", Options{Zone: denver}, event},
		{"zone of the stamp wins", "227,2024-05-13T15:00:00.5Z,82,27\n227,2024-05-13T08:00:00.5-07:00,82,27\n227,2024-05-13 17:00:00.5+0200,82,27\n", Options{Zone: denver},
			event + ";" + event + ";" + event},
		{"integers know no zone", "1715612400500000000,227,82,27\n", Options{Zone: denver}, event},
		{"noon and midnight", "d,5/13/2024 12:00:00 AM,1,1\nd,5/13/2024 12:00:00 pm,1,1\nd,5/13/2024 1:00:00 am,1,1\nd,5/13/2024 11:59:59 PM,1,1\n", Options{},
			"2024-05-13T00:00:00 d 1 1;2024-05-13T12:00:00 d 1 1;2024-05-13T01:00:00 d 1 1;2024-05-13T23:59:59 d 1 1"},
		{"zeros beyond nanoseconds", "227,2024-05-13 15:00:00.500000000000,82,27\n", Options{}, event},
		{"leap day", "d,2024-02-29 00:00:00,1,1\n", Options{}, "2024-02-29T00:00:00 d 1 1"},
		{"largest numbers", "d,2024-02-29 00:00:00,65535,65535\n", Options{}, "2024-02-29T00:00:00 d 65535 65535"},
		{"negative parameter", "d,2024-02-29 00:00:00,400,-1\nd,2024-02-29 00:00:00,400,-32768\n", Options{}, "2024-02-29T00:00:00 d 400 65535;2024-02-29T00:00:00 d 400 32768"},
		{"header alone", "TimeStamp,DeviceId,EventId,Parameter\n", Options{}, ""},
		{"finer than a millisecond, rounded", "d,2024-02-29 00:00:00.0004999,1,1\nd,2024-02-29 00:00:00.700000048,1,1\nd,2024-02-29 23:59:59.9995,1,1\n", Options{Round: true},
			"2024-02-29T00:00:00 d 1 1;2024-02-29T00:00:00.7 d 1 1;2024-03-01T00:00:00 d 1 1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, s, err := readAll(t, tt.log, tt.o)
			if err != nil {
				t.Fatal(err)
			}
			if g := strings.Join(got, ";"); g != tt.want {
				t.Errorf("got  %s\nwant %s", g, tt.want)
			}
			if s.Format != FormatCSV || s.Compression != "" || s.Size != int64(len(tt.log)) {
				t.Errorf("got format %q, compression %q, %d bytes, want csv without, %d", s.Format, s.Compression, s.Size, len(tt.log))
			}
		})
	}
}

func TestCSVErrors(t *testing.T) {
	const head = "TimeStamp,DeviceId,EventId,Parameter\n"
	const good = "1715612400500,227,82,27\n"
	for _, tt := range []struct {
		name, log string
		o         Options
		events    int
		want      string
		cut       bool
	}{
		{"not a time", head + good + "x,227,82,27\n", Options{}, 1, `line 3: TimeStamp: "x" is not a time`, false},
		{"no time", head + ",227,82,27\n", Options{}, 0, `line 2: TimeStamp: "" is not a time`, false},
		{"small integer", head + "99999999,227,82,27\n", Options{}, 0, `line 2: TimeStamp: "99999999" is not a time: less than 1e8, which is 1973 in seconds`, false},
		{"negative time", head + "-1715612400500,227,82,27\n", Options{}, 0, `line 2: TimeStamp: "-1715612400500" is not a time`, false},
		{"beyond 64 bits", head + "9999999999999999999,227,82,27\n", Options{}, 0, `line 2: TimeStamp: "9999999999999999999" is not a time`, false},
		{"beyond nanoseconds", head + "9223372036854775807,227,82,27\n", Options{}, 0, `line 2: TimeStamp: "9223372036854775807" is not between 1973-03-03 and 2261-12-31`, false},
		{"early text", head + "1973-03-03 00:00:00,227,82,27\n", Options{}, 0, `line 2: TimeStamp: "1973-03-03 00:00:00" is not between 1973-03-03 and 2261-12-31`, false},
		{"very early text", head + "0001-01-01 00:00:00,227,82,27\n", Options{}, 0, `line 2: TimeStamp: "0001-01-01 00:00:00" is not between 1973-03-03 and 2261-12-31`, false},
		{"late text", head + "2262-01-01 00:00:00,227,82,27\n", Options{}, 0, `line 2: TimeStamp: "2262-01-01 00:00:00" is not between 1973-03-03 and 2261-12-31`, false},
		{"30 February", head + "2024-02-30 00:00:00,227,82,27\n", Options{}, 0, `line 2: TimeStamp: "2024-02-30 00:00:00" is not a time`, false},
		{"hour 24", head + "2024-02-28 24:00:00,227,82,27\n", Options{}, 0, `line 2: TimeStamp: "2024-02-28 24:00:00" is not a time`, false},
		{"second 60", head + "2024-02-28 23:59:60,227,82,27\n", Options{}, 0, `line 2: TimeStamp: "2024-02-28 23:59:60" is not a time`, false},
		{"13 PM", head + "2/28/2024 13:00:00 PM,227,82,27\n", Options{}, 0, `line 2: TimeStamp: "2/28/2024 13:00:00 PM" is not a time`, false},
		{"month 13", head + "13/2/2024 13:00:00,227,82,27\n", Options{}, 0, `line 2: TimeStamp: "13/2/2024 13:00:00" is not a time`, false},
		{"point without digits", head + "2024-02-28 00:00:00.,227,82,27\n", Options{}, 0, `line 2: TimeStamp: "2024-02-28 00:00:00." is not a time`, false},
		{"beyond nanoseconds in a text", head + "2024-02-28 00:00:00.0000000001,227,82,27\n", Options{}, 0, `line 2: TimeStamp: "2024-02-28 00:00:00.0000000001" is not a time`, false},
		{"offset", head + "2024-02-28 00:00:00+99:00,227,82,27\n", Options{}, 0, `line 2: TimeStamp: "2024-02-28 00:00:00+99:00" is not a time`, false},
		{"text behind", head + "2024-02-28 00:00:00 UTC,227,82,27\n", Options{}, 0, `line 2: TimeStamp: "2024-02-28 00:00:00 UTC" is not a time`, false},
		{"finer than a millisecond", head + good + "1715612400500001,227,82,27\n", Options{}, 1, `line 3: TimeStamp: "1715612400500001" is finer than a millisecond`, false},
		{"skipped by the clocks", "Location Id,Timestamp,Event Code,Event Parameter\n1,3/10/2024 2:30:00,1,1\n", Options{Zone: zone(t, "America/Denver")}, 0,
			`line 2: Timestamp: "3/10/2024 2:30:00" was skipped by the clocks of America/Denver`, false},
		{"code", head + "1715612400500,227,65536,27\n", Options{}, 0, `line 2: EventId: "65536" is not a number from 0 to 65535`, false},
		{"negative code", head + "1715612400500,227,-1,27\n", Options{}, 0, `line 2: EventId: "-1" is not a number from 0 to 65535`, false},
		{"parameter", head + "1715612400500,227,82,27.5\n", Options{}, 0, `line 2: Parameter: "27.5" is not a number from -32768 to 65535`, false},
		{"parameter below", head + "1715612400500,227,82,-32769\n", Options{}, 0, `line 2: Parameter: "-32769" is not a number from -32768 to 65535`, false},
		{"parameter minus nothing", head + "1715612400500,227,82,-0\n", Options{}, 0, `line 2: Parameter: "-0" is not a number from -32768 to 65535`, false},
		{"no device", head + "1715612400500,,82,27\n", Options{}, 0, `line 2: DeviceId: is empty`, false},
		{"control character", head + "1715612400500,a\x01b,82,27\n", Options{}, 0, `line 2: DeviceId: "a\x01b" is not text without control characters`, false},
		{"not UTF-8", head + "1715612400500,a\xff,82,27\n", Options{}, 0, `line 2: DeviceId: "a\xff" is not text without control characters`, false},
		{"long device", head + "1715612400500," + strings.Repeat("x", 513) + ",82,27\n", Options{}, 0, `line 2: DeviceId: 513 bytes, at most 512`, false},
		{"long line", head + good + strings.Repeat("x", 4097) + "\n", Options{}, 1, `line 3: longer than 4096 bytes`, false},
		{"very long line", head + good + strings.Repeat("x", 1<<20), Options{}, 1, `line 3: longer than 4096 bytes`, false},
		{"few fields", head + good + "1715612400500,227,82\n", Options{}, 1, `line 3: 3 fields, want 4`, false},
		{"many fields", head + good + strings.Repeat(",", 99) + "\n", Options{}, 1, `line 3: more than 64 fields`, false},
		{"cut off", head + good + "1715612400500,22", Options{}, 1, `line 3: 2 fields, want 4, and the line does not end: the log is cut off`, true},
		{"open quote", head + good + "\"1715612400500,227,82,27\n", Options{}, 1, `line 3: field 1: the closing quote is missing`, false},
		{"text behind a quote", head + good + "\"1715612400500\"x,227,82,27\n", Options{}, 1, `line 3: field 1: text after the closing quote`, false},
		{"configuration", "DeviceId,Phase,Parameter,Function\n1136,8,25,Presence\n", Options{}, 0, `line 1: header: no column TimeStamp: this is not a log of events`, false},
		{"terminations", "TimeStamp,DeviceId,Phase,PerformanceMeasure,Total\n", Options{}, 0, `line 1: header: no column EventId: this is not a log of events`, false},
		{"no parameter", "TimeStamp,DeviceId,EventId\n", Options{}, 0, `line 1: header: no column Parameter: this is not a log of events`, false},
		{"nobody's", "TimeStamp,EventId,Parameter\n", Options{}, 0, `line 1: header: no column DeviceId, and no device was named for the file`, false},
		{"nobody's without header", "1715612400500,82,27\n", Options{}, 0, `line 1: no field for the device, and none was named for the file`, false},
		{"twice", "TimeStamp,Time,EventId,Parameter\n", Options{}, 0, `line 1: header: "TimeStamp" and "Time" are the same column`, false},
		{"two times", "1715612400500,1715612400500,82,27\n", Options{}, 0, `line 1: no header, and the first two fields could both be the time`, false},
		{"something else", "Hello world\n", Options{}, 0, `line 1: neither a header nor an event: this is not a log that we know`, false},
		{"empty", "", Options{}, 0, `the log is empty: the log is cut off`, true},
		{"one byte", "7", Options{}, 0, `line 1: neither a header nor an event: this is not a log that we know, and the line does not end: the log is cut off`, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, _, err := readAll(t, tt.log, tt.o)
			if err == nil || err.Error() != tt.want {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
			if kind.Of(err) != kind.Invalid {
				t.Errorf("got kind %s, want invalid", kind.Of(err))
			}
			if errors.Is(err, ErrTruncated) != tt.cut {
				t.Errorf("cut off: got %v, want %v", !tt.cut, tt.cut)
			}
			if len(got) != tt.events {
				t.Errorf("got %d events before the error, want %d", len(got), tt.events)
			}
		})
	}
}

// TestClocksBack reads the hour that comes twice: the log goes on, and a small
// step back does not make it the other hour.
func TestClocksBack(t *testing.T) {
	const log = "d,2024-11-03 00:59:59.9,1,1\n" + // MDT, UTC-6
		"d,2024-11-03 01:00:00.1,1,2\n" +
		"d,2024-11-03 01:00:00.0,1,3\n" + // out of order
		"d,2024-11-03 01:59:59.9,1,4\n" +
		"d,2024-11-03 01:00:00.0,1,5\n" + // MST, UTC-7
		"d,2024-11-03 01:25:00.0,1,6\n" +
		"d,2024-11-03 01:50:00.0,1,6\n" +
		"d,2024-11-03 02:00:00.0,1,7\n"
	got, s, err := readAll(t, log, Options{Zone: zone(t, "America/Denver")})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"2024-11-03T06:59:59.9 d 1 1", "2024-11-03T07:00:00.1 d 1 2", "2024-11-03T07:00:00 d 1 3", "2024-11-03T07:59:59.9 d 1 4",
		"2024-11-03T08:00:00 d 1 5", "2024-11-03T08:25:00 d 1 6", "2024-11-03T08:50:00 d 1 6", "2024-11-03T09:00:00 d 1 7"}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if s.OutOfOrder != 1 {
		t.Errorf("got %d out of order, want 1", s.OutOfOrder)
	}
	// Without an event before, it is the first of the two.
	got, _, err = readAll(t, "d,2024-11-03 01:30:00.0,1,1\n", Options{Zone: zone(t, "America/Denver")})
	if err != nil || len(got) != 1 || got[0] != "2024-11-03T07:30:00 d 1 1" {
		t.Errorf("got %q, %v, want 07:30 UTC", got, err)
	}
}

// TestClocksAll compares with the standard library over two years of a zone, at
// steps that meet every minute of an hour.
func TestClocksAll(t *testing.T) {
	for _, name := range []string{"America/Denver", "Australia/Lord_Howe", "Asia/Kathmandu"} {
		z := zone(t, name)
		c := clock{zone: z}
		for at := int64(1700000000); at < 1700000000+2*366*86400; at += 61 * 7 {
			u := time.Unix(at, 0).In(z)
			wall := time.Date(u.Year(), u.Month(), u.Day(), u.Hour(), u.Minute(), u.Second(), 0, time.UTC).Unix()
			if got, err := c.utc(wall, at); err != nil || got != at {
				t.Fatalf("%s %s: got %d, %v, want %d", name, u, got, err, at)
			}
		}
	}
}

func TestManyDevices(t *testing.T) {
	var b strings.Builder
	b.WriteString("TimeStamp,DeviceId,EventId,Parameter\n")
	for i := range maxDevices + 1 {
		fmt.Fprintf(&b, "1715612400500,d%d,82,27\n", i)
	}
	got, s, err := readAll(t, b.String(), Options{})
	if want := `line 65538: DeviceId: "d65536": more than 65536 devices in one log`; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	if len(got) != maxDevices || len(s.Devices) != maxDevices || s.Devices[0] != "d0" || s.Devices[maxDevices-1] != "d65535" {
		t.Errorf("got %d events of %d devices, want %d of as many", len(got), len(s.Devices), maxDevices)
	}
}
