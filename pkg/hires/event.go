// Package hires reads the logs of traffic signal controllers with a resolution of
// a tenth of a second, and computes from them what signal engineers judge a
// junction by.
//
// The events are Purdue's: "Indiana Traffic Signal Hi Resolution Data Logger
// Enumerations" (2012), and its edition of 2020, doi 10.5703/1288284317155.
package hires

import "github.com/stopline-traffic/stopline/pkg/traffic"

// Event is one line of a controller's log.
type Event struct {
	// At is nanoseconds since 1970 UTC. Logs without a time zone are read as the
	// zone that the caller names.
	At int64
	// Device is what the log calls the controller.
	Device traffic.DeviceID
	// Code is the enumeration's, Param its parameter: a phase, detector, …
	Code, Param uint16
}
