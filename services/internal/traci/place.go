package traci

import (
	"math"
	"strconv"
	"strings"
)

// place returns where a point of the network lies, in degrees of WGS 84. It
// knows UTM, which is what SUMO's importers use, and coordinates that are
// degrees already. A network that is not placed on the Earth, or by another
// projection, is taken as metres east and north of 0° N 0° E: its junctions
// have the right distances from each other, in the Gulf of Guinea.
func (l location) place(p point) (lat, lon float64) {
	x, y := p.x-l.offsetX, p.y-l.offsetY
	zone, south, proj := 0, false, ""
	for _, f := range strings.Fields(l.proj) {
		name, value, _ := strings.Cut(strings.TrimPrefix(f, "+"), "=")
		switch name {
		case "proj":
			proj = value
		case "zone":
			zone, _ = strconv.Atoi(value) // no number is zone 0, which is none
		case "south":
			south = true
		}
	}
	switch {
	case proj == "utm" && zone >= 1 && zone <= 60:
		return inverseUTM(x, y, zone, south)
	case (proj == "longlat" || proj == "latlong") && math.Abs(y) <= 90 && math.Abs(x) <= 180:
		return y, x
	case l.proj != "":
		x, y = p.x, p.y
	}
	const metresPerDegree = 111_320
	return y / metresPerDegree, x / metresPerDegree
}

// inverseUTM is Krüger's series to the third order (L. Krüger 1912, in the form
// of C. Karney, "Transverse Mercator with an accuracy of a few nanometers",
// 2011), good to millimetres within a zone.
func inverseUTM(easting, northing float64, zone int, south bool) (lat, lon float64) {
	const (
		a  = 6378137.0         // WGS 84
		f  = 1 / 298.257223563 // WGS 84
		k0 = 0.9996            // UTM
		n  = f / (2 - f)       // third flattening
		n2 = n * n
		n3 = n2 * n
		// rectifying radius
		r = a / (1 + n) * (1 + n2/4 + n2*n2/64)
	)
	if south {
		northing -= 10_000_000
	}
	xi, eta := northing/(k0*r), (easting-500_000)/(k0*r)
	beta := [3]float64{n/2 - 2*n2/3 + 37*n3/96, n2/48 + n3/15, 17 * n3 / 480}
	xp, ep := xi, eta
	for i, b := range beta {
		m := 2 * float64(i+1)
		xp -= b * math.Sin(m*xi) * math.Cosh(m*eta)
		ep -= b * math.Cos(m*xi) * math.Sinh(m*eta)
	}
	chi := math.Asin(math.Sin(xp) / math.Cosh(ep))
	delta := [3]float64{2*n - 2*n2/3 - 2*n3, 7*n2/3 - 8*n3/5, 56 * n3 / 15}
	phi := chi
	for i, d := range delta {
		phi += d * math.Sin(2*float64(i+1)*chi)
	}
	lambda := math.Atan2(math.Sinh(ep), math.Cos(xp))
	return phi * 180 / math.Pi, lambda*180/math.Pi + float64(zone)*6 - 183
}
