package main

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"

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
	SentinelPassword string     `yaml:"sentinel_password_file"` // its password, which is read at start alone
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

// options reads the files that c names. Certificates, authorities and the user's
// password are read again for each new connection; the Sentinels' own password,
// for which go-redis asks nobody, is not.
func (c *redisConfig) options(log *zap.Logger) (o inflight.Options, err error) {
	o = inflight.Options{Addrs: c.Addrs, Cluster: c.Cluster, SentinelMaster: c.SentinelMaster, SentinelUsername: c.SentinelUsername, DB: c.DB, Prefix: c.Prefix}
	switch {
	case c.URL != "":
		if o.URL, err = readSecret(c.URL); err != nil {
			return o, fmt.Errorf("redis.url_file: %w", err)
		}
		user := &redisUser{file: c.URL, log: log, parse: func(text string) (string, string, error) { return redisURLUser(text, o.URL) }}
		if err := user.read(); err != nil {
			return o, fmt.Errorf("redis.url_file: %w", err)
		}
		o.Credentials = user.current
	case c.Password != "":
		user := &redisUser{file: c.Password, log: log, parse: func(text string) (string, string, error) { return c.Username, text, nil }}
		if err := user.read(); err != nil {
			return o, fmt.Errorf("redis.password_file: %w", err)
		}
		o.Credentials = user.current
	}
	if c.SentinelPassword != "" {
		if o.SentinelPassword, err = readSecret(c.SentinelPassword); err != nil {
			return o, fmt.Errorf("redis.sentinel_password_file: %w", err)
		}
	}
	if c.TLS == nil {
		return o, nil
	}
	t, err := trust.Open(trust.Files{CA: c.TLS.CA, Cert: c.TLS.Cert, Key: c.TLS.Key}, log)
	if err != nil {
		return o, fmt.Errorf("redis.tls: %w", err)
	}
	o.TLS = t.Client
	return o, nil
}

// redisUser is who a new connection is for, as file says at that moment. A file
// that cannot be read leaves what it said last, and is logged once.
type redisUser struct {
	file  string
	parse func(text string) (name, password string, err error)
	log   *zap.Logger

	mu             sync.Mutex
	name, password string
	trouble        string // logged last
}

func (u *redisUser) read() error {
	text, err := readSecret(u.file)
	if err != nil {
		return err
	}
	name, password, err := u.parse(text)
	if err == nil {
		u.name, u.password = name, password
	}
	return err
}

func (u *redisUser) current() (name, password string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	trouble := ""
	if err := u.read(); err != nil {
		if trouble = err.Error(); trouble != u.trouble {
			u.log.Warn("not reloaded, the old stays in force", zap.String("what", "Redis user"), zap.String("file", u.file), zap.Error(err))
		}
	}
	u.trouble = trouble
	return u.name, u.password
}

// redisURLUser is the user in text, a URL of the server that first names:
// connections go where the first URL led, and no other server's password there.
func redisURLUser(text, first string) (name, password string, err error) {
	u, err := url.Parse(text)
	if err != nil {
		return "", "", errors.New("not a URL") // err would quote the password
	}
	user := u.User
	was, err := url.Parse(first)
	if u.User = nil; err == nil {
		was.User = nil
	}
	if err != nil || u.String() != was.String() {
		return "", "", errors.New("the URL names another server than at start: that takes a restart")
	}
	password, _ = user.Password()
	return user.Username(), password, nil
}
