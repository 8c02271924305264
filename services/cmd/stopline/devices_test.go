package main

import (
	"crypto/sha256"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
	"google.golang.org/protobuf/proto"

	pb "github.com/stopline-traffic/stopline/api/stopline/v1"
	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/pkg/traffic"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

// requireMosquitto makes the absence of Debian's MQTT clients a failure.
const requireMosquitto = "STOPLINE_REQUIRE_MOSQUITTO"

// mqttDoors returns where a demo takes MQTT, over TCP and over websocket.
func (d *demoRun) mqttDoors() (tcp, ws string) {
	d.t.Helper()
	m := regexp.MustCompile(`  mqtt (127\.0\.0\.1:[0-9]+)  mqtt (ws://127\.0\.0\.1:[0-9]+/mqtt)  `).FindStringSubmatch(d.err.String())
	if m == nil {
		d.t.Fatalf("no addresses for MQTT in %q", d.err)
	}
	return m[1], m[2]
}

// token returns a device's token, as the program makes it.
func (d *demoRun) token(id traffic.DeviceID) string {
	d.t.Helper()
	r := stopline(d.t, "token", "--data", d.data, "--device", string(id), "--for", "1h")
	wantExit(d.t, r, exitOK)
	return strings.TrimSpace(r.out)
}

// onPaho connects a device with a stock client and returns what sends a record
// until it has a receipt.
func (d *demoRun) onPaho(url string, id traffic.DeviceID, qos byte) (send func(envelope []byte) *pb.Receipt) {
	d.t.Helper()
	down := make(chan []byte, 16)
	c := mqtt.NewClient(mqtt.NewClientOptions().AddBroker(url).SetClientID(topic.Token(string(id))).SetUsername(string(id)).SetPassword(d.token(id)).
		SetProtocolVersion(4).SetAutoReconnect(false).SetConnectTimeout(soon))
	wait := func(what string, tok mqtt.Token) {
		d.t.Helper()
		if !tok.WaitTimeout(soon) || tok.Error() != nil {
			d.t.Fatalf("%s: %s: %v", url, what, tok.Error())
		}
	}
	wait("connect", c.Connect())
	d.t.Cleanup(func() { c.Disconnect(100) })
	dist := d.district.Genesis.District
	wait("subscribe", c.Subscribe(topic.MQTT(topic.DeviceDown(dist, id)), qos, func(_ mqtt.Client, m mqtt.Message) { down <- m.Payload() }))
	return func(envelope []byte) *pb.Receipt {
		d.t.Helper()
		wait("publish", c.Publish(topic.MQTT(topic.DeviceUp(dist, id)), qos, false, envelope))
		select {
		case b := <-down:
			var r pb.Receipt
			if err := proto.Unmarshal(b, &r); err != nil {
				d.t.Fatalf("receipt %q: %v", b, err)
			}
			if want := sha256.Sum256(envelope); !slices.Equal(r.Digest, want[:]) {
				d.t.Fatalf("receipt %v, want the digest %x", &r, want)
			}
			return &r
		case <-time.After(soon):
			d.t.Fatal("no receipt")
			return nil
		}
	}
}

// Devices with stock clients, over TCP and over websocket, before and after a
// restart: what they have receipts for is sealed once; a device that speaks for
// another is refused, and a revoked one is thrown out.
func TestDemoTakesFramesByMQTT(t *testing.T) {
	processTest(t)
	data := filepath.Join(t.TempDir(), "district")
	d := startDemo(t, data, "--mqtt", "127.0.0.1:0", "--mqtt-ws", "127.0.0.1:0")
	tcp, ws := d.mqttDoors()
	one, two := d.enrol("h0101", "one"), d.enrol("h0102", "two")
	sendOne, sendTwo := d.onPaho("tcp://"+tcp, "one", 1), d.onPaho(ws, "two", 0)
	var receipts []receipt
	stored := func(r *pb.Receipt) {
		t.Helper()
		if r.Status != pb.Receipt_STATUS_STORED {
			t.Fatalf("got %v, want stored", r)
		}
		receipts = append(receipts, receipt{Commitment: r.Commitment, Salt: r.Salt})
	}
	for range 5 {
		stored(sendOne(one.next()))
		stored(sendTwo(two.next()))
	}
	if r := sendTwo(one.next()); r.Status != pb.Receipt_STATUS_REFUSED || !strings.Contains(r.Reason, `for "one"`) {
		t.Errorf("another's frame: got %v, want refused", r)
	}
	d.sealed(receipts...)

	// A device that is not in the registry, and one with another's token.
	if _, err := servicetest.DialMQTT(tcp, "three", "three", d.token("three")); err == nil || err.Error() != servicetest.Refused(5).Error() {
		t.Errorf("a device that nobody knows: got %v, want %v", err, servicetest.Refused(5))
	}
	if _, err := servicetest.DialMQTT(tcp, "one:1", "one", d.token("two")); err == nil {
		t.Error("one device was let in with the token of another")
	}
	gone, err := servicetest.DialMQTT(tcp, "two:1", "two", d.token("two"))
	if err != nil {
		t.Fatal(err)
	}
	wantExit(t, stopline(t, "enrol", "--data", data, "--url", d.url, "--device", "two", "--revoke"), exitOK, "two is revoked")
	if err := gone.Conn.SetReadDeadline(time.Now().Add(soon)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := gone.Read(); err == nil || os.IsTimeout(err) {
		t.Errorf("a revoked device: got %v, want to be thrown out within %v", err, soon)
	}
	if _, err := servicetest.DialMQTT(tcp, "two", "two", d.token("two")); err == nil {
		t.Error("a revoked device was let in")
	}
	end := d.stop()
	if m := end.MQTT; m == nil || m.Connections != 3 || m.Records.Stored != 10 || m.Records.Refused != 1 || m.Refused["revoked"] != 2 || m.Refused["other-device"] != 1 || m.Revoked != 2 {
		t.Errorf("got %+v, want 3 connections, 10 records stored and 1 refused, connections refused: 2 revoked, 1 of another device, 2 ended", m)
	}
	if end.Frames.Quarantined != 0 {
		t.Errorf("got %+v, want none quarantined", end.Frames)
	}

	// After a restart old tokens are good, and a record sent again is the same one.
	d = startDemo(t, data, "--mqtt", "127.0.0.1:0", "--mqtt-ws", "127.0.0.1:0")
	_, ws = d.mqttDoors()
	one.boot++
	stored(d.onPaho(ws, "one", 1)(one.next()))
	once(t, d.sealed(receipts...), receipts)
	d.stop()
}

// Somebody with Debian's MQTT clients and openssl, and nothing of ours but the
// token, is heard: the script in testdata is the one that README shows.
func TestMosquitto(t *testing.T) {
	for _, p := range []string{"openssl", "curl", "sh"} {
		optional(t, p, "STOPLINE_REQUIRE_OPENSSL")
	}
	for _, p := range []string{"mosquitto_pub", "mosquitto_sub"} {
		if _, err := exec.LookPath(p); err == nil {
			continue
		}
		if os.Getenv(requireMosquitto) == "1" {
			t.Fatalf("%s is not in PATH, and %s=1 says that it must be there", p, requireMosquitto)
		}
		t.Skipf("needs %s in PATH (Debian: apt-get install mosquitto-clients); %s=1 makes this a failure", p, requireMosquitto)
	}
	processTest(t)
	dir := t.TempDir()
	d := startDemo(t, filepath.Join(dir, "district"), "--mqtt", "127.0.0.1:0", "--mqtt-ws", "127.0.0.1:0")
	tcp, _ := d.mqttDoors()
	script, err := filepath.Abs(filepath.Join("testdata", "mqtt-frame.sh"))
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "stopline")
	if err := os.WriteFile(program, []byte("#!/bin/sh\n"+asProgram+"=1 GORACE=atexit_sleep_ms=10 exec '"+exe+"' \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	said := tell(t, dir, "sh", script, program, d.data, d.url, tcp, filepath.Join(dir, "key.pem"), "my-sensor", "h0202")
	var r receipt
	if err := json.Unmarshal([]byte(lastLine(said)), &r); err != nil || len(r.Commitment) != 32 || len(r.Salt) != 32 {
		t.Fatalf("the script said\n%s\nwant a receipt in its last line (%v)", said, err)
	}
	v := d.sealed(r)
	once(t, v, []receipt{r})
	end := d.stop()
	if end.Frames.Quarantined != 0 || end.MQTT == nil || end.MQTT.Records.Stored == 0 {
		t.Errorf("got %+v and %+v, want none quarantined and some stored by MQTT", end.Frames, end.MQTT)
	}
}

func TestMQTTOptions(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct {
		args []string
		code int
		text string
	}{
		{[]string{"demo", "--mqtt-ws", "127.0.0.1:0"}, exitUsage, "--mqtt-ws, --mqtt-cert, --mqtt-key: must not be given without --mqtt"},
		{[]string{"demo", "--mqtt", "127.0.0.1:0", "--nats", "nats://x"}, exitUsage, "--mqtt: not with --nats"},
		{[]string{"demo", "--mqtt", "x", "--data", dir}, exitFailed, "MQTT: address x: missing port"},
		{[]string{"demo", "--mqtt", "127.0.0.1:0", "--mqtt-cert", "x", "--data", dir}, exitFailed, "CertFile, KeyFile: give both"},
		{[]string{"token"}, exitUsage, "--data and --device, or --client, are needed"},
		{[]string{"token", "--data", dir, "--device", "x", "--for", "1000h"}, exitUsage, "--for 1000h0m0s: must be 1s to 744h0m0s"},
		{[]string{"token", "--data", filepath.Join(dir, "none"), "--device", "x"}, exitFailed, "genesis.json"},
	} {
		wantExit(t, inside(t, tt.args...), tt.code, tt.text)
	}
}
