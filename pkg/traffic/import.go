package traffic

import "time"

// Import is a part of a controller's log that somebody else than the controller
// has brought in: the events of one device in one interval. Its signature is the
// importer's; nothing says that the controller wrote what is in it.
type Import struct {
	District DistrictID
	// Importer is the service whose key signs.
	Importer string
	// Run rises with each import of one importer, Seq from 1 within a run,
	// without gaps.
	Run, Seq uint64
	// Log names where the events come from, such as a file's name; SHA256 is of
	// the whole file as it was read, before any decompression.
	Log    string
	SHA256 [32]byte
	// Device is what the log calls the controller.
	Device DeviceID
	// Time is the end of the interval, in UTC, which is exclusive: an event at
	// that time belongs to the next.
	Time     time.Time
	Interval time.Duration
	// Events in the order of the log; offsets are before Time, 1 ms to Interval.
	Events []Event
}

// Health says that a detector has begun, or ceased, to break a rule of detector
// health.
type Health struct {
	District DistrictID
	Junction JunctionID
	// Seq rises with each to a junction.
	Seq uint64
	// Height is the block that it rests on, RestsOn the frame in it that decided.
	Height   uint64
	RestsOn  FrameKey
	Detector DetectorID
	// Failed says whether the detector breaks Rule from now on.
	Failed bool
	Rule   string
	// Reason gives the figures, for people.
	Reason string
	// Time is that of the frame, Since when what is wrong began, both in UTC.
	Time, Since time.Time
}
