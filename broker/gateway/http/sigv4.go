package http

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/countersign-dev/countersign/broker/gateway/inject"
)

// maxSigned is how long a body may be whose digest is signed, in bytes: it is
// read in full before the target is reached.
const maxSigned = 8 << 20

var errLarge = errors.New("the body is larger than what can be signed")

// unsigned stands for the digest of a body that is not signed, which S3 alone
// takes, and over TLS alone.
const unsigned = "UNSIGNED-PAYLOAD"

// sign shows an AWS target the secret as a signature of req (Signature Version
// 4).
func (x *exchange) sign(req *http.Request) error {
	in := x.v.access.Inject
	fields := inject.Fields(x.v.sess.Secret)
	creds := aws.Credentials{AccessKeyID: fields["access_key"], SecretAccessKey: fields["secret_key"], SessionToken: fields["security_token"]}
	if creds.AccessKeyID == "" || creds.SecretAccessKey == "" {
		return fmt.Errorf("%w: access_key or secret_key", inject.ErrField)
	}
	digest := unsigned
	if in.Service != "s3" || req.URL.Scheme != "https" {
		var err error
		if digest, err = buffered(req); err != nil {
			return err
		}
	}
	if in.Service == "s3" {
		req.Header.Set("X-Amz-Content-Sha256", digest)
	}
	for k := range req.Header {
		// What a proxy on the way may change is not signed; Go's transport adds
		// these as they are.
		if strings.EqualFold(k, "Te") {
			req.Header.Del(k)
		}
	}
	signer := v4.NewSigner(func(o *v4.SignerOptions) { o.DisableURIPathEscaping = in.Service == "s3" })
	if err := signer.SignHTTP(context.WithoutCancel(req.Context()), creds, req, digest, in.Service, in.Region, x.g.cfg.Now()); err != nil {
		return errors.New("the request cannot be signed")
	}
	return nil
}

// buffered reads a body in full, and returns its digest.
func buffered(req *http.Request) (string, error) {
	var b []byte
	if req.Body != nil {
		var err error
		if b, err = io.ReadAll(io.LimitReader(req.Body, maxSigned+1)); err != nil {
			return "", err
		}
		if len(b) > maxSigned {
			return "", errLarge
		}
		req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(b)), int64(len(b))
		if len(b) == 0 {
			req.Body = http.NoBody
		}
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), nil
}
