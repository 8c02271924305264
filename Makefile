# Stopline. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
GOLANGCI := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)

.PHONY: help build demo test race interlock attacks kills check gen bench fuzz clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

build: ## build bin/stopline
	CGO_ENABLED=0 go build -trimpath -ldflags "-X main.version=$(VERSION)" -o bin/stopline ./services/cmd/stopline

demo: build ## run the built-in city, everything in one process; Ctrl-C ends it
	bin/stopline demo

test: ## run all tests
	go test -timeout 10m ./api/... ./pkg/... ./services/...

race: ## run all tests with the race detector
	go test -race -timeout 20m ./api/... ./pkg/... ./services/...

interlock: ## 100,000,000 hostile steps against the interlock's two judges, and the seeded faults
	STOPLINE_INTERLOCK_STEPS=$${STOPLINE_INTERLOCK_STEPS:-100000000} go test -count 1 -timeout 10m -v -run 'TestModel|TestSeededFaults|UnderLoad' ./pkg/interlock

attacks: ## whole hours in SUMO under attack, against the bars; STOPLINE_ATTACKS says with how many seeds
	STOPLINE_REQUIRE_SUMO=1 STOPLINE_REQUIRE_SHARED=1 STOPLINE_ATTACKS=$${STOPLINE_ATTACKS:-10} go test -count 1 -timeout 6h -v -run 'TestAttacksInFull' ./services/cmd/stopline

kills: ## kill -9 validators 200 times under load; STOPLINE_SEED repeats a run
	STOPLINE_REQUIRE_TIMES=1 STOPLINE_KILLS=$${STOPLINE_KILLS:-200} go test -count 1 -timeout 20m -v -run 'TestValidatorsSurviveKills' ./services/cmd/stopline

check: ## format, vet, lint, module and generated-code checks
	@test -z "$$(gofmt -l api pkg services bench)" || { gofmt -l api pkg services bench; echo "run gofmt -w on these"; exit 1; }
	go vet ./api/... ./pkg/... ./services/...
	go run $(GOLANGCI) run ./api/... ./pkg/... ./services/...
	@for m in api pkg services; do (cd $$m && GOWORK=off go build ./...) || exit 1; done
	cd bench && GOWORK=off go vet ./...

gen: ## regenerate api/ from the .proto files
	cd api && ./third_party.sh && GOWORK=off go tool -modfile=buf.mod buf lint && GOWORK=off go tool -modfile=buf.mod buf generate

breaking: ## is the API understood by clients of before, and the other way round? STOPLINE_API_BASE names a commit
	cd api && ./third_party.sh && ./breaking.sh

bench: build ## run the benchmarks, the demo and the fixed controller; compare figures of one run only
	go test -run '^$$' -bench . -benchtime 1s ./pkg/... ./services/...
	@echo "== demo at its natural rate"; bin/stopline demo --for 20s --json
	@echo "== gateway, by ghz and vegeta beside a demo"; cd bench && GOWORK=off go run .
	@d=$${STOPLINE_SHARED:-../shared}/scenarios; if command -v sumo >/dev/null && [ -d $$d ]; then \
	  for m in ingolstadt1 ingolstadt7; do echo "== fixed controller, $$m"; \
	    bin/stopline simulate --config $$d/$$m/$$m.sumocfg --controller fixed --rules field --json || exit 1; done; \
	  else echo "== fixed controller: needs sumo and the scenarios (STOPLINE_SHARED); skipped"; fi

fuzz: ## fuzz every parser of outside bytes, 20 s each
	@for m in pkg services; do for p in $$(cd $$m && go list ./...); do \
	  for f in $$(cd $$m && go test -list '^Fuzz' $$p 2>/dev/null | grep '^Fuzz'); do \
	    echo "== $$p $$f"; (cd $$m && go test -run '^$$' -fuzz "^$$f$$" -fuzztime 20s -fuzzminimizetime 10x $$p) || exit 1; done; done; done

clean: ## remove what was built
	rm -rf bin
