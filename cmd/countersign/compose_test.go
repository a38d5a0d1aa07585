package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/countersign-dev/countersign/api/auth/oidcdev"
	"github.com/countersign-dev/countersign/issuer/vaultdev"
	"github.com/countersign-dev/countersign/store/ledger/postgrestest"
)

// composeFile is what the tests read of docker-compose.yml.
type composeFile struct {
	Services map[string]composeService `yaml:"services"`
	Networks map[string]any            `yaml:"networks"`
	Volumes  map[string]any            `yaml:"volumes"`
	Secrets  map[string]struct {
		File string `yaml:"file"`
	} `yaml:"secrets"`
}

type composeService struct {
	Image       string            `yaml:"image"`
	Entrypoint  []string          `yaml:"entrypoint"`
	Command     []string          `yaml:"command"`
	Environment map[string]string `yaml:"environment"`
	Volumes     []string          `yaml:"volumes"`
	Tmpfs       []string          `yaml:"tmpfs"`
	Secrets     []string          `yaml:"secrets"`
	Networks    any               `yaml:"networks"`
	Ports       []string          `yaml:"ports"`
	Profiles    []string          `yaml:"profiles"`
	User        string            `yaml:"user"`
	ReadOnly    bool              `yaml:"read_only"`
	CapDrop     []string          `yaml:"cap_drop"`
	SecurityOpt []string          `yaml:"security_opt"`
	Memory      string            `yaml:"mem_limit"`
	Pids        int               `yaml:"pids_limit"`
	DependsOn   map[string]any    `yaml:"depends_on"`
	Health      *struct {
		Test []string `yaml:"test"`
	} `yaml:"healthcheck"`
}

func (s *composeService) networks() []string {
	switch n := s.Networks.(type) {
	case []any:
		var list []string
		for _, x := range n {
			list = append(list, fmt.Sprint(x))
		}
		return list
	case map[string]any:
		return slices.Collect(maps.Keys(n))
	}
	return nil
}

func readCompose(t *testing.T) *composeFile {
	t.Helper()
	b, err := os.ReadFile("../../docker-compose.yml")
	if err != nil {
		t.Fatal(err)
	}
	var c composeFile
	// A key beside a merge ("<<") stands in the place of the merged one.
	if err := yaml.UnmarshalWithOptions(b, &c, yaml.AllowDuplicateMapKey()); err != nil {
		t.Fatal(err)
	}
	return &c
}

func TestTheComposeFileDrawsTheTrustDomains(t *testing.T) {
	c := readCompose(t)
	reach := func(a, b string) bool {
		x, y := c.Services[a], c.Services[b]
		return slices.ContainsFunc(x.networks(), func(n string) bool { return slices.Contains(y.networks(), n) })
	}
	// Who may reach whom: all other pairs share no network.
	may := map[string]bool{}
	for _, pair := range []string{
		"orchestrator broker-1", "orchestrator broker-2", "broker-1 broker-2",
		"broker-1 recorder", "broker-2 recorder", "broker-1 vault", "broker-2 vault", "broker-1 redis", "broker-2 redis", "redis vault",
		"recorder postgres", "ledger postgres", "ledger recorder", "recorder witness", "oidc recorder", "recorder reviewer", "oidc reviewer",
		"init vault", "init redis", "init broker-1", "init broker-2",
	} {
		a, b, _ := strings.Cut(pair, " ")
		may[a+" "+b], may[b+" "+a] = true, true
	}
	for a := range c.Services {
		for b := range c.Services {
			if a != b && reach(a, b) != may[a+" "+b] {
				t.Errorf("%s and %s share a network: %t", a, b, reach(a, b))
			}
		}
	}
	for name, s := range c.Services {
		for _, n := range s.networks() {
			if _, ok := c.Networks[n]; !ok {
				t.Errorf("%s is on the network %s, which is none", name, n)
			}
		}
		for _, p := range s.Ports {
			if !strings.HasPrefix(p, "127.0.0.1:") {
				t.Errorf("%s publishes %s to other machines", name, p)
			}
		}
		for d := range s.DependsOn {
			if _, ok := c.Services[d]; !ok {
				t.Errorf("%s depends on %s, which is none", name, d)
			}
		}
		for _, x := range s.Secrets {
			if c.Secrets[x].File != "./deploy/secrets/"+x {
				t.Errorf("%s is given the secret %s, which is %q", name, x, c.Secrets[x].File)
			}
		}
		for k, v := range s.Environment {
			if regexp.MustCompile(`(?i)(password|token|secret)$`).MatchString(k) {
				t.Errorf("%s has %s=%s in its environment: secrets come by file", name, k, v)
			}
		}
		if name == "init" {
			continue // it makes the secrets
		}
		if !slices.Contains(s.CapDrop, "ALL") || !slices.Contains(s.SecurityOpt, "no-new-privileges:true") || s.Memory == "" || s.Pids == 0 {
			t.Errorf("%s is not confined", name)
		}
		if name != "oidc" && (!s.ReadOnly || s.User == "" || strings.HasPrefix(s.User, "0")) {
			t.Errorf("%s writes to its file system, or runs as root", name)
		}
	}
	for x := range c.Secrets {
		if !slices.ContainsFunc(slices.Collect(maps.Values(c.Services)), func(s composeService) bool { return slices.Contains(s.Secrets, x) }) {
			t.Errorf("nobody is given the secret %s", x)
		}
	}
	// The keys of the log are the recorder's alone, Vault's logins the brokers'.
	for secret, owners := range map[string][]string{
		"log-key": {"recorder"}, "ledger-dsn": {"recorder"}, "ledger-owner-dsn": {"ledger"}, "broker-1-vault": {"broker-1"}, "broker-2-vault": {"broker-2"},
		"identity-key": {"broker-1", "broker-2"}, "oidc-secret": {"recorder"},
	} {
		for name, s := range c.Services {
			if slices.Contains(s.Secrets, secret) != slices.Contains(owners, name) {
				t.Errorf("%s is given %s: %t", name, secret, !slices.Contains(owners, name))
			}
		}
	}
}

// stack is what docker-compose.yml describes, run without Docker: the same
// programs, commands and files, in which paths below a container's mounts and
// addresses are those of this machine.
type stack struct {
	t       *testing.T
	compose *composeFile
	dir     string
	deploy  string
	addr    map[string]string // of a service, on this machine
}

func (h *stack) root(service string) string { return filepath.Join(h.dir, "root", service) }

// port is where each service listens in its container.
var composePorts = map[string]string{"broker-1": "8787", "broker-2": "8787", "recorder": "8788", "witness": "8790", "redis": "6379", "postgres": "5432", "vault": "8200", "oidc": "8443"}

// mounts are a service's paths that are not of its image, with what is there:
// a file or directory, or nothing.
func (h *stack) mounts(service string) map[string]string {
	s, m := h.compose.Services[service], map[string]string{}
	for _, v := range s.Volumes {
		from, to, _ := strings.Cut(v, ":")
		to = strings.TrimSuffix(to, ":ro")
		if rest, ok := strings.CutPrefix(from, "./deploy"); ok {
			m[to] = h.deploy + rest
		} else if strings.HasPrefix(from, ".") {
			m[to] = filepath.Join("../..", from)
		} else {
			m[to] = "" // a volume
		}
	}
	for _, v := range s.Tmpfs {
		to, _, _ := strings.Cut(v, ":")
		m[to] = ""
	}
	for _, x := range s.Secrets {
		m["/run/secrets/"+x] = filepath.Join(h.deploy, strings.TrimPrefix(h.compose.Secrets[x].File, "./deploy/"))
	}
	return m
}

// here puts this machine's paths and addresses into what a service reads.
func (h *stack) here(service, text string) string {
	var pairs []string
	targets := slices.Sorted(maps.Keys(h.mounts(service)))
	slices.Reverse(targets) // the longer of two with the same beginning comes first
	for _, to := range targets {
		if to != "/tmp" {
			pairs = append(pairs, to, h.root(service)+to)
		}
	}
	for name, port := range composePorts {
		host := name
		if strings.HasPrefix(name, "broker") {
			host = "broker"
		}
		pairs = append(pairs, name+":"+port, h.addr[name], host+".localhost:"+port, h.addr[name])
	}
	if port := composePorts[service]; port != "" {
		_, mine, _ := strings.Cut(h.addr[service], ":")
		pairs = append(pairs, "0.0.0.0:"+port, h.addr[service], "localhost:"+port, h.addr[service], "tls-port "+port, "tls-port "+mine,
			"0.0.0.0:8201", h.addr["vault-cluster"], "vault:8201", h.addr["vault-cluster"])
	}
	return strings.NewReplacer(pairs...).Replace(text)
}

// furnish lays out a service's files.
func (h *stack) furnish(service string) {
	h.t.Helper()
	put := func(from, to string) {
		b, err := os.ReadFile(from)
		if err != nil {
			h.t.Fatal(err)
		}
		info, err := os.Stat(from)
		if err != nil {
			h.t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			h.t.Fatal(err)
		}
		if err := os.WriteFile(to, []byte(h.here(service, string(b))), info.Mode().Perm()); err != nil {
			h.t.Fatal(err)
		}
	}
	for to, from := range h.mounts(service) {
		to = h.root(service) + to
		if from == "" {
			if err := os.MkdirAll(to, 0o700); err != nil {
				h.t.Fatal(err)
			}
			continue
		}
		if err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				rest, _ := filepath.Rel(from, path)
				put(path, filepath.Join(to, rest))
			}
			return err
		}); err != nil {
			h.t.Fatalf("%s needs %s: %v", service, from, err)
		}
	}
}

// command is what a service's container runs.
func (h *stack) command(service string, args ...string) *exec.Cmd {
	s := h.compose.Services[service]
	line := append(slices.Clone(s.Entrypoint), args...)
	if len(args) == 0 {
		line = append(line, s.Command...)
	}
	for i := range line {
		line[i] = h.here(service, line[i])
	}
	if strings.HasPrefix(s.Image, "countersign:") && len(s.Entrypoint) == 0 {
		line = append([]string{"countersign"}, line...)
	}
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Env = h.environ(service)
	cmd.Dir = h.dir
	return cmd
}

func (h *stack) environ(service string) []string {
	env := []string{"PATH=" + os.Getenv("PATH"), "HOME=" + h.dir}
	for k, v := range h.compose.Services[service].Environment {
		env = append(env, k+"="+h.here(service, v))
	}
	return env
}

// start runs a service until the test ends, once it is healthy as its
// container's check has it.
func (h *stack) start(service string) {
	h.t.Helper()
	h.furnish(service)
	cmd := h.command(service)
	log, err := os.Create(filepath.Join(h.dir, service+".log"))
	if err != nil {
		h.t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = log, log
	done, err := vaultdev.Run(cmd)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
		log.Close()
		if h.t.Failed() {
			b, _ := os.ReadFile(log.Name())
			h.t.Logf("%s said:\n%s", service, b[max(0, len(b)-4000):])
		}
	})
	check := h.compose.Services[service].Health.Test
	args := slices.Clone(check[1:])
	if check[0] == "CMD-SHELL" {
		port := strings.TrimPrefix(h.addr[service], "127.0.0.1:")
		args = []string{"sh", "-c", strings.NewReplacer("$$", "$", "-h localhost", "-h 127.0.0.1 -p "+port).Replace(args[0])}
	}
	for i := range args {
		args[i] = h.here(service, args[i])
	}
	if args[0] == "/countersign" {
		args[0] = "countersign"
	}
	eventually(h.t, service+" is healthy", func() bool {
		select {
		case <-done:
			b, _ := os.ReadFile(log.Name())
			h.t.Fatalf("%s ended: %s", service, b)
		default:
		}
		c := exec.Command(args[0], args[1:]...)
		c.Env = h.environ(service)
		return c.Run() == nil
	})
}

// init runs init.sh, as the container of that name does.
func (h *stack) init(what string) {
	h.t.Helper()
	cmd := exec.Command("sh", "docs/deploy/compose/init.sh", what)
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "OUT="+h.deploy, "IN=docs/deploy/compose", "VAULT_ADDR=https://"+h.addr["vault"], "VAULT_CACERT="+filepath.Join(h.deploy, "ca.pem"), "HOME="+h.dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		h.t.Fatalf("init.sh %s: %v: %s", what, err, out)
	}
}

func newStack(t *testing.T) *stack {
	vault, err := vaultdev.Find()
	if err != nil {
		t.Skip(err)
	}
	h := &stack{t: t, compose: readCompose(t), dir: t.TempDir(), addr: map[string]string{}}
	h.deploy = filepath.Join(h.dir, "deploy")
	for _, need := range []string{"openssl", "redis-server", "psql"} {
		if _, err := exec.LookPath(need); err != nil {
			t.Skip(err)
		}
	}
	bin := filepath.Join(h.dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(vault, filepath.Join(bin, "vault")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	for name := range composePorts {
		h.addr[name] = freeAddr(t)
	}
	h.addr["vault-cluster"] = freeAddr(t)
	h.init("files")
	return h
}

// postgres starts a server by the settings of its service's command, and runs on
// it what the image's entrypoint runs once.
func (h *stack) postgres() {
	t := h.t
	t.Helper()
	s, err := postgrestest.Start()
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { s.Stop(); _ = s.Remove() })
	u := regexp.MustCompile(`127\.0\.0\.1:(\d+)`).FindStringSubmatch(s.DSN)
	h.addr["postgres"] = u[0]
	h.furnish("postgres")
	script := exec.Command("sh", h.root("postgres")+"/docker-entrypoint-initdb.d/ledger.sh")
	script.Env = append(os.Environ(), "POSTGRES_USER=postgres", "PGHOST=127.0.0.1", "PGPORT="+u[1])
	if out, err := script.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// The server's user is not the container's: what it reads is put where it may.
	for _, x := range h.compose.Services["postgres"].Command[1:] {
		key, value, ok := strings.Cut(x, "=")
		if !ok {
			continue // -c
		}
		if from := h.here("postgres", value); from != value {
			b, err := os.ReadFile(from)
			if err != nil {
				t.Fatal(err)
			}
			to := filepath.Join(s.Data(), map[string]string{"hba_file": "pg_hba.conf"}[key])
			if key != "hba_file" {
				to = filepath.Join(s.Data(), key)
			}
			install := s.Command("sh")
			install.Path, install.Args = "/bin/sh", []string{"sh", "-c", `umask 077; cat > "$0"`, to}
			install.Stdin = strings.NewReader(string(b))
			if out, err := install.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			value = to
		}
		if key == "hba_file" {
			continue // a server reads it where it lies already, once it reloads
		}
		if out, err := exec.Command("psql", "-X", s.DSN, "-c", fmt.Sprintf("ALTER SYSTEM SET %s = '%s'", key, value)).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	if out, err := exec.Command("psql", "-X", s.DSN, "-c", "SELECT pg_reload_conf()").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// provider is an OpenID provider by the realm of its service. It is not the
// service's image, but this project's own for development, over TLS.
func (h *stack) provider() {
	t := h.t
	t.Helper()
	h.furnish("oidc")
	b, err := os.ReadFile(h.root("oidc") + "/opt/keycloak/data/import/realm.json")
	if err != nil {
		t.Fatal(err)
	}
	var realm struct {
		Realm string
		Users []struct {
			Username, Email string
			Groups          []string
		}
		Clients []struct {
			ClientID, Secret string
			RedirectURIs     []string
		}
	}
	if err := json.Unmarshal(b, &realm); err != nil || len(realm.Clients) != 1 {
		t.Fatalf("the realm: %v", err)
	}
	o := oidcdev.Options{Issuer: "https://" + h.addr["oidc"] + "/realms/" + realm.Realm, ClientID: realm.Clients[0].ClientID,
		ClientSecret: realm.Clients[0].Secret, RedirectURIs: realm.Clients[0].RedirectURIs}
	for _, u := range realm.Users {
		o.Users = append(o.Users, oidcdev.User{Name: u.Username, Email: u.Email, Groups: u.Groups})
	}
	p, err := oidcdev.New(o)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(h.root("oidc")+"/etc/oidc/tls.pem", h.root("oidc")+"/run/secrets/oidc-tls-key")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Addr: h.addr["oidc"], Handler: p.Handler(), TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}}}
	go func() { _ = s.ListenAndServeTLS("", "") }()
	t.Cleanup(func() { _ = s.Close() })
}

var composeUse = regexp.MustCompile("(?ms)^```shell\n(.*?)^```$")

func TestTheREADMEsFirstRealUseRunsAgainstWhatTheComposeFileDescribes(t *testing.T) {
	h := newStack(t)
	h.start("redis")
	h.postgres()
	h.start("vault")
	h.init("vault")
	h.init("vault") // done again, it changes nothing
	h.provider()
	h.furnish("ledger")
	if out, err := h.command("ledger").CombinedOutput(); err != nil {
		t.Fatalf("ledger: %v: %s", err, out)
	}
	for _, service := range []string{"witness", "recorder", "broker-1", "broker-2"} {
		h.start(service)
	}

	// The commands of the README, with a docker that starts nothing but what a
	// container of that service would run.
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var script strings.Builder
	for _, block := range composeUse.FindAllStringSubmatch(string(text), -1) {
		script.WriteString(block[1])
	}
	shim := "#!/bin/sh\n[ \"$2 $3\" = 'run --rm' ] && [ \"$4\" != init ] || exit 0\nservice=$4; shift 4\ncase $service in\n"
	for _, service := range []string{"orchestrator", "reviewer"} {
		h.furnish(service)
		shim += service + ") exec env -i '" + strings.Join(h.environ(service), "' '") + "' countersign " + `"$@"` + " ;;\n"
	}
	// The names of services that stand in arguments are this machine's addresses.
	shim = strings.Replace(shim, "shift 4\n", "shift 4\nn=$#; while [ $n -gt 0 ]; do set -- \"$@\" \"$(printf %s \"$1\" | sed 's|//recorder:8788|//"+h.addr["recorder"]+"|; s|//broker-2:8787|//"+h.addr["broker-2"]+"|')\"; shift; n=$((n-1)); done\n", 1) + "*) exit 3 ;;\nesac\n"
	if err := os.WriteFile(filepath.Join(h.dir, "bin", "docker"), []byte(shim), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "sh", "-eu", "-c", script.String())
	cmd.Dir, cmd.WaitDelay = h.dir, 5*time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{`"kind":"vault_token"`, "credential.issued", "credential.revoked", "verified: "} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the README's commands did not print %q:\n%s", want, out)
		}
	}

	// What one broker issued the other ends, and both are on one record.
	run := func(service string, more []string, args ...string) string {
		t.Helper()
		c := exec.Command("countersign", args...)
		c.Env = append(h.environ(service), more...)
		out, err := c.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
		return string(out)
	}
	second := []string{"COUNTERSIGN_ADDR=https://" + h.addr["broker-2"]}
	run("orchestrator", second, "request", "--scope", "identity:step", "--run", "run-2", "--step", "a")
	run("orchestrator", nil, "request", "--scope", "vault:demo-read", "--run", "run-2", "--step", "b")
	eventually(t, "the other broker knows the credential", func() bool {
		run("orchestrator", second, "revoke", "--run", "run-2", "--step", "b")
		return strings.Contains(run("reviewer", nil, "history", "--run", "run-2", "--step", "b"), "credential.revoked")
	})
	story := run("reviewer", nil, "history", "--run", "run-2", "-o", "json")
	for _, writer := range []string{`"writer":"broker-1"`, `"writer":"broker-2"`} {
		if !strings.Contains(story, writer) {
			t.Errorf("no entry of %s", writer)
		}
	}

	// A person is sent to the provider that the configuration names.
	pool := x509.NewCertPool()
	ca, err := os.ReadFile(filepath.Join(h.deploy, "ca.pem"))
	if err != nil || !pool.AppendCertsFromPEM(ca) {
		t.Fatal(err)
	}
	browser := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}
	req, err := http.NewRequest(http.MethodGet, "https://"+h.addr["recorder"]+"/approvals", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "text/html")
	res, err := browser.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusOK || res.Request.URL.Host != h.addr["oidc"] {
		t.Errorf("a person who opens the approvals is at %s, %s", res.Request.URL.Redacted(), res.Status)
	}
}
