package gateway

import (
	"context"
	"crypto/ed25519"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/stopline-traffic/stopline/pkg/access"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/pkg/validate"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/decided"
)

// part is one service of the API. Its methods run behind the guard: who asks is
// known ([caller]), the request has passed its rules, the policy has granted it,
// and it is on record. A method returns an error of pkg/kind, or a gRPC status.
type part interface {
	// register puts the service on a server.
	register(s *grpc.Server)
	// objects says what a request is about, before the policy is asked; nil is the
	// district as a whole. Requests of other services never come here. An error is
	// given to the client only if the policy grants the call on what is returned
	// beside it.
	objects(ctx context.Context, method string, req proto.Message) ([]access.Object, error)
}

// Parts may have these methods too.
type (
	// listener is told of every accepted record of every decided block, in the order
	// of the log, by one goroutine. It must not block. After a restart it begins at
	// the newest block that the gateway has not seen, or up to a second before: what
	// is older is asked of audit.
	listener interface {
		accepted(b *decided.Block, r *decided.Record, c *validate.Candidate)
	}
	// runner has work of its own, until ctx ends; an error ends the gateway.
	runner interface {
		run(ctx context.Context) error
	}
)

// parts makes the services of the API.
func (a *API) makeParts() ([]part, error) {
	registry, err := newRegistryPart(a)
	if err != nil {
		return nil, err
	}
	return []part{
		newTrafficPart(a), newEvidencePart(a), registry, newAccessPart(a), newLogPart(a),
		newPriorityPart(a), newDevicesPart(a, a.cfg.Name, a.cfg.Devices),
	}, nil
}

// What parts have of the API.

func (a *API) district() traffic.DistrictID { return a.g.cfg.District }

// registry is the one in force.
func (a *API) registry() *identity.Registry { return a.g.cfg.State.Registry() }

// now is the district's time.
func (a *API) now() time.Time { return a.g.cfg.Now() }

func (a *API) bus() *bus.Bus           { return a.g.cfg.Bus }
func (a *API) log() *slog.Logger       { return a.g.log }
func (a *API) key() ed25519.PrivateKey { return a.cfg.Key }

// may asks the policy about one object for the call in ctx, for methods that
// find out only on the way what they touch.
func (a *API) may(ctx context.Context, method string, o access.Object) bool {
	c := caller(ctx)
	return a.engine().Decide(access.Call{Principal: c.by, Method: method, Objects: []access.Object{o}, Purpose: c.purpose, Case: c.caseNo,
		LegalBasis: c.basis, ApprovedBy: c.approved, Time: a.now()}).Granted
}
