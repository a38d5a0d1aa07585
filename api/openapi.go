// Package api holds the description of every JSON call of this program, of the
// broker's listener and of the recorder's. What answers them is in the folders
// beside it, one per caller.
package api

import _ "embed"

// OpenAPI is the OpenAPI 3.1 document, as served at /openapi.yaml.
//
//go:embed openapi.yaml
var OpenAPI []byte
