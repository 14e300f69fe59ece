# make demo: the main job.  make test: the tests.  Both set up .venv first, in a fresh clone.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/ready

export RAY_USAGE_STATS_ENABLED := 0

.PHONY: setup demo test test-fast soak bench-quick check lint clean

SOAK := resume_matrix sample_exact kill_saves hang_naming batch_resume replica_kill manifest_commands three_hosts
QUICK := planner_accuracy disconnects autoscale_replay

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --requirement requirements.lock
	$(BIN)/python -m compileall -qq -j 0 -x /tests/ .venv/lib || true  # on all cores; pip has but one, and ignores errors too
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $(READY)

demo: $(READY)
	$(BIN)/python jobs/demo.py

test: lint
	$(BIN)/pytest -n 2 --dist worksteal tests/unit
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 tests/e2e tests/dist tests/jobs
	$(BIN)/pytest --durations=15 tests/cluster

test-fast: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal -m 'not slow' tests/unit

soak: $(READY)
	set -e; for name in $(SOAK); do $(BIN)/python -m tests.soak.$$name --size small; done

bench-quick: $(READY)
	set -e; for name in $(QUICK); do $(BIN)/python -m benchmarks.$$name --quick; done

check: lint
	$(BIN)/pytest -q tests/unit/test_house.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs registry prepared exports benchmarks/results
