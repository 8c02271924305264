// Package ingest takes records from senders, stores them, and says so.
//
// Records come as requests on topic.Inbox, by HTTP one or many at once, see
// [Service.Handler], and by gRPC from gateways, see [GRPC].
// They are gathered for at most 5 ms or 256 at a time, each with a fresh salt,
// and stored as one message of the stream INGRESS. Only then do their senders
// get their receipts, each of which says one of three things:
//
//   - stored: the record is on disk. It is not yet validated, agreed or sealed.
//     The commitment will be in the log if it is accepted.
//   - refused: the record's form breaks a rule, and always will. It was not
//     stored.
//   - busy: send it again later, the same bytes. Where the reason says that it
//     is not known whether the record was stored, sending it again is safe.
//
// Nobody's signature is checked here: that is for validation, and for each
// validator.
//
// # Order
//
// Records of one sender are stored in the order in which they came. Batches are
// pipelined: several may be on their way to the stream, each one but the first
// under the condition that its predecessor was the last to be stored. So when
// one cannot be stored none behind it is, and all are answered busy, as is what
// waits in the queue. A sender with several records on their way numbers them
// (see bus.Sender), so that what it had sent before it knew is not taken out of
// turn. For streams by gRPC, and for requests with many records, we do that
// ourselves, and send again as well.
//
// # Devices
//
// A device sends one envelope a message on topic.DeviceUp, by MQTT with QoS 0 or
// 1, in protobuf or, where it begins with a brace, in JSON. What became of it
// comes on topic.DeviceDown: a Receipt in the same encoding, whose digest is the
// SHA-256 of the message that it is about. A PUBACK means nothing; a device that
// hears nothing sends the same bytes again. What is signed with a key that the
// registry has for somebody else is refused at once.
//
// A device with several records on their way, of which some are told busy, sends
// all without a final answer again, in order: until the oldest of them has come
// again, for at most 10 s, everything else of that device is told busy. Of a
// device at most 256 records wait; more than 2,000 messages a second are dropped
// without an answer, so that none can crowd out the others.
//
// Instances of ingest share devices' messages in a queue group. NATS prefers the
// members at the server where the device is connected, so with one instance at
// each server a device's order holds as long as its connection. Where that is
// not so, a device that needs order has one record on its way at a time.
//
// # Bounds
//
// The queue is bounded in records and bytes; when it is full the sender is told
// at once. So it is when the stream is full, and when what is stored has not been
// decided for minutes: as long as validation or a quorum of validators does not
// get on, more receipts would promise what may not be kept. The answers to the newest 65,536
// stored records are remembered: the same bytes again get the same receipt and
// are not stored again. A restart reads them back from the stream, as far as
// they were stored in the last 15 minutes.
package ingest
