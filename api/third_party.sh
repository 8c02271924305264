#!/usr/bin/env bash
# Copies the .proto files that ours import out of the module cache, for
# generation only: they are not committed.
set -euo pipefail
cd "$(dirname "$0")"
dir() { GOWORK=off GOFLAGS=-mod=mod go mod download -json "$1" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p'; }
googleapis="$(dir github.com/grpc-ecosystem/grpc-gateway@v1.16.0)/third_party/googleapis"
validate="$(dir github.com/bufbuild/protovalidate@v1.2.2)/proto/protovalidate"
rm -rf third_party
mkdir -p third_party/google/api third_party/buf/validate
install -m 644 "$googleapis"/google/api/{annotations,http,httpbody}.proto third_party/google/api/
install -m 644 "$validate/buf/validate/validate.proto" third_party/buf/validate/
