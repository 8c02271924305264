// Package bus is NATS in our verbs: an embedded server or a cluster, the
// district's streams, durable publishing, batched consuming and requests.
//
// # What can be relied on
//
// [Bus.Publish] and [Bus.PublishAll] return only when JetStream has
// acknowledged, and the servers that we start acknowledge only what they have
// synced to disk. Give every message an id made from its content: then a retry
// is stored once, within the stream's window of duplicates. That window is
// finite, so what must never happen twice has to be checked downstream too.
//
// [Bus.Consume] hands out each stored message at least once. What a handler
// returns decides what becomes of its messages, by package kind and nothing
// else:
//
//	nil                                  acknowledged
//	Invalid, Conflict, NotFound, Denied  copied to DEADLETTER, then terminated
//	Unavailable                          tried again in place, without end
//	Stale, Internal, a panic             put back with growing delay; after
//	                                     MaxDeliver tries copied to DEADLETTER
//
// A message is terminated only after its copy is stored, so none is lost. A
// batch that fails is handed out once more message by message, so that one bad
// message does not take its neighbours with it.
//
// Core messages ([Bus.Send], [Bus.Request], [Bus.Serve], [Bus.Listen]) are
// delivered at most once and never stored.
//
// # Devices
//
// A server with [DeviceOptions] takes MQTT 3.1.1, over TCP and websocket. A
// device shows a token ([NewToken]) and may then publish on its one topic and
// subscribe to its other; no NATS client comes in that way. A connection ends
// with its token, and seconds after the registry has revoked the device.
//
// # Ending
//
// End the contexts of Consume, Serve and Subscribe and wait for them: each
// finishes what it has in hand, and gives back what it has not begun. Then
// [Bus.Close], which flushes the acknowledgements, and [Server.Shutdown] last.
//
// # Traces
//
// Every publish and request carries the W3C trace context of its ctx in the
// message's headers, and every handler's ctx continues it. Consume makes one
// span for a batch, linked to each message's own. Spans go to OpenTelemetry's
// global provider, which does nothing until main sets one.
package bus
