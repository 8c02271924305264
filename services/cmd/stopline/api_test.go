package main

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/gateway"
	"github.com/stopline-traffic/stopline/services/internal/district"
)

// agency is somebody who asks a running demo.
type agency struct {
	d       *demoRun
	addr    string
	token   string
	purpose []string // headers
}

// asClient is a client with a fresh token of `stopline token`.
func (d *demoRun) asClient(client, purpose string, more ...string) *agency {
	d.t.Helper()
	r := inside(d.t, "token", "--data", d.data, "--client", client)
	wantExit(d.t, r, exitOK)
	return &agency{d: d, addr: d.api(), token: strings.TrimSpace(r.out), purpose: append([]string{"Stopline-Purpose", purpose}, more...)}
}

// api is the address that the demo printed.
func (d *demoRun) api() string {
	d.t.Helper()
	_, rest, ok := strings.Cut(d.err.String(), "  api ")
	if !ok {
		d.t.Fatalf("the demo prints no address of its API:\n%s", d.err)
	}
	return strings.Fields(rest)[0]
}

// ask calls by REST, again where the gateway says to come again: a slow machine
// agrees on nothing for a while.
func (a *agency) ask(method, path, body string) (res *http.Response, b []byte) {
	a.d.t.Helper()
	waitFor(a.d.t, method+" "+path+" answered", 2*soon, func() bool {
		var err error
		if res, b, err = a.try(method, path, body); err != nil {
			a.d.t.Fatal(err)
		}
		return res.StatusCode != http.StatusServiceUnavailable
	})
	return res, b
}

// apiClient waits longer than the gateway does.
var apiClient = &http.Client{Timeout: 40 * time.Second}

func (a *agency) try(method, path, body string) (*http.Response, []byte, error) {
	req, err := http.NewRequest(method, "http://"+a.addr+path, strings.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	req.Header.Set("Authorization", "Bearer "+a.token)
	for i := 0; i+1 < len(a.purpose); i += 2 {
		req.Header.Set(a.purpose[i], a.purpose[i+1])
	}
	res, err := apiClient.Do(req)
	if err != nil {
		return nil, nil, err
	}
	b, err := io.ReadAll(res.Body)
	_ = res.Body.Close()
	return res, b, err
}

// get calls by REST and wants an answer, into m where it is not nil. It returns the
// answer and its receipt.
func (a *agency) get(path string, m proto.Message) ([]byte, receipt) {
	a.d.t.Helper()
	res, b := a.ask("GET", path, "")
	if res.StatusCode != http.StatusOK {
		a.d.t.Fatalf("GET %s: %s %s", path, res.Status, b)
	}
	if m != nil {
		if err := protojson.Unmarshal(b, m); err != nil {
			a.d.t.Fatalf("GET %s: %v in %s", path, err, b)
		}
	}
	return b, receipt{Commitment: a.d.promise(res.Header.Get(gateway.HeaderReceipt))}
}

// promise checks an access receipt against the registry's key, and returns its
// commitment.
func (d *demoRun) promise(text string) []byte {
	d.t.Helper()
	b, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		d.t.Fatal(err)
	}
	var r pb.AccessReceipt
	if err := proto.Unmarshal(b, &r); err != nil {
		d.t.Fatal(err)
	}
	key, err := d.district.Key(district.GatewayKey)
	if err != nil {
		d.t.Fatal(err)
	}
	in := gateway.ReceiptInput(d.district.Genesis.District, gateway.Promise{Commitment: ledger.Hash(r.Commitment), At: time.Unix(0, r.TimeUnixNano)})
	if !ed25519.Verify(key.Public().(ed25519.PublicKey), in, r.Signature) {
		d.t.Fatalf("receipt %q is not signed by the gateway", text)
	}
	return r.Commitment
}

// Agencies ask a whole district: live state, why a light changed, its evidence, an
// export by two, who read what; every reading is in the sealed log as its receipt
// promises.
func TestAgenciesAsk(t *testing.T) {
	processTest(t)
	d := startDemo(t, filepath.Join(t.TempDir(), "district"), "--api", "127.0.0.1:0")
	operator, police, second := d.asClient("operator-1", "operations"), d.asClient("police-1", "investigation", "Stopline-Case", "K-17/26", "Stopline-Legal-Basis", "warrant"),
		d.asClient("police-2", "investigation", "Stopline-Case", "K-17/26", "Stopline-Legal-Basis", "warrant")
	var receipts []receipt

	var state pb.GetJunctionStateResponse
	waitFor(t, "a junction's state", soon, func() bool {
		res, b, err := operator.try("GET", "/v1/junctions/h0101/state", "")
		return err == nil && res.StatusCode == 200 && protojson.Unmarshal(b, &state) == nil && state.State.Stage >= 0
	})
	if state.State.Junction != "h0101" || state.State.Height == 0 || state.State.State == "" || state.State.LastReceipt == nil {
		t.Errorf("got the state %v, want one of h0101 from a block", &state)
	}

	// gRPC at the same address.
	conn, err := grpc.NewClient(d.api(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+operator.token, "stopline-purpose", "operations")
	var md metadata.MD
	entries, err := pb.NewRegistryServiceClient(conn).ListEntries(ctx, &pb.ListEntriesRequest{Type: "junction"}, grpc.Header(&md))
	if err != nil || len(entries.Entries) != 9 {
		t.Fatalf("gRPC: got %v, %v, want nine junctions", entries, err)
	}
	receipts = append(receipts, receipt{Commitment: d.promise(md.Get(gateway.HeaderReceipt)[0])})

	// Why did it change, and the proof.
	var chain pb.GetChainResponse
	waitFor(t, "a chain with a command and what became of it", soon, func() bool {
		_, r := operator.get("/v1/junctions/h0101/chain", &chain)
		receipts = append(receipts, r)
		return len(chain.Links) >= 3 && chain.Links[1].Step == "command"
	})
	command := strconv.FormatUint(chain.Links[1].Record.Index, 10)
	var bundle []byte
	waitFor(t, "the bundle of the command's chain", soon, func() bool {
		res, b, err := police.try("GET", "/v1/bundles/"+command+"?chain=true", "")
		if err != nil || res.Header.Get(gateway.HeaderReceipt) == "" {
			return false
		}
		receipts = append(receipts, receipt{Commitment: d.promise(res.Header.Get(gateway.HeaderReceipt))})
		bundle = b
		return res.StatusCode == http.StatusOK
	})
	file := filepath.Join(t.TempDir(), "evidence.zip")
	if err := os.WriteFile(file, bundle, 0o644); err != nil {
		t.Fatal(err)
	}
	wantExit(t, inside(t, "verify", "--policy", filepath.Join(d.data, "policy"), file), exitOK, "PASS")
	for want, b := range map[string][]byte{`"verified":true`: bundle, `"verified":false`: append([]byte{}, bundle[:len(bundle)-1]...)} {
		body, err := json.Marshal(map[string][]byte{"bundle": b})
		if err != nil {
			t.Fatal(err)
		}
		if res, b := operator.ask("POST", "/v1/bundles:verify", string(body)); res.StatusCode != 200 || !strings.Contains(strings.ReplaceAll(string(b), " ", ""), want) {
			t.Errorf("verify: got %s %.300s, want %s", res.Status, b, want)
		}
	}

	// An export needs two people, and exactly what the second has approved.
	filter := `{"kind":"command","junction":"h0101"}`
	export := func(a *agency, filter, approval string) (int, string) {
		res, b := a.ask("POST", "/v1/exports", `{"filter":`+filter+`,"approval":"`+approval+`"}`)
		return res.StatusCode, string(b)
	}
	if code, b := export(police, filter, ""); code != http.StatusForbidden {
		t.Errorf("an export by one: got %d %s, want 403", code, b)
	}
	if res, b := police.ask("POST", "/v1/export-approvals", `{"filter":`+filter+`,"requester":"police-1"}`); res.StatusCode != http.StatusBadRequest {
		t.Errorf("one's own approval: got %s %s, want 400", res.Status, b)
	}
	res, b := second.ask("POST", "/v1/export-approvals", `{"filter":`+filter+`,"requester":"police-1"}`)
	var approval pb.ApproveExportResponse
	if err := protojson.Unmarshal(b, &approval); err != nil || res.StatusCode != 200 {
		t.Fatalf("approval: got %s %s", res.Status, b)
	}
	for name, refused := range map[string]func() (int, string){
		"of other records": func() (int, string) { return export(police, `{"kind":"command"}`, approval.Approval) },
		"by another":       func() (int, string) { return export(second, filter, approval.Approval) },
		"with a changed approval": func() (int, string) {
			return export(police, filter, "A"+approval.Approval[1:])
		},
		"for another case": func() (int, string) {
			return export(d.asClient("police-1", "investigation", "Stopline-Case", "K-18/26", "Stopline-Legal-Basis", "warrant"), filter, approval.Approval)
		},
	} {
		if code, b := refused(); code != http.StatusForbidden {
			t.Errorf("an export %s: got %d %.200s, want 403", name, code, b)
		}
	}
	code, lines := export(police, filter, approval.Approval)
	if code != 200 || strings.TrimSpace(lines) == "" {
		t.Fatalf("the export: got %d %.300s, want records", code, lines)
	}
	for line := range strings.Lines(lines) {
		var m pb.ExportRecordsResponse
		if err := protojson.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("%v in %.200s", err, line)
		}
		for _, r := range m.Records {
			h := ledger.Commit(ledger.Salt(r.Salt), r.Envelope)
			if r.Info.Kind != "command" || r.Info.Junction != "h0101" {
				t.Errorf("exported %v, want commands to h0101 only", r.Info)
			}
			receipts = append(receipts, receipt{Commitment: h[:]})
		}
	}

	// Whoever reads is on record: the police see their own, the auditor all.
	// Covert readings are not listed to others before their time.
	covert := d.asClient("police-1", "investigation", "Stopline-Case", "K-99/26", "Stopline-Legal-Basis", "warrant", "Stopline-Covert-Days", "30")
	_, hidden := covert.get("/v1/search?filter.kind=command&pageSize=1", nil)
	receipts = append(receipts, hidden)
	var own, all pb.ListAccessResponse
	contains := func(l *pb.ListAccessResponse, r receipt) bool {
		for _, x := range l.Records {
			if bytes.Equal(x.Commitment, r.Commitment) {
				return true
			}
		}
		return false
	}
	waitFor(t, "their own covert reading listed to the police", soon, func() bool {
		police.get("/v1/access?pageSize=1000", &own)
		return contains(&own, hidden)
	})
	for _, x := range own.Records {
		if x.Record.Agency != "police" {
			t.Errorf("the police are shown %v", x.Record)
		}
	}
	_, mine := operator.get("/v1/search?filter.kind=command&pageSize=1", nil)
	auditor := d.asClient("auditor-1", "audit")
	waitFor(t, "the operator's reading listed to the auditor", soon, func() bool {
		auditor.get("/v1/access?pageSize=1000", &all)
		return contains(&all, mine)
	})
	if contains(&all, hidden) {
		t.Error("a covert reading is listed to the auditor before its time")
	}
	for _, x := range all.Records {
		if x.Record.CaseNumber == "K-99/26" {
			t.Errorf("the auditor is shown %v", x.Record)
		}
	}
	receipts = append(receipts, mine)
	// The public has sums of ten and more.
	for range 25 {
		police.get("/v1/search?filter.kind=command&pageSize=1", nil)
	}
	waitFor(t, "the public's sums", soon, func() bool {
		var s pb.GetAccessSummaryResponse
		res, b, err := (&agency{d: d, addr: d.api()}).public("/v1/access/summary?month=" + time.Now().UTC().Format("2006-01"))
		if err != nil || res.StatusCode != 200 || protojson.Unmarshal(b, &s) != nil {
			t.Fatalf("summary: %v %s", err, b)
		}
		for _, c := range s.Counts {
			if c.Count < 10 || c.Count%10 != 0 {
				t.Errorf("the public is told of %v", c)
			}
		}
		return len(s.Counts) > 0
	})

	// Every receipt's commitment is in the sealed log, once.
	d.sealed(receipts...)

	// Which rule it was, without asking.
	explain := func(code int, want string, args ...string) {
		t.Helper()
		wantExit(t, inside(t, append([]string{"policy", "explain", "--url", d.url}, args...)...), code, want)
	}
	explain(exitOK, "investigators-read-by-case", "--client", "police-1", "--method", "GetBundle", "--object", "record:17,kind=frame", "--purpose", "investigation", "--case", "K", "--legal-basis", "warrant")
	explain(exitFailed, "no policy allows", "--client", "police-1", "--method", "GetJunctionState", "--object", "junction:h0101", "--purpose", "operations")
	explain(exitOK, "public", "--client", "public", "--method", "GetCheckpoint")
	wantExit(t, inside(t, "policy", "explain", "--data", d.data, "--client", "operator-1", "--method", "GetJunctionState", "--purpose", "operations", "--json"), exitOK, `"live-operations"`)
	wantExit(t, inside(t, "policy", "explain", "--client", "x", "--method", "Nothing"), exitUsage, "no method")
	wantExit(t, inside(t, "token", "--data", d.data, "--client", "nobody"), exitFailed, "there are")
	wantExit(t, inside(t, "token", "--data", d.data, "--client", "police-1", "--for", "1h"), exitUsage, "15m")

	d.propose()
	if r := d.stop(); r.LogSize != r.SealedSize || !r.Evidence.Verified {
		t.Errorf("the demo ends with %s", lastLine(d.out.String()))
	}
}

// public asks without saying who.
func (a *agency) public(path string) (*http.Response, []byte, error) {
	res, err := httpClient.Get("http://" + a.addr + path)
	if err != nil {
		return nil, nil, err
	}
	b, err := io.ReadAll(res.Body)
	_ = res.Body.Close()
	return res, b, err
}

// propose has a change go round the officials through the API, and come into
// force.
func (d *demoRun) propose() {
	t := d.t
	t.Helper()
	dir := t.TempDir()
	doc := filepath.Join(dir, "proposal")
	agencyKey, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := json.Marshal(identity.Agency{Name: "Harbour pilots", Key: identity.PublicKey(agencyKey)})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "body")
	if err := os.WriteFile(file, body, 0o644); err != nil {
		t.Fatal(err)
	}
	wantExit(t, inside(t, "registry", "propose", "--url", d.url, "--type", "agency", "--id", "pilots", "--file", file, "--out", doc), exitOK)
	written, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	official := d.asClient("registrar-1", "governance")
	post := func(path string, in any, want int) *pb.RegistryProposal {
		t.Helper()
		b, err := json.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		res, out := official.ask("POST", path, string(b))
		if res.StatusCode != want {
			t.Fatalf("%s: got %s %s, want %d", path, res.Status, out, want)
		}
		var m pb.GetProposalResponse
		if want == 200 {
			if err := protojson.Unmarshal(out, &m); err != nil {
				t.Fatal(err)
			}
		}
		return m.Proposal
	}
	p := post("/v1/proposals", map[string]any{"document": written}, 200)
	if p.Status != "open" || p.Missing == "" || len(p.Id) != 64 {
		t.Fatalf("proposed: got %v, want it open with signatures missing", p)
	}
	if again := post("/v1/proposals", map[string]any{"document": written}, 200); again.Id != p.Id {
		t.Errorf("the same proposal again is %s, want %s", again.Id, p.Id)
	}
	proposal, err := identity.ParseProposal(written)
	if err != nil {
		t.Fatal(err)
	}
	second, err := d.district.Key(district.PoliceOfficial)
	if err != nil {
		t.Fatal(err)
	}
	first, err := d.district.Key(district.RegistrarKey)
	if err != nil {
		t.Fatal(err)
	}
	a, err := identity.Approve(second, proposal.Change)
	if err != nil {
		t.Fatal(err)
	}
	bad := append([]byte{}, a.Signature...)
	bad[0] ^= 1
	post("/v1/proposals/"+p.Id+":sign", map[string]any{"keyId": a.Key, "signature": bad}, 400)
	post("/v1/proposals/"+strings.Repeat("0", 64)+":sign", map[string]any{"keyId": a.Key, "signature": []byte(a.Signature)}, 404)
	if p = post("/v1/proposals/"+p.Id+":sign", map[string]any{"keyId": a.Key, "signature": []byte(a.Signature)}, 200); len(p.SignedBy) != 1 {
		t.Errorf("signed: got %v, want one signature", p)
	}
	proposal.Change.Approvals = []identity.Approval{a}
	payload, err := proposal.Change.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	other := proposal.Change
	other.Nonce++
	otherPayload, err := other.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	post("/v1/proposals/"+p.Id+":submit", map[string]any{"envelope": identity.Sign(first, identity.KindRegistry, identity.JSON, otherPayload).Marshal()}, 400)
	post("/v1/proposals/"+p.Id+":submit", map[string]any{"envelope": identity.Sign(first, identity.KindRegistry, identity.JSON, payload).Marshal()}, 200)
	waitFor(t, "the proposal in force", soon, func() bool {
		var m pb.GetProposalResponse
		official.get("/v1/proposals/"+p.Id, &m)
		if m.Proposal.Status == "refused" {
			t.Fatalf("refused: %s", m.Proposal.Reason)
		}
		return m.Proposal.Status == "in-force"
	})
	var e pb.GetEntryResponse
	d.asClient("engineer-1", "governance").get("/v1/entries/agency/pilots", &e)
	if !strings.Contains(e.Entry.Body, "Harbour pilots") || e.Entry.SinceHeight == 0 {
		t.Errorf("the entry is %v, want it changed", e.Entry)
	}
	post("/v1/proposals/"+p.Id+":sign", map[string]any{"keyId": a.Key, "signature": []byte(a.Signature)}, 400)
	var list pb.ListProposalsResponse
	if official.get("/v1/proposals", &list); len(list.Proposals) != 1 {
		t.Errorf("%d proposals are listed, want one", len(list.Proposals))
	}
}

// kill -9 of the gateway, with everything around it, while agencies read: what a
// receipt has promised is in the log after the next start.
func TestKilledGatewayKeepsItsPromises(t *testing.T) {
	processTest(t)
	data := filepath.Join(t.TempDir(), "district")
	d := startDemo(t, data)
	var receipts []receipt
	for range 2 {
		operator := d.asClient("operator-1", "operations")
		// Each call a record of its own: this method is not counted.
		waitFor(t, "an answer", soon, func() bool {
			res, _, err := operator.try("GET", "/v1/entries?pageSize=1", "")
			return err == nil && res.StatusCode == 200
		})
		var mu sync.Mutex
		var readers sync.WaitGroup
		enough := make(chan struct{})
		var once sync.Once
		n := len(receipts)
		for range 4 {
			readers.Go(func() {
				for {
					res, _, err := operator.try("GET", "/v1/entries?pageSize=1", "")
					if err != nil {
						return // it is dead
					}
					if res.StatusCode != 200 {
						continue
					}
					b, err := base64.StdEncoding.DecodeString(res.Header.Get(gateway.HeaderReceipt))
					var r pb.AccessReceipt
					if err != nil || proto.Unmarshal(b, &r) != nil {
						t.Errorf("receipt %q cannot be read", res.Header.Get(gateway.HeaderReceipt))
						return
					}
					mu.Lock()
					receipts = append(receipts, receipt{Commitment: r.Commitment})
					if len(receipts) >= n+60 {
						once.Do(func() { close(enough) })
					}
					mu.Unlock()
				}
			})
		}
		select {
		case <-enough:
		case <-time.After(soon):
			t.Fatal("too few answers")
		}
		d.kill()
		readers.Wait()
		d = startDemo(t, data)
	}
	d.sealed(receipts...)
	t.Logf("%d receipts over two kills", len(receipts))
	d.stop()
}
