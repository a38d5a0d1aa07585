package auth

import (
	"encoding/base64"
	"errors"
	"strings"

	"github.com/go-json-experiment/json"
)

// unverifiedIssuer reads "iss" of a compact JWT to choose the keys it is then
// verified with. Nothing else may be believed of it.
func unverifiedIssuer(raw string) (string, error) {
	parts := strings.Split(raw, ".")
	if len(parts) != 3 {
		return "", errors.New("not a compact JWT")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return "", errors.New("the JWT's payload is not base64url")
	}
	var c struct {
		Iss string `json:"iss"`
	}
	if err := json.Unmarshal(payload, &c); err != nil {
		return "", errors.New("the JWT's payload is not a JSON object with a string iss")
	}
	return c.Iss, nil
}
