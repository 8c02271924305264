package traci

import (
	"bufio"
	"compress/gzip"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/kind"
)

// A Scenario is a SUMO configuration with the network that it names.
type Scenario struct {
	Path            string // the .sumocfg
	NetFile         string // absolute or relative to the working directory, as Path is
	RouteFiles      []string
	AdditionalFiles []string
	// Begin and End are simulated time. End is negative where the configuration
	// has none: then the run ends when no vehicle is left or to come.
	Begin, End time.Duration
	StepLength time.Duration

	net *network
}

// Load reads a .sumocfg and its network. What it refuses has kind NotFound (a
// file is missing) or Invalid, and names the file and the element.
func Load(sumocfg string) (*Scenario, error) {
	var c struct {
		XMLName xml.Name
		Inputs  []struct {
			Net        option `xml:"net-file"`
			Routes     option `xml:"route-files"`
			Additional option `xml:"additional-files"`
		} `xml:"input"`
		Times []struct {
			Begin option `xml:"begin"`
			End   option `xml:"end"`
			Step  option `xml:"step-length"`
		} `xml:"time"`
		// SUMO takes options outside their sections as well.
		Net        option `xml:"net-file"`
		Routes     option `xml:"route-files"`
		Additional option `xml:"additional-files"`
		Begin      option `xml:"begin"`
		End        option `xml:"end"`
		Step       option `xml:"step-length"`
	}
	err := readXML(sumocfg, func(r io.Reader) error { return xml.NewDecoder(r).Decode(&c) })
	if err != nil {
		return nil, err
	}
	if n := c.XMLName.Local; n != "configuration" && n != "sumoConfiguration" {
		return nil, kind.Errorf(kind.Invalid, "%s: is not a SUMO configuration: its root element is <%s>, want <configuration>", sumocfg, n)
	}
	for _, in := range c.Inputs {
		c.Net.or(in.Net)
		c.Routes.or(in.Routes)
		c.Additional.or(in.Additional)
	}
	for _, t := range c.Times {
		c.Begin.or(t.Begin)
		c.End.or(t.End)
		c.Step.or(t.Step)
	}
	s := &Scenario{Path: sumocfg, End: -1, StepLength: time.Second}
	beside := func(o option) []string {
		var files []string
		for _, f := range strings.FieldsFunc(o.text(), func(r rune) bool { return r == ',' || r == ';' }) {
			f = strings.TrimSpace(f)
			if f != "" && !filepath.IsAbs(f) {
				f = filepath.Join(filepath.Dir(sumocfg), filepath.FromSlash(f))
			}
			if f != "" {
				files = append(files, f)
			}
		}
		return files
	}
	nets := beside(c.Net)
	if len(nets) != 1 {
		return nil, kind.Errorf(kind.Invalid, "%s: <input> has %d <net-file>, exactly one is needed", sumocfg, len(nets))
	}
	s.NetFile, s.RouteFiles, s.AdditionalFiles = nets[0], beside(c.Routes), beside(c.Additional)
	for _, t := range []struct {
		name string
		from option
		to   *time.Duration
	}{{"begin", c.Begin, &s.Begin}, {"end", c.End, &s.End}, {"step-length", c.Step, &s.StepLength}} {
		if t.from.text() == "" {
			continue
		}
		if *t.to, err = parseTime(t.from.text()); err != nil {
			return nil, kind.Errorf(kind.Invalid, "%s: <time> <%s>: %w", sumocfg, t.name, err)
		}
	}
	if s.StepLength <= 0 {
		return nil, kind.Errorf(kind.Invalid, "%s: <time> <step-length>: must be positive, is %s", sumocfg, s.StepLength)
	}
	if s.End >= 0 && s.End <= s.Begin {
		return nil, kind.Errorf(kind.Invalid, "%s: <time> <end>: must be later than begin, %s is not after %s", sumocfg, s.End, s.Begin)
	}
	for _, f := range append(append([]string{}, s.RouteFiles...), s.AdditionalFiles...) {
		if _, err := os.Stat(f); err != nil {
			return nil, missing(f, fmt.Errorf("named by %s: %w", sumocfg, err))
		}
	}
	if s.net, err = readNetwork(s.NetFile); err != nil {
		return nil, err
	}
	for _, f := range s.AdditionalFiles {
		if err := s.net.addPrograms(f); err != nil {
			return nil, err
		}
	}
	if len(s.net.logics) == 0 {
		return nil, kind.Errorf(kind.Invalid, "%s: has no traffic lights (tlLogic)", s.NetFile)
	}
	return s, nil
}

// An option is an element of a configuration: <name value="…"/>, or the older
// <name>…</name>.
type option struct {
	Value string `xml:"value,attr"`
	V     string `xml:"v,attr"`
	Text  string `xml:",chardata"`
}

func (o option) text() string {
	for _, s := range []string{o.Value, o.V, o.Text} {
		if s = strings.TrimSpace(s); s != "" {
			return s
		}
	}
	return ""
}

func (o *option) or(other option) {
	if o.text() == "" {
		*o = other
	}
}

// readXML opens a file, unpacks it where it is gzipped, and hands it to parse.
// What parse refuses becomes Invalid and names the file.
func readXML(path string, parse func(io.Reader) error) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return missing(path, err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if st, err := f.Stat(); err == nil && st.IsDir() {
		return kind.Errorf(kind.Invalid, "%s: is a folder, a file is needed", path)
	}
	in := bufio.NewReaderSize(f, 64<<10)
	var r io.Reader = in
	if magic, _ := in.Peek(2); len(magic) == 2 && magic[0] == 0x1f && magic[1] == 0x8b {
		z, err := gzip.NewReader(in)
		if err != nil {
			return kind.Errorf(kind.Invalid, "%s: %w", path, err)
		}
		r = z
	}
	err = parse(r)
	switch {
	case errors.Is(err, io.EOF):
		return kind.Errorf(kind.Invalid, "%s: is not XML: it has no element", path)
	case err != nil:
		return kind.Errorf(kind.Invalid, "%s: %w", path, err)
	}
	return nil
}

func missing(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return kind.Errorf(kind.NotFound, "%s: does not exist: %w", path, err)
	}
	return fmt.Errorf("%s: %w", path, err)
}

// parseTime reads SUMO's times: seconds, or [days:]hours:minutes:seconds.
func parseTime(s string) (time.Duration, error) {
	parts := strings.Split(s, ":")
	units := []float64{86400, 3600, 60, 1}
	if n := len(parts); n != 1 && n != 3 && n != 4 {
		return 0, fmt.Errorf("%q is no time: want seconds or [d:]h:m:s", s)
	}
	total := 0.0
	for i, p := range parts {
		v, err := strconv.ParseFloat(strings.TrimSpace(p), 64)
		if err != nil {
			return 0, fmt.Errorf("%q is no time: want seconds or [d:]h:m:s", s)
		}
		total += v * units[len(units)-len(parts)+i]
	}
	// Beyond a century it is a mistake, and would not fit a Duration for long.
	if math.IsNaN(total) || math.Abs(total) > 100*366*86400 {
		return 0, fmt.Errorf("%q is no time within a century", s)
	}
	return time.Duration(math.Round(total*1000)) * time.Millisecond, nil
}
