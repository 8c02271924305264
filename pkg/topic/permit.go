package topic

import (
	"fmt"
	"slices"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Permissions are what a NATS user may do, and nothing else: patterns of the
// subjects that it may publish on and subscribe to. They are written for
// servers; who is who on the network is decided by keys and not by them, but
// they keep one user's junk out of the others' queues.
//
// What they cannot do: a user who may create a consumer may have its messages
// delivered to any subject, and two users who work together may lend each other
// one message on any subject, as a reply. All that can be had by it is a signed
// record in a place where it is checked like any other.
type Permissions struct {
	Publish, Subscribe []string
	// Responses is how many answers each request that came in may be given, on the
	// reply subject that it names, within ResponseWait. 0: none.
	Responses    int
	ResponseWait time.Duration
}

// responseWait is longer than any request is waited for.
const responseWait = 10 * time.Second

// InboxPrefix is where a NATS user hears answers: a prefix of its own, so that
// nobody reads those of others.
func InboxPrefix(user string) string { return "_INBOX." + Token(user) }

// ValidatorUser names the NATS user of a validator.
func ValidatorUser(validator uint64) string { return "validator-" + num(validator) }

// user begins permissions with what every user has: its own inbox.
func user(name string) Permissions { return Permissions{Subscribe: []string{InboxPrefix(name) + ".>"}} }

func (p *Permissions) publish(subjects ...string)   { p.Publish = append(p.Publish, subjects...) }
func (p *Permissions) subscribe(subjects ...string) { p.Subscribe = append(p.Subscribe, subjects...) }
func (p *Permissions) answer()                      { p.Responses, p.ResponseWait = 1, responseWait }

// api adds requests to JetStream's API: verb and what follows it.
func (p *Permissions) api(calls ...string) {
	for _, c := range calls {
		p.publish("$JS.API." + c)
	}
}

// durable adds what consuming a stream by one durable consumer takes, and
// beginning again from its ack floor.
func (p *Permissions) durable(stream, name, filter string) {
	p.api("STREAM.INFO."+stream, "CONSUMER.CREATE."+stream+"."+name+"."+filter)
	for _, verb := range []string{"INFO", "RESET", "MSG.NEXT"} {
		p.api("CONSUMER." + verb + "." + stream + "." + name)
	}
	p.acknowledge(stream, name)
}

// acknowledge adds a consumer's acknowledgements, in the server's form of today
// and in the one that it can be set to, which begins with domain and account.
func (p *Permissions) acknowledge(stream, consumer string) {
	p.publish("$JS.ACK."+stream+"."+consumer+".>", "$JS.ACK.*.*."+stream+"."+consumer+".>")
}

// reader adds what reading a stream by consumers without a name takes.
func (p *Permissions) reader(stream string) {
	p.api("STREAM.INFO."+stream, "STREAM.MSG.GET."+stream)
	for _, verb := range []string{"CREATE", "INFO", "MSG.NEXT", "DELETE"} {
		p.api("CONSUMER." + verb + "." + stream + ".>")
	}
}

// follower adds what following decisions takes.
func (p *Permissions) follower(d traffic.DistrictID) {
	p.reader(DecisionStream)
	p.publish(sub(d, "sync", "*"))
}

// ValidatorPermissions returns what validator n may do: send messages to the
// other validators in its own name, hear those to it, serve its blocks, cosign,
// publish its own decisions, hear what is sealed, and read ACCEPTED by its own
// durable consumer.
func ValidatorPermissions(d traffic.DistrictID, n uint64) Permissions {
	p := user(ValidatorUser(n))
	p.subscribe(BFTTo(d, n), Sync(d, n), Cosign(d, n), Seal(d))
	p.publish(sub(d, "bft", "*", num(n)), sub(d, "sync", "*"), Decision(d, n), Dead(d, ConsensusDurable(n)), sub(d, "in", "deletion", ConsensusDurable(n)))
	p.durable(AcceptedStream, ConsensusDurable(n), Accepted(d))
	p.api("CONSUMER.DELETE." + AcceptedStream + "." + ConsensusDurable(n)) // when it is revoked
	p.api("STREAM.INFO."+DecisionStream, "STREAM.MSG.GET."+DecisionStream)
	p.answer()
	return p
}

// Names of the NATS users of the other services.
const (
	AdminUser         = "admin" // declares streams
	IngestUser        = "ingest"
	ValidationUser    = "validation"
	SignalControlUser = "signal-control"
	SealingUser       = "sealing"
	AuditUser         = "audit"
	GatewayUser       = "gateway"
	EdgeUser          = "edge"   // knows which devices MQTT lets in
	StreetUser        = "street" // roadside units
	EraserUser        = "eraser" // of sealing: takes what is redacted out of streams
)

// ServiceUsers lists the names that [ServicePermissions] knows.
func ServiceUsers() []string {
	return []string{AdminUser, IngestUser, ValidationUser, SignalControlUser, SealingUser, AuditUser, GatewayUser, EdgeUser, StreetUser, EraserUser}
}

// ServicePermissions returns what a service other than a validator may do.
func ServicePermissions(d traffic.DistrictID, service string) (Permissions, error) {
	p := user(service)
	switch service {
	case AdminUser:
		for _, s := range Streams(d) {
			p.api("STREAM.CREATE."+s.Name, "STREAM.UPDATE."+s.Name, "STREAM.INFO."+s.Name)
		}
	case IngestUser:
		p.subscribe(InboxAll(d), DeviceUpAll(d))
		p.publish(Ingress(d), DeviceDownAll(d))
		p.reader(IngressStream)
		// How far those behind it have got.
		p.api("STREAM.INFO."+AcceptedStream, "STREAM.MSG.GET."+AcceptedStream, "CONSUMER.LIST."+AcceptedStream, "CONSUMER.NAMES."+AcceptedStream, "CONSUMER.INFO."+AcceptedStream+".*")
		p.answer()
	case ValidationUser:
		p.durable(IngressStream, ValidationDurable, Ingress(d))
		p.api("STREAM.MSG.GET."+IngressStream, "CONSUMER.DELETE."+IngressStream+"."+ValidationDurable) // when it begins again
		p.follower(d)
		p.publish(Accepted(d), QuarantineAll(d), Dead(d, ValidationDurable))
		p.reader(AcceptedStream)
		p.reader(QuarantineStream)
	case SignalControlUser:
		p.publish(OutflowAll(d))
		p.subscribe(OutflowAll(d))
		p.follower(d)
		p.subscribe(OverrideAll(d), AskAll(d, SignalControlUser))
		p.answer()
		p.publish(PriorityAll(d), OverrideAll(d))
		p.publish(sub(d, "command", "*"), sub(d, "plan", "*"), StatusAll(d), sub(d, "in", "command", "*"), sub(d, "in", "health", "*"), sub(d, "in", "plan", "*"))
	case SealingUser:
		p.follower(d)
		p.publish(sub(d, "cosign", "*"), Seal(d), Seen(d, SealingUser), sub(d, "in", "deletion", SealingUser))
	case AuditUser:
		p.follower(d)
		p.subscribe(Seal(d), SeenAll(d), AskAll(d, AuditUser))
		p.publish(Alarm(d))
		p.answer()
	case GatewayUser:
		p.follower(d)
		p.subscribe(Seal(d), StatusAll(d), Alarm(d), PriorityAll(d))
		p.publish(OverrideAll(d))
		p.api("STREAM.NAMES")
		p.reader(QuarantineStream)
		p.acknowledge(QuarantineStream, "*")
		p.publish(Access(d, GatewayUser), sub(d, "ask", "*", "*"), Dead(d, GatewayUser))
		for _, k := range []string{"access", "request", "override", "registry", "redaction"} {
			p.publish(sub(d, "in", k, GatewayUser))
		}
		p.durable(AccessStream, GatewayUser, Access(d, GatewayUser))
		p.api("STREAM.MSG.GET." + AccessStream) // its last epoch
		p.publish(ProposalAll(d))
		p.api("STREAM.INFO."+ProposalStream, "STREAM.MSG.GET."+ProposalStream)
	case EdgeUser:
		p.follower(d)
	case StreetUser:
		p.follower(d)
		p.subscribe(sub(d, "command", "*"), sub(d, "plan", "*"), OverrideAll(d))
		p.publish(StatusAll(d), InboxAll(d))
	case EraserUser:
		for _, s := range []string{IngressStream, AcceptedStream, QuarantineStream, DecisionStream, AccessStream, DeadStream} {
			p.reader(s)
			p.api("STREAM.MSG.DELETE."+s, "CONSUMER.LIST."+s)
		}
	default:
		return Permissions{}, fmt.Errorf("topic: no service %q; there are %v", service, ServiceUsers())
	}
	slices.Sort(p.Publish)
	p.Publish = slices.Compact(p.Publish)
	return p, nil
}
