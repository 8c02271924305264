package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"flag"
	"fmt"
	"path/filepath"
	"time"

	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/ingest"
	"github.com/stopline-traffic/stopline/services/internal/agreed"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/decided"
	"github.com/stopline-traffic/stopline/services/internal/district"
)

var tokenCommand = command{
	name:     "token",
	synopsis: "stopline token --data DIR --device ID [--for DURATION] [--json]\nstopline token --data DIR --client ID [--for DURATION] [--once] [--json]",
	summary:  "let a device connect by MQTT, or a client ask the gateway, for a while",
	manual: `Prints a token with which a device connects to a demo that was started with
--mqtt: MQTT 3.1.1, the device's id as user name, the token as password. The
token is signed with a key of the district in DIR, which is made if it is not
there; the demo may be running or not.

Whoever holds the token may speak on that device's two topics and no others,
until it expires; what is sent must be signed with the device's own key all the
same. A device that is not in the registry, or is revoked, is not let in
whatever its token says. --json prints the topics and the client id as well.

With --client it is a token for the gateway's API: a JWT that the client's own key
signs, good for 15 minutes at most, to be sent as Authorization: Bearer. A demo's
clients and their keys are made with its data folder: operator-1, engineer-1,
technician-1, ambulance-desk-1, fire-desk-1, transit-desk-1, police-1, police-2,
auditor-1 and registrar-1. With --once the token is good for one call.`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		data := fs.String("data", "", "data folder `DIR` of the demo; holds the key that signs tokens")
		device := fs.String("device", "", "device `ID`, as in the registry")
		client := fs.String("client", "", "client `ID`, as in the registry, instead of a device")
		once := fs.Bool("once", false, "with --client: good for one call only")
		length := fs.Duration("for", 0, "how long the token is good: a device's at most 744h, 0 is 24h;\na client's at most 15m, 0 is that")
		asJSON := fs.Bool("json", false, "print one JSON object")
		return func(_ context.Context, args []string, s streams) error {
			if len(args) > 0 || *data == "" || (*device == "") == (*client == "") {
				return usageError("token: --data and --device, or --client, are needed, and no arguments")
			}
			if *client != "" {
				return printClientToken(s, *data, *client, *length, *once, *asJSON)
			}
			if *once {
				return usageError("token: --once goes with --client")
			}
			if *length == 0 {
				*length = 24 * time.Hour
			}
			if *length < time.Second || *length > bus.MaxTokenLife {
				return usageError("token: --for %v: must be 1s to %v", *length, bus.MaxTokenLife)
			}
			d, err := district.Load(*data)
			if err != nil {
				return err
			}
			key, err := d.TokenKey()
			if err != nil {
				return err
			}
			id, now := traffic.DeviceID(*device), time.Now()
			token, err := bus.NewToken(key, d.Genesis.District, id, now, now.Add(*length))
			if err != nil {
				return err
			}
			if !*asJSON {
				_, err = fmt.Fprintln(s.out, token)
				return err
			}
			return json.NewEncoder(s.out).Encode(map[string]any{
				"district": d.Genesis.District, "device": id, "client_id": topic.Token(*device), "username": id, "password": token,
				"up": topic.MQTT(topic.DeviceUp(d.Genesis.District, id)), "down": topic.MQTT(topic.DeviceDown(d.Genesis.District, id)),
				"expires": now.Add(*length).UTC().Truncate(time.Second),
			})
		}
	},
}

// mqttOptions say where devices come by MQTT, if at all.
type mqttOptions struct{ listen, websocket, cert, key string }

func (o *mqttOptions) flags(fs *flag.FlagSet) {
	fs.StringVar(&o.listen, "mqtt", "", "let devices in by MQTT 3.1.1 on address `ADDR`, usually 127.0.0.1:1883; they need\na token (stopline token). Without it there is no MQTT")
	fs.StringVar(&o.websocket, "mqtt-ws", "", "also by MQTT over websocket on address `ADDR`, at the path /mqtt; needs --mqtt")
	fs.StringVar(&o.cert, "mqtt-cert", "", "`FILE` with the PEM certificate for MQTT with TLS; needs --mqtt-key. Without it\ntokens travel in the clear")
	fs.StringVar(&o.key, "mqtt-key", "", "`FILE` with its PEM key")
}

func (o *mqttOptions) check(n natsOptions) error {
	switch {
	case o.listen == "" && *o != (mqttOptions{}):
		return usageError("demo: --mqtt-ws, --mqtt-cert, --mqtt-key: must not be given without --mqtt")
	case o.listen != "" && n.url != "":
		return usageError("demo: --mqtt: not with --nats; let the cluster's own servers speak MQTT")
	}
	return nil
}

// edge knows by the agreed registry who may come in by MQTT or gRPC, and whose a
// key is.
type edge struct {
	state  *agreed.State
	follow decided.Config
}

// openEdge reads what the edge knew last, and says how devices come in by MQTT;
// nil where they do not. Its connection is made when there is a server.
func (l *local) openEdge(o localOptions) (*bus.DeviceOptions, error) {
	if o.mqtt.listen == "" && o.grpc.listen == "" {
		return nil, nil
	}
	g := &l.district.Genesis
	state, err := agreed.Open(filepath.Join(o.dir, "edge.place"), g)
	if err != nil {
		return nil, err
	}
	l.edge = &edge{state: state, follow: decided.Config{District: g.District, GenesisHash: l.district.GenesisHash, Logger: o.log.With("service", "edge")}}
	if o.mqtt.listen == "" {
		return nil, nil
	}
	key, err := l.district.TokenKey()
	if err != nil {
		return nil, err
	}
	return &bus.DeviceOptions{
		MQTT: o.mqtt.listen, Websocket: o.mqtt.websocket, CertFile: o.mqtt.cert, KeyFile: o.mqtt.key,
		District: g.District, TokenKey: key.Public().(ed25519.PublicKey), Active: l.edge.active,
	}, nil
}

func (e *edge) run(ctx context.Context) error {
	return e.state.Run(ctx, e.follow, func(context.Context, *decided.Block, *identity.Registry) error { return nil })
}

func (e *edge) active(d traffic.DeviceID) bool {
	entry, ok := e.state.Registry().Entry(identity.TypeDevice, string(d))
	return ok && entry.Status == identity.Active
}

// revoked reports whether the registry has revoked a key. One that it does not
// have may be on its way in.
func (e *edge) revoked(k identity.KeyID) bool {
	h, ok := e.state.Registry().Holder(k)
	return ok && h.Status == identity.Revoked
}

// deviceOf returns what ingest asks whose a key is; nil where there is no edge.
func (e *edge) deviceOf() func(identity.KeyID) (traffic.DeviceID, bool) {
	if e == nil {
		return nil
	}
	return func(k identity.KeyID) (traffic.DeviceID, bool) {
		h, ok := e.state.Registry().Holder(k)
		if h.Type != identity.TypeDevice {
			return "", ok
		}
		return traffic.DeviceID(h.ID), ok
	}
}

// mqttReport says what became of devices that came by MQTT.
type mqttReport struct {
	Connections   uint64            `json:"connections"`
	Refused       map[string]uint64 `json:"connections_refused,omitempty"`
	Revoked       uint64            `json:"connections_of_revoked_devices_ended"`
	OtherTopics   uint64            `json:"messages_on_other_topics"`
	Subscriptions uint64            `json:"subscriptions_refused"`
	Records       ingest.DoorCounts `json:"records"`
}

// mqttReport returns nil where devices do not come by MQTT.
func (l *local) mqttReport() *mqttReport {
	if l.server == nil || l.server.MQTTAddr() == "" {
		return nil
	}
	c := l.server.DeviceCounts()
	return &mqttReport{
		Connections: c.Accepted, Refused: c.Refused, Revoked: c.Dropped, OtherTopics: c.Topics, Subscriptions: c.Subscriptions,
		Records: l.ingest.Counts().Doors[ingest.DoorMQTT],
	}
}
