package masking_test

import (
	"strconv"
	"testing"

	"github.com/go-json-experiment/json"

	"github.com/countersign-dev/countersign/broker/gateway/masking"
	"github.com/countersign-dev/countersign/scopes"
	"github.com/countersign-dev/countersign/store"
)

// taken returns the masking of a catalogue with one rule, where it is taken.
func taken(protocol, kind, value string) (store.Masking, bool) {
	quoted, err := json.Marshal(value)
	if err != nil {
		return store.Masking{}, false
	}
	access := "{protocol: http, upstream: https://h.example.com, inject: {in: header, name: x-key, value: \"{{key}}\"}, routes: [{methods: [GET], paths: [/]}]}"
	engine := "engine: kv\n    vault: {path: api}"
	if protocol == store.ProtocolPostgres {
		access = "{protocol: postgres, statements: [select], tables: [orders]}"
		engine = "engine: database\n    vault: {role: sales}\n    connection: {host: db.example.com, database: sales}"
	}
	set, err := scopes.Parse("catalogue.yaml", []byte("scopes:\n  - name: one\n    description: one\n    target: https://h.example.com\n    sensitivity: low\n    max_ttl: 5m\n    ask: [\"*\"]\n    "+
		engine+"\n    delivery: [gateway]\n    access: "+access+"\n    masking: [{"+kind+": "+string(quoted)+"}]\n"), "", nil)
	if err != nil {
		return store.Masking{}, false
	}
	sc, _ := set.Scope("one")
	return sc.Masking, true
}

// FuzzCatalogue finds rules that a catalogue takes and no Masker does: they would
// be found out only when a session opens.
func FuzzCatalogue(f *testing.F) {
	for _, s := range []string{"$.customers[*].address", "$..lines[0]['unit price'].*", "$", "$.a", "$['it\\'s']", `$["a"]`, "$[00]", "$[0,1]", "$[99999999999999999999]", "$.größe", "$..['a']", "$.._x[*]"} {
		f.Add("path", s)
	}
	f.Add("path", "$['\t']")
	f.Add("field", "e-mail")
	f.Add("column", "sales.orders.phone")
	f.Add("column", "Übersicht.x")
	f.Add("type", "double precision")
	f.Add("type", "numeric(3, 2)[]")
	f.Add("detector", "iban")
	f.Fuzz(func(t *testing.T, kind, value string) {
		protocol := store.ProtocolHTTP
		if kind == "column" || kind == "type" {
			protocol = store.ProtocolPostgres
		}
		switch kind {
		case "field", "path", "column", "type", "detector":
		default:
			return
		}
		rules, ok := taken(protocol, kind, value)
		if !ok {
			return
		}
		if _, err := masking.New(rules); err != nil {
			t.Errorf("a catalogue takes %s %s: %v", kind, strconv.Quote(value), err)
		}
	})
}

func TestTheCataloguesOfTheFuzzTestAreCatalogues(t *testing.T) {
	for kind, value := range map[string]string{"path": "$.customers[*].address", "field": "email", "detector": "iban"} {
		if m, ok := taken(store.ProtocolHTTP, kind, value); !ok || len(m.Rules) != 1 {
			t.Error(kind, value)
		}
	}
	for kind, value := range map[string]string{"column": "orders.email", "type": "double precision"} {
		if m, ok := taken(store.ProtocolPostgres, kind, value); !ok || len(m.Rules) != 1 {
			t.Error(kind, value)
		}
	}
}
