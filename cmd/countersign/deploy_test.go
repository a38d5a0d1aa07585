package main

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

// object is what the tests read of a Kubernetes object.
type object struct {
	Kind     string `yaml:"kind"`
	Metadata struct {
		Name      string            `yaml:"name"`
		Namespace string            `yaml:"namespace"`
		Labels    map[string]string `yaml:"labels"`
	} `yaml:"metadata"`
	Spec struct {
		PodSelector  *labelSelector   `yaml:"podSelector"`
		PolicyTypes  []string         `yaml:"policyTypes"`
		Ingress      []policyRule     `yaml:"ingress"`
		Egress       []policyRule     `yaml:"egress"`
		Template     podTemplate      `yaml:"template"`
		VolumeClaims []map[string]any `yaml:"volumeClaimTemplates"`
	} `yaml:"spec"`
}

type labelSelector struct {
	MatchLabels map[string]string `yaml:"matchLabels"`
}

func (s *labelSelector) matches(labels map[string]string) bool {
	if s == nil {
		return true
	}
	for k, v := range s.MatchLabels {
		if labels[k] != v {
			return false
		}
	}
	return true
}

type policyPeer struct {
	Namespace *labelSelector `yaml:"namespaceSelector"`
	Pod       *labelSelector `yaml:"podSelector"`
}

type policyRule struct {
	From []policyPeer `yaml:"from"`
	To   []policyPeer `yaml:"to"`
}

type podTemplate struct {
	Metadata struct {
		Labels map[string]string `yaml:"labels"`
	} `yaml:"metadata"`
	Spec struct {
		AutomountToken *bool `yaml:"automountServiceAccountToken"`
		Grace          int   `yaml:"terminationGracePeriodSeconds"`
		HostNetwork    bool  `yaml:"hostNetwork"`
		Security       struct {
			NonRoot bool `yaml:"runAsNonRoot"`
			Seccomp struct {
				Type string `yaml:"type"`
			} `yaml:"seccompProfile"`
		} `yaml:"securityContext"`
		Containers []struct {
			Args     []string `yaml:"args"`
			Security struct {
				Escalation   *bool `yaml:"allowPrivilegeEscalation"`
				ReadOnly     bool  `yaml:"readOnlyRootFilesystem"`
				Capabilities struct {
					Drop []string `yaml:"drop"`
				} `yaml:"capabilities"`
			} `yaml:"securityContext"`
			Liveness  *probe         `yaml:"livenessProbe"`
			Readiness *probe         `yaml:"readinessProbe"`
			Lifecycle map[string]any `yaml:"lifecycle"`
			Resources struct {
				Limits map[string]string `yaml:"limits"`
			} `yaml:"resources"`
		} `yaml:"containers"`
	} `yaml:"spec"`
}

type probe struct {
	HTTP struct {
		Path   string `yaml:"path"`
		Scheme string `yaml:"scheme"`
	} `yaml:"httpGet"`
}

const kubernetes = "../../docs/deploy/kubernetes/"

// kustomized reads the objects that a kustomization in dir refers to.
func kustomized(t *testing.T, dir string) (objects []object) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "kustomization.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var k struct {
		Resources  []string `yaml:"resources"`
		Generators []struct {
			Files []string `yaml:"files"`
		} `yaml:"configMapGenerator"`
	}
	if err := yaml.Unmarshal(b, &k); err != nil {
		t.Fatal(err)
	}
	for _, g := range k.Generators {
		for _, f := range g.Files {
			if _, err := os.Stat(filepath.Join(dir, f)); err != nil {
				t.Error(err)
			}
		}
	}
	for _, r := range k.Resources {
		path := filepath.Join(dir, r)
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.IsDir() {
			objects = append(objects, kustomized(t, path)...)
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		d := yaml.NewDecoder(bytes.NewReader(b))
		for {
			var o object
			if err := d.Decode(&o); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", path, err)
			}
			objects = append(objects, o)
		}
	}
	return objects
}

// TestTheNetworkPoliciesDrawTheTrustDomains judges by the policies as a cluster
// does: a connection needs the leave of both ends, and a pod that no policy is
// about has all leave.
func TestTheNetworkPoliciesDrawTheTrustDomains(t *testing.T) {
	objects := kustomized(t, kustomizeExample)
	type pod struct {
		namespace           string
		spaceLabels, labels map[string]string
	}
	named := func(ns, name string) pod {
		return pod{ns, map[string]string{"kubernetes.io/metadata.name": ns}, map[string]string{"app.kubernetes.io/name": name}}
	}
	role := func(r string) pod {
		l := map[string]string{"countersign.dev/role": r}
		return pod{r, l, l}
	}
	caller := map[string]string{"countersign.dev/caller": "true"}
	pods := map[string]pod{
		"broker": named("countersign-machines", "broker"), "recorder": named("countersign-people", "recorder"), "witness": named("countersign-witness", "witness"),
		"orchestrator": {"agents", caller, caller}, "stranger": {"agents", caller, nil}, "impostor": {"elsewhere", nil, caller},
		"vault": role("vault"), "redis": role("redis"), "target": role("target"), "database": role("ledger-database"), "ingress": role("people-ingress"), "provider": role("openid-provider"),
		"machine": named("countersign-machines", "another"), "person": named("countersign-people", "another"),
	}
	leave := func(of, peer pod, direction string) bool {
		about := false
		for _, o := range objects {
			if o.Kind != "NetworkPolicy" || o.Metadata.Namespace != of.namespace || !o.Spec.PodSelector.matches(of.labels) || !slices.Contains(o.Spec.PolicyTypes, direction) {
				continue
			}
			about = true
			rules := o.Spec.Ingress
			if direction == "Egress" {
				rules = o.Spec.Egress
			}
			for _, r := range rules {
				for _, p := range append(slices.Clone(r.From), r.To...) {
					if p.Namespace == nil {
						t.Errorf("%s: a peer without a namespace", o.Metadata.Name)
					} else if p.Namespace.matches(peer.spaceLabels) && p.Pod.matches(peer.labels) {
						return true
					}
				}
			}
		}
		return !about
	}
	may := []string{
		"orchestrator broker", "broker recorder", "broker vault", "broker redis", "broker target",
		"recorder database", "recorder witness", "recorder provider", "ingress recorder",
	}
	ours := []string{"broker", "recorder", "witness", "machine", "person"}
	for from, a := range pods {
		for to, b := range pods {
			if from == to || !slices.Contains(ours, from) && !slices.Contains(ours, to) {
				continue
			}
			if got, want := leave(a, b, "Egress") && leave(b, a, "Ingress"), slices.Contains(may, from+" "+to); got != want {
				t.Errorf("%s reaches %s: %t, want %t", from, to, got, want)
			}
		}
	}
}

const kustomizeExample = kubernetes + "overlays/example"

func TestTheKubernetesSetIsConfinedAndWatched(t *testing.T) {
	objects := kustomized(t, kustomizeExample)
	budgets, workloads := map[string]bool{}, 0
	for _, o := range objects {
		switch o.Kind {
		case "Namespace":
			if o.Metadata.Labels["pod-security.kubernetes.io/enforce"] != "restricted" {
				t.Errorf("namespace %s does not enforce the restricted profile", o.Metadata.Name)
			}
		case "PodDisruptionBudget":
			budgets[o.Metadata.Name] = true
		}
	}
	for _, o := range objects {
		if o.Kind != "StatefulSet" {
			continue
		}
		workloads++
		s := o.Spec.Template.Spec
		if s.AutomountToken == nil || *s.AutomountToken || s.HostNetwork || !s.Security.NonRoot || s.Security.Seccomp.Type != "RuntimeDefault" || s.Grace < 30 || !budgets[o.Metadata.Name] || len(o.Spec.VolumeClaims) == 0 {
			t.Errorf("%s: %+v", o.Metadata.Name, s)
		}
		for _, c := range s.Containers {
			if c.Security.Escalation == nil || *c.Security.Escalation || !c.Security.ReadOnly || !slices.Contains(c.Security.Capabilities.Drop, "ALL") || c.Resources.Limits["memory"] == "" {
				t.Errorf("%s is not confined", o.Metadata.Name)
			}
			if c.Liveness == nil || c.Liveness.HTTP.Path != "/healthz" || c.Readiness == nil || c.Readiness.HTTP.Path != "/readyz" || c.Readiness.HTTP.Scheme != "HTTPS" || c.Lifecycle["preStop"] == nil {
				t.Errorf("%s is not watched", o.Metadata.Name)
			}
		}
	}
	if workloads != 3 {
		t.Errorf("%d workloads", workloads)
	}
}

func TestTheConfigurationsOfTheKubernetesExampleAreTaken(t *testing.T) {
	for name, c := range map[string]interface{ check() error }{
		"broker-0.yaml": &serveConfig{}, "broker-1.yaml": &serveConfig{}, "broker-2.yaml": &serveConfig{}, "record.yaml": &recordConfig{}, "witness.yaml": &witnessConfig{},
	} {
		if err := loadConfig(filepath.Join(kustomizeExample, name), c); err != nil {
			t.Error(err)
		} else if err := c.check(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	catalogue, err := countersign(t, "scopes", "lint", filepath.Join(kustomizeExample, "catalogue.yaml")).CombinedOutput()
	if err != nil {
		t.Errorf("%v: %s", err, catalogue)
	}
}

func TestKustomizeBuildsTheKubernetesExample(t *testing.T) {
	build := exec.Command("kubectl", "kustomize", kustomizeExample)
	if _, err := exec.LookPath("kubectl"); err != nil {
		if _, err := exec.LookPath("kustomize"); err != nil {
			t.Skip("neither kubectl nor kustomize is on PATH: the overlay is not built, only its parts are read")
		}
		build = exec.Command("kustomize", "build", kustomizeExample)
	}
	out, err := build.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, want := range []string{"replicas: 3", "image: registry.example.com/countersign@sha256:", "name: broker-config-"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the overlay is built without %q", want)
		}
	}
}

// units are those of systemd, with what each must hold to.
var units = map[string]string{
	"serve": "identity.key", "record": "log.key", "witness": "witness.key",
}

func TestTheSystemdUnitsAreConfined(t *testing.T) {
	analyze, missing := exec.LookPath("systemd-analyze")
	for name, secret := range units {
		file := "../../docs/deploy/systemd/countersign-" + name + ".service"
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range []string{
			"User=countersign-" + name, "NoNewPrivileges=yes", "CapabilityBoundingSet=", "ProtectSystem=strict", "ProtectHome=yes", "PrivateTmp=yes", "PrivateDevices=yes",
			"MemoryDenyWriteExecute=yes", "RestrictNamespaces=yes", "SystemCallArchitectures=native", "SystemCallFilter=@system-service", "LimitCORE=0", "UMask=0077",
			"LoadCredential=" + secret + ":/etc/credstore/countersign/" + secret,
			"ExecStart=/usr/local/bin/countersign " + name + " --config /etc/countersign-" + name + "/" + name + ".yaml",
		} {
			if !slices.Contains(strings.Split(string(b), "\n"), line) {
				t.Errorf("%s lacks %s", file, line)
			}
		}
		// A witness reads nothing again, and SIGHUP ends what does not take it.
		if strings.Contains(string(b), "ExecReload=") != (name != "witness") {
			t.Errorf("%s: of what takes SIGHUP, and nothing else, there is an ExecReload", file)
		}
		if missing != nil {
			t.Log("systemd-analyze is not on PATH: the units are read alone")
			continue
		}
		// Verified where the program and its user exist.
		text := strings.NewReplacer("/usr/local/bin/countersign ", "/bin/true ", "User=countersign-"+name, "User=root", "Group=countersign-"+name, "Group=root").Replace(string(b))
		copied := filepath.Join(t.TempDir(), "countersign-"+name+".service")
		if err := os.WriteFile(copied, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(analyze, "verify", "--man=no", copied).CombinedOutput(); strings.Contains(string(out), "countersign") || err != nil && len(out) == 0 {
			t.Errorf("systemd-analyze verify: %v: %s", err, out)
		}
		out, err := exec.Command(analyze, "security", "--offline=true", "--threshold=20", file).CombinedOutput() // tenths; without an answer it fails
		if m := regexp.MustCompile(`Overall exposure level .*: ([0-9.]+)`).FindSubmatch(out); err != nil || m == nil {
			t.Errorf("systemd-analyze security: %v: %s", err, out[max(0, len(out)-300):])
		}
	}
	for _, u := range slices.Collect(maps.Keys(units)) {
		b, err := os.ReadFile("../../docs/deploy/systemd/countersign.sysusers")
		if err != nil || !strings.Contains(string(b), "u countersign-"+u+" ") {
			t.Errorf("no user countersign-%s: %v", u, err)
		}
	}
}
