package main

import (
	"errors"
	"fmt"
	"strings"

	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/store/inflight"
	"github.com/countersign-dev/countersign/store/trust"
)

// redisConfig says where brokers keep what is under way: in one server
// (url_file, or addrs), behind Sentinels, in a Cluster, or in this process.
type redisConfig struct {
	Embedded bool `yaml:"embedded"` // true: a Redis inside this process, for a single broker

	URL string `yaml:"url_file"` // file of a URL, which may hold a password: redis://[user:password@]host:port[/db], or rediss:// for TLS; several brokers share one

	Addrs            []string   `yaml:"addrs"`                  // host:port of one server, of the Sentinels, or of some of a Cluster's nodes
	SentinelMaster   string     `yaml:"sentinel_master"`        // the name by which the Sentinels know the master
	Cluster          bool       `yaml:"cluster"`                // true: addrs are nodes of a Redis Cluster
	Username         string     `yaml:"username"`               // the ACL user; Redis's default user where it is empty
	Password         string     `yaml:"password_file"`          // its password
	SentinelUsername string     `yaml:"sentinel_username"`      // the Sentinels' own ACL user
	SentinelPassword string     `yaml:"sentinel_password_file"` // its password
	DB               int        `yaml:"db"`                     // database number; 0 by default
	TLS              *redisKeys `yaml:"tls"`                    // with addrs: present, even if empty, has TLS spoken

	Prefix string `yaml:"prefix"` // of every key, one for each deployment on a server; "countersign:" by default
}

// redisKeys are the files of TLS towards Redis and Sentinels.
type redisKeys struct {
	CA   string `yaml:"ca"`   // whom the server's certificate is checked against, PEM; the system's authorities by default
	Cert string `yaml:"cert"` // a client certificate, where the server wants one
	Key  string `yaml:"key"`  // its private key, PEM
}

func (c *redisConfig) check() error {
	ways := 0
	for _, is := range []bool{c.Embedded, c.URL != "", len(c.Addrs) > 0} {
		if is {
			ways++
		}
	}
	own := c.Username != "" || c.Password != "" || c.DB != 0
	sentinel := c.SentinelUsername != "" || c.SentinelPassword != ""
	switch {
	case ways != 1:
		return errors.New("redis: set either url_file or addrs (several brokers share one) or embedded: true (a single broker)")
	case c.Embedded && (own || sentinel || c.Cluster || c.SentinelMaster != "" || c.TLS != nil || c.Prefix != ""):
		return errors.New("redis: embedded: true stands alone: nobody else reaches it")
	case c.URL != "" && own:
		return errors.New("redis: user, password and database stand in the URL of url_file; username, password_file and db go with addrs")
	case c.URL != "" && (c.Cluster || c.SentinelMaster != "" || sentinel):
		return errors.New("redis: url_file names one server; for a Cluster or Sentinels set addrs")
	case c.Cluster && c.SentinelMaster != "":
		return errors.New("redis: either cluster or sentinel_master: a Cluster fails over by itself")
	case c.Cluster && c.DB != 0:
		return errors.New("redis: a Cluster has no databases: leave db out")
	case sentinel && c.SentinelMaster == "":
		return errors.New("redis: sentinel_username and sentinel_password_file are for Sentinels: set sentinel_master")
	case len(c.Addrs) > 1 && !c.Cluster && c.SentinelMaster == "":
		return errors.New("redis: several addrs are a Cluster's (cluster: true) or Sentinels' (sentinel_master): say which")
	case c.Username != "" && c.Password == "" || c.SentinelUsername != "" && c.SentinelPassword == "":
		return errors.New("redis: a user name needs its password: password_file with username, sentinel_password_file with sentinel_username")
	case c.DB < 0:
		return errors.New("redis: db is 0 or more")
	case strings.ContainsAny(c.Prefix, "*?[]{}\\ \t\r\n"):
		return fmt.Errorf("redis: prefix %q: no spaces, and none of *?[]{}\\, which mean something to Redis", c.Prefix)
	case c.TLS != nil && (c.TLS.Cert == "") != (c.TLS.Key == ""):
		return errors.New("redis: tls: cert and key go together")
	}
	for _, addr := range c.Addrs {
		if err := hostPort(addr); err != nil {
			return fmt.Errorf("redis: addrs: %w", err)
		}
	}
	return nil
}

// options reads the files that c names.
func (c *redisConfig) options() (o inflight.Options, err error) {
	o = inflight.Options{Addrs: c.Addrs, Cluster: c.Cluster, SentinelMaster: c.SentinelMaster, Username: c.Username, SentinelUsername: c.SentinelUsername, DB: c.DB, Prefix: c.Prefix}
	for _, f := range []struct {
		key, file string
		to        *string
	}{{"url_file", c.URL, &o.URL}, {"password_file", c.Password, &o.Password}, {"sentinel_password_file", c.SentinelPassword, &o.SentinelPassword}} {
		if f.file == "" {
			continue
		}
		if *f.to, err = readSecret(f.file); err != nil {
			return o, fmt.Errorf("redis.%s: %w", f.key, err)
		}
	}
	if c.TLS == nil {
		return o, nil
	}
	// Read at start: a Redis whose certificates change is turned to anew by a
	// restart of the broker.
	t, err := trust.Open(trust.Files{CA: c.TLS.CA, Cert: c.TLS.Cert, Key: c.TLS.Key}, zap.NewNop())
	if err != nil {
		return o, fmt.Errorf("redis.tls: %w", err)
	}
	o.TLS = t.Client()
	return o, nil
}
