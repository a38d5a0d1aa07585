package issuer

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/countersign-dev/countersign/store"
)

func TestACredentialIsPrintedAndLoggedWithoutItsSecret(t *testing.T) {
	c := &Credential{
		Kind: KindDatabase, Token: planted, Password: planted, PrivateKey: planted, SignedKey: planted, WrappingToken: planted,
		Data: []byte(`{"a":"` + planted + `"}`),
	}
	m := &Minted{Credential: c, Issued: store.IssuedDetails{Kind: "database"}}
	var out bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d", "%t"} {
		fmt.Fprintf(&out, verb+verb+verb+"\n", c, m, struct{ C *Credential }{c})
	}
	log := zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()), zapcore.AddSync(&out), zap.DebugLevel))
	log.Info("zap", zap.Any("credential", c), zap.Any("minted", m), zap.Object("object", c), zap.Stringer("text", m))
	log.Sugar().Infow("sugar", "credential", c, "minted", m)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("slog", "credential", c)
	slog.New(slog.NewTextHandler(&out, nil)).Info("slog", "credential", c)
	hex := fmt.Sprintf("%x", planted)
	if s := out.String(); strings.Contains(s, planted) || strings.Contains(s, hex) || !strings.Contains(s, "database") {
		t.Errorf("printed a secret:\n%s", s)
	}
}

func TestACredentialHasTheMembersThatTheContractNamesForItsKind(t *testing.T) {
	for _, tt := range []struct {
		c    Credential
		want string
	}{
		{Credential{Kind: KindIdentity, Token: "t"}, `{"kind":"identity","revocable":false,"token":"t"}`},
		{Credential{Kind: KindVaultToken, Revocable: true, Token: "t", Addr: "a"}, `{"kind":"vault_token","revocable":true,"token":"t","addr":"a"}`},
		{Credential{Kind: KindDatabase, Revocable: true, Username: "u", Password: "p", Host: "h", Port: 5432, Database: "d"}, `{"kind":"database","revocable":true,"username":"u","password":"p","host":"h","port":5432,"database":"d"}`},
		{Credential{Kind: KindPKI, Certificate: "c", PrivateKey: "k", CAChain: []string{"ca"}, Serial: "1"}, `{"kind":"pki","revocable":false,"certificate":"c","private_key":"k","ca_chain":["ca"],"serial":"1"}`},
		{Credential{Kind: KindSSH, SignedKey: "k", Serial: "1"}, `{"kind":"ssh","revocable":false,"signed_key":"k","serial":"1"}`},
		{Credential{Kind: KindPath, Data: []byte(`{"a":1}`)}, `{"kind":"path","revocable":false,"data":{"a":1}}`},
		{Credential{Kind: KindWrapped, Revocable: true, WrappingToken: "w", Addr: "a"}, `{"kind":"wrapped","revocable":true,"addr":"a","wrapping_token":"w"}`},
	} {
		got, err := json.Marshal(&tt.c)
		if err != nil || string(got) != tt.want {
			t.Errorf("got %s, %v\nwant %s", got, err, tt.want)
		}
	}
}
