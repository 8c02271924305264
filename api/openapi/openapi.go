// Package openapi holds the gateway's REST contract, generated from the .proto
// files.
package openapi

import _ "embed"

// JSON is the contract in OpenAPI v2.
//
//go:embed stopline.swagger.json
var JSON []byte
