"""Hostile bodies: wherever one goes wrong, it costs the gateway little memory and its event loop next to no time."""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from raymodels.serve import body_reader, schema
from raymodels.serve.bodies import SMALL_BYTES, Bodies
from raymodels.serve.body_reader import READERS, read, read_packed
from raymodels.serve.confined import Busy, Confined, Failed, Lost, TooLarge, TooLong, Unfinished
from raymodels.serve.schema import Refused
from raymodels.serve.sealed import Sealed, unpacked
from raymodels.serve.wire import MAX_TOKEN_IDS, Wire
from tests.unit.body_reading import MIB, chat, completion, hostile, nested, repeated

STALL_S = 0.05
WHOLE = ("empty parts", "text", "token ids")
"""Cases that are as large as a body may be."""
ACCEPTED = {"parts", "metadata", "surrogates", "duplicate keys", "bias", "as many token ids as may be", "text", "stop"}
ACCEPTED |= {"model", "digits of a fraction", "token ids", "tokens", "floats"}
"""At one mebibyte."""
SMALL_GROWTH = 12 * MIB
"""Of any small body, which is read in the process itself."""


def reading(folder: Path, size: int, *names: str) -> dict[str, dict[str, Any]]:
    """What reading the bodies of `hostile` costs a process, by name."""
    cases = [case for case in hostile(size) if not names or case[0] in names]
    for number, (_, reader, body) in enumerate(cases):
        (folder / f"{number:03}.{reader}").write_bytes(body)
    command = [sys.executable, "-m", "tests.unit.body_reading", str(folder)]
    lines = subprocess.run(command, capture_output=True, check=True).stdout.splitlines()
    return {name: json.loads(line) for (name, *_), line in zip(cases, lines, strict=True)}


@pytest.mark.parametrize(("size", "names"), [(SMALL_BYTES - 2**13, ()), (MIB, ()), (8 * MIB - 2**19, WHOLE)])
def test_a_body_costs_the_gateway_next_to_nothing(tmp_path: Path, size: int, names: tuple[str, ...]) -> None:
    most = 0
    for name, found in reading(tmp_path, size, *names).items():
        most = max(most, found["bytes"])
        assert found["stall_s"] <= STALL_S, (name, found)
        assert found["grown"] <= max(4 * most, SMALL_GROWTH if size < MIB else 0), (name, found)
        if "status" in found:
            assert (found["status"], len(found["message"]) < 1200) == (400, True), (name, found)
        if size == MIB:
            assert ("read" in found) == (name in ACCEPTED), (name, found)


def test_of_many_faults_only_the_first_is_looked_for() -> None:
    seen = set[int]()

    def lists(part: Any) -> None:
        if id(part) in seen:
            return
        seen.add(id(part))
        if isinstance(part, dict):
            assert part.get("type") != "list" or part["fail_fast"], part
            part = list(part.values())
        if isinstance(part, list | tuple):
            for each in part:
                lists(each)

    def kinds(kind: type[BaseModel]) -> list[type[BaseModel]]:
        return [kind, *(deeper for below in kind.__subclasses__() for deeper in kinds(below))]

    for kind in kinds(Wire):
        lists(kind.__pydantic_core_schema__)
    for body in ({"a": 1, "b": 2}, {"model": "m", "prompt": [[]] * 9, "logit_bias": {"x": 1, "y": 1}}):
        with pytest.raises(schema.ValidationError) as error:
            schema.CompletionRequest.model_validate(body)
        assert error.value.error_count() <= 6


@pytest.mark.parametrize("levels", [110, 600, 900, 5000, 100_000])
@pytest.mark.parametrize("field", ["messages", "metadata", "tools", "response_format", "unknown", "stop"])
def test_what_is_nested_too_deep_is_refused(field: str, levels: int) -> None:
    body = json.loads(chat()) | {field: "%"}
    for confined in (False, True):
        text = json.dumps(body).replace('"%"', nested(levels)).encode()
        if confined:
            problem = unpacked(read_packed(b"read_chat\n" + text))
        else:
            with pytest.raises(Refused, match="nested over 100 levels") as refused:
                read(text, READERS["read_chat"])
            problem = refused.value.problem
        assert problem.status == 400


def test_arguments_nested_too_deep_stay_text() -> None:
    deep = nested(600)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": deep}}
    request = schema.read_chat({"model": "m", "messages": [{"role": "assistant", "tool_calls": [call]}]})
    assert request.messages[0].plain()["tool_calls"][0]["function"]["arguments"] == deep


def test_errors_repeat_little_and_only_what_can_be_sent() -> None:
    for body in ({"model": "m", "prompt": "x", "f" * MIB: 1}, {"model": "m", "prompt": "x", "\ud800": 1}):
        with pytest.raises(Refused) as refused:
            schema.read_completion(body)
        problem = refused.value.problem
        assert len(problem.body()["error"]["message"].encode()) < 1200
        assert len((problem.param or "").encode()) < 1200


@pytest.mark.parametrize(
    ("reader", "body"),
    [
        ("read_completion", completion("[1,2,3]", logit_bias='{"1":-2,"7":0.5}')),
        ("read_completion", completion("[[1,2],[3]]", stop='["a"]', seed="3", stream="true")),
        ("read_completion", completion('["a","\\ud800"]')),
        ("read_chat", chat('[{"role":"user","content":[{"type":"text","text":"a"}]}]', tools="[]")),
        ("read_embedding", '{"model":"m","input":[[1,2],[3,4]]}'),
        ("read_tokenize", '{"model":"m","prompt":"x"}'),
        ("read_tokenize", chat()),
        ("read_detokenize", '{"tokens":[1,2,2147483647]}'),
        ("read_detokenize", '{"tokens":[]}'),
    ],
)
def test_a_replica_gets_the_same_request_from_either_reader(reader: str, body: str) -> None:
    here = read(body.encode(), READERS[reader])
    sealed = unpacked(read_packed(f"{reader}\n{body}".encode()))
    assert not any(isinstance(value, list) and value and isinstance(value[0], int) for value in dict(sealed).values())
    arrived = pickle.loads(pickle.dumps(sealed))
    for name in ("prompts", "inputs"):
        if hasattr(here, name):
            assert getattr(arrived, name) == getattr(here, name)
            assert len(getattr(sealed, name)) == len(getattr(here, name))
    loose = {"prompt", "input", "logit_bias"}
    whole = reader in ("read_tokenize", "read_detokenize")
    left, right = (
        {key: value for key, value in dict(each).items() if whole or key not in loose} for each in (arrived, here)
    )
    assert left == right
    assert {int(id): bias for id, bias in getattr(arrived, "logit_bias", {}).items()} == {
        int(id): bias for id, bias in getattr(here, "logit_bias", {}).items()
    }


def test_most_token_ids_are_of_all_prompts() -> None:
    half = [7] * (MAX_TOKEN_IDS // 2)
    assert len(schema.read_completion({"model": "m", "prompt": [half, half]}).prompts) == 2
    with pytest.raises(Refused, match="1,048,576 token ids at most"):
        schema.read_completion({"model": "m", "prompt": [half, half, [7]]})


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TooLong("takes more than 5 s"), 413),
        (TooLarge("takes more than 9 MiB"), 413),
        (Failed("SIGSEGV"), 400),
        (Lost("SIGKILL"), 503),
        (Busy("no 5 s"), 503),
    ],
)
def test_a_process_that_does_not_read_its_body(error: Unfinished, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(self: Confined, data: bytes) -> bytes:
        raise error

    monkeypatch.setattr(Confined, "call", fails)
    with pytest.raises(Refused) as refused:
        asyncio.run(_read(Bodies(MIB)))
    assert refused.value.problem.status == status
    assert (refused.value.problem.retry_after_s is not None) == (status == 503)


def test_what_takes_too_much_memory_is_refused_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymodels.serve.bodies.MEMORY_BYTES", MIB)
    monkeypatch.setattr("raymodels.serve.bodies.MEMORY_FACTOR", 1)

    async def main() -> None:
        bodies = Bodies(MIB)
        try:
            await _read(bodies)
        finally:
            await bodies.close()

    with pytest.raises(Refused, match="the body takes more than 2 MiB to be read") as refused:
        asyncio.run(main())
    assert refused.value.problem.status == 413


async def _read(bodies: Bodies) -> Any:
    body = chat(metadata=repeated("{}", SMALL_BYTES)).encode()
    return await bodies.read(body, READERS["read_chat"], "t", asyncio.get_running_loop().time() + 30)


def test_large_bodies_of_a_tenant_are_read_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[str] = []
    most: list[int] = []

    async def slow(self: Confined, data: bytes) -> bytes:
        running.append("")
        most.append(len(running))
        await asyncio.sleep(0.01)
        running.pop()
        return read_packed(data)

    monkeypatch.setattr(Confined, "call", slow)
    checked: list[int] = []

    async def main(tenants: list[str]) -> None:
        bodies, until = Bodies(MIB), asyncio.get_running_loop().time() + 30
        body = completion('"' + "x" * SMALL_BYTES + '"').encode()
        reads: list[Awaitable[Any]] = [
            bodies.read(body, READERS["read_completion"], tenant, until, lambda: checked.append(1))
            for tenant in tenants
        ]
        gone = asyncio.ensure_future(reads[0])
        await asyncio.sleep(0.002)
        gone.cancel()  # who leaves does not make room while their body is read
        await asyncio.gather(*reads[1:])

    asyncio.run(main(["a"] * 4))
    assert max(most) == 1 and len(checked) == 8
    asyncio.run(main(["a", "b", "a", "b"]))
    assert max(most) == 2


def test_readers_are_known_by_their_names() -> None:
    readers: dict[str, Callable[[Any], Any]] = body_reader.READERS
    assert all(getattr(schema, name) is reader for name, reader in readers.items())
    assert not isinstance(unpacked(read_packed(b"read_detokenize\n" + b'{"tokens":[1]}')).tokens, list)
    assert isinstance(unpacked(read_packed(b"read_detokenize\n" + b'{"tokens":[1]}')).tokens, Sealed)
