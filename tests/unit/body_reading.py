"""Reads hostile bodies as a gateway does, in a process of its own: what became of each, and what it cost the process.

python -m tests.unit.body_reading FOLDER: a line of JSON for each file of the folder.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

from raymodels.serve.bodies import Bodies
from raymodels.serve.body_reader import READERS
from raymodels.serve.schema import Refused

DEEP, DEEPER = 600, 100_000
MIB = 2**20

Case = tuple[str, str, bytes]


def repeated(item: str, size: int, begin: str = "[", end: str = "]") -> str:
    return begin + ",".join([item] * (size // (len(item) + 1))) + end


def numbered(item: str, size: int) -> str:
    """An object of ``item``s, in each of which % stands for another number."""
    return "{" + ",".join(item.replace("%", str(number)) for number in range(size // (len(item) + 5))) + "}"


def chat(messages: str = '[{"role":"user","content":"x"}]', **fields: str) -> str:
    return _body(messages=messages, **fields)


def completion(prompt: str = '"x"', **fields: str) -> str:
    return _body(prompt=prompt, **fields)


def _body(**fields: str) -> str:
    return '{"model":"m",' + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"


def nested(levels: int) -> str:
    return '{"a":[' * (levels // 2) + "]}" * (levels // 2)


def hostile(size: int) -> Iterator[Case]:
    """Name, reader and body."""
    for name, reader, body in (*_chats(size), *_completions(size), *_others(size), *_depths()):
        yield name, reader, body if isinstance(body, bytes) else body.encode()
    yield "invalid UTF-8", "read_chat", b"\xff" * size
    yield (
        "UTF-8 that ends badly",
        "read_completion",
        completion('"' + "x" * size + '%"').encode().replace(b"%", b"\xff"),
    )


def _chats(size: int) -> Iterator[tuple[str, str, str]]:
    text = '{"type":"text","text":"a"}'
    call = '{"id":"1","type":"function","function":{"name":"f","arguments":"{}"}}'
    for name, body in {
        "empty parts": chat('[{"role":"user","content":' + repeated("{}", size) + "}]"),
        "parts": chat('[{"role":"user","content":' + repeated(text, size) + "}]"),
        "one bad part": chat('[{"role":"user","content":[' + repeated(text, size, "", ",5]}]")),
        "empty messages": chat(repeated("{}", size)),
        "messages of lists": chat(repeated("[]", size)),
        "messages": chat(repeated('{"role":"user","content":""}', size)),
        "calls": chat('[{"role":"assistant","tool_calls":' + repeated(call, size) + "}]"),
        "role": chat('[{"role":"' + "r" * size + '","content":""}]'),
        "unknown fields": chat()[:-1] + "," + numbered('"field%":1', size)[1:],
        "unknown field": chat(**{"u" * size: "1"}),
        "unknown fields of a message": chat('[{"role":"user","content":"x",' + numbered('"f%":1', size)[1:] + "]"),
        "metadata": chat(metadata=repeated("{}", size)),
        "tools": chat(tools=repeated("{}", size)),
        "large tools": chat(
            tools='[{"type":"function","function":{"name":"f","parameters":{"enum":' + repeated("{}", size) + "}}}]"
        ),
        "schema": chat(
            response_format='{"type":"json_schema","json_schema":{"name":"n","schema":{"enum":'
            + repeated("1", size)
            + "}}}"
        ),
        "surrogates": chat('[{"role":"user","content":"' + "\\ud800" * (size // 6) + '"}]'),
        "duplicate keys": chat(user=repeated('"x"', size, '1,"user":[')),
    }.items():
        yield name, "read_chat", body


def _completions(size: int) -> Iterator[tuple[str, str, str]]:
    for name, body in {
        "bad bias": completion(logit_bias=numbered('"x%":1', size)),
        "bias too large": completion(logit_bias=numbered('"%":101', size)),
        "bias": completion(logit_bias=numbered('"%":-1.5', 4 * size)),
        "token ids": completion(repeated("1", size)),
        "as many token ids as may be": completion(repeated("1234567", 8 * size)),
        "lists of token ids": completion(repeated("[1,2]", size)),
        "floats": completion(repeated("1.0", size)),
        "strings": completion(repeated('"a"', size)),
        "empty lists": completion(repeated("[]", size)),
        "text": completion('"' + "x" * size + '"'),
        "stops": completion(stop=repeated('"a"', size)),
        "stop": completion(stop='"' + "a" * size + '"'),
        "model": completion().replace('"m"', '"' + "m" * size + '"'),
        "digits": completion(seed="1" * size),
        "digits of a fraction": completion(temperature="0." + "1" * size),
        "no object": repeated("{}", size),
        "a number": "1" * size,
        "a string": '"' + "x" * size + '"',
        "no JSON": "[1," * (size // 3),
        "cut": completion(repeated("{}", size))[:-2],
    }.items():
        yield name, "read_completion", body


def _others(size: int) -> Iterator[tuple[str, str, str]]:
    yield "texts to embed", "read_embedding", _body(input=repeated('"a"', size))
    yield "empty texts to embed", "read_embedding", _body(input=repeated('""', size))
    yield "messages to tokenize", "read_tokenize", _body(messages=repeated("{}", size))
    yield "tokens", "read_detokenize", _body(tokens=repeated("7", size))
    yield "wrong tokens", "read_detokenize", _body(tokens=repeated("-7", size))


def _depths() -> Iterator[tuple[str, str, str]]:
    schema = '{"type":"json_schema","json_schema":{"name":"n","schema":%}}'
    tool = '[{"type":"function","function":{"name":"f","parameters":%}}]'
    for levels in (DEEP, DEEPER):
        for field, form in (("metadata", "%"), ("user", "[%]"), ("response_format", schema), ("tools", tool)):
            yield f"{field} {levels} deep", "read_chat", chat(**{field: form.replace("%", nested(levels))})
        for field in ("prompt", "stop", "logit_bias", "unknown"):
            yield f"{field} {levels} deep", "read_completion", _body(**({"prompt": '"x"'} | {field: nested(levels)}))
        yield f"input {levels} deep", "read_embedding", _body(input="[" * levels + "]" * levels)


async def longest_step_s(seen: list[float]) -> None:
    """The most processor time that the event loop's thread spends before another task gets its turn."""
    before = time.thread_time()
    while True:
        await asyncio.sleep(0)
        now = time.thread_time()
        seen[0], before = max(seen[0], now - before), now


def held_bytes() -> int:
    """What this process holds now, in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def most_bytes() -> int:
    """What it ever held. (`ru_maxrss` would begin with what the process held that has started this one.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


async def cost(reading: Awaitable[Any]) -> dict[str, Any]:
    """What became of it, and the longest step of the event loop meanwhile."""
    longest = [0.0]
    ticking = asyncio.create_task(longest_step_s(longest))
    await asyncio.sleep(0)
    try:
        found: dict[str, Any] = {"read": type(await reading).__name__}
    except Refused as error:
        problem = error.problem
        found = {"status": problem.status, "message": problem.message, "param": problem.param}
    ticking.cancel()
    return found | {"stall_s": longest[0]}


async def main(folder: Path) -> None:
    """Read the bodies in the files of a folder, which are named NUMBER.READER."""
    bodies = Bodies(8 * MIB)
    warm = b'{"model":"m","prompt":"' + b"x" * MIB + b'"}'
    await bodies.read(warm, READERS["read_completion"], "t", asyncio.get_running_loop().time() + 60)
    del warm
    before = held_bytes()
    for file in sorted(folder.iterdir()):
        body = file.read_bytes()
        reading = bodies.read(body, READERS[file.suffix[1:]], "t", asyncio.get_running_loop().time() + 60)
        found = await cost(reading)
        print(json.dumps({"bytes": len(body), "grown": most_bytes() - before} | found), flush=True)
        del body, reading
    await bodies.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
