# countersign: make demo | test | test-slow | drill | vault | bench | lint | build
#
# Every target works from a clean clone with Go, git and a shell. What it needs
# beyond that is installed with apt where this runs as root on Debian or
# Ubuntu; elsewhere the target says what to install.

GO ?= go

# Linters run at pinned versions with `go run pkg@version`: as dependencies of
# go.mod they would raise the versions that the product itself is built with.
STATICCHECK ?= honnef.co/go/tools/cmd/staticcheck@v0.8.2
CYCLONEDX ?= github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@v1.10.0
GOVULNCHECK ?= golang.org/x/vuln/cmd/govulncheck@v1.9.0
GOSEC ?= github.com/securego/gosec/v2/cmd/gosec@v2.30.0

# How many random histories the tests of properties try in test-slow, for 100
# in test; and which packages have such tests, since others refuse the flag.
RAPID_CHECKS ?= 500
USES_RAPID = {{$$pkg := .ImportPath}}{{range .TestImports}}{{if eq . "pgregory.net/rapid"}}{{$$pkg}}{{end}}{{end}}{{range .XTestImports}}{{if eq . "pgregory.net/rapid"}}{{$$pkg}}{{end}}{{end}}

# Debian keeps PostgreSQL's server programs off PATH.
PGBIN := $(firstword $(wildcard /usr/lib/postgresql/*/bin))
export PATH := $(PATH)$(if $(PGBIN),:$(PGBIN))

# Tests kill processes and not the machine, so what they write need not reach a
# disk, and waiting for one is half of their time. Where there is room for it,
# and what lies there may be run, their files are in memory.
define in_memory
@m=/dev/shm/countersign-test-$$(id -u); \
if [ "$$(df -k --output=avail /dev/shm 2>/dev/null | tail -1)" -gt 8000000 ] 2>/dev/null && \
	mkdir -p "$$m" && [ -O "$$m" ] && chmod 755 "$$m" && \
	printf '#!/bin/sh\n' > "$$m/try" && chmod 700 "$$m/try" && "$$m/try"; \
then export GOTMPDIR="$${GOTMPDIR:-$${TMPDIR:-/tmp}}" TMPDIR="$$m"; fi; set -x;
endef

.DEFAULT_GOAL := build
# All but SQLite's own code, which is translated from C, has its own locks, and
# would take two thirds of the tests' time.
RACE = -race -gcflags=modernc.org/sqlite/lib=-race=false

.PHONY: build static sbom demo test test-slow drill bench lint vault check servers compiler

## build: the program, at bin/countersign
build: compiler
	$(GO) build -trimpath -buildvcs=auto -o bin/countersign ./cmd/countersign

## static: the program as releases and the image have it, at BIN: linked whole,
#  and the same bytes wherever the same commit is built with the same toolchain
static: BIN ?= bin/countersign-static
static: compiler
	$(GO) build -trimpath -buildvcs=auto -tags netgo,osusergo -ldflags '-s -w -buildid= -linkmode external -extldflags "-static -Wl,--build-id=none"' -o $(BIN) ./cmd/countersign

## sbom: what the static program is made of, as CycloneDX JSON, at bin/countersign.cdx.json
sbom: static
	$(GO) run $(CYCLONEDX) bin -json -output bin/countersign.cdx.json bin/countersign-static

## demo: a real flow against a real Vault and PostgreSQL, told as a story
demo: servers vault build
	$(GO) run ./cmd/demo bin/countersign

## test: everything but the slow tests, with the race detector; 15 minutes at most
test: check servers vault
	$(in_memory) $(GO) test $(RACE) -timeout 15m ./...

## drill: several brokers and a bad day; docs/drill.md tells how to read it
#  It needs root: it makes network namespaces, and says so where it cannot.
DRILL ?= -for 10m
drill: servers vault build
	$(call have,ip=iproute2 nft=nftables)
	$(GO) build -o bin/drill ./cmd/drill
	bin/drill $(DRILL)

## test-slow: kills in hundreds, the drill, and 30 s of every fuzz target
#  Fuzz targets are those of this module; `go list` leaves out nested ones.
test-slow: check servers vault drill
	@set -eu; rapid=$$($(GO) list -f '$(USES_RAPID)' ./...); set -x; \
	$(GO) test $(RACE) -tags slow -timeout 90m $$($(GO) list ./... | grep -vxF "$$rapid"); \
	$(GO) test $(RACE) -tags slow -timeout 90m $$rapid -rapid.checks $(RAPID_CHECKS)
	@set -eu; for pkg in $$($(GO) list ./...); do \
		for target in $$($(GO) test -list '^Fuzz' "$$pkg" | grep '^Fuzz' || true); do \
			echo "fuzz $$pkg $$target"; \
			$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime 30s -fuzzminimizetime 20x "$$pkg"; \
		done; \
	done

## bench: what docs/benchmarks.md reports, measured side by side in one run
bench: ALSO = pgbouncer=pgbouncer
bench: servers vault build
	$(GO) build -C cmd/bench -o ../../bin/bench .
	$(GO) run ./cmd/demo -postgres sh -c 'exec bin/bench -postgres "$$POSTGRES_DSN"'

## lint: gofmt, go vet, staticcheck, govulncheck, gosec
#  A finding of gosec is answered in docs/security-findings.md, by rule and file.
lint: check
	$(GO) vet -C cmd/devvault .
	$(GO) vet -C cmd/bench .
	$(GO) run $(STATICCHECK) ./...
	@out=$$($(GO) run $(GOVULNCHECK) ./... 2>&1) && echo "$$out" || { \
		if echo "$$out" | grep -qE 'fetching vulnerabilities|vuln\.go\.dev.*(dial|lookup|Forbidden|Not Found|timeout|refused|EOF)'; then \
			echo "lint: govulncheck skipped: its database (vuln.go.dev) cannot be had from here"; \
		else echo "$$out"; exit 1; fi; }
	@out=$$($(GO) run $(GOSEC) -quiet -no-fail -fmt=golint -exclude-dir=cmd/devvault ./... 2>&1) && \
		echo "$$out" | awk -F'|' 'NR == FNR { gsub(/ /, ""); answered[$$2 "|" $$3] = 1; next } \
			match($$0, /\(Rule:G[0-9]+/) { rule = substr($$0, RSTART + 6, RLENGTH - 6); file = $$0; sub(/:[0-9].*/, "", file); sub(ENVIRON["PWD"] "/", "", file); \
				if (!(rule "|*" in answered) && !(rule "|" file in answered)) { print; bad = 1 } } \
			END { exit bad }' docs/security-findings.md - || { \
		if echo "$$out" | grep -qE 'gosec.*(dial|lookup|Forbidden|Not Found|timeout|refused|EOF)'; then \
			echo "lint: gosec skipped: it cannot be had from here"; \
		else echo "$$out" | grep -v 'Rule:G' || true; echo "mend it, or answer it in docs/security-findings.md"; exit 1; fi; }

## vault: finds or builds the development Vault; its path is the last line
vault:
	@$(GO) run -C cmd/devvault .

# Formatting and vet come first: they are quick, and say the most for it.
check:
	@out=$$(gofmt -l $$(git ls-files '*.go')); \
		if [ -n "$$out" ]; then echo "not formatted, run gofmt -w on:"; echo "$$out"; exit 1; fi
	$(GO) vet ./...

# $(call have,COMMANDS-AND-PACKAGES): installs what is missing of "command=package..."
define have
	@set -eu; missing=; \
	for x in $(1); do command -v "$${x%%=*}" >/dev/null || missing="$$missing $$(echo "$${x#*=}" | tr + ' ')"; done; \
	[ -n "$$missing" ] || exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing$$missing"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	else \
		echo "missing:$$missing; install them (Debian: sudo apt-get install$$missing) and run make again" >&2; exit 1; \
	fi
endef

# What reads SQL is PostgreSQL's own parser, in C.
compiler:
	$(call have,cc=gcc+libc6-dev)

# redis-server and PostgreSQL for the tests and the demo; promtool for the alert
# rules; curl for the commands of the README. initdb is looked for off PATH, too: see PGBIN.
servers: compiler
	$(call have,redis-server=redis-server initdb=postgresql psql=postgresql-client curl=curl openssl=openssl promtool=prometheus $(ALSO))
