// Package topic names every subject, stream and durable consumer of a district.
//
// Nothing else in the project spells a subject. A subject begins with
// "stopline.<district>."; what comes after says who may publish it, so that NATS
// permissions can be written from this file:
//
//	in.<kind>.<source>        any sender → ingest; request, answered by a Receipt
//	ingress                   ingest → INGRESS
//	accepted                  validation → ACCEPTED
//	quarantine.<rule>         validation → QUARANTINE
//	bft.<to>.<from>           validator → validator; never stored
//	sync.<validator>          anyone → validator; request for decided blocks
//	cosign.<validator>        sealing → validator; request
//	decision.<validator>      validator → DECISIONS
//	seal                      sealing → SEALS
//	seen.<source>             whoever has seen a checkpoint of the district's log →
//	                          audit: the signed note; never stored
//	alarm                     audit → anybody: a JSON object; told again while it
//	                          stands, never stored
//	command.<junction>        signal-control → roadside unit; never stored: an old
//	                          command is worth nothing
//	plan.<junction>           signal-control → roadside unit: its fall-back plan, said
//	                          again and again; never stored
//	override.<junction>       gateway → roadside unit, signal-control: an operator's
//	                          signed word, said until the unit has it; never stored
//	priority.<request>        signal-control → anybody: how a request stands; never
//	                          stored
//	status.<junction>         roadside unit → STATUS
//	access.<gateway>          gateway → ACCESS: what is about to be answered
//	proposal.<id>             gateway → PROPOSALS: a registry change on its way
//	ask.<service>.<method>    gateway → a service that answers; request
//	dead.<consumer>           the bus → DEADLETTER
//	device.<device>.up        a device → ingest, by MQTT; never stored
//	device.<device>.down      ingest → the device, by MQTT: receipts; never stored
//
// An MQTT topic is the subject with slashes for dots, see [MQTT].
package topic

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/traffic"
)

// Token makes s usable as one token of a subject: everything outside
// [A-Za-z0-9_-] becomes its UTF-8 bytes as =XX, so that two names never meet.
func Token(s string) string {
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "=%02X", c)
		}
	}
	if b.Len() == 0 {
		return "=" // an empty name is still one token
	}
	return b.String()
}

func sub(d traffic.DistrictID, rest ...string) string {
	return "stopline." + Token(string(d)) + "." + strings.Join(rest, ".")
}

// Inbox is where source sends a record of a kind, as a request.
func Inbox(d traffic.DistrictID, kind, source string) string {
	return sub(d, "in", Token(kind), Token(source))
}

// InboxAll matches every [Inbox] of a district.
func InboxAll(d traffic.DistrictID) string { return sub(d, "in", ">") }

// InboxQueue is the queue group in which instances of ingest share the inbox.
const InboxQueue = "ingest"

// Ingress carries batches as ingest stored them.
func Ingress(d traffic.DistrictID) string { return sub(d, "ingress") }

// Accepted carries batches that validation let through.
func Accepted(d traffic.DistrictID) string { return sub(d, "accepted") }

// Quarantine carries records that validation refused by a rule.
func Quarantine(d traffic.DistrictID, rule string) string { return sub(d, "quarantine", Token(rule)) }

// QuarantineAll matches every [Quarantine].
func QuarantineAll(d traffic.DistrictID) string { return sub(d, "quarantine", ">") }

// BFT carries consensus messages from one validator to another.
func BFT(d traffic.DistrictID, to, from uint64) string { return sub(d, "bft", num(to), num(from)) }

// BFTTo matches everything sent to a validator.
func BFTTo(d traffic.DistrictID, to uint64) string { return sub(d, "bft", num(to), "*") }

// Sync is where a validator answers requests for decided blocks.
func Sync(d traffic.DistrictID, validator uint64) string { return sub(d, "sync", num(validator)) }

// Cosign is where a validator answers requests to cosign.
func Cosign(d traffic.DistrictID, validator uint64) string { return sub(d, "cosign", num(validator)) }

// Decision carries the blocks that a validator saw decided.
func Decision(d traffic.DistrictID, validator uint64) string {
	return sub(d, "decision", num(validator))
}

// DecisionAll matches every [Decision].
func DecisionAll(d traffic.DistrictID) string { return sub(d, "decision", "*") }

// Seal announces sealed checkpoints.
func Seal(d traffic.DistrictID) string { return sub(d, "seal") }

// Seen is where a source tells which checkpoint of the district's log it has
// seen, so that it can be compared with what others were shown.
func Seen(d traffic.DistrictID, source string) string { return sub(d, "seen", Token(source)) }

// SeenAll matches every [Seen].
func SeenAll(d traffic.DistrictID) string { return sub(d, "seen", "*") }

// Alarm carries what the auditor has found to be wrong with the log.
func Alarm(d traffic.DistrictID) string { return sub(d, "alarm") }

// Access is where a gateway puts on record what it is about to answer.
func Access(d traffic.DistrictID, gateway string) string { return sub(d, "access", Token(gateway)) }

// AccessAll matches all of [Access].
func AccessAll(d traffic.DistrictID) string { return sub(d, "access", "*") }

// Proposal keeps a registry change on its way round the officials.
func Proposal(d traffic.DistrictID, id string) string { return sub(d, "proposal", Token(id)) }

// ProposalAll matches every [Proposal].
func ProposalAll(d traffic.DistrictID) string { return sub(d, "proposal", "*") }

// Ask is where a service answers questions of others, as requests: JSON, or what
// the method says.
func Ask(d traffic.DistrictID, service, method string) string {
	return sub(d, "ask", Token(service), Token(method))
}

// AskAll matches all questions to a service.
func AskAll(d traffic.DistrictID, service string) string { return sub(d, "ask", Token(service), "*") }

// Command carries signed commands to the roadside unit of a junction.
func Command(d traffic.DistrictID, j traffic.JunctionID) string {
	return sub(d, "command", Token(string(j)))
}

// Plan carries the signed fall-back plan of a junction to its roadside unit.
func Plan(d traffic.DistrictID, j traffic.JunctionID) string {
	return sub(d, "plan", Token(string(j)))
}

// Override carries operators' signed overrides to the roadside unit of a junction.
func Override(d traffic.DistrictID, j traffic.JunctionID) string {
	return sub(d, "override", Token(string(j)))
}

// OverrideAll matches every [Override].
func OverrideAll(d traffic.DistrictID) string { return sub(d, "override", "*") }

// Priority carries how a request stands, whenever that changes.
func Priority(d traffic.DistrictID, request string) string {
	return sub(d, "priority", Token(request))
}

// PriorityAll matches every [Priority].
func PriorityAll(d traffic.DistrictID) string { return sub(d, "priority", "*") }

// Status carries what a roadside unit says at once, outside its frames.
func Status(d traffic.DistrictID, j traffic.JunctionID) string {
	return sub(d, "status", Token(string(j)))
}

// StatusAll matches every [Status].
func StatusAll(d traffic.DistrictID) string { return sub(d, "status", "*") }

// Dead carries messages that a consumer could not process however often.
func Dead(d traffic.DistrictID, consumer string) string { return sub(d, "dead", Token(consumer)) }

// DeviceUp is where a device sends envelopes by MQTT, one a message.
func DeviceUp(d traffic.DistrictID, device traffic.DeviceID) string {
	return sub(d, "device", Token(string(device)), "up")
}

// DeviceUpAll matches every [DeviceUp] of a district.
func DeviceUpAll(d traffic.DistrictID) string { return sub(d, "device", "*", "up") }

// DeviceDown is where a device hears what became of its envelopes.
func DeviceDown(d traffic.DistrictID, device traffic.DeviceID) string {
	return sub(d, "device", Token(string(device)), "down")
}

// DeviceDownAll matches every [DeviceDown] of a district.
func DeviceDownAll(d traffic.DistrictID) string { return sub(d, "device", "*", "down") }

// DeviceOf returns the [Token] of the device whose [DeviceUp] up is, and its
// [DeviceDown]; ok is false if it is no such subject of the district.
func DeviceOf(d traffic.DistrictID, up string) (token, down string, ok bool) {
	rest, ok1 := strings.CutPrefix(up, sub(d, "device", ""))
	token, ok2 := strings.CutSuffix(rest, ".up")
	if !ok1 || !ok2 || token == "" || strings.ContainsAny(token, ".*>") {
		return "", "", false
	}
	return token, sub(d, "device", token, "down"), true
}

// MQTT is the MQTT topic of a subject: tokens have neither dots nor slashes.
func MQTT(subject string) string { return strings.ReplaceAll(subject, ".", "/") }

func num(n uint64) string { return strconv.FormatUint(n, 10) }

// Stream declares one JetStream stream.
type Stream struct {
	Name     string
	Subjects []string
	// MaxAge bounds what the stream keeps: streams that carry payloads must let
	// go, or redaction would be a lie.
	MaxAge time.Duration
	// MaxBytes refuses new messages (DiscardNew) when it is reached, so that the
	// sender is told instead of old data being lost.
	MaxBytes int64
	// MaxMsgSize bounds one message, bytes.
	MaxMsgSize int32
	// Duplicates is the window in which a message id is stored once.
	Duplicates time.Duration
	// DiscardOld lets the newest push out the oldest; only where the stream is a
	// convenience and not a duty.
	DiscardOld bool
}

// Names of the streams are the same in every district; a district is its own
// NATS account.
const (
	IngressStream    = "INGRESS"
	AcceptedStream   = "ACCEPTED"
	QuarantineStream = "QUARANTINE"
	DecisionStream   = "DECISIONS"
	SealStream       = "SEALS"
	StatusStream     = "STATUS"
	DeadStream       = "DEADLETTER"
	// AccessStream holds what the gateway promised to put on record, until ingest
	// has it. It is apart from the others so that load there cannot delay an answer.
	AccessStream = "ACCESS"
	// ProposalStream holds registry changes that officials still have to sign.
	ProposalStream = "PROPOSALS"
)

// MaxMessage is the largest message that a stream or a request may carry,
// bytes; [MaxPayload] of the server is larger, for view changes.
const (
	MaxMessage = 4 << 20
	MaxPayload = 16 << 20
)

// Streams declares the streams of a district. An hour of 1,250 frames a second,
// with the commands that answer them, is about 5 GB of INGRESS.
func Streams(d traffic.DistrictID) []Stream {
	const hour = time.Hour
	return []Stream{
		{Name: IngressStream, Subjects: []string{Ingress(d)}, MaxAge: hour, MaxBytes: 8 << 30, MaxMsgSize: MaxMessage, Duplicates: 2 * time.Minute},
		{Name: AcceptedStream, Subjects: []string{Accepted(d)}, MaxAge: hour, MaxBytes: 8 << 30, MaxMsgSize: MaxMessage, Duplicates: 2 * time.Minute},
		{Name: QuarantineStream, Subjects: []string{QuarantineAll(d)}, MaxAge: 24 * hour, MaxBytes: 1 << 30, MaxMsgSize: MaxMessage, Duplicates: 2 * time.Minute, DiscardOld: true},
		{Name: DecisionStream, Subjects: []string{DecisionAll(d)}, MaxAge: hour, MaxBytes: 8 << 30, MaxMsgSize: MaxPayload, Duplicates: 2 * time.Minute, DiscardOld: true},
		{Name: SealStream, Subjects: []string{Seal(d)}, MaxAge: 24 * hour, MaxBytes: 256 << 20, MaxMsgSize: MaxMessage, Duplicates: 2 * time.Minute, DiscardOld: true},
		{Name: StatusStream, Subjects: []string{StatusAll(d)}, MaxAge: hour, MaxBytes: 256 << 20, MaxMsgSize: 1 << 20, Duplicates: 2 * time.Minute, DiscardOld: true},
		{Name: AccessStream, Subjects: []string{AccessAll(d)}, MaxAge: hour, MaxBytes: 1 << 30, MaxMsgSize: MaxMessage, Duplicates: 2 * time.Minute},
		{Name: ProposalStream, Subjects: []string{ProposalAll(d)}, MaxAge: 30 * 24 * hour, MaxBytes: 64 << 20, MaxMsgSize: 1 << 20, Duplicates: 2 * time.Minute},
		{Name: DeadStream, Subjects: []string{sub(d, "dead", ">")}, MaxAge: 7 * 24 * hour, MaxBytes: 256 << 20, MaxMsgSize: MaxPayload, Duplicates: 2 * time.Minute, DiscardOld: true},
	}
}

// Durable names of consumers.
const (
	ValidationDurable = "validation"
	SealingDurable    = "sealing"
	AuditDurable      = "audit"
)

// ConsensusDurable names the consumer of ACCEPTED that belongs to a validator.
func ConsensusDurable(validator uint64) string { return "validator-" + num(validator) }
