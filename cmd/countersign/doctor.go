package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/countersign-dev/countersign/issuer"
	"github.com/countersign-dev/countersign/store/inflight"
)

// finding is one thing that doctor looked at.
type finding struct {
	What    string `json:"what"`
	OK      bool   `json:"ok"`
	Message string `json:"message,omitzero"` // what is wrong and what to do, or a detail
}

func doctorCommand() *cobra.Command {
	var config, output string
	cmd := &cobra.Command{
		Use:   "doctor --config FILE",
		Short: "Check a configuration of serve or record, and what it names",
		Long: `Check a configuration of serve or record before the first request does: its
keys, the files it names and who may read them; for serve also the recorder,
Vault and each capability that the catalogue needs there, and Redis. Nothing
is changed and nothing is minted. Exit status 1 when something is wrong.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
			defer cancel()
			findings, err := examine(ctx, config)
			if err != nil {
				return err
			}
			bad := 0
			for _, f := range findings {
				if !f.OK {
					bad++
				}
			}
			if output == "json" {
				if err := printJSON(cmd, struct {
					Findings []finding `json:"findings"`
				}{findings}); err != nil {
					return err
				}
			} else {
				for _, f := range findings {
					mark := "ok  "
					if !f.OK {
						mark = "BAD "
					}
					fmt.Fprintln(cmd.OutOrStdout(), strings.TrimRight(mark+f.What+": "+f.Message, ": "))
				}
			}
			if bad > 0 {
				return fmt.Errorf("%d of %d checks found something wrong", bad, len(findings))
			}
			return nil
		},
	}
	configFlag(cmd, &config)
	outputFlag(cmd, &output, "text", "text", "json")
	return cmd
}

// examine tells the two kinds of configuration apart by the keys that only one
// of them has.
func examine(ctx context.Context, path string) ([]finding, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var keys map[string]any
	if err := yaml.Unmarshal(b, &keys); err != nil {
		return nil, fmt.Errorf("%s is not YAML: %w", path, err)
	}
	if keys["recorder"] != nil || keys["vault"] != nil {
		var c serveConfig
		if err := errors.Join(loadConfig(path, &c), c.check()); err != nil {
			return nil, err
		}
		return c.examine(ctx), nil
	}
	var c recordConfig
	if err := errors.Join(loadConfig(path, &c), c.check()); err != nil {
		return nil, err
	}
	return c.examine(), nil
}

// doctor collects findings.
type doctor []finding

// look records err, or the detail where there is none. It reports whether all
// is well.
func (d *doctor) look(what string, err error, detail string) bool {
	if err != nil {
		*d = append(*d, finding{What: what, Message: err.Error()})
		return false
	}
	*d = append(*d, finding{What: what, OK: true, Message: detail})
	return true
}

// secret checks that a file of a secret can be read, by its owner alone.
func (d *doctor) secret(what, path string) {
	if path == "" {
		return
	}
	_, err := readSecret(path)
	if info, statErr := os.Stat(path); err == nil && statErr == nil && info.Mode().Perm()&0o077 != 0 {
		err = fmt.Errorf("%s may be read by others: chmod 600 it", path)
	}
	if errors.Is(err, os.ErrNotExist) {
		err = fmt.Errorf("%s is missing; docs/operations.md says how it is made", path)
	}
	d.look(what, err, path)
}

func (c *serveConfig) examine(ctx context.Context) []finding {
	var d doctor
	_, err := c.Listen.tls()
	d.look("listen", err, c.Listen.Addr)
	d.secret("privacy_key", c.PrivacyKey)
	d.secret("identity_key", c.IdentityKey)
	d.secret("listen.key", c.Listen.Key)
	d.secret("recorder.token_file", c.Recorder.Token)
	d.secret("recorder.key", c.Recorder.Key)
	d.secret("vault.token_file", c.Vault.Token)
	if c.Vault.AppRole != nil {
		d.secret("vault.approle.secret_id_file", c.Vault.AppRole.SecretID)
	}
	d.secret("redis.url_file", c.Redis.URL)
	d.secret("redis.password_file", c.Redis.Password)
	d.secret("redis.sentinel_password_file", c.Redis.SentinelPassword)
	if c.Redis.TLS != nil {
		d.secret("redis.tls.key", c.Redis.TLS.Key)
	}

	// What the doctor sees of the log is not what the broker has seen: its head
	// file is the broker's to write.
	c.Recorder.HeadFile = ""
	o, err := c.options(zap.NewNop())
	if !d.look("files, catalogue and policy", err, "") {
		return d
	}
	d[len(d)-1].Message = fmt.Sprintf("%d scopes, %s", len(o.scopes.Current().Scopes()), o.scopes.Current().Digest())
	defer o.recorder.Close()
	a, err := o.recorder.Open(ctx, "")
	if err == nil {
		d.look("recorder", nil, fmt.Sprintf("answers as %s, %d entries open", o.logKey.Origin(), len(a.Entries)))
	} else {
		d.look("recorder", fmt.Errorf("%w; is it up, is recorder.log_key its key, and recorder.writer's token in its token file?", err), "")
	}
	d.vault(ctx, o)
	if !c.Redis.Embedded {
		s, err := inflight.Open(o.redis)
		if err == nil {
			err = s.Ping(ctx)
			_ = s.Close()
		}
		d.look("redis", err, "answers")
	}
	return d
}

// vault checks login and capabilities.
func (d *doctor) vault(ctx context.Context, o *machinesOptions) {
	if _, err := os.Stat(o.identityKey); err != nil {
		return // found above, and never made here
	}
	id, err := issuer.OpenIdentity(issuer.IdentityConfig{Issuer: o.publicURL, TrustDomain: o.trustDomain, KeyFile: o.identityKey, Lead: o.identityLead})
	if !d.look("step identity", err, o.publicURL) {
		return
	}
	vault := o.vault
	vault.TrustDomain, vault.Log, vault.Scopes, vault.Identity, vault.FirstTTL = o.trustDomain, o.logKey, o.scopes.Current, id, o.firstTTL
	i, err := issuer.New(ctx, vault)
	if err == nil {
		err = i.Ping(ctx)
	}
	if !d.look("vault", err, "logged in at "+vault.Addr) {
		return
	}
	defer i.Close()
	missing, err := i.CheckCapabilities(ctx)
	if err != nil || len(missing) == 0 {
		d.look("vault capabilities", err, "all that the catalogue needs")
	}
	for _, m := range missing {
		what := "vault capabilities"
		if m.Scope != "" {
			what += " of " + m.Scope
		}
		d.look(what, fmt.Errorf("%s on %s is missing: %s", m.Capability, m.Path, m.Note), "")
	}
}

func (c *recordConfig) examine() []finding {
	var d doctor
	_, err := c.Listen.tls()
	d.look("listen", err, c.Listen.Addr)
	d.secret("log_key", c.LogKey)
	d.secret("privacy_key", c.PrivacyKey)
	d.secret("listen.key", c.Listen.Key)
	o, err := c.options(zap.NewNop())
	if !d.look("files", err, "") {
		return d
	}
	d[len(d)-1].Message = "log " + o.ledger.Signer.Name()
	if names := writers(o); len(names) == 0 {
		d.look("writers", errors.New("nobody may write: `countersign token create --role writer` makes a broker's token, certificates names client certificates"), "")
	}
	for _, dir := range [][2]string{{"dir", c.Dir}, {"head_file", filepath.Dir(c.HeadFile)}, {"keys_file", filepath.Dir(c.KeysFile)}} {
		if dir[1] == "." {
			continue // not set: beside the ledger
		}
		info, err := os.Stat(dir[1])
		switch {
		case errors.Is(err, os.ErrNotExist) && dir[0] == "dir":
			err = nil // made at the first start
		case err == nil && !info.IsDir():
			err = fmt.Errorf("%s is not a directory", dir[1])
		}
		d.look(dir[0], err, dir[1])
	}
	return d
}
