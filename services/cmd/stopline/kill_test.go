package main

import (
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/pkg/retention"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/payload"
)

// poster is a device's own process: it posts frame after frame and keeps the
// receipts.
type poster struct {
	mu       sync.Mutex
	receipts []receipt // guarded by mu
	sent     [][]byte  // guarded by mu; envelopes that have a receipt
	lost     [][]byte  // guarded by mu; no answer came
	stop     chan struct{}
	done     sync.WaitGroup
}

// postAll posts for the devices, each its own line of frames, until the demo is
// gone or end is called.
func postAll(d *demoRun, devices ...*device) *poster {
	p := &poster{stop: make(chan struct{})}
	for _, v := range devices {
		p.done.Go(func() {
			for {
				select {
				case <-p.stop:
					return
				default:
				}
				e := v.next()
				r, err := d.post("/v1/frames", identity.Protobuf, e)
				p.mu.Lock()
				if err != nil {
					p.lost = append(p.lost, e)
				} else if r.HTTP == http.StatusOK {
					p.receipts, p.sent = append(p.receipts, r), append(p.sent, e)
				} else {
					d.t.Errorf("frame %d of %s: got %+v, want a receipt", v.seq, v.id, r)
				}
				p.mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	return p
}

// soFar returns the receipts so far.
func (p *poster) soFar() []receipt {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.receipts[:len(p.receipts):len(p.receipts)]
}

// end stops the poster.
func (p *poster) end() {
	close(p.stop)
	p.done.Wait()
}

// payloads counts the envelopes in the payload store of a folder.
func payloads(t *testing.T, data string) map[string]int {
	t.Helper()
	n := map[string]int{}
	d, err := payload.OpenReader(data)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	err = d.Scan(0, func(_ retention.Class, p *ledger.Payload) error {
		n[string(p.Envelope)]++
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// kill -9 at any moment, three times on one folder, while two devices post.
// Whatever had a receipt is in the log, once; the log goes on from where it
// was; old bundles still verify.
func TestKill(t *testing.T) {
	processTest(t)
	data := filepath.Join(t.TempDir(), "district")
	d := startDemo(t, data)
	devices := []*device{d.enrol("h0101", "probe-1"), d.enrol("h0303", "probe-2")}
	policy := filepath.Join(data, "policy")
	bundle := filepath.Join(t.TempDir(), "old.zip")

	var receipts []receipt
	var sent [][]byte
	lost := 0
	resent := map[string]int{} // after which kill
	var before *logView
	const kills = 3
	for i := range kills {
		p := postAll(d, devices...)
		waitFor(t, "so many receipts", soon, func() bool { return len(p.soFar()) >= 20+15*i })
		if i == 0 {
			// A bundle of a record from before all kills. Its block is provable once
			// another block is sealed.
			first := p.soFar()[0]
			index := d.sealed(first).find(first.Commitment)[0]
			var b []byte
			waitFor(t, "a bundle of the first record", soon, func() bool {
				var err error
				b, err = d.get("/v1/evidence/" + strconv.Itoa(index))
				return err == nil
			})
			if err := os.WriteFile(bundle, b, 0o644); err != nil {
				t.Fatal(err)
			}
			wantExit(t, inside(t, "verify", "--policy", policy, bundle), exitOK, "PASS", "probe-")
		}
		before = d.log()
		d.kill()
		p.end()
		receipts, sent = append(receipts, p.receipts...), append(sent, p.sent...)
		wantExit(t, stopline(t, "fsck", data), exitOK, "OK: ")

		d = startDemo(t, data)
		// What had no answer is sent again, the same bytes. If it had been stored
		// before the kill it is a duplicate, and the receipt of now stands for it.
		for _, e := range p.lost {
			receipts = append(receipts, d.store("/v1/frames", e))
			sent = append(sent, e)
			resent[string(e)] = i + 1
			lost++
		}
		now := d.sealed(receipts...)
		now.check(t, before)
		wantExit(t, inside(t, "verify", "--policy", policy, bundle), exitOK, "PASS")
	}

	// The devices go on as if nothing had been, and the street too.
	for _, v := range devices {
		e := v.next()
		receipts, sent = append(receipts, d.store("/v1/frames", e)), append(sent, e)
	}
	after := d.sealed(receipts...)
	if after.size <= before.size {
		t.Errorf("log of %d entries, want more than the %d of before the last kill", after.size, before.size)
	}
	d.obeyed(kills + 1)
	r := d.stop()
	if r.Frames.Quarantined != r.Frames.ByRule[validate.RuleDuplicate] || r.Commands.Applied == 0 || r.Interlock.Trips != 0 || r.LogSize != r.SealedSize || !r.Evidence.Verified {
		t.Errorf("after %d kills the demo ends with %s", kills, lastLine(d.out.String()))
	}
	end := logOf(t, data)
	end.check(t, after)
	once(t, end, receipts)
	wantExit(t, stopline(t, "fsck", data), exitOK, "OK: ")
	wantExit(t, stopline(t, "verify", "--policy", policy, r.Evidence.Path), exitOK, "PASS")
	wantExit(t, stopline(t, "verify", "--policy", policy, bundle), exitOK, "PASS")
	have := payloads(t, data)
	for i, e := range sent {
		if have[string(e)] != 1 {
			t.Errorf("frame %d of %d is in the payload store %d times, want once; sent again after kill %d (0: never); rejected by validators in the last run: %d, quarantined %v",
				i, len(sent), have[string(e)], resent[string(e)], r.Rejected, r.Frames.ByRule)
		}
	}
	if t.Failed() {
		t.Logf("standard error of the last run:\n%s", d.err)
	}
	t.Logf("%d receipts and %d frames without an answer over %d kills, log of %d entries", len(receipts), lost, kills, end.size)
}
