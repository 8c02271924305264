package hires_test

import (
	"crypto/sha256"
	"fmt"
	"io"
	"log"
	"strings"

	"github.com/stopline-traffic/stopline/pkg/hires"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// A log is read twice: for its digest, which each record carries, and for its
// events.
func Example() {
	file := strings.NewReader("TimeStamp,DeviceId,EventId,Parameter\n" +
		"2024-05-13 15:00:00.1,227,82,27\n" +
		"2024-05-13 15:00:00.9,227,81,27\n" +
		"2024-05-13 15:00:01.0,227,8,2\n" +
		"2024-05-13 15:00:01.0,227,300,12\n")
	digest := sha256.New()
	if _, err := io.Copy(digest, file); err != nil {
		log.Fatal(err)
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		log.Fatal(err)
	}
	o := hires.GroupOptions{District: "oregon", Importer: "importer", Run: 1, Log: "may.csv", SHA256: [32]byte(digest.Sum(nil))}
	g, err := hires.NewGroup(o, func(m *traffic.Import) error {
		fmt.Println("record", m.Seq, "of", m.Device, "before", m.Time.Format("15:04:05"))
		for _, e := range hires.Events(m) {
			fmt.Println("  ", hires.Describe(e.Code), e.Param)
		}
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	s, err := hires.Read(file, hires.Options{}, g.Add)
	if err != nil {
		log.Fatal(err) // what was read before is in g
	}
	if err := g.Flush(); err != nil {
		log.Fatal(err)
	}
	fmt.Println(s.Events, "events,", s.UnknownEvents(), "of unknown codes; the whole file:", s.SHA256 == o.SHA256)
	// Output:
	// record 1 of 227 before 15:00:01
	//    detector on 27
	//    detector off 27
	// record 2 of 227 before 15:00:02
	//    phase begin yellow clearance 2
	//    manufacturer's 12
	// 4 events, 1 of unknown codes; the whole file: true
}
