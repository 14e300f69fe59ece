"""Deltas as answers: whole and in chunks, and both the same."""

from __future__ import annotations

import base64
import struct
from typing import Any

import openai.types as api
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from raymodels.serve.answers import Usage, answer_to, embeddings
from raymodels.serve.engine import Alternative, Delta, Token
from raymodels.serve.schema import read_chat, read_completion, read_embedding

MESSAGES = [{"role": "user", "content": "x"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
OPTIONS = {"stream": True, "stream_options": {"include_usage": True}}


def token(text: str, logprob: float | None, offset: int, **top: float) -> Token:
    alternatives = tuple(Alternative(0, name.encode(), value) for name, value in top.items())
    return Token(0, text.encode(), logprob, offset, alternatives)


def usage_of(deltas: list[Delta]) -> Usage:
    usage = Usage(prompt_tokens=3)
    for delta in deltas:
        usage.add(delta)
    return usage


def test_a_completion_in_chunks_is_the_whole_one() -> None:
    deltas = [
        Delta(1, "b", 1, (token("b", -1.0, 0, b=-1.0),)),
        Delta(0, "a", 2, (token("", -2.0, 0, z=-0.5), token("a", -0.25, 0, a=-0.25)), prompt=(token("p", None, 0),)),
        Delta(1, "c", 2, (token("c", -1.5, 1, c=-1.5),), finish="length"),
        Delta(0, "", 3, finish="stop"),
    ]
    answer = answer_to(read_completion({"model": "m", "prompt": "x", "logprobs": 1, "n": 2, **OPTIONS}))
    whole = answer.whole(deltas, usage_of(deltas))
    assert [(c["index"], c["text"], c["finish_reason"]) for c in whole["choices"]] == [
        (0, "a", "stop"),
        (1, "bc", "length"),
    ]
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert whole["choices"][0]["logprobs"] == {
        "tokens": ["p", "", "a"],
        "token_logprobs": [None, -2.0, -0.25],
        "top_logprobs": [None, {"z": -0.5, "": -2.0}, {"a": -0.25}],
        "text_offset": [0, 0, 0],
    }
    chunks = [answer.chunk(delta) for delta in deltas]
    assert all(chunk is not None and chunk["usage"] is None and chunk["id"] == whole["id"] for chunk in chunks)
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk and chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == whole["choices"][index]["text"]
        assert [choice["finish_reason"] for choice in own][-1] == whole["choices"][index]["finish_reason"]
        names = [name for choice in own for name in choice["logprobs"]["tokens"]]
        assert names == whole["choices"][index]["logprobs"]["tokens"]
    assert answer.usage_chunk(usage_of(deltas))["choices"] == []


def streamed(body: dict[str, Any], deltas: list[Delta]) -> tuple[list[dict[str, Any]], Any]:
    """The chunks of a stream, and what OpenAI's client puts together from them."""
    answer = answer_to(read_chat({"model": "m", "messages": MESSAGES, **OPTIONS, **body}))
    chunks = [*answer.opening(), *(chunk for delta in deltas if (chunk := answer.chunk(delta)) is not None)]
    state: Any = ChatCompletionStreamState()
    for chunk in [*chunks, answer.usage_chunk(usage_of(deltas))]:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    return chunks, state.current_completion_snapshot


def whole(body: dict[str, Any], deltas: list[Delta]) -> ChatCompletion:
    answer = answer_to(read_chat({"model": "m", "messages": MESSAGES, **body}))
    return ChatCompletion.model_validate(answer.whole(deltas, usage_of(deltas)))


def test_a_chat_in_chunks_is_the_whole_one() -> None:
    deltas = [Delta(0, "on", 1), Delta(0, "e", 2, (token("e", -0.5, 2, e=-0.5),)), Delta(0, "", 3, finish="stop")]
    for logprobs in (False, True):
        body = {"logprobs": logprobs, "top_logprobs": 1 if logprobs else 0}
        chunks, snapshot = streamed(body, deltas)
        choice = whole(body, deltas).choices[0]
        assert snapshot.choices[0].message.content == choice.message.content == "one"
        assert snapshot.choices[0].finish_reason == choice.finish_reason == "stop"
        assert snapshot.usage.completion_tokens == 3
        assert (snapshot.choices[0].logprobs is not None) == logprobs
        if logprobs:
            assert snapshot.choices[0].logprobs.content == choice.logprobs.content
            assert choice.logprobs.content[0].top_logprobs[0].token == "e"
        assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "on", "e", None]


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_calls_in_chunks_are_the_whole_ones(finish: Any) -> None:
    text = (
        'Now.<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>{"name": "f", "arguments": {}}'
    )
    pieces = [text[at : at + 5] for at in range(0, len(text), 5)]
    deltas = [Delta(1, piece, at + 1, finish=None) for at, piece in enumerate(pieces)]
    deltas += [Delta(1, "</tool_call>", 99, finish=finish), Delta(0, "free", 1, finish="stop")]
    chunks, snapshot = streamed({"tools": TOOLS, "n": 2}, deltas)
    free, called = whole({"tools": TOOLS, "n": 2}, deltas).choices
    assert (free.message.content, free.message.tool_calls, free.finish_reason) == ("free", None, "stop")
    assert called.finish_reason == ("tool_calls" if finish == "stop" else "length")
    assert called.message.content == "Now."
    for choice in (called, snapshot.choices[1]):
        assert [call.function.arguments for call in choice.message.tool_calls] == ['{"a": 1}', "{}"]
        assert [call.function.name for call in choice.message.tool_calls] == ["f", "f"]
    assert snapshot.choices[1].finish_reason == called.finish_reason
    empty = [chunk for chunk in chunks if not chunk["choices"][0]["delta"] and not chunk["choices"][0]["finish_reason"]]
    assert not empty
    first = next(chunk["choices"][0]["delta"]["tool_calls"][0] for chunk in chunks if "tool_calls" in str(chunk))
    assert first["function"]["name"] == "f" and first["id"] and first["type"] == "function"


def test_nothing_but_a_call_has_no_content() -> None:
    deltas = [Delta(0, '{"name": "f", "arguments": {}}', 9, finish="stop")]
    message = whole({"tools": TOOLS, "tool_choice": "required"}, deltas).choices[0].message
    assert message.content is None and message.tool_calls
    untouched = whole({"tools": TOOLS, "tool_choice": "none"}, deltas).choices[0].message
    assert untouched.content == deltas[0].text and not untouched.tool_calls


def test_embeddings_in_base64_are_little_endian_floats() -> None:
    vectors = [[0.5, -0.25], [1.0, 3.0]]
    plain = embeddings(read_embedding({"model": "m", "input": ["a", "b"]}), vectors, 2)
    packed = embeddings(read_embedding({"model": "m", "input": ["a", "b"], "encoding_format": "base64"}), vectors, 2)
    api.CreateEmbeddingResponse.model_validate(plain)
    assert [each["embedding"] for each in plain["data"]] == vectors
    decoded = [list(struct.unpack("<2f", base64.b64decode(each["embedding"]))) for each in packed["data"]]
    assert decoded == vectors and packed["usage"] == {"prompt_tokens": 2, "total_tokens": 2}


def test_cached_tokens_are_told_where_they_are_counted() -> None:
    assert Usage(5, cached_tokens=3).body()["prompt_tokens_details"] == {"cached_tokens": 3}
    assert "prompt_tokens_details" not in Usage(5).body()
