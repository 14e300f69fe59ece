"""schemathesis against a live endpoint's own OpenAPI page: positive and negative requests, every check, no filter.

What it sends is made from the page alone, but for one thing that JSON Schema cannot say: a tool that is named in
``tool_choice`` is one of ``tools`` (tests/unit/schemathesis_hooks.py). Another is how long a text is in tokens: the
model's context is long enough for all that comes.

The bars: at least 2,000 cases, and no failure, which a status of 500 would be as well as an answer that the page does
not describe.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.endpoint import serving, tiny_model
from benchmarks.report import Bar, report
from tests.soak.size import small

CONTEXT = 1 << 16
CASES = re.compile(r"([\d,]+) generated(?:, ([\d,]+) found [\d,]+ unique failures)?")


def main() -> int:
    examples, wanted = (10, 300) if small() else (150, 2_000)
    with tempfile.TemporaryDirectory() as temporary:
        http = {"max_output_tokens": 8, "access_log": False}
        model = {"cpus": 1, "engine": {"max_batch": 8}}
        model_dir = tiny_model(Path(temporary) / "model", context=CONTEXT)
        with serving(Path(temporary), model_dir, model, http) as endpoint:
            start = time.perf_counter()
            told = fuzz(f"{endpoint.url}/openapi.json", examples)
            seconds = time.perf_counter() - start
    print(told.stdout[-6000:], told.stderr[-2000:])
    found = CASES.search(told.stdout)
    cases = int(found[1].replace(",", "")) if found else 0
    row = {"cases": cases, "exit code": told.returncode, "seconds": seconds}
    return report(
        "openapi_fuzz", [row], [Bar("cases", cases, ">=", wanted), Bar("exit_code", told.returncode, "==", 0)]
    )


def fuzz(page: str, examples: int) -> subprocess.CompletedProcess[str]:
    """Exits with 0 if there was no failure, and no error either."""
    command = [str(Path(sys.executable).parent / "st"), "run", page, "--mode", "all", "--checks", "all"]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", str(examples), "--seed", "1"]
    command += ["--continue-on-failure", "--request-timeout", "60", "--suppress-health-check", "all", "--no-color"]
    hooks = {"SCHEMATHESIS_HOOKS": "tests.unit.schemathesis_hooks", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, env=os.environ | hooks, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
