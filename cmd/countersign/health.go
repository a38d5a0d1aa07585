package main

import (
	"fmt"
	"net/http"
	"time"

	"github.com/spf13/cobra"
)

// healthWithin is how long a health check waits for its answer.
const healthWithin = 3 * time.Second

func healthCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "health URL",
		Short: "Ask a process whether it is ready, and exit 0 if it is",
		Long: `Ask URL, such as https://localhost:8787/readyz, and exit 0 if it answers 200: the
health check of a container that has no shell. SSL_CERT_FILE names the
authorities where the machine's are not the ones.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := http.NewRequestWithContext(cmd.Context(), http.MethodGet, args[0], nil)
			if err != nil {
				return err
			}
			c := http.Client{Timeout: healthWithin, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
			res, err := c.Do(r)
			if err != nil {
				return err
			}
			defer res.Body.Close()
			if res.StatusCode != http.StatusOK {
				return fmt.Errorf("%s answers %s", args[0], res.Status)
			}
			return nil
		},
	}
}
