"""`raymodels batch` on a real Ray: through kill -9 of its driver and of its actor, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from raymodels.batch.job import Batch, Counts, run
from raymodels.config import ModelServeConfig
from raymodels.errors import AdapterError, ConfigError, IntegrityError, RunInUse
from raymodels.registry import Registry
from tests.lora_adapters import random_adapter
from tests.processes import descendants

LINES = 600
# Ray Data warns of its own settings while it copies them.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")


@pytest.fixture(scope="module")
def registry(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    place = str(tmp_path_factory.mktemp("registry"))
    Registry(place).publish("tiny", str(tiny_model_dir), {})
    return place


def requests(count: int, max_tokens: int = 8) -> list[dict[str, Any]]:
    body = {"max_tokens": max_tokens, "temperature": 0}
    return [
        {"custom_id": f"r{n}", "method": "POST", "url": "/v1/completions", "body": {"prompt": f"line {n}", **body}}
        for n in range(count)
    ]


def write(folder: Path, entries: list[Any]) -> Path:
    content = "".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries)
    (folder / "in.jsonl").write_text(content)
    return folder / "in.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def batch(folder: Path, registry: str, **model: Any) -> Batch:
    settings = ModelServeConfig.model_validate({"model": "tiny", "cpus": 0.5, **model})
    return Batch(str(folder / "in.jsonl"), str(folder / "out.jsonl"), registry, settings)


def parts(folder: Path) -> list[Path]:
    return sorted((folder / "out.parts").glob("*.jsonl"))


def wait_for_parts(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(parts(folder)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def command(ray_cluster: Any, registry: str, tmp_path: Path) -> list[str]:
    options = ["--model", "tiny@1", "--registry", registry, "--cpus", "0.5", "--json"]
    program = str(Path(sys.executable).with_name("raymodels"))
    return [program, "batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), *options]


def test_a_driver_killed_in_the_middle_leaves_what_the_next_one_goes_on_with(
    ray_cluster: Any, registry: str, tmp_path: Path, command: list[str]
) -> None:
    entries = requests(LINES)
    write(tmp_path, [*entries[:400], "no JSON", *entries[400:]])
    here = os.environ | {"RAY_ADDRESS": ray_cluster.get_runtime_context().gcs_address}
    with subprocess.Popen(command, env=here, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        wait_for_parts(tmp_path, 5)
        driver.send_signal(signal.SIGKILL)
    kept = {part.name: part.read_bytes() for part in parts(tmp_path)}
    assert 5 <= len(kept) < 19
    assert not (tmp_path / "out.jsonl").exists()
    done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["lines"], told["completed"], told["failed"]) == (LINES + 1, LINES, 1)
    assert told["resumed"] == sum(len(content.splitlines()) - 1 for content in kept.values())
    answers = read(tmp_path / "out.jsonl")
    assert [answer["custom_id"] for answer in answers] == [entry["custom_id"] for entry in entries]
    assert len({answer["id"] for answer in answers}) == LINES
    (failed,) = read(tmp_path / "out.errors.jsonl")
    assert (failed["error"]["code"], failed["error"]["line"]) == ("invalid_json_line", 401)
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines()
    assert all(line in lines for content in kept.values() for line in content.splitlines()[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.jsonl",
        "out.batch.json",
        "out.errors.jsonl",
        "out.jsonl",
    ]
    # Without the fault the texts are the same ones.
    again = tmp_path / "again"
    again.mkdir()
    write(again, entries)
    run(batch(again, registry))
    assert texts(again) == texts(tmp_path)


def texts(folder: Path) -> dict[str, str]:
    found = read(folder / "out.jsonl")
    return {answer["custom_id"]: answer["response"]["body"]["choices"][0]["text"] for answer in found}


def test_an_actor_that_dies_is_replaced(ray_cluster: Any, registry: str, tmp_path: Path) -> None:
    write(tmp_path, requests(LINES))
    killed: list[psutil.Process] = []

    def on_progress(counts: Counts, lines: int) -> None:
        if counts.lines >= 64 and not killed:
            killed.extend(descendants(psutil.Process(), r"MapWorker\(Map\(Answerer\)\)"))  # the shared Ray is ours
            for process in killed:
                process.kill()

    summary = run(batch(tmp_path, registry), on_progress)
    assert len(killed) == 1
    assert summary.counts.completed == LINES
    assert len(texts(tmp_path)) == LINES


def test_what_is_completed_is_not_done_again_and_nothing_else_goes_into_it(
    ray_cluster: Any, registry: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    write(tmp_path, requests(3))
    first = run(batch(tmp_path, registry))
    assert (first.counts.completed, first.before.lines, first.errors) == (3, 0, None)
    content = (tmp_path / "out.jsonl").read_bytes()
    again = run(batch(tmp_path, registry, engine={"max_batch": 3}))  # which changes how fast it is
    assert (again.counts, again.before.lines) == (first.counts, 3)
    assert (tmp_path / "out.jsonl").read_bytes() == content
    with pytest.raises(ConfigError, match=r"\(engine\.max_context was None, is 64\)"):
        run(batch(tmp_path, registry, engine={"max_context": 64}))
    Registry(registry).publish("tiny", str(tiny_model_dir), {})
    with pytest.raises(ConfigError, match=r"model was tiny@1, is tiny@2"):
        run(batch(tmp_path, registry))
    write(tmp_path, requests(4))
    with pytest.raises(ConfigError, match=r"input_sha256 was \w+, is \w+\)"):
        run(batch(tmp_path, registry, model="tiny@1"))
    (tmp_path / "out.batch.json").unlink()
    with pytest.raises(ConfigError, match=r"out\.jsonl is there already"):
        run(batch(tmp_path, registry, model="tiny@1"))
    assert (tmp_path / "out.jsonl").read_bytes() == content
    assert not (tmp_path / "out.parts").exists()


def test_lines_for_adapters_and_a_batch_whose_adapters_have_changed(
    ray_cluster: Any, registry: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    settings = {"target_modules": "all-linear", "r": 8, "lora_alpha": 64}
    folder = random_adapter(tmp_path / "terse", tiny_model_dir, seed=1, **settings)
    Registry(registry).publish("terse", str(folder), {})
    entries = requests(3)
    for entry, model in zip(entries, ("tiny", "terse", None), strict=True):
        entry["body"] |= {"prompt": "the model", "model": model}
    write(tmp_path, entries)
    model = {"model": "tiny@1", "adapters": {"terse": "registry:terse@1"}}
    given = replace(batch(tmp_path, registry, **model), unnamed="terse")
    assert run(given).counts.completed == 3
    found = texts(tmp_path)
    assert found["r0"] != found["r1"] == found["r2"]
    with pytest.raises(ConfigError, match=r"unnamed was terse, is None"):
        run(replace(given, unnamed=None))
    with pytest.raises(ConfigError, match=r"adapters was {'terse': 'registry:terse@1 \w+'}, is {'terse': '/\S+ \w+'}"):
        run(replace(batch(tmp_path, registry, **model | {"adapters": {"terse": str(folder)}}), unnamed="terse"))
    with pytest.raises(AdapterError, match=r"adapter terse: .* is not in PEFT's format"):
        run(batch(tmp_path, registry, **model | {"adapters": {"terse": "tiny@1"}}))


def test_two_drivers_do_not_work_on_one_batch(registry: str, tmp_path: Path) -> None:
    from raymodels.batch.job import _alone

    write(tmp_path, requests(3))
    with _alone(batch(tmp_path, registry)), pytest.raises(RunInUse, match=r"out\.jsonl"):
        run(batch(tmp_path, registry))


def test_a_part_that_is_not_whole_is_named(ray_cluster: Any, registry: str, tmp_path: Path) -> None:
    write(tmp_path, requests(40))
    counted: list[int] = []

    def stop(counts: Counts, lines: int) -> None:
        counted.append(counts.lines)
        if counts.lines:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(batch(tmp_path, registry, model="tiny@1"), stop)
    assert counted[-1] in (8, 32)
    (part,) = parts(tmp_path)
    part.write_bytes(part.read_bytes().rsplit(b"\n", 2)[0] + b"\n")
    with pytest.raises(IntegrityError, match=rf"{part.name} holds \d+ of \d+ lines: delete it"):
        run(batch(tmp_path, registry, model="tiny@1"))
    part.unlink()
    assert run(batch(tmp_path, registry, model="tiny@1")).counts.completed == 40
