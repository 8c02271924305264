package sealing

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/stopline-traffic/stopline/pkg/ledger"
)

// asker gets cosignatures of one witness: the client's side of C2SP tlog-witness.
// Its methods are called by one goroutine at a time.
type asker struct {
	ledger.Witness
	client *http.Client
	tiles  ledger.TileReader
	// size is what the witness cosigned last, as far as we know: it says so if it is
	// something else.
	size uint64
	// failures in a row; rest is until when it is left alone.
	failures int
	rest     time.Time
}

// maxRest bounds how long a witness that fails is left alone.
const maxRest = 5 * time.Minute

// maxAnswer bounds what is read of an answer, bytes.
const maxAnswer = 64 << 10

// witnessError is an answer that is no cosignature.
type witnessError struct {
	status int
	text   string
	fork   bool // the witness has cosigned another log of this size
}

func (e *witnessError) Error() string {
	if e.fork {
		return "it has cosigned a checkpoint of this size with another root: the log was forked, or put back from a copy"
	}
	return fmt.Sprintf("%d %s: %.200q", e.status, http.StatusText(e.status), e.text)
}

// ask asks for the cosignature on a signed checkpoint of our log, whose tiles are
// on disk, and returns its line.
func (a *asker) ask(ctx context.Context, c ledger.Checkpoint, signed []byte) (line string, err error) {
	// It may be elsewhere than we think, and go on meanwhile because another
	// instance of us asked it.
	for range 3 {
		if a.size > c.Size {
			size := a.size
			a.size = 0 // ask it again next time
			return "", fmt.Errorf("it has cosigned %d entries, this log has %d: it was put back from a copy, or is not the only one of its name", size, c.Size)
		}
		var proof []tlog.Hash
		if a.size > 0 && a.size < c.Size {
			if proof, err = tlog.ProveTree(int64(c.Size), int64(a.size), ledger.NewHashReader(a.tiles, c.Size)); err != nil {
				return "", fmt.Errorf("consistency proof from %d to %d: %w", a.size, c.Size, err)
			}
		}
		line, size, err := a.post(ctx, c, request(a.size, proof, signed))
		if err != nil {
			return "", err
		}
		if line != "" {
			a.size = c.Size
			return line, nil
		}
		if size == a.size {
			if size != c.Size {
				return "", fmt.Errorf("it answers with the size %d that it was asked with", size)
			}
			return "", &witnessError{fork: true}
		}
		a.size = size
	}
	return "", errors.New("its size changes each time it is asked")
}

func request(old uint64, proof []tlog.Hash, signed []byte) string {
	var b strings.Builder
	fmt.Fprintf(&b, "old %d\n", old)
	for _, h := range proof {
		b.WriteString(base64.StdEncoding.EncodeToString(h[:]) + "\n")
	}
	b.WriteByte('\n')
	b.Write(signed)
	return b.String()
}

// post sends one request. It returns the cosignature's line, or the size that the
// witness is at.
func (a *asker) post(ctx context.Context, c ledger.Checkpoint, body string) (line string, size uint64, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimRight(a.URL, "/")+"/add-checkpoint", strings.NewReader(body))
	if err != nil {
		return "", 0, err
	}
	req.Header.Set("Content-Type", "text/plain; charset=utf-8")
	resp, err := a.client.Do(req)
	if err != nil {
		return "", 0, err
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return "", 0, err
	}
	switch resp.StatusCode {
	case http.StatusOK:
		// Lines of keys that we do not know are to be ignored.
		last := errors.New("no line of its key")
		for l := range strings.SplitAfterSeq(string(b), "\n") {
			if !strings.HasPrefix(l, "— "+a.Cosigner.Name()+" ") {
				continue
			}
			if _, last = a.CheckCosignature(c.Body(), l); last == nil {
				return l, 0, nil
			}
		}
		return "", 0, fmt.Errorf("answer: %w", last)
	case http.StatusConflict:
		kind, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
		text, ended := strings.CutSuffix(string(b), "\n")
		n, perr := strconv.ParseUint(text, 10, 63)
		if err == nil && kind == "text/x.tlog.size" && ended && perr == nil {
			return "", n, nil
		}
	}
	return "", 0, &witnessError{status: resp.StatusCode, text: string(b)}
}

// WitnessMetrics count what was asked of witnesses.
type WitnessMetrics struct {
	Cosigned uint64 // cosignatures that we got
	Failed   uint64 // times that a witness did not cosign
	Forks    uint64 // of which because it has cosigned another history
	Size     uint64 // of the newest checkpoint that a witness has cosigned
}

// askers returns one for each witness that can be asked.
func (c *Config) askers(p *ledger.Policy, s *Store) []*asker {
	client := c.HTTPClient
	if client == nil {
		client = &http.Client{}
	}
	var out []*asker
	for _, w := range append(p.AllWitnesses(), c.Witnesses...) {
		if w.URL == "" || slices.ContainsFunc(out, func(o *asker) bool { return o.Key().Equal(w.Key()) }) {
			continue
		}
		out = append(out, &asker{Witness: w, client: client, tiles: s})
	}
	return out
}

// gather asks all witnesses that are not to be left alone for cosignatures on a
// checkpoint, until they have answered, ctx ends, or enough, called after each
// with what has come, says so. Only one gather runs at a time.
func (s *Service) gather(ctx context.Context, c ledger.Checkpoint, signed []byte, enough func(lines []string) bool) []string {
	ctx, cancel := context.WithTimeout(ctx, s.c.WitnessTimeout)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	type answer struct {
		a    *asker
		line string
		err  error
	}
	answers := make(chan answer, len(s.askers))
	asked := 0
	now := time.Now()
	for _, a := range s.askers {
		if now.Before(a.rest) {
			continue
		}
		asked++
		wg.Go(func() {
			line, err := a.ask(ctx, c, signed)
			answers <- answer{a, line, err}
		})
	}
	var lines []string
	done := false
	for range asked {
		r := <-answers
		if r.err != nil {
			if !done && !errors.Is(r.err, context.Canceled) {
				s.refused(r.a, r.err)
			}
			continue
		}
		r.a.failures, r.a.rest = 0, time.Time{}
		s.mu.Lock()
		s.m.Witnesses.Cosigned++
		s.m.Witnesses.Size = max(s.m.Witnesses.Size, c.Size)
		s.mu.Unlock()
		lines = append(lines, r.line)
		slices.Sort(lines) // the same lines, the same note
		if !done && enough(lines) {
			// A little longer for those who are about to answer.
			done = true
			stop := time.AfterFunc(pinnedWait, cancel)
			defer stop.Stop()
		}
	}
	return lines
}

// refused notes that a witness has not cosigned, and leaves it alone for longer
// each time.
func (s *Service) refused(a *asker, err error) {
	var w *witnessError
	fork := errors.As(err, &w) && w.fork
	s.mu.Lock()
	s.m.Witnesses.Failed++
	if fork {
		s.m.Witnesses.Forks++
	}
	s.mu.Unlock()
	a.failures++
	if rest := s.c.WitnessInterval << min(a.failures-1, 8); a.failures > 1 && !s.needed {
		a.rest = time.Now().Add(min(rest, maxRest))
	}
	if fork {
		s.log.Error("sealing: a witness knows another history", "witness", a.Witness.Name, "err", err)
	} else {
		s.log.Warn("sealing: a witness has not cosigned", "witness", a.Witness.Name, "err", err)
	}
}

// witness asks the witnesses, each [Config.WitnessInterval], to cosign the newest
// sealed checkpoint: for policies that do without them.
func (s *Service) witness(ctx context.Context) error {
	if len(s.askers) == 0 || s.needed {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(s.c.WitnessInterval)
	defer tick.Stop()
	var before uint64
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		signed, h, err := s.store.Last()
		if err != nil {
			return err
		}
		if signed == nil {
			continue
		}
		sealed, err := s.store.Check(h, signed)
		if err != nil {
			return err
		}
		if sealed.Size == before {
			continue
		}
		lines := s.gather(ctx, sealed.Checkpoint, signed, func([]string) bool { return false })
		if len(lines) == 0 {
			continue
		}
		before = sealed.Size
		if err := s.store.Witnessed(h, append(signed, strings.Join(lines, "")...)); err != nil {
			return err
		}
	}
}
