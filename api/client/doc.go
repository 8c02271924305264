// Package client calls a Stopline gateway: what an agency's own program imports.
// It needs the generated API and gRPC, and nothing of Stopline's insides.
//
// # Who asks
//
// A program proves who it is by a client certificate, by a token that somebody
// else has issued (OIDC), or by tokens that it signs itself with the key that the
// registry has for it: [KeyFile] reads that key, and [SelfSigned] makes a new token
// when the last is about to end. The gateway's own certificate is checked against
// authorities, or against [Options.Pins] where it has none.
//
// # What for
//
// Most methods want a purpose, and some a case number and a legal basis. They go
// with a call, as options:
//
//	c.Evidence.GetBundle(ctx, req, client.Purpose("investigation"), client.Case("K-17/26"), client.LegalBasis("warrant"))
//
// # Receipts
//
// The answer to a reading carries a signed receipt with the commitment of its
// access record. With [Options.ReceiptKey] every receipt that comes is verified and
// an answer with a false one is an error; [Options.OnReceipt] and [Receipt] hand
// them out. Keep them: if the record is not in the log some seconds later, the
// receipt proves that the gateway left it out. Readings that are counted by the
// minute carry a receipt once a minute; with [MustReceipt] a call fails without one.
//
// # Trying again
//
// A call is made again when the gateway says that it did nothing (too many calls,
// draining, not on record), after as long as it says; also when the connection was
// lost, if making the call twice does no harm: a reading, or a write with an
// idempotency key. The context's deadline bounds it all. Streams are opened again
// by [Client.WatchJunctionStates] and [Client.WatchPriority], and [Follow] for
// others.
package client
