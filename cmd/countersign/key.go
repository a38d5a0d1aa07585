package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/countersign-dev/countersign/issuer"
)

func keyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "key",
		Short: "Make and show the keys that serve and record need",
		Args:  cobra.NoArgs,
	}
	cmd.AddCommand(keyGenerateCommand(), keyShowCommand(), keyRotateCommand())
	return cmd
}

func keyGenerateCommand() *cobra.Command {
	var out, name, alg string
	cmd := &cobra.Command{
		Use:   "generate log|identity|privacy|witness --out FILE",
		Short: "Make a key in a new file of mode 0600",
		Long: `Make a key and write it to a new file of mode 0600. The public part, where
there is one, is printed.

  log       the recorder signs the log's head with it (C2SP note key, Ed25519);
            its printed verifier key is what ` + "`countersign verify --key`" + ` takes
  identity  the broker signs step identity tokens with it; --alg says how
  privacy   brokers and recorder share it; names in the ledger are pseudonyms
            under it, so losing it loses who is who, and leaking it lets a leaf
            be searched for a known name
  witness   a witness cosigns checkpoints with it (C2SP tlog-cosignature,
            Ed25519); its printed verifier key goes to those who run a log and
            those who verify one`,
		Example: `  countersign key generate log --name ledger.example.com/main --out log.key
  countersign key generate identity --alg ES256 --out identity.key
  countersign key generate privacy --out privacy.key
  countersign key generate witness --name witness.example.com/w1 --out witness.key`,
		Args:      cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
		ValidArgs: []string{"log", "identity", "privacy", "witness"},
		RunE: func(cmd *cobra.Command, args []string) error {
			var secret, public string
			var err error
			switch args[0] {
			case "identity":
				return generateIdentityKey(cmd, out, alg)
			case "log":
				if name == "" {
					return errors.New("a log needs a name that no other log has: add --name, such as --name ledger.example.com/main")
				}
				if secret, err = generateLogKey(name); err == nil {
					public, err = logVerifierKey(secret)
				}
			case "witness":
				if name == "" {
					return errors.New("a witness needs a name that no other has: add --name, such as --name witness.example.com/w1")
				}
				if secret, err = generateWitnessKey(name); err == nil {
					public, err = publicPart(secret)
				}
			case "privacy":
				secret = generatePrivacyKey()
			}
			if err != nil {
				return err
			}
			if err := writeSecret(out, []byte(strings.TrimSuffix(secret, "\n")+"\n")); err != nil {
				return err
			}
			if public != "" {
				fmt.Fprintln(cmd.OutOrStdout(), strings.TrimSuffix(public, "\n"))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "file to create")
	cmd.Flags().StringVar(&name, "name", "", "the log's name (origin) or the witness's, a URL without scheme that you own")
	algorithmFlag(cmd, &alg)
	_ = cmd.MarkFlagRequired("out")
	return cmd
}

func keyShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "show FILE",
		Short: "Print the public part of a key",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			text, err := readSecret(args[0])
			if err != nil {
				return err
			}
			if strings.HasPrefix(text, "{") || strings.HasPrefix(text, "-----BEGIN ") {
				return showIdentityKeys(cmd, args[0])
			}
			public, err := publicPart(text)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), strings.TrimSuffix(public, "\n"))
			return err
		},
	}
}

// publicPart says what kind of key text holds by its form.
func publicPart(text string) (string, error) {
	switch {
	case strings.HasPrefix(text, "PRIVATE+KEY+"):
		if w, err := parseWitnessKey(text); err == nil {
			return w.Verifier().String(), nil
		}
		return logVerifierKey(text)
	case strings.HasPrefix(text, "privacy-key-v1:"):
		return "", errors.New("a privacy key has no public part")
	}
	return "", errors.New("neither a key of a log or witness, an identity key nor a privacy key; make one with `countersign key generate`")
}

func keyRotateCommand() *cobra.Command {
	var alg string
	var lead time.Duration
	cmd := &cobra.Command{
		Use:   "rotate FILE",
		Short: "Add a new identity key, which signs once it has been published for a while",
		Long: `Add a new key to a file of identity keys. It is published at once and signs
after --lead, so that relying parties that cache the key set know it by then;
the old key stays published until the last token it signed has ended. Brokers
read the file again on SIGHUP.

To rotate the log's key, start a new log: checkpoints of the old one stay
valid under its old key.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := openIdentityFile(args[0], alg, lead)
			if err != nil {
				return err
			}
			kid, err := id.Rotate()
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), kid)
			return err
		},
	}
	algorithmFlag(cmd, &alg)
	cmd.Flags().DurationVar(&lead, "lead", 10*time.Minute, "how long the new key is published before it signs")
	return cmd
}

func algorithmFlag(cmd *cobra.Command, alg *string) {
	*alg = string(issuer.ES256)
	choices := []string{string(issuer.ES256), string(issuer.RS256), string(issuer.EdDSA)}
	cmd.Flags().Var(&choice{alg, choices}, "alg", "algorithm of an identity key")
	_ = cmd.RegisterFlagCompletionFunc("alg", cobra.FixedCompletions(choices, cobra.ShellCompDirectiveNoFileComp))
}

// openIdentityFile opens a file of identity keys to look after the keys; as
// whom they sign is the configuration of serve.
func openIdentityFile(path, alg string, lead time.Duration) (*issuer.Identity, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, err // OpenIdentity would make the file
	}
	return openOrMakeIdentity(path, alg, lead)
}

func openOrMakeIdentity(path, alg string, lead time.Duration) (*issuer.Identity, error) {
	return issuer.OpenIdentity(issuer.IdentityConfig{
		Issuer: "https://localhost", TrustDomain: "localhost",
		KeyFile: path, Algorithm: issuer.Algorithm(alg), Lead: lead,
	})
}

func generateIdentityKey(cmd *cobra.Command, path, alg string) error {
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("%s exists: choose another name, or use `countersign key rotate` to add a key to it", path)
	}
	id, err := openOrMakeIdentity(path, alg, 0)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(cmd.OutOrStdout(), string(id.JWKS()))
	return err
}

func showIdentityKeys(cmd *cobra.Command, path string) error {
	id, err := openIdentityFile(path, "", 0)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(cmd.OutOrStdout(), string(id.JWKS()))
	return err
}
