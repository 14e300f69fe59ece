"""OpenAI's batch files: how lines are read, cut into parts and answered; all of it but Ray."""

from __future__ import annotations

import asyncio
import hashlib
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from raymodels import storage
from raymodels.batch import lines as batch_lines
from raymodels.batch.answerer import Answerer
from raymodels.batch.lines import Entry, Line, NoRequest, Part, entry_of, index, lines_of, request_of
from raymodels.cli import main
from raymodels.cli_batch import _settings
from raymodels.config import EngineConfig
from raymodels.errors import DataError, IntegrityError, StorageError
from raymodels.registry import Registry
from raymodels.serve.schema import Refused
from tests.lora_adapters import adapted_scores, random_adapter

URL = "/v1/completions"


def request(custom_id: Any, url: str = URL, method: str = "POST", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": method, "url": url, "body": {"prompt": "the model", **body}}


def write(place: str, entries: list[Any]) -> None:
    storage.write_bytes(place, b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))


def test_parts_cover_every_line_once(place: str) -> None:
    entries = [request(f"line-{n}", prompt="x" * (n % 7)) for n in range(100)]
    write(place, entries)
    given = index(place)
    content = storage.read_bytes(place)
    assert (given.bytes, given.sha256, given.lines) == (len(content), hashlib.sha256(content).hexdigest(), 100)
    assert [part.lines for part in given.parts] == [32, 32, 32, 4]
    found = [line for part in given.parts for line in lines_of(place, part)]
    assert [json.loads(line.content or b"") for line in found] == entries
    assert [line.number for line in found] == list(range(1, 101))


def test_blank_lines_are_none_and_the_last_needs_no_newline(tmp_path: Path) -> None:
    place = str(tmp_path / "in.jsonl")
    storage.write_bytes(place, b'\n{"custom_id": "a"}\n  \n\n{"custom_id": "b"}')
    (part,) = index(place).parts
    assert [(line.number, line.content) for line in lines_of(place, part)] == [
        (2, b'{"custom_id": "a"}\n'),
        (5, b'{"custom_id": "b"}'),
    ]
    storage.write_bytes(place, b'{"custom_id": "a"}\n' + b"\n" * 100)
    assert index(place).lines == 1


@pytest.mark.parametrize("content", [b"", b"\n \n\n"])
def test_a_file_without_lines_is_an_error(tmp_path: Path, content: bytes) -> None:
    storage.write_bytes(str(tmp_path / "in.jsonl"), content)
    with pytest.raises(DataError, match="holds no request"):
        index(str(tmp_path / "in.jsonl"))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        index(str(tmp_path / "nowhere.jsonl"))


def test_parts_are_bounded_in_bytes_and_long_lines_are_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_lines, "LINE_BYTES", 1000)
    monkeypatch.setattr(batch_lines, "PART_BYTES", 1500)
    place = str(tmp_path / "in.jsonl")
    entries = [
        request("a"),
        request("b", prompt="x" * 5000),
        request("c"),
        *[request(n, prompt="x" * 700) for n in "defg"],
    ]
    write(place, entries)
    given = index(place)
    assert [part.lines for part in given.parts] == [2, 3, 2]
    found = [line for part in given.parts for line in lines_of(place, part)]
    assert [line.number for line in found if line.content is None] == [2]
    with pytest.raises(NoRequest, match="over 1000 bytes"):
        entry_of(found[1])


def test_an_input_that_changed_is_noticed(tmp_path: Path) -> None:
    place = str(tmp_path / "in.jsonl")
    write(place, [request("a"), request("b")])
    (part,) = index(place).parts
    for changed in ([request("a"), request("c")], [request("a")]):
        write(place, changed)
        with pytest.raises(DataError, match="changed while"):
            list(lines_of(place, part))


def test_a_custom_id_that_repeats_across_parts_is_found(tmp_path: Path) -> None:
    place = str(tmp_path / "in.jsonl")
    write(place, [*[request(f"line-{n}") for n in range(40)], request("line-3"), "no object", request("line-3")])
    given = index(place)
    assert [sorted(part.repeated) for part in given.parts] == [[], [41, 43]]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "invalid_json_line"),
        (b"\xff", "invalid_json_line"),
        (b"[" * 100_000, "invalid_json_line"),
        (b"[1]", "invalid_json_line"),
        (None, "invalid_json_line"),
        (b"{}", "missing_required_parameter"),
        (json.dumps(request(5)).encode(), "missing_required_parameter"),
        (json.dumps(request("a", method="GET")).encode(), "invalid_method"),
        (json.dumps(request("a", url="/v1/audio")).encode(), "invalid_url"),
        (b'{"custom_id": "a", "method": "POST", "url": ["x"], "body": {}}', "invalid_url"),
        (b'{"custom_id": "a", "method": "POST", "url": "/v1/completions"}', "missing_required_parameter"),
    ],
)
def test_a_line_that_is_no_request(content: bytes | None, code: str) -> None:
    with pytest.raises(NoRequest) as raised:
        entry_of(Line(1, content, repeated=False))
    assert raised.value.code == code


def test_the_model_may_be_left_out_but_not_be_another() -> None:
    for body in ({}, {"model": None}, {"model": "tiny"}):
        assert request_of(Entry("a", URL, {"prompt": "x", **body}), ["tiny", "terse"], "tiny").model == "tiny"
    assert request_of(Entry("a", URL, {"prompt": "x"}), ["tiny", "terse"], "terse").model == "terse"
    assert request_of(Entry("a", URL, {"prompt": "x", "model": "terse"}), ["tiny", "terse"], "tiny").model == "terse"
    with pytest.raises(Refused, match="the model 'tiny' or 'terse', not 'other'") as raised:
        request_of(Entry("a", URL, {"prompt": "x", "model": "other"}), ["tiny", "terse"], "tiny")
    assert (raised.value.problem.status, raised.value.problem.param) == (404, "model")


def test_streams_and_bad_fields_are_refused() -> None:
    for field, value in (("stream", True), ("temperature", 5), ("misspelled", 1)):
        with pytest.raises(Refused) as raised:
            request_of(Entry("a", URL, {"prompt": "x", field: value}), ["tiny"], "tiny")
        assert (raised.value.problem.status, raised.value.problem.param) == (400, field)


def answered(
    registry: str, place: str, engine: EngineConfig, unnamed: str = "tiny", **adapters: str
) -> list[list[dict[str, Any]]]:
    """What an actor makes of every part, all at once: each part's head and lines."""
    answerer = Answerer(place, "tiny", unnamed, registry, "tiny@1", engine, threads=1, adapters=adapters)

    async def call(part: Part) -> Any:
        row = await answerer({"part": pickle.dumps(part)})
        assert row["number"] == part.number
        return pickle.loads(row["result"])

    async def main() -> list[Any]:
        return await asyncio.gather(*(call(part) for part in index(place).parts))

    results = asyncio.run(main())
    if isinstance(results[0], Exception):
        raise results[0]
    answerer._replica._engine.close()
    return [[json.loads(line) for line in result.splitlines()] for result in results]


@pytest.fixture(scope="module")
def registry(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    place = str(tmp_path_factory.mktemp("registry"))
    Registry(place).publish("tiny", str(tiny_model_dir), {})
    return place


@pytest.mark.slow
def test_every_line_is_answered_once_or_told_of(registry: str, tmp_path: Path) -> None:
    place = str(tmp_path / "in.jsonl")
    good = [request(f"good-{n}", max_tokens=1 + n % 4, temperature=0) for n in range(60)]
    chat = {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions"}
    bad = [
        {**chat, "body": {"messages": [{"role": "user", "content": "x"}]}},  # the tiny model has no chat template
        request("long", prompt="the " * 400),
        request("other", model="other"),
        request("good-7"),
        request("nowhere", url="/v1/nowhere"),
    ]
    vectors = {"custom_id": "vectors", "method": "POST", "url": "/v1/embeddings", "body": {"input": ["a", "b"]}}
    many = request("many", max_tokens=2, n=2, prompt=["the", "a"])
    write(place, [*good, *bad, vectors, many])
    # Far less room than lines at once, and than `many` needs: lines wait, none is refused for it.
    parts = answered(registry, place, EngineConfig(max_batch=2, max_queue=2))
    heads = [part[0] for part in parts]
    assert [(head["completed"], head["failed"]) for head in heads] == [(32, 0), (28, 4), (2, 1)]
    lines = {line["custom_id"]: line for part in parts for line in part[1:] if line["error"] is None}
    assert lines.keys() == {*(f"good-{n}" for n in range(60)), "chat", "long", "other", "vectors", "many"}
    statuses = {name: lines[name]["response"]["status_code"] for name in ("good-7", "chat", "long", "other", "many")}
    assert statuses == {"good-7": 200, "chat": 400, "long": 400, "other": 404, "many": 200}
    assert lines["long"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert [choice["index"] for choice in lines["many"]["response"]["body"]["choices"]] == [0, 1, 2, 3]
    assert len(lines["vectors"]["response"]["body"]["data"]) == 2
    assert len({line["id"] for line in lines.values()}) == len(lines)
    told = [line for part in parts for line in part[1:] if line["error"]]
    assert [(line["custom_id"], line["error"]["code"], line["error"]["line"]) for line in told] == [
        ("good-7", "duplicate_custom_id", 64),
        ("nowhere", "invalid_url", 65),
    ]
    assert all(line["response"] is None for line in told)
    usage = [line["response"]["body"]["usage"] for line in lines.values() if line["response"]["status_code"] == 200]
    for kind in ("prompt_tokens", "completion_tokens"):
        assert sum(head[kind] for head in heads) == sum(each.get(kind, 0) for each in usage)


@pytest.mark.slow
def test_a_line_is_answered_by_the_adapter_that_it_names(registry: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = {"target_modules": "all-linear", "r": 8, "lora_alpha": 64}
    sources = {
        "terse": str(random_adapter(tmp_path / "terse", tiny_model_dir, seed=1, **settings)),
        "verbose": str(random_adapter(tmp_path / "verbose", tiny_model_dir, seed=2, **settings)),
    }
    tokens = AutoTokenizer.from_pretrained(tiny_model_dir)("the model reads a line")["input_ids"]
    scored = {"prompt": tokens, "max_tokens": 0, "echo": True, "logprobs": 0}
    place = str(tmp_path / "in.jsonl")
    vectors = {"method": "POST", "url": "/v1/embeddings"}
    write(
        place,
        [
            request("base", model="tiny", **scored),
            *(request(name, model=name, **scored) for name in sources),
            request("unnamed", **scored),
            *({**vectors, "custom_id": f"{m} vector", "body": {"input": "a", "model": m}} for m in ("tiny", "terse")),
            request("other", model="other"),
        ],
    )
    [part] = answered(registry, place, EngineConfig(max_batch=8), "verbose", **sources)
    bodies = {line["custom_id"]: line["response"]["body"] for line in part[1:]}
    assert bodies["other"]["error"]["code"] == "model_not_found"
    found = {name: bodies[name]["choices"][0]["logprobs"]["token_logprobs"][1:] for name in (*sources, "unnamed")}
    for name, source in sources.items():
        assert bodies[name]["model"] == name
        assert found[name] == pytest.approx(adapted_scores(tiny_model_dir, Path(source), tokens), abs=1e-5)
    assert (bodies["unnamed"]["model"], found["unnamed"]) == ("verbose", pytest.approx(found["verbose"], abs=1e-5))
    base = bodies["base"]["choices"][0]["logprobs"]["token_logprobs"][1:]
    assert base != pytest.approx(found["terse"], abs=1e-2)
    embedded = [bodies[f"{name} vector"]["data"][0]["embedding"] for name in ("tiny", "terse")]
    assert embedded[0] != pytest.approx(embedded[1], abs=1e-3)


@pytest.mark.slow
def test_a_model_that_was_changed_ends_the_batch(registry: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    other = Registry(str(tmp_path / "registry"))
    version = other.publish("tiny", str(tiny_model_dir), {})
    weights = Path(version.model_place) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    write(str(tmp_path / "in.jsonl"), [request("a")])
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        answered(other.place, str(tmp_path / "in.jsonl"), EngineConfig())


@pytest.mark.slow
def test_bad_input_is_one_line_before_anything_starts(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, output = str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")
    config = tmp_path / "serve.yaml"
    config.write_text(f"{{registry: {registry}, models: [{{model: tiny@1, served_as: chat}}]}}")
    write(place, [request("a")])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "taken.jsonl").write_text("precious")
    where = ["--model", "tiny", "--registry", registry]
    for arguments, message in (
        ([place, output, "--model", "none", "--registry", registry], "no model 'none'"),
        ([str(tmp_path / "empty.jsonl"), output, *where], "empty.jsonl holds no request"),
        ([str(tmp_path / "nowhere.jsonl"), output, *where], "nowhere.jsonl"),
        ([place, place, *where], "both read and written"),
        ([place, str(tmp_path / "taken.jsonl"), *where], "taken.jsonl is there already"),
        ([place, output, "--model", "tiny", "--config", str(config)], "the config serves chat"),
        ([place, output, *where, "--set", "http.port=1"], "--set needs --config"),
    ):
        monkeypatch.setattr(sys, "argv", ["raymodels", "batch", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        assert (ended.value.code, told.out) == (2, "")
        assert message in told.err
        assert told.err.count("\n") == 1
    assert (tmp_path / "taken.jsonl").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "in.jsonl", "serve.yaml", "taken.jsonl"]


def test_a_configs_model_by_its_name_or_in_another_version(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("{registry: r, models: [{model: tiny@prod, served_as: chat, cpus: 2, engine: {max_batch: 8}}]}")
    for reference, version in (("chat", "tiny@prod"), ("tiny@3", "tiny@3")):
        settings = _settings(config, [], None, reference, None)
        (model,) = settings.models
        assert (settings.registry, model.model, model.public_name, model.cpus) == ("r", version, "chat", 2)
        assert model.engine.max_batch == 8
    settings = _settings(config, ["models.0.adapters={terse: ./terse}"], None, "terse", None)
    assert (settings.models[0].public_name, settings.models[0].adapters) == ("chat", {"terse": "./terse"})
    settings = _settings(config, ["models.0.cpus=3"], "other", "chat", None)
    assert (settings.registry, settings.models[0].cpus) == ("other", 3)
    settings = _settings(None, None, None, "tiny@3", 0.5)
    assert (settings.registry, settings.models[0].public_name, settings.models[0].cpus) == ("./registry", "tiny", 0.5)
