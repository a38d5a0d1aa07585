package main

import (
	"testing"

	"github.com/countersign-dev/countersign/api/client"
)

func TestASessionsTokenIsThePasswordInPSQLsEnvironment(t *testing.T) {
	env, err := credentialEnv("step-1", &client.Credential{Credential: []byte(
		`{"kind":"gateway","revocable":true,"token":"t0ken","protocol":"postgres","address":"[::1]:8790","username":"step","database":"orders"}`)})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"PGHOST": "::1", "PGPORT": "8790", "PGUSER": "step", "PGPASSWORD": "t0ken", "PGDATABASE": "orders",
		"COUNTERSIGN_CREDENTIAL_ADDRESS": "[::1]:8790", "COUNTERSIGN_CREDENTIAL_PROTOCOL": "postgres",
	} {
		if env[name] != want {
			t.Errorf("%s is %q", name, env[name])
		}
	}
	if _, err := credentialEnv("step-1", &client.Credential{Credential: []byte(`{"kind":"gateway","protocol":"postgres","address":"nowhere"}`)}); err == nil {
		t.Error("an address without port was taken")
	}
	env, err = credentialEnv("step-1", &client.Credential{Credential: []byte(`{"kind":"gateway","token":"t","protocol":"http","address":"http://127.0.0.1:8789"}`)})
	if err != nil || env["PGHOST"] != "" || env["COUNTERSIGN_CREDENTIAL_ADDRESS"] != "http://127.0.0.1:8789" || env["COUNTERSIGN_CREDENTIAL_TOKEN"] != "t" {
		t.Errorf("%v, %v", env, err)
	}
}
