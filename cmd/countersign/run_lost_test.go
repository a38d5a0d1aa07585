package main

import (
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestRunEndsACredentialWhoseAnswerWasLost(t *testing.T) {
	r := startDev(t, t.TempDir(), "--vault", "none")
	u, err := url.Parse(r.API)
	if err != nil {
		t.Fatal(err)
	}
	broker := httputil.NewSingleHostReverseProxy(u)
	between := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Method != http.MethodPost {
			broker.ServeHTTP(w, req)
			return
		}
		broker.ServeHTTP(httptest.NewRecorder(), req)
		panic(http.ErrAbortHandler)
	}))
	defer between.Close()
	marker := filepath.Join(t.TempDir(), "ran")
	cmd := exec.Command("countersign", "run", "--scope", "identity:step", "--run", "r1", "--step", "lost", "--", "touch", marker)
	cmd.Env = append(os.Environ(), "COUNTERSIGN_ADDR="+between.URL, "COUNTERSIGN_TOKEN="+r.Orchestrators[0].Token)
	if out, err := cmd.CombinedOutput(); err == nil {
		t.Errorf("run succeeded: %s", out)
	}
	if _, err := os.Stat(marker); err == nil {
		t.Error("the command ran")
	}
	status, body := r.call(r.Reviewers[0].Token, "GET", r.Recorder+"/history?step=lost", "")
	if status != 200 || strings.Count(body, `"type":"credential.issued"`) != 1 || strings.Count(body, `"type":"credential.revoked"`) != 1 {
		t.Errorf("%d %s", status, body)
	}
}
