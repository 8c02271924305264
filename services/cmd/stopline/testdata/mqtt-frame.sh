#!/bin/sh
# Enrols a device, signs one frame with openssl, sends it with Debian's MQTT
# client, and waits for the receipt.
# usage: mqtt-frame.sh STOPLINE DATA URL MQTT_HOST:PORT KEY.pem DEVICE JUNCTION [DISTRICT]
# STOPLINE is the program; the demo runs with --data DATA --mqtt MQTT_HOST:PORT.
# KEY.pem is made, and the device enrolled, if the file is not there.
set -eu
stopline=$1 data=$2 url=$3 host=${4%:*} port=${4##*:} key=$5 device=$6 junction=$7 district=${8:-harbour}
tmp=$(mktemp -d)
listener=
trap '[ -z "$listener" ] || kill "$listener" 2>/dev/null || :; rm -rf "$tmp"' EXIT

# 1. The device's key and its place in the registry, once; then a token for MQTT.
if [ ! -e "$key" ]; then
	openssl genpkey -algorithm ed25519 -out "$key"
	openssl pkey -in "$key" -pubout -out "$tmp/public.pem"
	"$stopline" enrol --data "$data" --url "$url" --junction "$junction" --device "$device" --public-key "$tmp/public.pem"
fi
"$stopline" token --data "$data" --device "$device" --for 1h --json >"$tmp/token"
member() { sed 's/.*"'"$1"'":"\([^"]*\)".*/\1/' "$tmp/token"; }

# 2. The frame, signed, in its envelope, as in send-frame.sh.
now=$(date +%s)
groups=$(curl -sS "$url/v1/registry/junction/$junction" | grep -oE '"kind":"(vehicles|pedestrians|buses)"' | wc -l)
lamps=$(printf "%${groups}s" '' | tr ' ' r)
printf '{"district":"%s","junction":"%s","device":"%s","boot_epoch":"%s","seq":"1","time_unix_nano":"%s000000000","signal":{"state":"%s","stage":-1,"mode":"local"}}' \
	"$district" "$junction" "$device" "$now" "$now" "$lamps" >"$tmp/frame"
{ printf 'stopline envelope v1\nframe\napplication/json\n'; cat "$tmp/frame"; } >"$tmp/signed"
openssl pkeyutl -sign -rawin -inkey "$key" -in "$tmp/signed" -out "$tmp/signature"
key_id=$(openssl pkey -in "$key" -pubout -outform DER | tail -c 32 | openssl dgst -sha256 -r | cut -c 1-32)
printf '{"kind":"frame","content_type":"application/json","key_id":"%s","payload":"%s","signature":"%s"}' \
	"$key_id" "$(openssl base64 -A -in "$tmp/frame")" "$(openssl base64 -A -in "$tmp/signature")" >"$tmp/envelope"

# 3. Listen on the device's own topic, and send until the receipt is there: a
# PUBACK does not mean stored, and the same bytes again are one record. The
# digest says which record a receipt is about. Each connection of a device has
# a client id of its own: the device's, or that with :1, :2, :3 behind it.
mosquitto_sub -h "$host" -p "$port" -i "$(member client_id):1" -u "$device" -P "$(member password)" -t "$(member down)" >"$tmp/receipts" &
listener=$!
digest=$(openssl dgst -sha256 -binary "$tmp/envelope" | openssl base64 -A)
tries=0
while [ "$tries" -lt 30 ]; do
	tries=$((tries + 1))
	mosquitto_pub -h "$host" -p "$port" -i "$(member client_id)" -u "$device" -P "$(member password)" -q 1 -t "$(member up)" -f "$tmp/envelope"
	sleep 0.3
	if receipt=$(grep -F "\"digest\":\"$digest\"" "$tmp/receipts" | grep -v STATUS_BUSY); then
		printf '%s\n' "$receipt" | head -n 1
		printf '%s\n' "$receipt" | grep -q STATUS_STORED
		exit
	fi
done
echo "no receipt" >&2
exit 1
