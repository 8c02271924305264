package consensus

import "github.com/stopline-traffic/stopline/pkg/ledger"

// engine is what brings validators to agree on the order of requests. This
// package is written against it, so that another engine could take SmartBFT's
// place; smart.go is the only file that knows which one it is.
//
// An engine calls its host from goroutines of its own. After [engine.stop] it
// calls no more.
type engine interface {
	// start goes on after the last block, from what was journaled.
	start(last decision) error
	stop()
	// submit adds a verified request to those waiting to be proposed. It blocks
	// while there is no room, for a bounded time. Adding one twice is no error.
	submit(raw []byte) error
	// receive takes a message that a peer's transport authenticated.
	receive(from uint64, m message)
	// forget drops waiting requests that were decided elsewhere.
	forget()
	status() (view, leader uint64)
}

// host is what an engine needs of the validator.
type host interface {
	// assemble makes the proposal for a height out of the requests, or of some of
	// them. metadata is the engine's and becomes part of what is signed.
	assemble(at slot, metadata []byte, requests [][]byte) proposal
	// verify checks a proposal from its own bytes, by the rules for voting on it.
	verify(at slot, digest ledger.Hash, p proposal) ([]ledger.Hash, error)
	// sign votes for a proposal, or ends the validator if it must not.
	sign(at slot, digest ledger.Hash, p proposal) []byte
	// checkVote verifies a peer's vote for a proposal.
	checkVote(p proposal, v ledger.Vote) error
	// signView and checkView sign and verify what validators say of their state
	// when the leader is replaced.
	signView(b []byte) []byte
	checkView(from uint64, b, sig []byte) error
	// decide makes a decided proposal durable and applies it, or ends the
	// validator.
	decide(p proposal, votes []ledger.Vote)
	// catchUp fetches what peers have decided, and returns the last decision.
	catchUp() decision
	// decidedRequest reports whether a request was decided.
	decidedRequest(raw []byte) bool
	// requestID is [ledger.RequestID], for bytes that are not changed any more.
	requestID(raw []byte) ledger.Hash
	// over reports that the members have changed: the engine is about to be
	// stopped, nothing of it counts any more, and it should begin nothing.
	over() bool
	// outvoted reports whether a quorum was seen to prepare another proposal than
	// this at the view and height.
	outvoted(at slot, digest ledger.Hash) bool
	// trails reports whether f+1 peers say that they have decided more.
	trails() bool
	// patient reports whether the leader decides what waits, so that no request's
	// age alone should depose it.
	patient() bool
	requestsOf(p proposal) []ledger.Hash
	// send passes a message to a peer. It does not block.
	send(to uint64, m message)
	// save makes an entry of the engine's log durable.
	save(entry []byte, truncate bool, votes []vote) error
	// fail ends the validator: what it would do next could be wrong.
	fail(err error)
}

// proposal is one block on its way to be agreed: Header is the encoded header,
// Payload the batches, Metadata the engine's own view and sequence.
type proposal struct{ Header, Payload, Metadata []byte }

// decision is a proposal with the votes that decided it; its zero value stands
// for the beginning.
type decision struct {
	Proposal proposal
	Votes    []ledger.Vote
}

// message is one message between engines. Body is opaque to the transport, vote
// says in which slot it votes, if it does.
type message struct {
	body []byte
	vote vote
	// changesView says that the sender gives up its view: what it proposed and
	// prepared there need not be sent again.
	changesView bool
	// parsed is the engine's own form of body, where there is one.
	parsed any
}

// codec reads an engine's formats, also while none is running.
type codec interface {
	// parse decodes a message and finds what it votes for.
	parse(body []byte) (message, error)
	// votes reads the votes that an entry of the engine's log amounts to.
	votes(entry []byte) ([]vote, error)
	// position reads view and height from a proposal's metadata.
	position(metadata []byte) (slot, error)
}
