package bus

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// RouterConfig configures [NewRouter].
type RouterConfig struct {
	Bus *Bus
	// District and Consumer name where poisoned messages go: topic.Dead. Required.
	District traffic.DistrictID
	Consumer string
	// Retries of a handler after its first try; 0 means 3.
	Retries int
	// Wait before the first retry, doubling to 20 times that; 0 means 50 ms. All
	// waits together must stay well under the subscriber's AckWait.
	Wait time.Duration
	// CloseTimeout bounds how long closing waits for handlers; 0 means 10 s.
	CloseTimeout time.Duration
	// Logger is optional.
	Logger *slog.Logger
}

// NewRouter returns a Watermill router whose handlers, from the inside out, are
//
//   - recovered: a panic becomes an error;
//   - retried in place, briefly, where another try can help: not for errors that
//     package kind calls Invalid, Conflict, NotFound or Denied;
//   - poisoned: what still fails is stored with the dead letters and then
//     acknowledged. Errors of kind Unavailable never poison a message: it is
//     given back, and comes again;
//   - correlated: messages made from a message carry its correlation id.
//
// The caller adds handlers, with a [Subscriber] and a [Publisher], and runs it.
func NewRouter(c RouterConfig) (*message.Router, error) {
	var errs []error
	if c.Bus == nil {
		errs = append(errs, errors.New("bus: Router.Bus: must be given"))
	}
	if c.District == "" {
		errs = append(errs, errors.New("bus: Router.District: must not be empty"))
	}
	if c.Consumer == "" {
		errs = append(errs, errors.New("bus: Router.Consumer: must not be empty"))
	}
	if c.Retries < 0 || c.Wait < 0 || c.CloseTimeout < 0 {
		errs = append(errs, errors.New("bus: Router.Retries, Wait, CloseTimeout: must not be negative"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if c.Retries == 0 {
		c.Retries = 3
	}
	if c.Wait == 0 {
		c.Wait = retryFirst
	}
	if c.CloseTimeout == 0 {
		c.CloseTimeout = 10 * time.Second
	}
	log := watermill.NewSlogLogger(orDiscard(c.Logger))
	r, err := message.NewRouter(message.RouterConfig{CloseTimeout: c.CloseTimeout}, log)
	if err != nil {
		return nil, fmt.Errorf("bus: router: %w", err)
	}
	poison, err := middleware.PoisonQueueWithFilter(poisonPublisher{NewPublisher(c.Bus)}, topic.Dead(c.District, c.Consumer),
		func(err error) bool { return kind.Of(err) != kind.Unavailable })
	if err != nil {
		return nil, fmt.Errorf("bus: router: %w", err)
	}
	retry := middleware.Retry{
		MaxRetries: c.Retries, InitialInterval: c.Wait, MaxInterval: 20 * c.Wait, Multiplier: 2,
		ResetContextOnRetry: true, Logger: log,
		ShouldRetry: func(p middleware.RetryParams) bool { return !final(kind.Of(p.Err)) },
	}
	r.AddMiddleware(middleware.CorrelationID, poison, retry.Middleware, middleware.Recoverer)
	return r, nil
}

// final reports whether the same input can never pass.
func final(k kind.Kind) bool {
	switch k {
	case kind.Invalid, kind.Conflict, kind.NotFound, kind.Denied:
		return true
	}
	return false
}

// poisonPublisher makes the reason fit a header: a recovered panic's is its
// whole stack.
type poisonPublisher struct{ *Publisher }

func (p poisonPublisher) Publish(subject string, msgs ...*message.Message) error {
	for _, m := range msgs {
		for k, v := range m.Metadata {
			m.Metadata[k] = headerLine(v)
		}
		m.Metadata[HeaderDeadReason] = m.Metadata[middleware.ReasonForPoisonedKey]
		m.Metadata[HeaderDeadSubject] = m.Metadata[middleware.PoisonedTopicKey]
	}
	return p.Publisher.Publish(subject, msgs...)
}
