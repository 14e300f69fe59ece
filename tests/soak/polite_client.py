"""A tenant who asks for little, evenly, and sees how long each answer takes and what it says.

A process beside the endpoint's, as `tests.soak.hostile_client` is: told by one line of JSON on stdin, it goes on until
stdin ends, and then for what it has asked.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp

PROMPTS = [f"def {name}(value):\n    return" for name in ("main", "größe", "parse", "write", "read", "count", "last")]
TIMEOUT_S = 60.0
OWN = ("127.0.0.2", 0)
"""Where its connections come from: not the address of the hostile clients, by which a server may tell them apart."""


@dataclass
class Polite:
    """One request of its."""

    prompt: int
    start_unix_s: float
    seconds: float = TIMEOUT_S
    status: int = 0
    text: str = ""
    """Of the answer, or what was answered instead of it."""


async def asked(http: aiohttp.ClientSession, number: int, tokens: int) -> Polite:
    """A completion, of which every third is streamed, and every fourth ends its connection."""
    found, start = Polite(number % len(PROMPTS), time.time()), time.perf_counter()
    body = {"prompt": PROMPTS[found.prompt], "max_tokens": tokens, "temperature": 0, "logit_bias": {"0": -100}}
    stream = number % 3 == 0
    body |= {"model": "tiny", "stream": stream}
    headers = {"Connection": "close"} if number % 4 == 0 else {}
    try:
        async with http.post("/v1/completions", json=body, headers=headers) as answer:
            content = await answer.text()
            found.status = answer.status
        found.text = _text(content, stream) if found.status == 200 else content[:300]
        found.seconds = time.perf_counter() - start
    except (aiohttp.ClientError, TimeoutError) as error:
        found.text = repr(error)
    return found


def _text(content: str, stream: bool) -> str:
    if not stream:
        return str(json.loads(content)["choices"][0]["text"])
    events = [event.removeprefix("data: ") for event in content.split("\n\n") if event]
    if events[-1] != "[DONE]":
        return f"cut off: {events[-1][:300]}"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


async def evenly(told: dict[str, Any]) -> None:
    """Ask at the rate that was told, whether or not what was asked before has been answered."""
    enough, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_reader(sys.stdin, enough.set)  # nothing more is said: it has ended
    headers = {"Authorization": f"Bearer {told['key']}"}
    timeout, connector = aiohttp.ClientTimeout(TIMEOUT_S), aiohttp.TCPConnector(limit=0, local_addr=OWN)
    url = f"http://{told['host']}:{told['port']}"
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector, headers=headers) as http:
        asking, number, start = set[asyncio.Task[None]](), 0, loop.time()

        async def ask(number: int) -> None:
            print(json.dumps(asdict(await asked(http, number, told["tokens"]))), flush=True)

        while not enough.is_set():
            asking.add(asyncio.create_task(ask(number)))
            number += 1
            await asyncio.sleep(start + number / told["per_s"] - loop.time())
        await asyncio.gather(*asking)


if __name__ == "__main__":
    asyncio.run(evenly(json.loads(sys.stdin.readline())))
