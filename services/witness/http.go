package witness

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/stopline-traffic/stopline/pkg/ledger"
)

// maxProof is the longest consistency proof, C2SP tlog-witness.
const maxProof = 63

// MaxRequest is the largest request, bytes: old size, proof, checkpoint.
const MaxRequest = 64 + maxProof*45 + ledger.MaxNote

// Handler answers
//
//	POST /add-checkpoint   C2SP tlog-witness
//	GET  /                 who this is, which logs it knows and how far, and what it
//	                       has counted, as JSON
func (w *Witness) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /add-checkpoint", w.addCheckpoint)
	mux.HandleFunc("GET /{$}", w.index)
	return mux
}

func (w *Witness) addCheckpoint(rw http.ResponseWriter, r *http.Request) {
	rw.Header().Set("Cache-Control", "no-store")
	fail := func(err error, status int) {
		w.log.Debug("witness: refused", "status", status, "err", err)
		http.Error(rw, err.Error(), status)
	}
	body, err := io.ReadAll(http.MaxBytesReader(rw, r.Body, MaxRequest))
	if err != nil {
		w.count(&w.m.BadRequest)
		status := http.StatusBadRequest
		if large := (*http.MaxBytesError)(nil); errors.As(err, &large) {
			status = http.StatusRequestEntityTooLarge
		}
		fail(err, status)
		return
	}
	old, proof, signed, err := ParseRequest(body)
	if err != nil {
		w.count(&w.m.BadRequest)
		fail(err, http.StatusBadRequest)
		return
	}
	line, err := w.Add(old, proof, signed)
	var size *SizeError
	switch {
	case err == nil:
		rw.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = io.WriteString(rw, line) // whoever went away asks again
	case errors.As(err, &size):
		w.log.Debug("witness: refused", "status", http.StatusConflict, "err", err)
		rw.Header().Set("Content-Type", "text/x.tlog.size")
		rw.WriteHeader(http.StatusConflict)
		_, _ = fmt.Fprintf(rw, "%d\n", size.Size) // as above
	case errors.Is(err, ErrBadRequest):
		fail(err, http.StatusBadRequest)
	case errors.Is(err, ErrUnknownLog):
		fail(err, http.StatusNotFound)
	case errors.Is(err, ErrNotSigned):
		fail(err, http.StatusForbidden)
	case errors.Is(err, ErrInconsistent):
		fail(err, http.StatusUnprocessableEntity)
	default: // the disk; logged where it happened
		http.Error(rw, "cannot be stored", http.StatusInternalServerError)
	}
}

// ParseRequest decodes the body of add-checkpoint: old size, consistency proof,
// empty line, signed checkpoint.
func ParseRequest(b []byte) (old uint64, proof []tlog.Hash, signed []byte, err error) {
	fail := func(format string, args ...any) (uint64, []tlog.Hash, []byte, error) {
		return 0, nil, nil, fmt.Errorf("add-checkpoint: "+format, args...)
	}
	head, note, ok := strings.Cut(string(b), "\n\n")
	lines := strings.Split(head, "\n")
	n, is := strings.CutPrefix(lines[0], "old ")
	if !ok || !is {
		return fail("must begin with the line «old» and a size, and have an empty line before the checkpoint")
	}
	if old, err = strconv.ParseUint(n, 10, 63); err != nil || strconv.FormatUint(old, 10) != n {
		return fail("old: must be a decimal number without leading zeros")
	}
	if len(lines)-1 > maxProof {
		return fail("proof: %d lines, at most %d", len(lines)-1, maxProof)
	}
	for i, l := range lines[1:] {
		h, err := base64.StdEncoding.Strict().DecodeString(l)
		if err != nil || len(h) != tlog.HashSize {
			return fail("proof: line %d: must be %d bytes in base64", i+1, tlog.HashSize)
		}
		proof = append(proof, tlog.Hash(h))
	}
	return old, proof, []byte(note), nil
}

// status is the answer of GET /.
type status struct {
	Name string      `json:"name"`
	Key  string      `json:"key"`
	Logs []logStatus `json:"logs"`
	// Counts since the witness was started.
	Counts Metrics `json:"counts"`
}

type logStatus struct {
	Origin string `json:"origin"`
	Size   uint64 `json:"size"`
	Root   string `json:"root"`
}

func (w *Witness) index(rw http.ResponseWriter, _ *http.Request) {
	s := status{Name: w.c.Name, Key: w.Key(), Logs: []logStatus{}, Counts: w.Metrics()}
	for _, k := range w.logs {
		k.mu.Lock()
		s.Logs = append(s.Logs, logStatus{k.Origin, k.size, base64.StdEncoding.EncodeToString(k.root[:])})
		k.mu.Unlock()
	}
	slices.SortFunc(s.Logs, func(a, b logStatus) int { return strings.Compare(a.Origin, b.Origin) })
	b, err := json.MarshalIndent(s, "", " ")
	if err != nil {
		http.Error(rw, err.Error(), http.StatusInternalServerError)
		return
	}
	rw.Header().Set("Content-Type", "application/json")
	rw.Header().Set("Cache-Control", "no-store")
	_, _ = rw.Write(append(b, '\n')) // the client may have gone
}
