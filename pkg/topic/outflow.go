package topic

import "github.com/stopline-traffic/stopline/pkg/traffic"

// Outflow carries what a junction announces to those downstream: the vehicles
// that it has let go, and is about to. JSON of timing.Outflow. A signal-control
// that decides for only some junctions of a district hears of the others by it.
func Outflow(d traffic.DistrictID, j traffic.JunctionID) string {
	return sub(d, "outflow", Token(string(j)))
}

// OutflowAll matches every [Outflow].
func OutflowAll(d traffic.DistrictID) string { return sub(d, "outflow", "*") }
