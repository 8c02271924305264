package hires

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// dat returns an Econolite log of a controller that began at noon of 8 August
// 2021, UTC.
func dat(records ...string) string {
	return datAt("8-9-2021 12:00:00.4", "8/9/2021,12:00:00.4", records...)
}

func datAt(stamp, begin string, records ...string) string {
	return stamp + ",Version #:,3\n" +
		stamp + ",ECON_10.204.7.239_2021_08_09_1200.dat\n" +
		stamp + ",Intersection #:,10.204.7.239\n" +
		stamp + ",IP Address:,10.204.7.240\n" +
		stamp + ",MAC Address:,00:04:81:02:15:0d\n" +
		stamp + ",Controller Data Log Beginning:," + begin + "\n" +
		stamp + ",Phases in use:,2,4,5,6,8\n" + strings.Join(records, "")
}

// rec returns a record of a .dat.
func rec(code, param byte, tenths uint16) string {
	return string([]byte{code, param, byte(tenths >> 8), byte(tenths)})
}

func TestEconolite(t *testing.T) {
	for _, tt := range []struct {
		name, log string
		o         Options
		want      string
	}{
		{"events", dat(rec(82, 27, 0), rec(81, 255, 1), rec(0, 0, 256)), Options{},
			"2021-08-09T12:00:00.4 10.204.7.239 82 27;2021-08-09T12:00:00.5 10.204.7.239 81 255;2021-08-09T12:00:26 10.204.7.239 0 0"},
		{"none", dat(), Options{}, ""},
		{"zone", dat(rec(82, 27, 0)), Options{Zone: zone(t, "America/Denver")}, "2021-08-09T18:00:00.4 10.204.7.239 82 27"},
		{"past midnight", datAt("12-31-2021 23:59:59.9", "12/31/2021,23:59:59.9", rec(1, 2, 1)), Options{}, "2022-01-01T00:00:00 10.204.7.239 1 2"},
		{"past the hour that comes twice", datAt("11-7-2021 00:59:59.9", "11/7/2021,00:59:59.9", rec(1, 2, 1), rec(1, 2, 36001)), Options{Zone: zone(t, "America/Denver")},
			"2021-11-07T07:00:00 10.204.7.239 1 2;2021-11-07T08:00:00 10.204.7.239 1 2"},
		{"above 32767 tenths", dat(rec(1, 2, 32767), rec(1, 2, 32768), rec(1, 2, 65535)), Options{},
			"2021-08-09T12:54:37.1 10.204.7.239 1 2;2021-08-09T12:54:37.2 10.204.7.239 1 2;2021-08-09T13:49:13.9 10.204.7.239 1 2"},
		{"two turns", dat(rec(1, 2, 65535), rec(1, 2, 0), rec(1, 2, 40000), rec(1, 2, 5)), Options{},
			"2021-08-09T13:49:13.9 10.204.7.239 1 2;2021-08-09T13:49:14 10.204.7.239 1 2;2021-08-09T14:55:54 10.204.7.239 1 2;2021-08-09T15:38:28.1 10.204.7.239 1 2"},
		{"out of order", dat(rec(1, 2, 20), rec(1, 2, 19)), Options{}, "2021-08-09T12:00:02.4 10.204.7.239 1 2;2021-08-09T12:00:02.3 10.204.7.239 1 2"},
		{"out of order over a turn", dat(rec(1, 2, 65535), rec(1, 2, 0), rec(1, 2, 65535)), Options{},
			"2021-08-09T13:49:13.9 10.204.7.239 1 2;2021-08-09T13:49:14 10.204.7.239 1 2;2021-08-09T13:49:13.9 10.204.7.239 1 2"},
		{"late over a turn, by a minute", dat(rec(1, 2, 65535), rec(1, 2, 0), rec(1, 2, 65536-600)), Options{},
			"2021-08-09T13:49:13.9 10.204.7.239 1 2;2021-08-09T13:49:14 10.204.7.239 1 2;2021-08-09T13:48:14 10.204.7.239 1 2"},
		{"late over a turn, by more than a minute", dat(rec(1, 2, 65535), rec(1, 2, 0), rec(1, 2, 65535-600)), Options{},
			"2021-08-09T13:49:13.9 10.204.7.239 1 2;2021-08-09T13:49:14 10.204.7.239 1 2;2021-08-09T15:37:27.5 10.204.7.239 1 2"},
		{"long silence at the start", dat(rec(1, 2, 60000)), Options{}, "2021-08-09T13:40:00.4 10.204.7.239 1 2"},
		{"address in place of a number", strings.Replace(dat(rec(1, 2, 0)), "Intersection #:,10.204.7.239", "Intersection #:,", 1), Options{}, "2021-08-09T12:00:00.4 10.204.7.240 1 2"},
		{"named device", "8-9-2021 12:00:00.4,Phases in use:,1\n" + rec(1, 2, 0), Options{Device: "1210"}, "2021-08-09T12:00:00.4 1210 1 2"},
		{"lines with CR LF", "8-9-2021 12:00:00.4,Intersection #:,x\r\n8-9-2021 12:00:00.4,Phases in use:,1\r\n" + rec(1, 2, 0), Options{}, "2021-08-09T12:00:00.4 x 1 2"},
		{"a record of line ends", dat(rec('\n', '\n', 10<<8|10)), Options{}, "2021-08-09T12:04:17.4 10.204.7.239 10 10"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, s, err := readAll(t, tt.log, tt.o)
			if err != nil {
				t.Fatal(err)
			}
			if g := strings.Join(got, ";"); g != tt.want {
				t.Errorf("got  %s\nwant %s", g, tt.want)
			}
			if s.Format != FormatEconolite || s.Compression != "" {
				t.Errorf("got format %q, compression %q, want econolite without", s.Format, s.Compression)
			}
		})
	}
}

func TestEconoliteErrors(t *testing.T) {
	header := len(dat())
	for _, tt := range []struct {
		name, log string
		events    int
		want      string
		cut       bool
	}{
		{"a record of 3 bytes", dat(rec(1, 2, 0), rec(1, 2, 1), "\x01\x02\x00"), 2, fmt.Sprintf("byte %d: record: 3 bytes of 4: the log is cut off", header+8), true},
		{"a record of 1 byte", dat(rec(1, 2, 0), "\x01"), 1, fmt.Sprintf("byte %d: record: 1 bytes of 4: the log is cut off", header+4), true},
		{"header cut off between lines", "8-9-2021 12:00:00.4,Version #:,3\n", 0, `line 2: the log ends before the line "Phases in use:": the log is cut off`, true},
		{"header cut off in a line", dat()[:header-9], 0, `line 7: the log ends before the end of the line: the log is cut off`, true},
		{"no end of the header", strings.Repeat("8-9-2021 12:00:00.4,x\n", 65), 0, `line 65: no line "Phases in use:" among the first 64`, false},
		{"a line without a time", "8-9-2021 12:00:00.4,Version #:,3\nhello\n", 0, `line 2: "hello" does not begin with a time such as 2-21-2024 11:15:00.0`, false},
		{"a long line", "8-9-2021 12:00:00.4,Version #:,3\n8-9-2021 12:00:00.4," + strings.Repeat("x", 5000) + "\n", 0, `line 2: longer than 4096 bytes`, false},
		{"beginning", datAt("8-9-2021 12:00:00.4", "8/9/2021"), 0, `line 6: Controller Data Log Beginning: "8/9/2021" is not a time`, false},
		{"beginning before 1973", datAt("8-9-2021 12:00:00.4", "8/9/1921,12:00:00.4"), 0, `line 6: Controller Data Log Beginning: "8/9/1921,12:00:00.4" is not between 1973-03-03 and 2261-12-31`, false},
		{"first line before 1973", datAt("8-9-1921 12:00:00.4", "8/9/2021,12:00:00.4"), 0, `line 1: time: "8-9-1921 12:00:00.4" is not between 1973-03-03 and 2261-12-31`, false},
		{"finer than a millisecond", datAt("8-9-2021 12:00:00.4", "8/9/2021,12:00:00.0001"), 0, `line 6: Controller Data Log Beginning: "8/9/2021,12:00:00.0001" is finer than a millisecond`, false},
		{"beyond nanoseconds", datAt("12-31-2261 23:59:59.9", "12/31/2261,23:59:59.9", rec(1, 2, 0), rec(1, 2, 1)), 1, fmt.Sprintf("byte %d: time: is not between 1973-03-03 and 2261-12-31", header+4+2*7+2), false},
		{"nobody's", "8-9-2021 12:00:00.4,Phases in use:,1\n", 0, "line 1: neither Intersection # nor IP Address, and no device was named for the file", false},
		{"device", strings.Replace(dat(), "Intersection #:,10", "Intersection #:,\x01", 1), 0, `Intersection #: "\x01.204.7.239" is not text without control characters`, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, _, err := readAll(t, tt.log, Options{})
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
