# One image for serve and record; the command says which.
FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
# The SQL parser is C: linked in whole, so that the image needs nothing else.
RUN go build -trimpath -tags netgo,osusergo -ldflags '-s -w -linkmode external -extldflags -static' -o /countersign ./cmd/countersign

FROM gcr.io/distroless/static-debian12:nonroot
COPY --from=build /countersign /countersign
# The ledger, keys and heads: mount a volume here.
VOLUME /var/lib/countersign
WORKDIR /var/lib/countersign
ENTRYPOINT ["/countersign"]
CMD ["--help"]
