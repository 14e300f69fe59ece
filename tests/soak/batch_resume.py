"""A batch through kill -9 of its driver: nothing is lost, nothing is answered twice, no answer differs.

2,000 short lines on a tiny model; the driver and with it its Ray are killed when half of the parts are there, and the
same command is given again. The bars: as many results as lines, in their order; no custom_id twice over both files; and
every greedy text as the engine, called directly, gives it.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.endpoint import tiny_model
from benchmarks.report import Bar, report
from raymodels.config import EngineConfig
from raymodels.registry import Registry
from raymodels.serve.engine import GenerateRequest, Sampling
from raymodels.serve.transformers_engine import TransformersEngine
from tests.soak.size import small

MAX_TOKENS = 16
POLL_S = 0.02
PATIENCE_S = 300.0


def prompts(lines: int) -> list[str]:
    return [f"def function_{number}(größe):\n    return" for number in range(lines)]


def write_input(place: Path, lines: int) -> None:
    options = {"max_tokens": MAX_TOKENS, "temperature": 0}
    with place.open("w") as file:
        for number, prompt in enumerate(prompts(lines)):
            body = {"prompt": prompt, **options}
            entry = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(entry) + "\n")


def killed_start(command: list[str], parts: Path, count: int) -> float:
    """Seconds until so many parts were there and the driver was killed."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as driver:
        while len(list(parts.glob("*.jsonl"))) < count:
            if driver.poll() is not None or time.perf_counter() - begin > PATIENCE_S:
                driver.kill()
                assert driver.stderr
                raise RuntimeError(f"the first start did not come that far: {driver.stderr.read()[-2000:]}")
            time.sleep(POLL_S)
        driver.send_signal(signal.SIGKILL)
    return time.perf_counter() - begin


def engine_texts(model_dir: Path, lines: int) -> list[str]:
    """What the engine itself answers, as many prompts at once as it takes."""
    config = EngineConfig(max_queue=lines)
    engine = TransformersEngine(str(model_dir), config)

    async def text(number: int, prompt: str) -> str:
        tokens = engine.text.encode(prompt)
        request = GenerateRequest(str(number), tokens, MAX_TOKENS, sampling=Sampling(temperature=0))
        return "".join([delta.text async for delta in engine.generate(request)])

    async def main() -> list[str]:
        return await asyncio.gather(*(text(number, prompt) for number, prompt in enumerate(prompts(lines))))

    texts = asyncio.run(main())
    engine.close()
    return texts


def read(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["response"]["body"]["choices"][0]["text"])


def main() -> int:
    lines = 400 if small() else 2000
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tiny_model(folder / "model")
        Registry(str(folder / "registry")).publish("tiny", str(folder / "model"), {})
        write_input(folder / "in.jsonl", lines)
        program = str(Path(sys.executable).with_name("raymodels"))
        command = [program, "batch", str(folder / "in.jsonl"), str(folder / "out.jsonl"), "--model", "tiny"]
        command += ["--registry", str(folder / "registry"), "--json"]
        first_s = killed_start(command, folder / "out.parts", lines // 32 // 2)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        second = json.loads(done.stdout)
        answers, errors = read(folder / "out.jsonl"), read(folder / "out.errors.jsonl")
        expected = engine_texts(folder / "model", lines)
    ids = Counter(answer["custom_id"] for answer in [*answers, *errors])
    found = [(answer["custom_id"], text_of(answer)) for answer in answers]
    wrong = len({(f"line-{number}", text) for number, text in enumerate(expected)} - set(found))
    in_order = [custom_id for custom_id, _ in found] == [f"line-{number}" for number in range(lines)]
    rows = [
        {"start": "killed with -9", "lines done": second["resumed"], "seconds": first_s},
        {"start": "again", "lines done": second["lines"] - second["resumed"], "seconds": second["seconds"]},
    ]
    bars = [
        Bar("results", len(answers), "==", lines),
        Bar("results_in_order", int(in_order), "==", 1),
        Bar("duplicates", sum(times - 1 for times in ids.values()), "==", 0),
        Bar("wrong_answers", wrong, "==", 0),
        Bar("lines_done_before_the_kill", second["resumed"], ">=", 1),
        Bar("lines_done_after_it", second["lines"] - second["resumed"], ">=", 1),
    ]
    return report("batch_resume", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
