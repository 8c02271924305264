package hires

import (
	"slices"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// TestGroupOregon brings in the whole of the Oregon data, and gets all of it back
// from the records alone.
func TestGroupOregon(t *testing.T) {
	in := map[traffic.DeviceID][]Event{}
	out := map[traffic.DeviceID][]Event{}
	var records []*traffic.Import
	sha := [32]byte{1}
	g, err := NewGroup(GroupOptions{District: "oregon", Importer: "importer", Run: 7, Log: "odot", SHA256: sha}, func(m *traffic.Import) error {
		records = append(records, m)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = Read(shared(t, "hires-odot/odot_hires_test_data.csv.gz"), Options{}, func(e Event) error {
		in[e.Device] = append(in[e.Device], e)
		return g.Add(e)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Flush(); err != nil {
		t.Fatal(err)
	}
	for i, m := range records {
		if m.Seq != uint64(i+1) || m.Run != 7 || m.District != "oregon" || m.Importer != "importer" || m.Log != "odot" || m.SHA256 != sha {
			t.Fatalf("record %d: got %s %s run %d seq %d log %q", i, m.District, m.Importer, m.Run, m.Seq, m.Log)
		}
		out[m.Device] = append(out[m.Device], Events(m)...)
	}
	if want := (GroupStats{Events: 246413, Imports: 30623}); g.Stats() != want || len(records) != want.Imports {
		t.Errorf("got %d records, %+v, want %+v", len(records), g.Stats(), want)
	}
	if len(in) != 3 {
		t.Errorf("got %d devices, want 3", len(in))
	}
	for id := range in {
		if !slices.Equal(in[id], out[id]) {
			t.Errorf("device %s: the records give other events, or another order, than the file", id)
		}
	}
}
