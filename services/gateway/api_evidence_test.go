package gateway

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/wire"
)

// indexOf is an audit with these records.
func indexOf(t *testing.T, asked func(path, query string), rows ...indexed) http.Handler {
	t.Helper()
	mux := http.NewServeMux()
	page := func(w http.ResponseWriter, r *http.Request) {
		if asked != nil {
			asked(r.URL.Path, r.URL.RawQuery)
		}
		_ = json.NewEncoder(w).Encode(indexPage{Records: rows})
	}
	mux.HandleFunc("GET /payloads", page)
	mux.HandleFunc("GET /v1/records", page)
	mux.HandleFunc("GET /record/{index}", func(w http.ResponseWriter, r *http.Request) {
		for _, x := range rows {
			if r.PathValue("index") == "17" && x.Index == 17 {
				_ = json.NewEncoder(w).Encode(x)
				return
			}
		}
		w.WriteHeader(http.StatusNotFound)
		_, _ = w.Write([]byte(`{"detail":"index: the log has no such record"}`))
	})
	mux.HandleFunc("GET /v1/bundle", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("zip")) })
	return mux
}

// reading is a sealed access record.
func reading(t *testing.T, index uint64, agency string, covertUntil time.Time) indexed {
	t.Helper()
	key, _ := clientKey(t)
	a := traffic.Access{District: "harbour", Turn: traffic.Turn{Epoch: 1, Seq: index}, Time: noon, By: traffic.Agent{Agency: agency, Name: agency + "-1"},
		Method: "/stopline.v1.EvidenceService/GetBundle", Purpose: "investigation", Granted: true, Phase: traffic.AccessUnary, Count: 1, CovertUntil: covertUntil}
	return indexed{Index: index, Kind: "access", Requester: agency + "/" + agency + "-1", Time: noon, Salt: make([]byte, 32),
		Envelope: identity.Sign(key, identity.KindAccess, identity.Protobuf, wire.EncodeAccess(&a)).Marshal()}
}

func decode[M proto.Message](t *testing.T, b []byte, m M) M {
	t.Helper()
	if err := protojson.Unmarshal(b, m); err != nil {
		t.Fatalf("%v in %s", err, b)
	}
	return m
}

// What is not to be seen yet, or not by this agency, is in no listing and no
// bundle.
func TestCovertReadings(t *testing.T) {
	until := time.Now().Add(time.Hour)
	rows := []indexed{reading(t, 17, "police", until), reading(t, 18, "police", time.Now().Add(-time.Hour)), reading(t, 19, "roads", time.Time{}), {Index: 20, Kind: "access", State: "gone"}}
	w := newAPIWorld(t, apiOptions{audit: indexOf(t, nil, rows...)}).ready()
	auditor, police, operator := w.who("auditor-1", "audit"), w.who("police-1", "investigation", headerCase, "K", headerBasis, "warrant"), w.who("operator-1", "operations")
	list := func(path string, h http.Header) []uint64 {
		res, b := w.rest("GET", path, h, "")
		if res.StatusCode != 200 {
			t.Fatalf("%s: %s %s", path, res.Status, b)
		}
		var out []uint64
		if strings.Contains(path, "/search") {
			for _, r := range decode(t, b, &pb.SearchRecordsResponse{}).Records {
				out = append(out, r.Index)
			}
			return out
		}
		for _, r := range decode(t, b, &pb.ListAccessResponse{}).Records {
			out = append(out, r.Index)
		}
		return out
	}
	for _, tc := range []struct {
		name, path string
		h          http.Header
		want       []uint64
	}{
		{"an auditor lists", "/v1/access", auditor, []uint64{18, 19}},
		{"its own agency lists", "/v1/access", police, []uint64{17, 18}},
		{"another agency lists", "/v1/access", operator, []uint64{19}},
		{"by subject", "/v1/access?subject=roads-1", auditor, []uint64{19}},
		{"an auditor searches", "/v1/search?filter.kind=access", auditor, []uint64{18, 19}},
		{"a search of all kinds has no readings", "/v1/search", auditor, nil},
		{"an operator searches readings", "/v1/search", operator, nil},
	} {
		if got := list(tc.path, tc.h); !slices.Equal(got, tc.want) {
			t.Errorf("%s: got %v, want %v", tc.name, got, tc.want)
		}
	}
	w.problem(404, "GET", "/v1/bundles/17", auditor, "")
	w.problem(404, "GET", "/v1/chains/17", auditor, "")
	if res, b := w.rest("GET", "/v1/bundles/17", police, ""); res.StatusCode != 200 || string(b) != "zip" {
		t.Errorf("its own agency: got %s %s, want the bundle", res.Status, b)
	}
	w.problem(403, "GET", "/v1/access?agency=police", operator, "")
	w.problem(403, "GET", "/v1/search?filter.kind=access", operator, "")
	w.problem(403, "GET", "/v1/bundles/17", operator, "")
	w.problem(404, "GET", "/v1/bundles/99", auditor, "")
}

// The record of a covert reading says until when; a denied one is never covert.
func TestCovertRecords(t *testing.T) {
	w := newAPIWorld(t, apiOptions{audit: indexOf(t, nil)}).ready()
	before := time.Now()
	covert := w.who("police-1", "investigation", headerCase, "K", headerBasis, "warrant", headerCovert, "30")
	if res, b := w.rest("GET", "/v1/search", covert, ""); res.StatusCode != 200 {
		t.Fatalf("got %s %s", res.Status, b)
	}
	w.problem(403, "GET", "/v1/search", w.who("police-1", "investigation", headerCase, "K", headerBasis, "warrant", headerCovert, "300"), "")
	w.problem(403, "GET", "/v1/search", w.who("police-1", "investigation", headerCovert, "30"), "")
	as := w.have("SearchRecords", 3)
	if d := as[0].CovertUntil.Sub(before); d < 29*24*time.Hour || d > 31*24*time.Hour {
		t.Errorf("covert until %s, want 30 days", as[0].CovertUntil)
	}
	for _, a := range as[1:] {
		if a.Granted || !a.CovertUntil.IsZero() {
			t.Errorf("got %+v, want it denied and not covert", a)
		}
	}
}

// Who asks for records of one kind gets audit asked for exactly that.
func TestFilters(t *testing.T) {
	var path, query string
	w := newAPIWorld(t, apiOptions{audit: indexOf(t, func(p, q string) { path, query = p, q })}).ready()
	h := w.who("police-1", "investigation", headerCase, "K", headerBasis, "warrant")
	for _, tc := range []struct{ in, path, query string }{
		{"filter.command=7&filter.junction=J1&pageSize=5", "/v1/records", "junction=J1&kind=command&limit=5&seq=7"},
		{"filter.kind=frame&filter.device=d&filter.height=9", "/v1/records", "device=d&height=9&kind=frame&limit=100"},
		{"filter.kind=access&filter.requester=police/police-1&filter.caseNumber=K", "/payloads", "case=K&kind=access&limit=100&requester=police%2Fpolice-1"},
		{"filter.startTime=2026-01-01T00:00:00Z&filter.endTime=2026-01-02T00:00:00Z", "/v1/records", "from=2026-01-01T00%3A00%3A00Z&limit=100&to=2026-01-02T00%3A00%3A00Z"},
	} {
		if res, b := w.rest("GET", "/v1/search?"+tc.in, h, ""); res.StatusCode != 200 || path != tc.path || query != tc.query {
			t.Errorf("%s: got %s %s, and audit asked %s?%s, want %s?%s", tc.in, res.Status, b, path, query, tc.path, tc.query)
		}
	}
	for in, field := range map[string]string{
		"filter.kind=nothing": "filter.kind", "filter.kind=frame&filter.command=7": "filter.command",
		"filter.startTime=2026-01-02T00:00:00Z&filter.endTime=2026-01-02T00:00:00Z": "filter.end_time", "filter.startTime=1926-01-02T00:00:00Z": "filter.start_time",
	} {
		if p, _ := w.problem(400, "GET", "/v1/search?"+in, h, ""); len(p.Errors) != 1 || p.Errors[0].Field != field {
			t.Errorf("%s: got %+v, want it to name %s", in, p, field)
		}
	}
}

func TestAggregate(t *testing.T) {
	in := func() []*pb.AccessCount {
		return []*pb.AccessCount{
			{Agency: "police", Purpose: "investigation", Granted: true, Count: 27}, {Agency: "fire", Purpose: "emergency-response", Granted: true, Count: 9},
			{Agency: "roads", Purpose: "operations", Granted: true, Count: 4}, {Agency: "fire", Purpose: "operations", Count: 9}, {Agency: "bus", Purpose: "transit-service", Granted: true, Count: 10},
		}
	}
	want := []string{"bus transit-service true 10", "other other true 13", "police investigation true 27"}
	for _, runs := range []bool{false, true} {
		var got []string
		for _, c := range aggregate(in(), runs) {
			b, err := json.Marshal(c.Count)
			if err != nil {
				t.Fatal(err)
			}
			granted := "false"
			if c.Granted {
				granted = "true"
			}
			got = append(got, c.Agency+" "+c.Purpose+" "+granted+" "+string(b))
		}
		if runs {
			want = []string{"bus transit-service true 10", "other other true 10", "police investigation true 20"}
		}
		if !slices.Equal(got, want) {
			t.Errorf("while the month runs %v: got %q, want %q", runs, got, want)
		}
	}
}

func TestMasks(t *testing.T) {
	m := &pb.RecordInfo{Index: 7, Kind: "frame", Junction: "J1"}
	chain := &pb.GetChainResponse{Account: "a", Links: []*pb.ChainLink{{Step: "reading", Record: m}}}
	link := &pb.ChainLink{Step: "reading", Record: m, Text: "t"}
	for _, tc := range []struct {
		in    proto.Message
		paths []string
		want  string
	}{
		{m, nil, `{"index":"7","kind":"frame","junction":"J1"}`},
		{m, []string{"kind"}, `{"kind":"frame"}`},
		{link, []string{"record.kind", "text"}, `{"record":{"kind":"frame"},"text":"t"}`},
		{link, []string{"record.kind", "record"}, `{"record":{"index":"7","kind":"frame","junction":"J1"}}`},
		{link, []string{"record", "record.kind"}, `{"record":{"index":"7","kind":"frame","junction":"J1"}}`},
		{chain, []string{"links"}, `{"links":[{"step":"reading","record":{"index":"7","kind":"frame","junction":"J1"}}]}`},
	} {
		b, err := protojson.Marshal(masked(tc.in, &fieldmaskpb.FieldMask{Paths: tc.paths}))
		if got := strings.ReplaceAll(string(b), ": ", ":"); err != nil || strings.ReplaceAll(got, ", ", ",") != tc.want {
			t.Errorf("%v: got %s, %v, want %s", tc.paths, got, err, tc.want)
		}
	}
	if m.Kind != "frame" || m.Index != 7 {
		t.Error("a mask has changed the message itself")
	}
	if err := checkMask(&fieldmaskpb.FieldMask{Paths: []string{"record.kind"}}, link); err != nil {
		t.Error(err)
	}
	if err := checkMask(&fieldmaskpb.FieldMask{Paths: []string{"record.secret"}}, link); err == nil {
		t.Error("an unknown path is taken")
	}
	if err := checkMask(&fieldmaskpb.FieldMask{Paths: make([]string, 65)}, link); err == nil {
		t.Error("65 paths are taken")
	}
}

func TestPageTokens(t *testing.T) {
	a, b := &pb.SearchRecordsRequest{Filter: &pb.RecordFilter{Kind: "frame"}, PageSize: 5}, &pb.SearchRecordsRequest{Filter: &pb.RecordFilter{Kind: "command"}}
	token := nextPage(a, "x")
	a.PageToken, a.PageSize = token, 50 // another size goes on all the same
	if got, err := pageAt(a, token); err != nil || got != "x" {
		t.Errorf("got %q, %v, want x", got, err)
	}
	for name, bad := range map[string]string{"another's": token, "no base64": "!", "no JSON": "AAAA"} {
		if _, err := pageAt(b, bad); err == nil {
			t.Errorf("%s token is taken", name)
		}
	}
	if nextPage(a, "") != "" {
		t.Error("a token where there is no next page")
	}
}

func TestMeasure(t *testing.T) {
	j := &traffic.Junction{ID: "J1", Stages: []traffic.Stage{{Name: "a"}, {Name: "b"}},
		Detectors: []traffic.Detector{{ID: "loop", Kind: traffic.StopLine}, {ID: "area", Kind: traffic.Area}, {ID: "oracle", Kind: traffic.Oracle}}}
	m := newMeasure(j, noon, noon.Add(time.Minute), 30*time.Second)
	frame := func(after time.Duration, stage int, mode traffic.Mode, count, halted uint32, interval time.Duration) {
		m.add(&traffic.Frame{Time: noon.Add(after), Interval: interval, Signal: traffic.Signal{Stage: stage, Mode: mode},
			Readings: []traffic.Reading{{Detector: "loop", Count: count}, {Detector: "area", Halted: halted}, {Detector: "oracle", Count: 99, Halted: 99}}})
	}
	frame(time.Second, 0, traffic.Coordinated, 2, 4, time.Second)
	frame(1500*time.Millisecond, -1, traffic.Coordinated, 0, 0, 0) // an event between
	frame(2*time.Second, 1, traffic.Coordinated, 1, 2, time.Second)
	frame(3*time.Second, 0, traffic.Local, 0, 0, time.Second)
	frame(31*time.Second, 0, traffic.Local, 5, 1, time.Second)
	frame(61*time.Second, 0, traffic.Local, 5, 1, time.Second) // outside
	frame(-time.Second, 0, traffic.Local, 5, 1, time.Second)
	got := m.result()
	if len(got) != 2 || got[0].Vehicles != 3 || got[0].MaxHalted != 4 || got[0].MeanHalted != 2 || !slices.Equal(got[0].StageCount, []uint32{2, 1}) ||
		got[0].StageGreen[0].AsDuration() != 2*time.Second || got[0].StageGreen[1].AsDuration() != time.Second || got[0].DegradedShare < 0.33 || got[0].DegradedShare > 0.34 {
		t.Errorf("got %v, want three vehicles, at most four halted, stages twice and once", got)
	}
	if got[1].Vehicles != 5 || got[1].DegradedShare != 1 || got[1].StageCount[0] != 0 {
		t.Errorf("second bin: got %v, want five vehicles, all degraded, in the stage of before", got[1])
	}
}
