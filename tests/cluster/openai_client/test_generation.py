"""Completions and chats: streams, usage, log-probabilities, prompts, choices and sampling."""

from __future__ import annotations

import itertools
from typing import Any

import openai
import pytest

from tests.cluster.openai_client.asking import (
    GREEDY,
    PROMPT,
    ROUTES,
    ask,
    logprobs_of,
    said,
    text_of,
)

# Streams and usage


@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_with_usage(ai: openai.OpenAI, route: str) -> None:
    whole = ask(ai, route, **GREEDY)
    chunks = list(ask(ai, route, **GREEDY, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks[:-1])
    assert "".join(text_of(chunk.choices[0]) for chunk in chunks[:-1]) == text_of(whole.choices[0])
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1


@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_without_usage(ai: openai.OpenAI, route: str) -> None:
    chunks = list(ask(ai, route, **GREEDY, stream=True, stream_options={"include_usage": False}))
    assert not any("usage" in chunk.model_fields_set for chunk in chunks)


def test_usage_counts_tokens(ai: openai.OpenAI, tokenizer: Any) -> None:
    usage = ai.completions.create(
        model="tiny", prompt=[PROMPT, "x"], n=2, max_tokens=5, logit_bias={str(tokenizer.eos_token_id): -100}
    ).usage
    prompts = sum(len(tokenizer(prompt).input_ids) for prompt in (PROMPT, "x"))
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompts, 20, prompts + 20)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("reason", ["length", "stop"])
def test_the_finish_reason_is_on_the_last_text(
    ai: openai.OpenAI, tokenizer: Any, route: str, reason: str, stream: bool
) -> None:
    fields = dict(GREEDY) if reason == "length" else {**GREEDY, "stop": said(ai, route, **GREEDY)[6:9]}
    if not stream:
        assert [choice.finish_reason for choice in ask(ai, route, **fields).choices] == [reason]
        return
    reasons = [chunk.choices[0].finish_reason for chunk in ask(ai, route, **fields, stream=True)]
    assert reasons == [None] * (len(reasons) - 1) + [reason]


# Log-probabilities


@pytest.mark.parametrize("count", [0, 1, 5, 20])
@pytest.mark.parametrize("route", ROUTES)
def test_logprobs(ai: openai.OpenAI, route: str, count: int) -> None:
    asked = {"logprobs": True, "top_logprobs": count} if route == "chat" else {"logprobs": count}
    whole = ask(ai, route, **GREEDY, **asked).choices[0]
    found = logprobs_of(route, whole)
    assert all(token.startswith("bytes:") or token in text_of(whole) for token, *_ in found)
    for _, logprob, tops in found:
        assert len(tops) == (count if route == "chat" or count else 1)  # a completion names the token itself too
        assert tops == sorted(tops, reverse=True)
        if count:
            assert logprob == tops[0]  # greedy
    chunks = [chunk.choices[0] for chunk in ask(ai, route, **GREEDY, **asked, stream=True)]
    streamed = [each for choice in chunks if choice.logprobs for each in logprobs_of(route, choice)]
    assert [token for token, *_ in streamed] == [token for token, *_ in found]
    assert [value for _, value, _ in streamed] == pytest.approx([value for _, value, _ in found], abs=1e-4)


@pytest.mark.parametrize("route", ROUTES)
def test_no_logprobs_unless_asked_for(ai: openai.OpenAI, route: str) -> None:
    assert ask(ai, route, **GREEDY).choices[0].logprobs is None


def test_text_offsets_say_where_tokens_begin(ai: openai.OpenAI, tokenizer: Any) -> None:
    bias = {str(tokenizer("x").input_ids[0]): 100}
    fields = {"prompt": "the naïve café 模型 🙂", "max_tokens": 3, "logprobs": 0, "echo": True, "logit_bias": bias}
    choice = ask(ai, "completions", **fields).choices[0]
    assert choice.text == "the naïve café 模型 🙂xxx"
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[offset : offset + len(token)] == token


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("new", [0, 1, 8])
def test_echo_with_logprobs(ai: openai.OpenAI, tokenizer: Any, new: int, as_ids: bool, stream: bool) -> None:
    ids = tokenizer(PROMPT).input_ids
    fields = {"prompt": ids if as_ids else PROMPT, "max_tokens": new, "temperature": 0, "echo": True, "logprobs": 1}
    # As lm-eval needs it: a token that ends the text is counted and listed like any other.
    fields["logit_bias"] = {str(tokenizer.eos_token_id): 100 if new == 1 else -100}
    if stream:
        choices = [chunk.choices[0] for chunk in ask(ai, "completions", **fields, stream=True)]
        text = "".join(choice.text for choice in choices)
        values = [value for choice in choices for value in choice.logprobs.token_logprobs]
    else:
        answer = ask(ai, "completions", **fields)
        text, values = answer.choices[0].text, answer.choices[0].logprobs.token_logprobs
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), new)
    assert text.startswith(PROMPT)
    assert (text == PROMPT) == (new < 2)
    assert len(values) == len(ids) + new
    assert [value is None for value in values] == [True] + [False] * (len(values) - 1)


def test_a_chats_logprobs_are_of_its_text(ai: openai.OpenAI, tokenizer: Any) -> None:
    end = {str(tokenizer.eos_token_id): 100}
    answer = ask(ai, "chat", **GREEDY, logit_bias=end, logprobs=True)
    assert (answer.choices[0].message.content, answer.choices[0].logprobs.content) == ("", [])
    assert answer.usage.completion_tokens == 1


# Prompts and choices


@pytest.mark.parametrize("form", ["text", "list", "ids", "list of ids"])
def test_the_forms_of_a_prompt(ai: openai.OpenAI, tokenizer: Any, form: str) -> None:
    ids = tokenizer(PROMPT).input_ids
    prompt = {"text": PROMPT, "list": [PROMPT], "ids": ids, "list of ids": [ids]}[form]
    assert said(ai, "completions", prompt=prompt, **GREEDY) == said(ai, "completions", **GREEDY)


@pytest.mark.parametrize("as_ids", [False, True])
def test_several_prompts_are_numbered_through(ai: openai.OpenAI, tokenizer: Any, as_ids: bool) -> None:
    texts = ["the model", "模型 café"]
    prompts = [tokenizer(text).input_ids for text in texts] if as_ids else texts
    choices = ask(ai, "completions", prompt=prompts, n=2, **GREEDY).choices
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    single = [said(ai, "completions", prompt=text, **GREEDY) for text in texts]
    assert [choice.text for choice in choices] == [single[0], single[0], single[1], single[1]]


@pytest.mark.parametrize("route", ROUTES)
def test_streamed_choices_are_interleaved_by_index(ai: openai.OpenAI, route: str) -> None:
    fields = {"n": 3, "seed": 5, "max_tokens": 32, "temperature": 1}
    texts, order = [""] * 3, []
    for chunk in ask(ai, route, **fields, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += text_of(choice)
        order.append(choice.index)
    assert texts == [text_of(choice) for choice in ask(ai, route, **fields).choices]
    assert len(set(texts)) == 3
    changes = sum(one != other for one, other in itertools.pairwise(order))
    assert changes > 3  # not one choice after the other


@pytest.mark.parametrize("route", ROUTES)
def test_a_seed_repeats_every_choice(ai: openai.OpenAI, route: str) -> None:
    def texts(seed: int) -> list[str]:
        answer = ask(ai, route, n=3, seed=seed, temperature=1.2, max_tokens=12)
        return [text_of(choice) for choice in answer.choices]

    assert texts(9) == texts(9)
    assert len({*texts(9), *texts(900)}) == 6


# Sampling


@pytest.mark.parametrize("route", ROUTES)
def test_logit_bias(ai: openai.OpenAI, tokenizer: Any, route: str) -> None:
    (wanted,) = tokenizer("x").input_ids
    assert said(ai, route, max_tokens=6, logit_bias={str(wanted): 100}) == "xxxxxx"
    first = logprobs_of(route, ask(ai, route, **GREEDY, logprobs=True if route == "chat" else 0).choices[0])[0][0]
    banned = {str(id): -100 for id in range(len(tokenizer)) if tokenizer.decode([id]) == first}
    assert not said(ai, route, **GREEDY, logit_bias=banned).startswith(first)


@pytest.mark.parametrize("kind", ["presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("route", ROUTES)
def test_penalties(ai: openai.OpenAI, route: str, kind: str) -> None:
    free, bound = (set(said(ai, route, temperature=0, max_tokens=40, **{kind: value})) for value in (-2, 2))
    assert len(free) < len(bound)


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_a_stop_string_may_span_tokens(ai: openai.OpenAI, route: str, as_list: bool) -> None:
    whole = said(ai, route, temperature=0, max_tokens=32)
    stop = whole[9:14]
    fields = {"temperature": 0, "max_tokens": 32, "stop": ["never said", stop] if as_list else stop}
    assert said(ai, route, **fields) == whole[: whole.index(stop)]
    pieces = [text_of(chunk.choices[0]) for chunk in ask(ai, route, **fields, stream=True)]
    assert "".join(pieces) == whole[: whole.index(stop)]


@pytest.mark.parametrize("stop", [None, []])
def test_no_stop(ai: openai.OpenAI, stop: Any) -> None:
    assert said(ai, "completions", **GREEDY, stop=stop) == said(ai, "completions", **GREEDY)


def test_max_completion_tokens(ai: openai.OpenAI, tokenizer: Any) -> None:
    bias = {str(tokenizer.eos_token_id): -100}
    for name in ("max_completion_tokens", "max_tokens"):
        assert ask(ai, "chat", logit_bias=bias, **{name: 7}).usage.completion_tokens == 7
