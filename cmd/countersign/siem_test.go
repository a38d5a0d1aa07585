package main

import (
	"os"
	"strings"
	"testing"

	"github.com/countersign-dev/countersign/store/siem"
)

func TestTheDocumentedSIEMSectionIsTaken(t *testing.T) {
	b, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(b), "## SIEM\n")
	_, section, _ = strings.Cut(section, "```yaml\n")
	section, _, ok := strings.Cut(section, "```\n")
	if !ok {
		t.Fatal("docs/operations.md has no SIEM section with its YAML")
	}
	var c struct {
		SIEM siem.Config `yaml:"siem"`
	}
	if err := parseConfig("docs/operations.md", []byte(section), &c); err != nil {
		t.Fatal(err)
	}
	if err := c.SIEM.Check(); err != nil || len(c.SIEM) != 2 || c.SIEM[0].HTTP.Token == "" || len(c.SIEM[0].Types) != 2 || c.SIEM[1].Syslog.TLS.CA == "" || *c.SIEM[1].Syslog.Facility != 13 {
		t.Errorf("%+v, %v", c.SIEM, err)
	}
}
