"""Adapters as models of their own: through HTTP, in metrics and tenancy, in the config and before anything starts."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from transformers import AutoTokenizer

from raymodels import manifest
from raymodels.cli import main
from raymodels.client import Client
from raymodels.config import EngineConfig, ServeConfig, validate
from raymodels.errors import AdapterError, ConfigError, RegistryError
from raymodels.registry import Registry
from raymodels.serve import deploy as deploying
from raymodels.serve.adapter_sources import check_all, fetched, fingerprint, resolved
from raymodels.serve.adapters import CONFIG, WEIGHTS
from raymodels.serve.answers import Usage, answer_to
from raymodels.serve.deploy import deploy
from raymodels.serve.replica import Replica
from raymodels.serve.schema import read_completion, read_embedding
from raymodels.serve.tenants import add_key
from tests.lora_adapters import adapted_scores, random_adapter
from tests.random_models import random_model
from tests.unit.endpoint import endpoint

pytestmark = pytest.mark.slow

PROMPT = "the model reads a line and learns what follows " * 3
NAMES = ["base", "terse", "verbose"]


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return random_model(folder, AutoTokenizer.from_pretrained(tiny_model_dir), initializer_range=0.15)


@pytest.fixture(scope="module")
def adapters(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return {
        "terse": random_adapter(place / "terse", model_dir, seed=1, target_modules=["q_proj", "v_proj"]),
        "verbose": random_adapter(place / "verbose", model_dir, seed=2, target_modules="all-linear", r=8),
    }


@pytest.fixture(scope="module")
def url(model_dir: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("endpoint")
    keys = str(folder / "keys.yaml")
    secrets["all"] = add_key(keys, "all", metrics=True)
    secrets["one"] = add_key(keys, "one", models=["terse"])
    with endpoint(folder, {"base": model_dir}, EngineConfig(max_batch=8), {"base": adapters}, keys_file=keys) as url:
        yield url


secrets: dict[str, str] = {}


def call(url: str, path: str, key: str = "all", **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {secrets[key]}"}
    return httpx.request("POST" if body else "GET", url + path, json=body or None, headers=headers, timeout=60)


def text(url: str, model: str, **body: Any) -> str:
    answer = call(
        url, "/v1/completions", **{"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 24, **body}
    )
    return str(answer.raise_for_status().json()["choices"][0]["text"])


def test_adapters_are_models_with_a_parent(url: str) -> None:
    data = call(url, "/v1/models").raise_for_status().json()["data"]
    assert {each["id"]: each["parent"] for each in data} == {"base": None, "terse": "base", "verbose": "base"}
    one = call(url, "/v1/models/terse").raise_for_status().json()
    assert (one["id"], one["parent"], one["root"]) == ("terse", "base", "base@1")
    with Client(url, api_key=secrets["all"]) as client:
        assert {model.id for model in client.models()} == {*NAMES}


def test_each_name_answers_for_itself_however_many_call_at_once(url: str) -> None:
    alone = {name: text(url, name) for name in NAMES}
    assert len({*alone.values()}) == 3
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda name: (name, text(url, name)), NAMES * 8))
    assert found == [(name, alone[name]) for name in NAMES * 8]


def test_echoed_log_probabilities_are_pefts(url: str, model_dir: Path, adapters: dict[str, Path]) -> None:
    tokens = AutoTokenizer.from_pretrained(model_dir)(PROMPT)["input_ids"]
    for name, folder in adapters.items():
        asked = {"model": name, "prompt": tokens, "max_tokens": 0, "echo": True, "logprobs": 0}
        answer = call(url, "/v1/completions", **asked).raise_for_status().json()
        found = answer["choices"][0]["logprobs"]["token_logprobs"]
        assert answer["model"] == name
        assert found[1:] == pytest.approx(adapted_scores(model_dir, folder, tokens), abs=1e-5)


def test_embeddings_and_the_tokenizer_go_by_an_adapters_name(url: str) -> None:
    vectors = [
        call(url, "/v1/embeddings", model=name, input="the model").raise_for_status().json()["data"][0]["embedding"]
        for name in NAMES
    ]
    assert vectors[0] != vectors[1] != vectors[2]
    tokens = [call(url, "/tokenize", model=name, prompt="the model").json()["tokens"] for name in NAMES]
    assert tokens[0] == tokens[1] == tokens[2]


def test_a_name_that_is_neither_is_404(url: str) -> None:
    answer = call(url, "/v1/completions", model="nowhere", prompt="x")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_a_key_may_be_for_an_adapter_alone(url: str) -> None:
    assert [each["id"] for each in call(url, "/v1/models", key="one").json()["data"]] == ["terse"]
    asked = {"prompt": "x", "max_tokens": 1}
    assert call(url, "/v1/completions", key="one", model="terse", **asked).status_code == 200
    for model in ("base", "verbose"):
        assert call(url, "/v1/completions", key="one", model=model, **asked).status_code == 403


def test_metrics_count_each_name_and_the_shared_engine_once(url: str) -> None:
    def counted(name: str) -> float:
        lines = call(url, "/metrics").text.splitlines()
        wanted = f'raymodels_serve_tokens_out_total{{gateway="here",model="{name}",tenant="all"}}'
        return sum(float(line.split()[-1]) for line in lines if line.startswith(wanted))

    before = {name: counted(name) for name in NAMES}
    text(url, "terse", max_tokens=7)
    assert {name: counted(name) - before[name] for name in NAMES} == {"base": 0, "terse": 7, "verbose": 0}
    page = call(url, "/metrics").text
    for metric in ("raymodels_serve_engine_running", "raymodels_serve_queue_requests", "raymodels_serve_replicas"):
        assert f'{metric}{{gateway="here",model="base"}}' in page
        assert f'{metric}{{gateway="here",model="terse"}}' not in page


@pytest.fixture
def registry(model_dir: Path, adapters: dict[str, Path], tmp_path: Path) -> Registry:
    registry = Registry(str(tmp_path / "registry"))
    registry.publish("base", str(model_dir), {})
    registry.publish("terse", str(adapters["terse"]), {}, alias="prod")
    return registry


def config(registry: Registry, *models: dict[str, Any]) -> ServeConfig:
    return validate({"registry": registry.place, "models": list(models), "http": {"port": 0}}, ServeConfig)


def test_a_registry_holds_adapters_too(registry: Registry, adapters: dict[str, Path]) -> None:
    source = resolved("terse@prod", registry)
    assert source == fingerprint(source) == "registry:terse@1"
    assert (Path(fetched(source, registry)) / CONFIG).read_text() == (adapters["terse"] / CONFIG).read_text()


def test_a_folder_is_published_with_its_base_and_served_as_a_version(
    registry: Registry, model_dir: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(adapters["verbose"], tmp_path / "verbose")
    (folder / "optimizer.pt").write_bytes(b"pickled")  # as PEFT's trainer leaves it
    words = ["publish", str(folder), "--name", "verbose", "--base", "base", "--alias", "prod"]
    assert run_models(monkeypatch, *words, "--registry", registry.place) == (0, "verbose@1\n", "")
    version = registry.resolve("verbose@prod")
    version.verify()
    assert sorted(path.name for path in Path(version.model_place).iterdir()) == [CONFIG, WEIGHTS]
    assert (version.card["base"], version.card["adapter"]["r"]) == ("base@1", 8)
    assert version.card["base_digest"] == manifest.digest(registry.resolve("base").place)
    source = resolved("registry:verbose@1", registry)
    check_all({"verbose": source}, registry, registry.resolve("base"))
    replica = Replica(registry.place, "base@1", EngineConfig(), threads=1, adapters={"verbose": source})
    tokens = AutoTokenizer.from_pretrained(model_dir)(PROMPT)["input_ids"]
    request = read_completion({"model": "verbose", "prompt": tokens, "max_tokens": 0, "echo": True, "logprobs": 0})

    async def ask() -> list[Any]:
        return [item async for item in replica.generate(request, adapter="verbose")]

    deltas = [delta for item in asyncio.run(ask())[1:] for delta in item]
    [choice] = answer_to(request).whole(deltas, Usage(0))["choices"]
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
        adapted_scores(model_dir, adapters["verbose"], tokens), abs=1e-5
    )
    replica._engine.close()


def test_an_adapter_that_cannot_be_served_is_not_published(
    registry: Registry, adapters: dict[str, Path], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.publish("other", str(tiny_model_dir), {})
    broken = shutil.copytree(adapters["terse"], tmp_path / "broken")
    (broken / WEIGHTS).unlink()
    for folder, base, message in (
        (adapters["terse"], "terse", "config.json"),
        (adapters["terse"], "nowhere", "no model 'nowhere'"),
        (broken, "base", f"adapter new: {broken} has no {WEIGHTS}"),
        (tmp_path, "base", f"adapter new: {tmp_path} is not in PEFT's format"),
        (tmp_path / "none", "base", f"adapter new: {tmp_path}/none is not in PEFT's format"),
        (random_adapter(tmp_path / "dora", tiny_model_dir, use_dora=True), "other", "use_dora"),
    ):
        words = ["publish", str(folder), "--name", "new", "--base", base, "--registry", registry.place]
        code, out, err = run_models(monkeypatch, *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
    assert registry.versions("new") == []


def run_models(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    """The command `raymodels models`: exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["raymodels", "models", *words])
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


def test_a_changed_folder_has_another_fingerprint(model_dir: Path, registry: Registry, tmp_path: Path) -> None:
    source = resolved(str(random_adapter(tmp_path / "a", model_dir, target_modules=["q_proj"])), registry)
    before = fingerprint(source)
    random_adapter(tmp_path / "a", model_dir, seed=9, target_modules=["q_proj"])
    assert fingerprint(source) != before


def test_names_are_unique_over_the_endpoint(registry: Registry) -> None:
    with pytest.raises(ConfigError, match="x is served twice"):
        config(registry, {"model": "base", "adapters": {"x": "terse"}}, {"model": "base", "served_as": "x"})


def test_models_of_one_version_share_replicas_and_adapters(registry: Registry, adapters: dict[str, Path]) -> None:
    first = {"model": "base", "adapters": {"a": "terse"}}
    second = {"model": "base@1", "served_as": "other", "adapters": {"b": str(adapters["verbose"])}}
    both = config(registry, first, second)
    versions = {name: registry.resolve("base") for name in ("base", "other")}
    table = deploying._table(both, versions)
    assert {name: route.parent for name, route in table.items()} == {
        "base": None,
        "other": None,
        "a": "base",
        "b": "other",
    }
    assert {*map(str, (route.applications for route in table.values()))} == {"{'base--v1': 1.0}"}
    shared = deploying._adapters(both, versions, versions["base"])
    assert shared == {"a": "registry:terse@1", "b": str(adapters["verbose"])}


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nowhere", RegistryError, "no model 'nowhere'"),
        ("./nowhere", AdapterError, "adapter mine: .*nowhere is not in PEFT's format"),
        ("s3://bucket/adapter", AdapterError, "publish it to the registry"),
        ("base", AdapterError, "adapter mine: .*is not in PEFT's format"),
    ],
)
def test_a_bad_adapter_is_refused_before_anything_starts(
    registry: Registry, source: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        deploy(config(registry, {"model": "base", "adapters": {"mine": source}}))
    assert not ray.is_initialized()


def test_an_adapter_of_another_base_is_refused_before_anything_starts(
    registry: Registry, tiny_model_dir: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    other = random_model(tmp_path / "other", tokenizer, num_hidden_layers=3)
    adapter = random_adapter(tmp_path / "adapter", other, target_modules=["q_proj"])
    settings = json.loads((adapter / CONFIG).read_text())
    assert settings["r"] == 4
    with pytest.raises(AdapterError, match=r"layers\.2.* matches nothing in the base model"):
        deploy(config(registry, {"model": "base", "adapters": {"mine": str(adapter)}}))
    assert not ray.is_initialized()


def test_a_replica_without_the_adapter_does_not_answer_as_the_base(registry: Registry) -> None:
    """As one that is replaced while the gateway still has a name in its table."""
    replica = Replica(registry.place, "base@1", EngineConfig(), threads=1)
    request = read_completion({"model": "gone", "prompt": "x", "max_tokens": 1})

    async def ask() -> list[Any]:
        return [item async for item in replica.generate(request, adapter="gone")]

    [problem] = asyncio.run(ask())
    assert (problem.status, problem.code, problem.param) == (404, "model_not_found", "model")
    embedding = read_embedding({"model": "gone", "input": "x"})
    assert asyncio.run(replica.embed(embedding, "gone")).status == 404
    replica._engine.close()
