"""What goes wrong in one request stays there: with its neighbours, with the next one in its memory, with the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raymodels.config import EngineConfig
from raymodels.errors import ServeError
from raymodels.serve.engine import GenerateRequest, InvalidRequest, RequestFailed, Sampling
from raymodels.serve.transformers_engine import TransformersEngine
from tests.random_models import random_model
from tests.unit.endpoint import endpoint
from tests.unit.engines import GREEDY, deltas, reference, run, texts

pytestmark = pytest.mark.slow

POISON, GUILTY = 96, 97
"""A token whose embedding is NaN, and one that a planted fault is for; the answers that are compared hold neither."""
MISSING = 7
"""Tokens of the tokenizer, its last ones, that the model has no embeddings for."""
DRAWN = Sampling(temperature=1, seed=3, top_p=0.9)
LONG = "the model reads a line and learns what follows " * 4
SETTINGS = EngineConfig(max_batch=8, prefill_chunk=16, prefix_cache=0.25)


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    folder = random_model(tmp_path_factory.mktemp("sick"), tokenizer, vocab_size=len(tokenizer) - MISSING)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = float("nan")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def engine(model_dir: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(str(model_dir), SETTINGS)
    yield engine
    engine.close()


async def failed(work: Coroutine[Any, Any, Any]) -> str:
    with pytest.raises(RequestFailed) as failure:
        await work
    return str(failure.value)


def nothing_is_left(engine: TransformersEngine) -> bool:
    slabs = engine._model.cache._slabs.values()
    return not any(tensor.any() for slab in slabs for layer in slab.layers for tensor in layer)


def forward_of(engine: TransformersEngine, before: Callable[[list[int]], None]) -> None:
    """Have a function called with the tokens of each forward pass, before it."""
    forward = engine._model.forward

    def watched(works: Any, hidden: bool = False) -> Any:
        before([token for work in works for token in work.tokens])
        return forward(works, hidden)

    engine._model.forward = watched  # type: ignore[method-assign]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
@pytest.mark.parametrize("prompt", [[POISON], [5] * 40 + [POISON] + [6] * 40])
def test_values_that_are_not_finite_end_their_own_request(
    engine: TransformersEngine, model_dir: Path, sampling: Sampling, prompt: list[int]
) -> None:
    asked: list[dict[str, Any]] = [{}, {"n": 3}, {"logprobs": 2}, {"prompt_logprobs": 2}, {"max_tokens": 0}]

    async def together() -> list[str]:
        beside = asyncio.create_task(texts(engine, "the model", "beside", max_tokens=100))
        whole = engine.generate(GenerateRequest("e", prompt, 0, embed=True))
        sick = [deltas(engine, prompt, str(n), sampling=sampling, **each) for n, each in enumerate(asked)]
        errors = await asyncio.gather(*map(failed, [*sick, anext(whole)]))  # type: ignore[list-item]
        assert all("not finite" in error for error in errors)
        return await beside

    assert run(together()) == [reference(model_dir, "the model", 100)]
    engine.check()
    assert nothing_is_left(engine)


def test_freed_memory_carries_nothing_over(engine: TransformersEngine, model_dir: Path) -> None:
    """A short sequence gets the row of one that held NaN, and is attended to together with a longer one."""

    async def leave() -> None:
        stream = engine.generate(GenerateRequest("gone", [5] * 20 + [POISON] + [6] * 60, 100, sampling=GREEDY))
        before = engine.stats().tokens_in
        while engine.stats().tokens_in == before:
            await asyncio.sleep(0)
        await asyncio.sleep(0.003)  # some of its chunks are computed
        await stream.aclose()  # type: ignore[attr-defined]
        engine.abort("gone")
        while engine.stats().running:
            await asyncio.sleep(0.001)

    async def pair() -> Any:
        return await asyncio.gather(texts(engine, "x", "short"), texts(engine, LONG, "long"))

    expected = [[reference(model_dir, "x")], [reference(model_dir, LONG)]]
    for _ in range(5):
        run(leave())
        run(failed(deltas(engine, [5] * 60 + [POISON])))
        assert run(pair()) == expected
    assert nothing_is_left(engine)


def test_prefixes_that_are_not_finite_are_not_kept(engine: TransformersEngine) -> None:
    run(failed(deltas(engine, [5] * 70 + [POISON] + [6] * 70)))
    assert engine._model.prefixes.positions == 64
    assert all(block.stored.isfinite().all() for block in engine._model.prefixes._blocks.values())


def test_a_pass_that_fails_ends_only_the_request_that_makes_it_fail(
    engine: TransformersEngine, model_dir: Path
) -> None:
    def refuse(tokens: list[int]) -> None:
        if GUILTY in tokens:
            raise RuntimeError("planted")

    forward_of(engine, refuse)
    prompts = ["the model", "x", LONG]

    async def together() -> list[Any]:
        beside = [asyncio.create_task(texts(engine, prompt, prompt, max_tokens=60)) for prompt in prompts]
        while engine.stats().running < len(prompts):
            await asyncio.sleep(0)
        for number in range(5):
            assert "planted" not in await failed(deltas(engine, [5] * number + [GUILTY], f"guilty {number}"))
        return list(await asyncio.gather(*beside))

    assert run(together()) == [[reference(model_dir, prompt, 60)] for prompt in prompts]
    engine.check()


@pytest.mark.parametrize("where", ["_choice", "_next", "_score"])
def test_a_fault_anywhere_in_a_request_ends_that_request(
    engine: TransformersEngine, model_dir: Path, where: str
) -> None:
    batch = engine._batch
    sound = getattr(batch, where)

    def planted(first: Any, *rest: Any) -> Any:
        if getattr(first, "request", first).tokens == [5, 6, 7]:
            raise KeyError("planted")
        return sound(first, *rest)

    setattr(batch, where, planted)

    async def together() -> list[str]:
        beside = asyncio.create_task(texts(engine, "the model", "beside", max_tokens=60))
        await failed(deltas(engine, [5, 6, 7], n=2, prompt_logprobs=0))
        return await beside

    assert run(together()) == [reference(model_dir, "the model", 60)]
    engine.check()
    assert nothing_is_left(engine)


@pytest.mark.parametrize("error", [RuntimeError("always"), MemoryError(), torch.OutOfMemoryError()])
def test_an_engine_that_cannot_go_on_says_so(model_dir: Path, error: Exception) -> None:
    engine = TransformersEngine(str(model_dir), SETTINGS)

    def refuse(tokens: list[int]) -> None:
        raise error

    forward_of(engine, refuse)
    with pytest.raises((RequestFailed, ServeError)):
        run(deltas(engine, [5]))
    engine._thread.join(10)
    with pytest.raises(ServeError, match="the engine has failed"):
        engine.check()


def test_a_request_aborted_before_it_was_taken_in_never_runs(engine: TransformersEngine) -> None:
    async def ask() -> None:
        for number in range(8):
            with engine._wake:  # the engine takes both in at once
                engine.generate(GenerateRequest(str(number), [5, 6], 200, sampling=GREEDY))
                engine.abort(str(number))

    run(ask())
    run(texts(engine, "x", max_tokens=3))
    assert engine.stats().tokens_in == len(engine.text.encode("x"))
    assert (engine.stats().tokens_out, engine.stats().running, engine.stats().queued) == (3, 0, 0)


def test_an_id_can_be_used_again_once_its_request_has_ended(engine: TransformersEngine, model_dir: Path) -> None:
    async def twice() -> list[str]:
        with engine._wake:
            for _ in range(3):
                engine.generate(GenerateRequest("r", [5, 6], 200, sampling=GREEDY))
                engine.abort("r")
            again = texts(engine, "x", "r")
            task = asyncio.create_task(again)
        return await task

    assert run(twice()) == [reference(model_dir, "x")]
    for _ in range(5):
        assert run(texts(engine, "x", "r")) == [reference(model_dir, "x")]


@pytest.mark.parametrize("beyond", [0, MISSING - 1, -10_000])
def test_ids_beyond_the_embeddings_are_refused_wherever_they_come_in(engine: TransformersEngine, beyond: int) -> None:
    id = engine.text.size - MISSING + beyond

    async def ask(**fields: Any) -> None:
        engine.generate(GenerateRequest(**{"id": "bad", "tokens": [1], "max_tokens": 1} | fields))

    for fields, field in [
        ({"tokens": [1, id]}, "prompt"),
        ({"sampling": Sampling(logit_bias=((5, 1.0), (id, 1.0)))}, "logit_bias"),
    ]:
        with pytest.raises(InvalidRequest, match=f"token id {id} is not in the model's vocabulary") as refused:
            run(ask(**fields))
        assert refused.value.field == field


def test_what_a_client_sees(model_dir: Path, tmp_path: Path) -> None:
    def problem(answer: httpx.Response) -> tuple[int, str, str]:
        found = answer.json()["error"]
        return answer.status_code, found["param"] or found["code"], found["message"]

    with endpoint(tmp_path, {"m": model_dir}, SETTINGS) as url, httpx.Client(base_url=url, timeout=30) as http:
        text = AutoTokenizer.from_pretrained(model_dir)
        beyond = len(text) - 1
        asked: dict[str, Any] = {"model": "m", "prompt": [5, POISON], "max_tokens": 4}
        status, code, message = problem(http.post("/v1/completions", json=asked))
        assert (status, code) == (500, "request_failed") and "not finite" in message
        streamed = http.post("/v1/completions", json=asked | {"stream": True})
        assert streamed.status_code == 200
        assert '"request_failed"' in streamed.text and "[DONE]" not in streamed.text
        assert problem(http.post("/v1/embeddings", json={"model": "m", "input": [[5], [POISON]]}))[0] == 500
        for change, param in [({"logit_bias": {str(beyond): 1}}, "logit_bias"), ({"prompt": [beyond]}, "prompt")]:
            status, code, message = problem(http.post("/v1/completions", json=asked | {"prompt": "x"} | change))
            assert (status, code) == (400, param) and str(beyond - MISSING + 1) in message
        piece = text.decode([beyond])
        assert text(piece)["input_ids"] == [beyond]
        assert problem(http.post("/v1/completions", json=asked | {"prompt": piece}))[:2] == (400, "prompt")
        assert problem(http.post("/v1/embeddings", json={"model": "m", "input": piece}))[:2] == (400, "input")
        answer = http.post("/v1/completions", json=asked | {"prompt": "x", "temperature": 0, "max_tokens": 24})
        assert answer.json()["choices"][0]["text"] == reference(model_dir, "x")


def test_prompts_beside_a_stream_are_computed_in_chunks_that_take_a_bounded_time(model_dir: Path) -> None:
    """A token takes 2 ms here: the 400 of two prompts, one of them scored, would hold the stream up for 0.8 s."""
    engine, passes = TransformersEngine(str(model_dir), EngineConfig(max_batch=4, prefix_cache=0)), list[int]()

    def slow(tokens: list[int]) -> None:
        passes.append(len(tokens))
        time.sleep(0.002 * len(tokens))

    forward_of(engine, slow)

    async def work() -> None:
        prompts = list[Any]()
        async for delta in engine.generate(GenerateRequest("s", [5], 60, sampling=Sampling(0, logit_bias=((9, 99),)))):
            if delta.generated == 2:
                scored: list[dict[str, Any]] = [{}, {"prompt_logprobs": 20}]
                for number, fields in enumerate(scored):
                    prompts.append(asyncio.create_task(deltas(engine, [6] * 200, str(number), max_tokens=1, **fields)))
        await asyncio.gather(*prompts)

    run(work())
    engine.close()
    assert max(passes) <= 128 and sum(passes) > 400
