package bus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/topic"
)

// Bus is one connection to a district's NATS. Safe for concurrent use.
type Bus struct {
	// NC and JS may be used directly where the methods do not fit.
	NC *nats.Conn
	JS jetstream.JetStream

	log    *slog.Logger
	closed chan struct{} // closed when the connection is, for good
}

// ConnectOptions configure a connection to a cluster.
type ConnectOptions struct {
	// URL of one or more servers, separated by commas. Required.
	URL string
	// Name of this client, for the servers' logs.
	Name string
	// CredsFile holds a user JWT and its nkey seed. Optional.
	CredsFile string
	// NKeyFile holds the user's nkey seed alone, for servers that list their users.
	// Optional.
	NKeyFile string
	// User is the name by which the user has its permissions: answers come to
	// topic.InboxPrefix of it. Optional: to an inbox that anybody may have.
	User string
	// CAFile holds the PEM certificates by which the servers are known. Optional:
	// the system's.
	CAFile string
	// CertFile and KeyFile hold this client's certificate and key, PEM. Optional.
	CertFile, KeyFile string
	// Logger is optional.
	Logger *slog.Logger
}

// Validate reports everything that is wrong with o.
func (o ConnectOptions) Validate() error {
	var errs []error
	if o.URL == "" {
		errs = append(errs, errors.New("bus: URL: must not be empty"))
	}
	if (o.CertFile == "") != (o.KeyFile == "") {
		errs = append(errs, errors.New("bus: CertFile, KeyFile: give both or neither"))
	}
	if o.CredsFile != "" && o.NKeyFile != "" {
		errs = append(errs, errors.New("bus: CredsFile, NKeyFile: give one of them"))
	}
	return errors.Join(errs...)
}

// Connect returns a connection to a cluster. It does not wait for a server to
// be up: the connection is made, and made again, for as long as the Bus is open.
func Connect(o ConnectOptions) (*Bus, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	opts := []nats.Option{nats.Name(o.Name), nats.RetryOnFailedConnect(true)}
	if o.CredsFile != "" {
		opts = append(opts, nats.UserCredentials(o.CredsFile))
	}
	if o.NKeyFile != "" {
		opt, err := nats.NkeyOptionFromSeed(o.NKeyFile)
		if err != nil {
			return nil, fmt.Errorf("bus: NKeyFile: %s: %w", o.NKeyFile, err)
		}
		opts = append(opts, opt)
	}
	if o.User != "" {
		opts = append(opts, nats.CustomInboxPrefix(topic.InboxPrefix(o.User)))
	}
	if o.CAFile != "" {
		opts = append(opts, nats.RootCAs(o.CAFile))
	}
	if o.CertFile != "" {
		opts = append(opts, nats.ClientCert(o.CertFile, o.KeyFile))
	}
	return connect(o.URL, opts, orDiscard(o.Logger))
}

func connect(url string, opts []nats.Option, log *slog.Logger) (*Bus, error) {
	closed := make(chan struct{})
	opts = append(opts,
		nats.MaxReconnects(-1),
		nats.ReconnectWait(200*time.Millisecond),
		nats.ReconnectJitter(100*time.Millisecond, 200*time.Millisecond),
		// What is sent while the connection is away fails at once. A buffer would
		// say "sent", and deliver commands when they are worth nothing.
		nats.ReconnectBufSize(-1),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				log.Warn("bus: connection lost", "err", err)
			}
		}),
		nats.ReconnectHandler(func(nc *nats.Conn) { log.Info("bus: connected again", "url", nc.ConnectedUrlRedacted()) }),
		nats.ErrorHandler(func(_ *nats.Conn, s *nats.Subscription, err error) {
			subject := ""
			if s != nil {
				subject = s.Subject
			}
			log.Warn("bus: NATS reports an error", "subject", subject, "err", err)
		}),
		nats.ClosedHandler(func(*nats.Conn) { close(closed) }),
	)
	nc, err := nats.Connect(url, opts...)
	if err != nil {
		return nil, fmt.Errorf("bus: connecting: %w", err)
	}
	js, err := jetstream.New(nc)
	if err != nil {
		nc.Close()
		return nil, fmt.Errorf("bus: connecting: %w", err)
	}
	return &Bus{NC: nc, JS: js, log: log, closed: closed}, nil
}

// closeWait bounds how long Close waits for what is in flight.
const closeWait = 10 * time.Second

// Close lets handlers of core messages finish, flushes what has been published
// and acknowledged, and closes the connection.
func (b *Bus) Close() {
	if err := b.NC.Drain(); err != nil {
		b.NC.Close()
	}
	select {
	case <-b.closed:
	case <-time.After(closeWait):
		b.log.Warn("bus: not drained in time, closing", "elapsed", closeWait)
		b.NC.Close()
	}
}

// DeclareOptions change how streams are declared.
type DeclareOptions struct {
	// Replicas of each stream, 1 to 5; 0 means 1. In a cluster use 3.
	Replicas int
}

// Declare creates the streams, or updates those that exist. It waits until ctx
// ends for a server that is not up yet.
func (b *Bus) Declare(ctx context.Context, streams []topic.Stream) error {
	return b.DeclareWith(ctx, streams, DeclareOptions{})
}

// DeclareWith is [Bus.Declare] with options.
func (b *Bus) DeclareWith(ctx context.Context, streams []topic.Stream, o DeclareOptions) error {
	for _, s := range streams {
		cfg := jetstream.StreamConfig{
			Name: s.Name, Subjects: s.Subjects, Storage: jetstream.FileStorage,
			Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardNew,
			MaxAge: s.MaxAge, MaxBytes: s.MaxBytes, MaxMsgSize: s.MaxMsgSize,
			Duplicates: s.Duplicates, Replicas: max(o.Replicas, 1), AllowAtomicPublish: true,
		}
		if s.DiscardOld {
			cfg.Discard = jetstream.DiscardOld
		}
		for wait := retryFirst; ; wait = min(2*wait, retryMost) {
			// A cluster without a leader does not answer at all.
			try, cancel := context.WithTimeout(ctx, declareTry)
			_, err := b.JS.CreateOrUpdateStream(try, cfg)
			cancel()
			if err == nil {
				break
			}
			if k := kindOf(err); k != kind.Unavailable || ctx.Err() != nil || b.NC.IsClosed() {
				return kind.Errorf(k, "bus: declaring stream %s: %w", s.Name, err)
			}
			b.log.Warn("bus: cannot declare a stream yet", "stream", s.Name, "err", err)
			if !sleep(ctx, wait) {
				return kind.Errorf(kind.Unavailable, "bus: declaring stream %s: %w", s.Name, err)
			}
		}
	}
	return nil
}

// declareTry bounds one try to declare a stream.
const declareTry = 2 * time.Second

// Waits between tries.
const (
	retryFirst = 50 * time.Millisecond
	retryMost  = 2 * time.Second
)

// sleep waits and reports whether it waited to the end.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// JetStream's error codes that decide what we do.
// https://github.com/nats-io/nats-server, server/errors.json
const (
	codeBatchDisabled  = 10174
	codeBatchTooMany   = 10210
	codeBatchDuplicate = 10201
	codeStoreFailed    = 10077 // among others: the stream is full and discards new
	codeMsgTooLarge    = 10054
	codeWrongLastMsgID = 10070
	codeDuplicateOpen  = 10158 // the same id is being stored just now
)

// ErrFull is wrapped by errors of publishing to a stream that has reached its
// bounds. Nothing was stored: tell the sender to come back later.
var ErrFull = errors.New("stream is full")

// ErrUnknown is wrapped by errors that leave open whether the message was
// stored. Publish again with the same id before saying anything to anybody.
var ErrUnknown = errors.New("not known whether it was stored")

// apiCode returns JetStream's error code, 0 where err is not from its API.
func apiCode(err error) int {
	var api *jetstream.APIError
	if errors.As(err, &api) {
		return int(api.ErrorCode)
	}
	var js jetstream.JetStreamError
	if errors.As(err, &js) && js.APIError() != nil {
		return int(js.APIError().ErrorCode)
	}
	return 0
}

// kindOf classifies an error of nats.go.
func kindOf(err error) kind.Kind {
	var api *jetstream.APIError
	var js jetstream.JetStreamError
	if !errors.As(err, &api) && errors.As(err, &js) {
		api = js.APIError()
	}
	if api == nil {
		for _, never := range []error{nats.ErrMaxPayload, nats.ErrBadSubject, nats.ErrInvalidMsg, jetstream.ErrInvalidConsumerName,
			jetstream.ErrInvalidStreamName, jetstream.ErrInvalidSubject} {
			if errors.Is(err, never) {
				return kind.Invalid
			}
		}
		return kind.Unavailable // timeouts, no responders, connection away
	}
	switch {
	case api.ErrorCode == codeMsgTooLarge:
		return kind.Invalid
	case api.ErrorCode == codeStoreFailed, api.ErrorCode == codeBatchTooMany, api.ErrorCode == codeDuplicateOpen:
		return kind.Unavailable
	case api.Code == 503 || api.Code == 429 || api.Code == 408:
		return kind.Unavailable
	case api.Code == 404:
		return kind.NotFound
	}
	return kind.Internal
}
