"""Embeddings, models, headers, the asynchronous client, and what is ignored."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
import time
from typing import Any

import httpx
import openai
import pytest

from tests.cluster.openai_client.asking import (
    GREEDY,
    PROMPT,
    said,
)


@pytest.mark.parametrize("form", ["text", "list", "ids", "list of ids"])
def test_embeddings(ai: openai.OpenAI, tokenizer: Any, form: str) -> None:
    ids = tokenizer(PROMPT).input_ids
    given: Any = {"text": PROMPT, "list": [PROMPT, "x"], "ids": ids, "list of ids": [ids, tokenizer("x").input_ids]}
    answer = ai.embeddings.create(model="tiny", input=given[form], encoding_format="float")
    assert [each.index for each in answer.data] == list(range(2 if "list" in form else 1))
    assert answer.usage.prompt_tokens == len(ids) + (len(tokenizer("x").input_ids) if "list" in form else 0)
    for each in answer.data:
        assert math.hypot(*each.embedding) == pytest.approx(1, abs=1e-4)
    alone = ai.embeddings.create(model="tiny", input=PROMPT).data[0].embedding  # as base64, which the client reads
    assert answer.data[0].embedding == pytest.approx(alone, abs=1e-5)


def test_base64_embeddings(ai: openai.OpenAI) -> None:
    floats, coded = (
        ai.embeddings.create(model="tiny", input="x", encoding_format=kind).data[0].embedding
        for kind in ("float", "base64")
    )
    found = struct.unpack(f"<{len(floats)}f", base64.b64decode(str(coded)))
    assert found == pytest.approx(floats, abs=1e-6)


def test_models(ai: openai.OpenAI) -> None:
    assert [model.id for model in ai.models.list()] == ["tiny"]
    deadline = time.monotonic() + 10
    while not (model := ai.models.retrieve("tiny")).created:  # what the gateway knows of replicas may be seconds old
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "raymodels")


def test_headers(ai: openai.OpenAI) -> None:
    asked = ai.completions.with_raw_response
    answer = asked.create(model="tiny", prompt=PROMPT, max_tokens=1)
    assert answer.headers["x-request-id"] == answer.request_id == answer.parse()._request_id
    own = asked.create(model="tiny", prompt=PROMPT, max_tokens=1, extra_headers={"X-Request-Id": "my-own"})
    assert own.headers["x-request-id"] == "my-own"


@pytest.mark.parametrize(
    "fields",
    [{"user": "a"}, {"store": True, "metadata": {"a": "b"}}, {"service_tier": "auto"}, {"seed": None, "n": None}],
)
def test_what_changes_nothing_is_ignored(ai: openai.OpenAI, fields: dict[str, Any]) -> None:
    assert said(ai, "chat", **GREEDY, **fields) == said(ai, "chat", **GREEDY)


def test_the_client_for_asyncio(ai: openai.OpenAI, url: str, keys: dict[str, str]) -> None:
    prompts = [f"the model reads {number}" for number in range(12)]
    expected = [said(ai, "completions", prompt=prompt, **GREEDY) for prompt in prompts]

    async def stream(client: openai.AsyncOpenAI, prompt: str) -> str:
        chunks = await client.completions.create(model="tiny", prompt=prompt, **GREEDY, stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key=keys["team"], max_retries=0, timeout=60) as client:
            left = await client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1000, stream=True)
            await anext(left)
            await left.close()
            return await asyncio.gather(*(stream(client, prompt) for prompt in prompts))

    assert asyncio.run(main()) == expected


def test_a_stream_of_events_is_one(url: str, keys: dict[str, str]) -> None:
    """What the client does not show: the media type, and the event that ends it."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2, "stream": True}
    answer = httpx.post(f"{url}/completions", json=body, headers={"Authorization": f"Bearer {keys['team']}"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")
