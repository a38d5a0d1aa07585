package http

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/countersign-dev/countersign/store"
)

const awsKey = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"

// signature is what AWS computes for a request it received (Signature Version 4,
// "Create a signed AWS API request").
func signature(r *http.Request, host, payload, key string, signed []string, date, region, service string) string {
	var query []string
	for k, values := range r.URL.Query() {
		for _, v := range values {
			query = append(query, awsEscape(k)+"="+awsEscape(v))
		}
	}
	slices.Sort(query)
	path := r.URL.EscapedPath()
	if service != "s3" { // every other service encodes the path once more
		var parts []string
		for s := range strings.SplitSeq(path, "/") {
			parts = append(parts, awsEscape(s))
		}
		path = strings.Join(parts, "/")
	}
	canonical := r.Method + "\n" + path + "\n" + strings.Join(query, "&") + "\n"
	for _, name := range signed {
		v := strings.Join(r.Header.Values(name), ",")
		switch name {
		case "host":
			v = host
		case "content-length":
			v = r.Header.Get("Content-Length")
		}
		canonical += name + ":" + strings.Join(strings.Fields(v), " ") + "\n"
	}
	canonical += "\n" + strings.Join(signed, ";") + "\n" + payload
	sum := sha256.Sum256([]byte(canonical))
	scope := date[:8] + "/" + region + "/" + service + "/aws4_request"
	text := "AWS4-HMAC-SHA256\n" + date + "\n" + scope + "\n" + hex.EncodeToString(sum[:])
	k := []byte("AWS4" + key)
	for _, s := range []string{date[:8], region, service, "aws4_request", text} {
		h := hmac.New(sha256.New, k)
		h.Write([]byte(s))
		k = h.Sum(nil)
	}
	return hex.EncodeToString(k)
}

func awsEscape(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "+", "%20") }

func TestTheSignatureThatTestsExpectIsAWSs(t *testing.T) {
	t.Parallel()
	// get-vanilla and get-vanilla-query-order-key-case of AWS's test suite.
	empty := "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	for to, want := range map[string]string{
		"https://example.amazonaws.com/":                             "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
		"https://example.amazonaws.com/?Param2=value2&Param1=value1": "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
	} {
		r, err := http.NewRequestWithContext(t.Context(), "GET", to, nil)
		ok(t, err)
		r.Header.Set("X-Amz-Date", "20150830T123600Z")
		if got := signature(r, r.Host, empty, awsKey, []string{"host", "x-amz-date"}, "20150830T123600Z", "us-east-1", "service"); got != want {
			t.Errorf("%s: %s, not %s", to, got, want)
		}
	}
}

func TestAnAWSTargetIsShownASignature(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 23, 21, 0, 0, 0, time.UTC)
	for _, service := range []string{"execute-api", "s3"} {
		p := newPath(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			auth := r.Header.Get("Authorization")
			if !strings.HasPrefix(auth, "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20261123/eu-central-1/"+service+"/aws4_request, SignedHeaders=") || r.Header.Get("X-Amz-Date") != "20261123T210000Z" {
				t.Errorf("%s at %s", auth, r.Header.Get("X-Amz-Date"))
				return
			}
			names, sig, _ := strings.Cut(auth[strings.Index(auth, "SignedHeaders=")+len("SignedHeaders="):], ", Signature=")
			body, _ := io.ReadAll(r.Body)
			sum := sha256.Sum256(body)
			digest := hex.EncodeToString(sum[:])
			if h := r.Header.Get("X-Amz-Content-Sha256"); service == "s3" && h != digest {
				t.Errorf("X-Amz-Content-Sha256 is %s", h)
			}
			if r.Header.Get("X-Amz-Security-Token") != "sts-token" || !strings.Contains(names, "x-amz-security-token") {
				t.Error("without the session token")
			}
			if want := signature(r, r.Host, digest, awsKey, strings.Split(names, ";"), "20261123T210000Z", "eu-central-1", service); sig != want {
				t.Errorf("%s %s: signed %s as %s, not %s", service, r.URL, names, sig, want)
			}
		}), &store.Access{Inject: &store.Inject{In: "sigv4", Region: "eu-central-1", Service: service}},
			option{secret: `{"access_key":"AKIDEXAMPLE","secret_key":"` + awsKey + `","security_token":"sts-token"}`, config: func(c *Config) { c.Now = func() time.Time { return now } }})
		for _, to := range []string{"/", "/a%20b/c?x=1&y=a%20b&x=0", "/%C3%A9/d=e"} {
			if a := p.get(to, "X-Amz-Date", "20200101T000000Z", "X-Amz-Security-Token", "mine", "X-Extra", "a  b"); a.status != 200 {
				t.Errorf("%s: %+v", to, a)
			}
			if a := p.do("PUT", to, strings.NewReader("some content")); a.status != 200 {
				t.Errorf("%s: %+v", to, a)
			}
		}
		if p.reached.Load() != 6 || strings.Contains(p.rec.All(), awsKey) {
			t.Error(p.reached.Load())
		}
	}
}

func TestABodyThatIsTooLargeToSignIsRefused(t *testing.T) {
	t.Parallel()
	p := newPath(t, says(200, "", ""), &store.Access{Inject: &store.Inject{In: "sigv4", Region: "eu-central-1", Service: "execute-api"}},
		option{secret: `{"access_key":"AKIDEXAMPLE","secret_key":"` + awsKey + `"}`})
	a := p.do("PUT", "/x", io.LimitReader(zeros{}, maxSigned+1))
	if a.status != 413 || p.reached.Load() != 0 {
		t.Fatalf("%+v", a)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }
