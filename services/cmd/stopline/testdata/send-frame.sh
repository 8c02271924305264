#!/bin/sh
# Signs one frame with openssl, sends it, and finds its commitment in the log.
# usage: send-frame.sh URL KEY.pem DEVICE JUNCTION [DISTRICT]
set -eu
url=$1 key=$2 device=$3 junction=$4 district=${5:-harbour}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

# 1. The frame. Nothing of it is re-encoded later: sign the very bytes you send.
# Each call counts as a start of the device: a new boot epoch, frame 1.
now=$(date +%s)
groups=$(curl -sS "$url/v1/registry/junction/$junction" | grep -oE '"kind":"(vehicles|pedestrians|buses)"' | wc -l)
lamps=$(printf "%${groups}s" '' | tr ' ' r)
printf '{"district":"%s","junction":"%s","device":"%s","boot_epoch":"%s","seq":"1","time_unix_nano":"%s000000000","signal":{"state":"%s","stage":-1,"mode":"local"}}' \
	"$district" "$junction" "$device" "$now" "$now" "$lamps" >"$tmp/frame"

# 2. The signature is over a domain line, the kind, the content type, the frame.
{ printf 'stopline envelope v1\nframe\napplication/json\n'; cat "$tmp/frame"; } >"$tmp/signed"
openssl pkeyutl -sign -rawin -inkey "$key" -in "$tmp/signed" -out "$tmp/signature"
key_id=$(openssl pkey -in "$key" -pubout -outform DER | tail -c 32 | openssl dgst -sha256 -r | cut -c 1-32)

# 3. The envelope, and the receipt: on disk, with the salt of the commitment.
printf '{"kind":"frame","content_type":"application/json","key_id":"%s","payload":"%s","signature":"%s"}' \
	"$key_id" "$(openssl base64 -A -in "$tmp/frame")" "$(openssl base64 -A -in "$tmp/signature")" >"$tmp/envelope"
receipt=$(curl -sS --fail-with-body -H 'Content-Type: application/json' --data-binary "@$tmp/envelope" "$url/v1/frames") || {
	echo "$receipt" >&2
	exit 1
}
echo "$receipt"

# 4. Once agreed and sealed, the leaf 01 01 <commitment> is in the served entries
# (c2sp.org/tlog-tiles; 256 of them a file, the last file is partial).
leaf=0101$(printf '%s' "$receipt" | sed 's/.*"commitment":"\([^"]*\)".*/\1/' | openssl base64 -d -A | od -An -v -tx1 | tr -d ' \n')
tries=0
while [ "$tries" -lt 100 ]; do
	tries=$((tries + 1))
	size=$(curl -sS "$url/log/checkpoint" | sed -n 2p)
	n=$(((${size:-0} + 255) / 256)) # from the newest file back
	while [ "$n" -gt 0 ] && [ "$n" -gt $(((${size:-0} + 255) / 256 - 2)) ]; do
		n=$((n - 1))
		tile=$(printf '%03d' $((n % 1000)))
		[ "$n" -lt 1000 ] || tile=$(printf 'x%03d/%s' $((n / 1000)) "$tile")
		width=$((size - n * 256))
		[ "$width" -ge 256 ] || tile=$tile.p/$width
		if curl -sS "$url/log/tile/entries/$tile" | od -An -v -tx1 | tr -d ' \n' | grep -q "$leaf"; then
			echo "sealed: the leaf $leaf is in $url/log/tile/entries/$tile"
			exit 0
		fi
	done
	sleep 0.1
done
echo "the leaf $leaf is not in the log" >&2
exit 1
