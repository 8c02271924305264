#!/usr/bin/env bash
# Fails if the API does not understand what clients of before send, or the other
# way round: buf breaking against the newest commit before this one that changed
# it, or against the commit that STOPLINE_API_BASE names. Needs ./third_party.sh
# to have run, and nothing from any network.
set -euo pipefail
cd "$(dirname "$0")"
skip() { echo "breaking: SKIPPED: $1"; exit 0; }

git rev-parse --git-dir >/dev/null 2>&1 || skip "this is no git clone"
base="${STOPLINE_API_BASE:-}"
if [ -z "$base" ]; then
	# What is not committed is compared with the newest commit; a commit that changed
	# the API with the one that changed it before.
	if git diff --quiet HEAD -- stopline; then
		base="$(git log -2 --format=%H -- stopline | sed -n 2p)"
	else
		base="$(git rev-parse HEAD)"
	fi
	[ -n "$base" ] || skip "the clone has no earlier commit that changed the API"
fi
git cat-file -e "$base:./buf.yaml" 2>/dev/null || skip "$base has no API, or is not in this clone"

tmp="$(mktemp -d)"
trap 'rm -rf "$tmp"' EXIT
buf() { GOWORK=off go tool -modfile=buf.mod buf "$@"; }
mkdir "$tmp/before" "$tmp/broken"
git archive "$base" . | tar -x -C "$tmp/before"
# Imports are not committed; that they are those of today changes nothing, as they
# are not compared.
cp -R buf.yaml third_party "$tmp/before/"
buf breaking --against "$tmp/before"
echo "breaking: nothing since $(git log -1 --format='%h %s' "$base")"

# The check can fail: a field with another number is found.
cp -R buf.yaml stopline third_party "$tmp/broken/"
sed -i 's/^  string claim = 1 /  string claim = 15 /' "$tmp/broken/stopline/v1/devices.proto"
if buf breaking "$tmp/broken" --against . >"$tmp/said"; then
	echo "breaking: a field with another number was not found"
	exit 1
fi
grep -q 'claim' "$tmp/said" || { cat "$tmp/said"; echo "breaking: another fault was found than the one that was made"; exit 1; }
