package traci

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"time"
)

// network is what we keep of a .net.xml.
type network struct {
	file      string
	location  location
	lanes     []netLane // normal, internal, crossings, walking areas
	lane      map[string]int
	edges     map[string][]int // lanes of an edge, from the right
	links     []link
	leaving   map[int][]int // links by the lane that they come from
	reaching  map[int][]int // links by the lane that they lead to
	junctions []netJunction
	node      map[string]int // junction by the lanes that come to it
	logics    []logic        // in the order of the file, one an id: the last program wins, as in SUMO
}

type location struct {
	offsetX, offsetY float64
	proj             string // empty: the network is not placed on the Earth
}

type netLane struct {
	id, edge string
	index    int
	function string // of its edge: "", internal, crossing, walkingarea, connector
	length   float64
	speed    float64
	allow    string
	disallow string
	end      point // the last point of its shape
}

type point struct{ x, y float64 }

// link is one <connection>: from lane to lane, by way of an internal lane where
// the network has them. Indices into lanes; via is -1 where there is none.
type link struct {
	from, to, via int
	tls           string // empty where no signal holds it
	index         int    // link index within the signal
	dir           string // s, r, l, R, L, t (turnaround)
}

type netJunction struct {
	id       string
	kind     string
	at       point
	incoming []string
	internal []string // the last internal lane of each link, in the order of requests
	requests []request
}

// request is one link's row of a junction's right of way, with bit i of link i
// (SUMO writes link 0 rightmost).
type request struct {
	index          int
	response, foes string
}

// bit reads bit i of a string of SUMO's bits.
func bit(bits string, i int) bool {
	at := len(bits) - 1 - i
	return at >= 0 && bits[at] == '1'
}

type logic struct {
	id, program, kind string
	offset            time.Duration
	phases            []phase
}

type phase struct {
	duration time.Duration
	state    string
	name     string
	next     string
}

type xmlLogic struct {
	ID      string `xml:"id,attr"`
	Type    string `xml:"type,attr"`
	Program string `xml:"programID,attr"`
	Offset  string `xml:"offset,attr"`
	Phases  []struct {
		Duration string `xml:"duration,attr"`
		State    string `xml:"state,attr"`
		Name     string `xml:"name,attr"`
		Next     string `xml:"next,attr"`
	} `xml:"phase"`
}

func readNetwork(path string) (*network, error) {
	n := &network{
		file: path, lane: map[string]int{}, edges: map[string][]int{},
		leaving: map[int][]int{}, reaching: map[int][]int{}, node: map[string]int{},
	}
	if err := readXML(path, n.parse); err != nil {
		return nil, err
	}
	return n, nil
}

// parse reads a network as a stream of its top-level elements.
func (n *network) parse(in io.Reader) error {
	type connection struct {
		From, To, Via, TL, Dir string
		FromLane, ToLane       int
		Index                  string
	}
	var connections []connection
	err := elements(in, "net", func(d *xml.Decoder, e xml.StartElement) error {
		switch e.Name.Local {
		case "location":
			var x struct {
				Offset string `xml:"netOffset,attr"`
				Proj   string `xml:"projParameter,attr"`
			}
			if err := d.DecodeElement(&x, &e); err != nil {
				return err
			}
			p, err := parsePoint(x.Offset)
			if err != nil {
				return fmt.Errorf("<location> netOffset: %w", err)
			}
			n.location = location{p.x, p.y, strings.TrimSpace(x.Proj)}
			if n.location.proj == "!" || n.location.proj == "." {
				n.location.proj = ""
			}
		case "edge":
			var x struct {
				ID       string `xml:"id,attr"`
				Function string `xml:"function,attr"`
				Lanes    []struct {
					ID       string  `xml:"id,attr"`
					Index    int     `xml:"index,attr"`
					Length   float64 `xml:"length,attr"`
					Speed    float64 `xml:"speed,attr"`
					Allow    string  `xml:"allow,attr"`
					Disallow string  `xml:"disallow,attr"`
					Shape    string  `xml:"shape,attr"`
				} `xml:"lane"`
			}
			if err := d.DecodeElement(&x, &e); err != nil {
				return fmt.Errorf("<edge id=%q>: %w", attr(e, "id"), err)
			}
			for _, l := range x.Lanes {
				if _, twice := n.lane[l.ID]; twice {
					return fmt.Errorf("<lane id=%q> is there twice", l.ID)
				}
				if !(l.Length > 0 && l.Length < 1e6) || !(l.Speed >= 0 && l.Speed < 1e4) {
					return fmt.Errorf("<lane id=%q>: length %g and speed %g must be positive", l.ID, l.Length, l.Speed)
				}
				var end point
				if f := strings.Fields(l.Shape); len(f) > 0 {
					var err error
					if end, err = parsePoint(f[len(f)-1]); err != nil {
						return fmt.Errorf("<lane id=%q> shape: %w", l.ID, err)
					}
				}
				n.lane[l.ID] = len(n.lanes)
				n.edges[x.ID] = append(n.edges[x.ID], len(n.lanes))
				n.lanes = append(n.lanes, netLane{l.ID, x.ID, l.Index, x.Function, l.Length, l.Speed, l.Allow, l.Disallow, end})
			}
		case "junction":
			var x struct {
				ID       string  `xml:"id,attr"`
				Type     string  `xml:"type,attr"`
				X        float64 `xml:"x,attr"`
				Y        float64 `xml:"y,attr"`
				Incoming string  `xml:"incLanes,attr"`
				Internal string  `xml:"intLanes,attr"`
				Requests []struct {
					Index    int    `xml:"index,attr"`
					Response string `xml:"response,attr"`
					Foes     string `xml:"foes,attr"`
				} `xml:"request"`
			}
			if err := d.DecodeElement(&x, &e); err != nil {
				return fmt.Errorf("<junction id=%q>: %w", attr(e, "id"), err)
			}
			j := netJunction{id: x.ID, kind: x.Type, at: point{x.X, x.Y},
				incoming: strings.Fields(x.Incoming), internal: strings.Fields(x.Internal)}
			for _, r := range x.Requests {
				j.requests = append(j.requests, request{r.Index, r.Response, r.Foes})
			}
			if j.kind != "internal" { // which lists the lanes of its junction again
				for _, id := range j.incoming {
					n.node[id] = len(n.junctions)
				}
			}
			n.junctions = append(n.junctions, j)
		case "connection":
			var x struct {
				From     string `xml:"from,attr"`
				To       string `xml:"to,attr"`
				FromLane int    `xml:"fromLane,attr"`
				ToLane   int    `xml:"toLane,attr"`
				Via      string `xml:"via,attr"`
				TL       string `xml:"tl,attr"`
				Index    string `xml:"linkIndex,attr"`
				Dir      string `xml:"dir,attr"`
			}
			if err := d.DecodeElement(&x, &e); err != nil {
				return fmt.Errorf("<connection from=%q to=%q>: %w", attr(e, "from"), attr(e, "to"), err)
			}
			connections = append(connections, connection{x.From, x.To, x.Via, x.TL, x.Dir, x.FromLane, x.ToLane, x.Index})
		case "tlLogic":
			return n.addLogic(d, e)
		default:
			return d.Skip()
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, c := range connections {
		l := link{via: -1, tls: c.TL, dir: c.Dir}
		var ok bool
		if l.from, ok = n.laneOf(c.From, c.FromLane); !ok {
			return fmt.Errorf("<connection from=%q fromLane=\"%d\">: there is no such lane", c.From, c.FromLane)
		}
		if l.to, ok = n.laneOf(c.To, c.ToLane); !ok {
			return fmt.Errorf("<connection to=%q toLane=\"%d\">: there is no such lane", c.To, c.ToLane)
		}
		if c.Via != "" {
			if l.via, ok = n.lane[c.Via]; !ok {
				return fmt.Errorf("<connection from=%q via=%q>: there is no such lane", c.From, c.Via)
			}
		}
		if c.TL != "" {
			var err error
			if l.index, err = strconv.Atoi(c.Index); err != nil || l.index < 0 {
				return fmt.Errorf("<connection from=%q tl=%q>: linkIndex %q is no number from 0", c.From, c.TL, c.Index)
			}
		}
		n.leaving[l.from] = append(n.leaving[l.from], len(n.links))
		n.reaching[l.to] = append(n.reaching[l.to], len(n.links))
		n.links = append(n.links, l)
	}
	return nil
}

func (n *network) laneOf(edge string, index int) (int, bool) {
	for _, l := range n.edges[edge] {
		if n.lanes[l].index == index {
			return l, true
		}
	}
	return 0, false
}

// addPrograms takes the signal programs of an additional file; like SUMO, the
// program that is read last is the one that runs.
func (n *network) addPrograms(path string) error {
	return readXML(path, func(in io.Reader) error {
		return elements(in, "", func(d *xml.Decoder, e xml.StartElement) error {
			if e.Name.Local != "tlLogic" {
				return d.Skip()
			}
			return n.addLogic(d, e)
		})
	})
}

func (n *network) addLogic(d *xml.Decoder, e xml.StartElement) error {
	var x xmlLogic
	bad := func(err error) error { return fmt.Errorf("<tlLogic id=%q>: %w", attr(e, "id"), err) }
	if err := d.DecodeElement(&x, &e); err != nil {
		return bad(err)
	}
	l := logic{id: x.ID, program: x.Program, kind: x.Type}
	if x.ID == "" {
		return bad(errors.New("id must not be empty"))
	}
	var err error
	if x.Offset != "" && x.Offset != "begin" {
		if l.offset, err = parseTime(x.Offset); err != nil {
			return bad(fmt.Errorf("offset: %w", err))
		}
	}
	for i, p := range x.Phases {
		dur, err := parseTime(p.Duration)
		if err != nil {
			return bad(fmt.Errorf("<phase> %d: duration: %w", i, err))
		}
		if dur <= 0 {
			return bad(fmt.Errorf("<phase> %d: duration must be positive, is %s", i, dur))
		}
		if len(x.Phases[0].State) != len(p.State) {
			return bad(fmt.Errorf("<phase> %d: state %q has %d letters, the first phase %d", i, p.State, len(p.State), len(x.Phases[0].State)))
		}
		l.phases = append(l.phases, phase{dur, p.State, p.Name, p.Next})
	}
	for i := range n.logics {
		if n.logics[i].id == l.id {
			if len(l.phases) > 0 { // an additional file may change the offset only
				n.logics[i] = l
			}
			return nil
		}
	}
	n.logics = append(n.logics, l)
	return nil
}

// elements calls visit for each child of the root, which must have the given
// name where one is given. visit must consume the element.
func elements(in io.Reader, root string, visit func(*xml.Decoder, xml.StartElement) error) error {
	d := xml.NewDecoder(in)
	inside := false
	for {
		t, err := d.Token()
		if errors.Is(err, io.EOF) && inside {
			return nil
		}
		if err != nil {
			return err
		}
		e, ok := t.(xml.StartElement)
		if !ok {
			continue
		}
		if !inside {
			if root != "" && e.Name.Local != root {
				return fmt.Errorf("the root element is <%s>, want <%s>", e.Name.Local, root)
			}
			inside = true
			continue
		}
		if err := visit(d, e); err != nil {
			return err
		}
	}
}

func attr(e xml.StartElement, name string) string {
	for _, a := range e.Attr {
		if a.Name.Local == name {
			return a.Value
		}
	}
	return ""
}

func parsePoint(s string) (point, error) {
	f := strings.Split(s, ",")
	if len(f) < 2 {
		return point{}, fmt.Errorf("%q is no x,y", s)
	}
	x, errX := strconv.ParseFloat(strings.TrimSpace(f[0]), 64)
	y, errY := strconv.ParseFloat(strings.TrimSpace(f[1]), 64)
	if errX != nil || errY != nil || math.IsNaN(x+y) || math.IsInf(x+y, 0) {
		return point{}, fmt.Errorf("%q is no x,y", s)
	}
	return point{x, y}, nil
}
