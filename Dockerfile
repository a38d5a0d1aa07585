# One image for serve, record and witness; the command says which. In the build
# container `go version -m` and `countersign version` know the commit from .git.
FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
# The SQL parser is C: linked in whole, so that the image needs nothing else.
RUN make static BIN=/countersign && mkdir -p /out/var/lib/countersign /out/var/lib/countersign-head /out/var/lib/countersign-keys

# What makes a deployment's keys and sets up Vault, once; see docs/deploy.
FROM hashicorp/vault:1.21.0 AS vault
FROM debian:bookworm-slim AS init
RUN apt-get update && apt-get install -y --no-install-recommends openssl ca-certificates && rm -rf /var/lib/apt/lists/*
COPY --from=vault /bin/vault /usr/local/bin/vault
COPY --from=build /countersign /usr/local/bin/countersign
COPY docs/deploy/compose/init.sh /usr/local/bin/init.sh
ENTRYPOINT ["sh", "/usr/local/bin/init.sh"]

FROM gcr.io/distroless/static-debian12:nonroot AS countersign
COPY --from=build /countersign /countersign
# The ledger, keys and heads: mount volumes here. They begin with this owner.
COPY --from=build --chown=65532:65532 /out/ /
VOLUME ["/var/lib/countersign", "/var/lib/countersign-head", "/var/lib/countersign-keys"]
WORKDIR /var/lib/countersign
USER 65532:65532
ENTRYPOINT ["/countersign"]
CMD ["--help"]
