package scopes

import (
	_ "embed"
	"net/netip"
	"strconv"
	"strings"
)

//go:embed demo.yaml
var demo string

//go:embed demo-postgres.yaml
var demoPostgres string

// Demo is the catalogue of `countersign dev`: with the scopes of the orders
// database where orders says how steps reach it. The gateway asks a server on
// this machine for no TLS, any other for a certificate that it can verify. Through
// the gateway steps reach the table orders and more of that database; what they
// may do there, PostgreSQL's roles orders_read and orders_write say. Parse it as
// any other.
func Demo(orders *Connection, more ...string) []byte {
	if orders == nil {
		return []byte(demo)
	}
	tls := "verify"
	if ip, err := netip.ParseAddr(orders.Host); orders.Host == "localhost" || err == nil && ip.IsLoopback() {
		tls = "off"
	}
	inside := func(s string) string { q := strconv.Quote(s); return q[1 : len(q)-1] }
	tables := "orders"
	for _, t := range more {
		tables += ", " + strconv.Quote(t)
	}
	return []byte(demo + strings.NewReplacer(
		"@HOST@", inside(orders.Host),
		"@PORT@", strconv.Itoa(orders.Port),
		"@TLS@", tls,
		"@DATABASE@", inside(orders.Database),
		"@TABLES@", tables,
	).Replace(demoPostgres))
}
