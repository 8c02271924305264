package bus_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/stopline-traffic/stopline/pkg/kind"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

// refused runs f and reports what the server said against it, "" for nothing.
func refused(t *testing.T, b *bus.Bus, f func()) string {
	t.Helper()
	before := b.NC.LastError()
	f()
	if err := b.NC.FlushTimeout(10 * time.Second); err != nil {
		t.Fatal(err)
	}
	// What the server has against f came before the answer to the flush.
	if err := b.NC.LastError(); err != nil && !errors.Is(err, before) && errors.Is(err, nats.ErrPermissionViolation) {
		return err.Error()
	}
	return ""
}

// Everything that a validator does works with its own user's permissions.
func TestValidatorUserWorks(t *testing.T) {
	t.Parallel()
	u := servicetest.NewUsers(t, district, 4)
	if err := u.Connect(topic.AdminUser).Declare(within(t), topic.Streams(district)); err != nil {
		t.Fatal(err)
	}
	one, two := u.Connect(topic.ValidatorUser(1)), u.Connect(topic.ValidatorUser(2))

	// Messages to each other.
	arrived := make(chan string, 1)
	stop, err := two.Listen(topic.BFTTo(district, 2), "", func(m *nats.Msg) { arrived <- m.Subject })
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	if err := one.Send(topic.BFT(district, 2, 1), []byte("vote")); err != nil {
		t.Fatal(err)
	}
	if s := got(t, arrived, 1)[0]; s != topic.BFT(district, 2, 1) {
		t.Errorf("got a message on %s", s)
	}
	// Blocks for a peer, a cosignature for sealing: answers to whoever asked.
	for _, c := range []struct {
		subject string
		who     *bus.Bus
	}{{topic.Sync(district, 2), one}, {topic.Sync(district, 2), u.Connect(topic.GatewayUser)}, {topic.Cosign(district, 2), u.Connect(topic.SealingUser)}} {
		stop, err := two.Listen(c.subject, "", func(m *nats.Msg) {
			if err := m.Respond([]byte("answer")); err != nil {
				t.Error(err)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		if b, err := c.who.Request(within(t), c.subject, []byte("?")); err != nil || string(b) != "answer" {
			t.Errorf("%s: got %q, %v", c.subject, b, err)
		}
		stop()
	}
	// Its decisions, one and several at once, and the newest of them read back.
	subject := topic.Decision(district, 1)
	if err := one.PublishAll(within(t), []bus.Msg{{Subject: subject, ID: "1", Data: []byte("a")}, {Subject: subject, ID: "2", Data: []byte("b")}}); err != nil {
		t.Fatal(err)
	}
	st, err := one.JS.Stream(within(t), topic.DecisionStream)
	if err != nil {
		t.Fatal(err)
	}
	if m, err := st.GetLastMsgForSubject(within(t), subject); err != nil || string(m.Data) != "b" {
		t.Errorf("last decision: got %v, %v", m, err)
	}
	// ACCEPTED by its own consumer, also from the start of what is not acknowledged;
	// what cannot be read goes to the dead letters.
	if err := u.Connect(topic.ValidationUser).Publish(within(t), topic.Accepted(district), "m", []byte("batch")); err != nil {
		t.Fatal(err)
	}
	name := topic.ConsensusDurable(1)
	for round, acknowledge := range []bool{false, true} {
		if round > 0 {
			if _, err := one.JS.Consumer(within(t), topic.AcceptedStream, name); err != nil {
				t.Fatal(err)
			}
			if _, err := one.JS.ResetConsumer(within(t), topic.AcceptedStream, name); err != nil {
				t.Fatal(err)
			}
		}
		taken := make(chan string, 1)
		stop := consuming(t, one, bus.Consumer{District: district, Stream: topic.AcceptedStream, Durable: name, Filter: topic.Accepted(district), Manual: true},
			func(_ context.Context, ms []*bus.Msg) error {
				if acknowledge {
					ms[0].Fail(kind.Errorf(kind.Invalid, "not a batch"))
				}
				taken <- string(ms[0].Data)
				return nil
			})
		if d := got(t, taken, 1)[0]; d != "batch" {
			t.Errorf("round %d: got %q", round, d)
		}
		stop()
	}
	if n := len(dead(t, u.Connect(servicetest.All))); n != 1 {
		t.Errorf("%d dead letters, want 1", n)
	}
	if err := one.NC.LastError(); err != nil {
		t.Errorf("the server said: %v", err)
	}
}

// Nothing else works. The test's own eyes see that nothing came of it.
func TestValidatorUserIsConfined(t *testing.T) {
	t.Parallel()
	u := servicetest.NewUsers(t, district, 4)
	all := u.Connect(servicetest.All)
	if err := all.Declare(within(t), topic.Streams(district)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{topic.ConsensusDurable(2), topic.ValidationDurable} {
		if _, err := all.JS.CreateConsumer(within(t), topic.AcceptedStream, jetstream.ConsumerConfig{Durable: name, AckPolicy: jetstream.AckExplicitPolicy}); err != nil {
			t.Fatal(err)
		}
	}
	one := u.Connect(topic.ValidatorUser(1))
	eyes := make(chan string, 1024)
	stop, err := all.Listen(">", "", func(m *nats.Msg) {
		if string(m.Data) == "forbidden" {
			eyes <- m.Subject
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	publish := []string{
		topic.BFT(district, 3, 2), topic.BFT(district, 1, 2), // in another's name
		topic.Decision(district, 2), topic.Cosign(district, 2),
		topic.Ingress(district), topic.Accepted(district), topic.Quarantine(district, "signature"), topic.Seal(district),
		topic.Inbox(district, "frame", "x"), topic.Command(district, "j1"), topic.Status(district, "j1"), topic.DeviceDown(district, "d"),
		topic.BFT("elsewhere", 2, 1), topic.Decision("elsewhere", 1),
		topic.Dead(district, topic.ValidationDurable),
		topic.InboxPrefix(topic.SealingUser) + ".abc", topic.InboxPrefix(topic.ValidatorUser(2)) + ".abc", "_INBOX.abc",
		"$JS.API.INFO", "$JS.API.STREAM.NAMES", "$JS.API.STREAM.LIST",
		"$JS.API.DIRECT.GET." + topic.DecisionStream,
		"$JS.API.CONSUMER.CREATE." + topic.AcceptedStream, "$JS.API.CONSUMER.CREATE." + topic.AcceptedStream + "." + topic.ConsensusDurable(1),
		"$JS.API.CONSUMER.DURABLE.CREATE." + topic.AcceptedStream + "." + topic.ConsensusDurable(1),
		"$JS.ACK." + topic.IngressStream + "." + topic.ValidationDurable + ".1.1.1.1.0",
		"$JS.ACK.D.A." + topic.AcceptedStream + "." + topic.ConsensusDurable(2) + ".1.1.1.1.0",
		"$SYS.REQ.SERVER.PING", "$SYS.REQ.USER.INFO", "anything",
	}
	for _, s := range topic.Streams(district) {
		for _, verb := range []string{"CREATE", "UPDATE", "DELETE", "PURGE", "MSG.DELETE", "SNAPSHOT", "RESTORE"} {
			publish = append(publish, "$JS.API.STREAM."+verb+"."+s.Name)
		}
		if s.Name != topic.DecisionStream {
			publish = append(publish, "$JS.API.STREAM.MSG.GET."+s.Name)
		}
	}
	for _, other := range []string{topic.ConsensusDurable(2), topic.ConsensusDurable(10), topic.ValidationDurable} {
		for _, verb := range []string{"INFO", "DELETE", "RESET", "PAUSE", "UNPIN", "MSG.NEXT"} {
			publish = append(publish, "$JS.API.CONSUMER."+verb+"."+topic.AcceptedStream+"."+other)
		}
		publish = append(publish, "$JS.API.CONSUMER.CREATE."+topic.AcceptedStream+"."+other+"."+topic.Accepted(district),
			"$JS.ACK."+topic.AcceptedStream+"."+other+".1.1.1.1.0")
	}
	for _, s := range publish {
		if r := refused(t, one, func() { _ = one.Send(s, []byte("forbidden")) }); !strings.Contains(r, `Publish to "`+s+`"`) {
			t.Errorf("publishing on %s: the server said %q", s, r)
		}
	}
	for _, s := range []string{
		">", "_INBOX.>", topic.InboxPrefix(topic.SealingUser) + ".>", topic.InboxPrefix(topic.ValidatorUser(2)) + ".>", "_INBOX.*.x",
		topic.BFTTo(district, 2), "stopline.*.bft.>", topic.Sync(district, 2), topic.Cosign(district, 2),
		topic.Ingress(district), topic.Accepted(district), topic.InboxAll(district), topic.DecisionAll(district),
		"$JS.API.>", "$JS.EVENT.ADVISORY.>", "$JS.ACK.>", "$SYS.>",
	} {
		if r := refused(t, one, func() { _, _ = one.NC.SubscribeSync(s) }); !strings.Contains(r, `Subscription to "`+s+`"`) {
			t.Errorf("subscribing to %s: the server said %q", s, r)
		}
	}
	// The same eyes see what is allowed, and nothing before it.
	if err := one.Send(topic.BFT(district, 2, 1), []byte("forbidden")); err != nil {
		t.Fatal(err)
	}
	if s := got(t, eyes, 1)[0]; s != topic.BFT(district, 2, 1) {
		t.Errorf("something arrived on %s", s)
	}
	stop()
	if n := len(stored(t, all, topic.IngressStream)) + len(stored(t, all, topic.DecisionStream)); n != 0 {
		t.Errorf("%d messages stored, want none", n)
	}

	// One request may be answered once, where it says, and by nobody else.
	two := u.Connect(topic.ValidatorUser(2))
	asked := make(chan string, 1)
	serving, err := one.Listen(topic.Sync(district, 1), "", func(m *nats.Msg) { asked <- m.Reply })
	if err != nil {
		t.Fatal(err)
	}
	defer serving()
	inbox := two.NC.NewInbox()
	answers, err := two.NC.SubscribeSync(inbox)
	if err != nil {
		t.Fatal(err)
	}
	if err := two.NC.PublishRequest(topic.Sync(district, 1), inbox, nil); err != nil {
		t.Fatal(err)
	}
	reply := got(t, asked, 1)[0]
	if r := refused(t, one, func() { _ = one.Send(reply, []byte("1")) }); r != "" {
		t.Errorf("the answer: %s", r)
	}
	if m, err := answers.NextMsg(10 * time.Second); err != nil || string(m.Data) != "1" {
		t.Errorf("got %v, %v, want the answer", m, err)
	}
	if r := refused(t, one, func() { _ = one.Send(reply, []byte("2")) }); r == "" {
		t.Error("a second answer was let through")
	}
}

// Who has no key, or another's name without the key, is not let in.
func TestStrangersAreNotLetIn(t *testing.T) {
	t.Parallel()
	u := servicetest.NewUsers(t, district, 1)
	_, seed, err := bus.NewNKey()
	if err != nil {
		t.Fatal(err)
	}
	file := t.TempDir() + "/stranger.nk"
	if err := os.WriteFile(file, seed, 0o600); err != nil {
		t.Fatal(err)
	}
	stranger, err := nats.NkeyOptionFromSeed(file)
	if err != nil {
		t.Fatal(err)
	}
	for what, opts := range map[string][]nats.Option{"no key": nil, "another key": {stranger}} {
		if nc, err := nats.Connect(u.URL, opts...); !errors.Is(err, nats.ErrAuthorization) {
			t.Errorf("%s: got %v, want %v", what, err, nats.ErrAuthorization)
			if err == nil {
				nc.Close()
			}
		}
	}
	// And a user without a key of its own cannot be configured.
	for _, key := range []string{"", "UABC", "SUAB"} {
		if _, err := bus.ServerConfig("127.0.0.1:-1", t.TempDir(), []bus.User{{Name: "x", NKey: key}}); err == nil || !strings.Contains(err.Error(), "user x: NKey") {
			t.Errorf("key %q: got %v", key, err)
		}
	}
}

// A user of a name with anything in it cannot break out of its inbox's prefix.
func TestInboxPrefixIsOneUsersOwn(t *testing.T) {
	for _, name := range []string{"a.b", "*", ">", "", "validator-1"} {
		if p := topic.InboxPrefix(name); strings.Count(p, ".") != 1 || strings.ContainsAny(p, "*>") {
			t.Errorf("%q: got %s", name, p)
		}
	}
}
