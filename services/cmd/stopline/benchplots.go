package main

import (
	"context"
	"errors"
	"fmt"
	"image/color"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"github.com/stopline-traffic/stopline/pkg/timing"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/traci"
)

// The colours of controllers: told apart also by those who see few colours.
var benchColours = []color.RGBA{
	{0x7f, 0x7f, 0x7f, 0xff}, {0xe6, 0x9f, 0x00, 0xff}, {0x56, 0xb4, 0xe9, 0xff}, {0xd5, 0x5e, 0x00, 0xff}, {0x00, 0x9e, 0x73, 0xff},
}

func colourOf(controller string) color.RGBA {
	return benchColours[max(slices.Index(benchControllers, controller), 0)%len(benchColours)]
}

// standingOf is how many vehicles stand before the stop lines of a frame's junction.
func standingOf(f unitFrame) int {
	var oracle, area int
	for _, r := range f.frame.Readings {
		switch id := string(r.Detector); {
		case strings.HasPrefix(id, "oracle:"):
			oracle += int(r.Halted)
		case strings.HasPrefix(id, "area:"):
			area += int(r.Halted)
		}
	}
	return max(oracle, area)
}

func drawPlots(ctx context.Context, o benchOptions, configs []scenarioFile, results []benchResult) error {
	var errs []error
	for _, c := range configs {
		own := slices.DeleteFunc(slices.Clone(results), func(r benchResult) bool { return r.Scenario != c.name })
		file := strings.ReplaceAll(c.name, "/", "-")
		errs = append(errs, drawDelay(filepath.Join(o.out, "delay-"+file+".svg"), c.name, o, own))
		for _, t := range o.tracks {
			errs = append(errs, drawQueues(filepath.Join(o.out, "queues-"+file+"-"+t.name+".svg"), c.name+", "+t.name, own, t.name))
		}
		if slices.Contains(o.controllers, "adaptive") {
			errs = append(errs, drawCorridor(ctx, filepath.Join(o.out, "corridor-"+file+".png"), c, o))
		}
	}
	return errors.Join(errs...)
}

// drawDelay shows each seed as a point and each mean as a bar, by track and
// controller.
func drawDelay(path, title string, o benchOptions, results []benchResult) error {
	p := plot.New()
	p.Title.Text = title + ": delay of each seed, and the mean"
	p.Y.Label.Text = "strict delay, s a trip"
	least, most := math.Inf(1), 0.0
	var names []string
	var at []plot.Tick
	for ti, t := range o.tracks {
		first := float64(ti * (len(o.controllers) + 1))
		at = append(at, plot.Tick{Value: first + float64(len(o.controllers)-1)/2, Label: t.name})
		for ci, c := range o.controllers {
			var pts plotter.XYs
			mean := 0.0
			for _, r := range results {
				if r.Track == t.name && r.Controller == c {
					// A little apart, by seed, so that points do not hide one another.
					pts = append(pts, plotter.XY{X: first + float64(ci) + 0.3*(float64(r.Seed%7)-3)/3, Y: r.DelayS})
					mean += r.DelayS
					least, most = min(least, r.DelayS), max(most, r.DelayS)
				}
			}
			if len(pts) == 0 {
				continue
			}
			mean /= float64(len(pts))
			s, err := plotter.NewScatter(pts)
			if err != nil {
				return err
			}
			s.GlyphStyle = draw.GlyphStyle{Color: colourOf(c), Radius: vg.Points(2), Shape: draw.CircleGlyph{}}
			x := first + float64(ci)
			bar, err := plotter.NewLine(plotter.XYs{{X: x - 0.4, Y: mean}, {X: x + 0.4, Y: mean}})
			if err != nil {
				return err
			}
			bar.Width, bar.Color = vg.Points(2.5), colourOf(c)
			p.Add(s, bar)
			if !slices.Contains(names, c) {
				names = append(names, c)
				p.Legend.Add(c, s)
			}
		}
	}
	if len(names) == 0 {
		return nil
	}
	p.X.Tick.Marker = plot.ConstantTicks(at)
	p.Y.Min = 0
	if most > 8*least && least > 0 {
		// One gridlock would squeeze everything else to the floor.
		p.Y.Scale, p.Y.Tick.Marker, p.Y.Min = plot.LogScale{}, plot.LogTicks{Prec: 0}, least/1.5
	}
	p.Y.Max = most * 1.15
	p.Legend.Top = true
	p.Add(plotter.NewGrid())
	return p.Save(vg.Length(4+3*len(o.tracks))*vg.Inch*0.8, 4.5*vg.Inch, path)
}

func drawQueues(path, title string, results []benchResult, track string) error {
	p := plot.New()
	p.Title.Text = title + ": standing vehicles, seed 1"
	p.X.Label.Text, p.Y.Label.Text = "minutes", "vehicles standing before the stop lines"
	any := false
	for _, c := range benchControllers {
		for _, r := range results {
			if r.Track != track || r.Controller != c || r.Series == nil || len(r.Series.Standing) == 0 {
				continue
			}
			pts := make(plotter.XYs, len(r.Series.Standing))
			for i, n := range r.Series.Standing {
				pts[i] = plotter.XY{X: float64(i) * queueEvery.Minutes(), Y: float64(n)}
			}
			l, err := plotter.NewLine(pts)
			if err != nil {
				return err
			}
			l.Color = colourOf(c)
			p.Add(l)
			p.Legend.Add(c, l)
			any = true
		}
	}
	if !any {
		return nil
	}
	p.Legend.Top, p.Legend.Left = true, true
	p.Y.Min = 0
	p.Add(plotter.NewGrid())
	return p.Save(8*vg.Inch, 4*vg.Inch, path)
}

// A corridor is a chain of signals with how far each stop line is along it, m.
type corridor struct {
	ids []traffic.JunctionID
	at  []float64
}

// longestCorridor is the longest chain of signals that lead to one another; of
// two with as many signals the longer in metres, then the first by name.
func longestCorridor(js []*traffic.Junction) corridor {
	far := map[traffic.JunctionID]map[traffic.JunctionID]float64{}
	var ids []traffic.JunctionID
	for _, j := range js {
		ids = append(ids, j.ID)
		far[j.ID] = map[traffic.JunctionID]float64{}
		for _, l := range j.Lanes {
			if l.From == j.ID && l.To != "" && l.To != j.ID && l.AheadCM > 0 {
				d := float64(l.AheadCM) / 100
				if have, ok := far[j.ID][l.To]; !ok || d < have {
					far[j.ID][l.To] = d
				}
			}
		}
	}
	slices.Sort(ids)
	var best corridor
	tries := 0
	var walk func(c corridor)
	walk = func(c corridor) {
		if tries++; tries > 200_000 {
			return
		}
		if len(c.ids) > len(best.ids) || len(c.ids) == len(best.ids) && len(c.ids) > 0 && c.at[len(c.at)-1] > best.at[len(best.at)-1] {
			best = corridor{slices.Clone(c.ids), slices.Clone(c.at)}
		}
		last := len(c.ids) - 1
		for _, next := range ids {
			if d, ok := far[c.ids[last]][next]; ok && !slices.Contains(c.ids, next) {
				walk(corridor{append(c.ids, next), append(c.at, c.at[last]+d)})
			}
		}
	}
	for _, id := range ids {
		walk(corridor{[]traffic.JunctionID{id}, []float64{0}})
	}
	return best
}

// corridorTime is how much of a run a space–time diagram shows.
const corridorTime = 15 * time.Minute

// drawCorridor runs the first quarter of an hour once more, and shows vehicles on
// their way along the longest chain of signals, with what each signal showed them.
func drawCorridor(ctx context.Context, path string, c scenarioFile, o benchOptions) error {
	s, err := traci.Load(c.path)
	if err != nil {
		return err
	}
	rules, err := timing.RulesNamed("free")
	if err != nil {
		return err
	}
	ds, err := s.Derive(traci.Limits{MinGreenMS: rules.MinGreenMS, YellowMS: rules.YellowMS}, traci.SensingOracle)
	if err != nil {
		return err
	}
	defs := map[traffic.JunctionID]*traffic.Junction{}
	var js []*traffic.Junction
	for _, d := range ds {
		js = append(js, d.Junction)
		defs[d.Junction.ID] = d.Junction
	}
	way := longestCorridor(js)
	if len(way.ids) < 2 {
		return nil // one signal is no corridor
	}
	var moving, standing plotter.XYs
	type span struct {
		x0, x1, y float64
		green     bool
	}
	var spans []span
	open := make([]int, len(way.ids))
	for i := range open {
		open[i] = -1
	}
	var start time.Time
	frames := func(now time.Time, fs []unitFrame) {
		if start.IsZero() {
			start = now
		}
		x := now.Sub(start).Minutes()
		for _, uf := range fs {
			i := slices.Index(way.ids, uf.frame.Junction)
			if i < 1 {
				continue
			}
			j := defs[uf.frame.Junction]
			green := false
			for _, m := range j.Movements {
				l, _ := j.Lane(m.From)
				green = green || l.From == way.ids[i-1] && uf.frame.Signal.State.At(m.Group).Go()
			}
			if k := open[i]; k >= 0 && spans[k].green == green {
				spans[k].x1 = x
			} else {
				if k >= 0 {
					spans[k].x1 = x
				}
				open[i] = len(spans)
				spans = append(spans, span{x, x, way.at[i], green})
			}
			for d, r := range uf.frame.Readings {
				if d >= len(j.Detectors) || j.Detectors[d].Kind != traffic.Oracle {
					continue
				}
				if l, _ := j.Lane(j.Detectors[d].Lane); l.From != way.ids[i-1] {
					continue
				}
				for _, a := range r.Ahead {
					pt := plotter.XY{X: x, Y: way.at[i] - float64(a.DistanceCM)/100}
					if a.SpeedCMS < 100 {
						standing = append(standing, pt)
					} else {
						moving = append(moving, pt)
					}
				}
			}
		}
	}
	length := corridorTime
	if o.length > 0 {
		length = min(length, o.length)
	}
	if _, err := simulate(ctx, simulateOptions{config: c.path, controller: "adaptive", rules: "free", sensing: "oracle", seed: 1, length: length, frames: frames}); err != nil {
		return fmt.Errorf("corridor of %s: %w", c.name, err)
	}
	p := plot.New()
	p.Title.Text = fmt.Sprintf("%s: from %.12s to %.12s under adaptive, free, oracle", c.name, way.ids[0], way.ids[len(way.ids)-1])
	p.X.Label.Text, p.Y.Label.Text = "minutes", "metres along the corridor"
	for _, sp := range spans {
		l, err := plotter.NewLine(plotter.XYs{{X: sp.x0, Y: sp.y}, {X: sp.x1, Y: sp.y}})
		if err != nil {
			return err
		}
		l.Width, l.Color = vg.Points(2), color.RGBA{0xcc, 0x22, 0x22, 0xff}
		if sp.green {
			l.Color = color.RGBA{0x22, 0x99, 0x44, 0xff}
		}
		p.Add(l)
	}
	for _, set := range []struct {
		name string
		pts  plotter.XYs
		c    color.RGBA
	}{{"moving", moving, color.RGBA{0x33, 0x66, 0xcc, 0xff}}, {"standing", standing, color.RGBA{0xe6, 0x9f, 0x00, 0xff}}} {
		if len(set.pts) == 0 {
			continue
		}
		sc, err := plotter.NewScatter(set.pts)
		if err != nil {
			return err
		}
		sc.GlyphStyle = draw.GlyphStyle{Color: set.c, Radius: vg.Points(0.6), Shape: draw.CircleGlyph{}}
		p.Add(sc)
		p.Legend.Add("vehicle, "+set.name, sc)
	}
	p.Legend.Top = true
	return p.Save(12*vg.Inch, 6*vg.Inch, path)
}
