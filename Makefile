# make test is the whole test: it installs what the tests need, and a skipped test is a failure. The packages run one by
# one, as many of them watch the clock.

GO          ?= go
FUZZTIME    ?= 10s
SOAK        ?= 60m
RUNS        ?= 1
STATICCHECK  = honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK  = golang.org/x/vuln/cmd/govulncheck@v1.9.0

.PHONY: all build test lint bench conform soak fuzz

all: build

build:
	$(GO) build ./cmd/sluice

test:
	test/install
	SLUICE_TEST_NOSKIP=1 SLUICE_SCHEDULES=60s $(GO) run ./test/noskip -race -count=1 -p 1 ./...

lint:
	@unformatted="$$(gofmt -l .)"; if [ -n "$$unformatted" ]; then echo "gofmt -w these: $$unformatted"; exit 1; fi
	$(GO) vet ./...
	GOOS=darwin $(GO) vet ./...
	GOOS=freebsd $(GO) vet ./...
	GOOS=windows $(GO) build ./...
	$(GO) run $(STATICCHECK) ./...
	GO='$(GO)' test/vulncheck $(GOVULNCHECK) ./...

# What the README's figures come from.
bench:
	$(GO) run ./bench

# sluice conform in full on every relay of docs/conformance.md, RUNS times, and their table. A run takes six minutes.
conform:
	test/install
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT; \
	SLUICE_CONFORM=$$dir SLUICE_CONFORM_RUNS=$(RUNS) $(GO) test -count=1 -timeout 0 -run '^TestConform$$' ./test/e2e >&2; \
	$(GO) run ./cmd/sluice conform --markdown "$$dir"/*.json

# Ten thousand of each fault, then random histories of pairs, and then the mixed endings of test/e2e, again and again, each for SOAK.
soak:
	SLUICE_FAULTS=10000 $(GO) test -count=1 -timeout 0 -run 'Faults|WithoutDescriptors' -v ./relay
	SLUICE_SCHEDULES=$(SOAK) $(GO) test -race -count=1 -timeout 0 -run '^TestSchedules$$' -v ./relay
	SLUICE_SOAK=$(SOAK) $(GO) test -race -count=1 -timeout 0 -run '^TestMixedEndings$$' -v ./test/e2e

# Every fuzz target for FUZZTIME. (make test runs their seeds.)
fuzz:
	GO='$(GO)' test/fuzz $(FUZZTIME)
