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
