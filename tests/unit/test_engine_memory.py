"""Keys and values within their bound: rows that grow and move, parking when memory runs out, prefixes used again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from raymodels.config import EngineConfig
from raymodels.errors import ServeError
from raymodels.serve.engine import GenerateRequest
from raymodels.serve.kv_cache import MIN_POSITIONS, KVCache, Row
from raymodels.serve.prefix import BLOCK, PrefixCache
from raymodels.serve.transformers_engine import TransformersEngine
from tests.unit.engines import GREEDY, deltas, reference, run, texts

SHAPE = (2, 2, 16)
POSITION_BYTES = 2 * 2 * 2 * 16 * 4
PROMPT = "the model reads a line and learns what follows " * 3


def cache_of(positions: int) -> KVCache:
    return KVCache(SHAPE, torch.float32, torch.device("cpu"), positions * POSITION_BYTES)


def fill(cache: KVCache, row: Row, used: int, value: float) -> None:
    cache.write_back(row, torch.full((2, 2, 2, used, 16), value))


def test_rows_keep_their_contents_however_others_come_grow_and_go() -> None:
    cache, draw, rows = cache_of(6000), random.Random(5), dict[int, tuple[Row, int]]()
    for number in range(400):
        deed = draw.choice(["new", "new", "grow", "free"]) if rows else "new"
        if deed == "new" and (row := cache.row(draw.randint(1, 300))):
            used = draw.randint(1, row.positions)
            fill(cache, row, used, number)
            rows[number] = row, used
        elif deed == "grow":
            row, used = rows[key := draw.choice(list(rows))]
            cache.grow(row, draw.randint(1, 900), used)
        elif deed == "free":
            cache.free(rows.pop(draw.choice(list(rows)))[0])
        assert cache.used <= cache.allocated <= cache.capacity
        for key, (row, used) in rows.items():
            assert (cache.read(row, 0, used) == key).all()
            assert not cache.read(row, used, row.positions).any()  # nothing of whoever had this memory before


def test_memory_that_is_freed_is_used_for_rows_of_another_length() -> None:
    cache = cache_of(1024)
    small = [cache.row(1) for _ in range(8)]
    assert all(small) and cache.row(1) is None and cache.row(1024) is None
    for row in small:
        assert row
        cache.free(row)
    assert cache.used == 0
    large = cache.row(1024)
    assert large and large.positions == 1024 and cache.row(1) is None


def test_prefixes_are_found_by_their_tokens_and_what_comes_before_them() -> None:
    cache = cache_of(2048)
    prefixes, row, target = PrefixCache(cache, 3 * BLOCK), cache.row(128), cache.row(128)
    assert row and target
    fill(cache, row, 2 * BLOCK, 7.0)
    tokens = list(range(2 * BLOCK))
    prefixes.keep(tokens, row)
    assert prefixes.positions == 2 * BLOCK
    assert prefixes.restore([*tokens, 9], target) == 2 * BLOCK
    assert (cache.read(target, 0, 2 * BLOCK) == 7).all()
    assert prefixes.restore(tokens, target) == BLOCK  # the last token is always computed
    assert prefixes.restore([*range(BLOCK), *[5] * 64], target) == BLOCK
    assert prefixes.restore([*range(BLOCK, 2 * BLOCK), *[5] * 64], target) == 0
    other = [3] * 2 * BLOCK
    prefixes.keep(other, row)
    assert prefixes.positions == 3 * BLOCK
    assert prefixes.restore([*other, 9], target) == 2 * BLOCK
    assert prefixes.restore([*tokens, 9], target) == BLOCK  # the least recently used has gone, from the end


@pytest.fixture(scope="module")
def narrow(tiny_model_dir: Path) -> Iterator[TransformersEngine]:
    """Holds 384 positions, one and a half contexts, and no prefixes."""
    config = EngineConfig(max_batch=4, kv_memory=384 * POSITION_BYTES, prefix_cache=0, prefill_chunk=64)
    engine = TransformersEngine(str(tiny_model_dir), config)
    yield engine
    engine.close()


@pytest.mark.slow
def test_more_than_memory_holds_is_answered_all_the_same(narrow: TransformersEngine, tiny_model_dir: Path) -> None:
    async def together() -> list[list[str]]:
        asked = (texts(narrow, PROMPT + "x" * n, str(n), max_tokens=120) for n in range(4))
        return list(await asyncio.gather(*asked))

    assert narrow.context == 256
    found = [text for (text,) in run(together())]
    assert found == [reference(tiny_model_dir, PROMPT + "x" * n, 120) for n in range(4)]
    assert narrow.stats().parkings > 0
    assert narrow.stats().kv_usage == 0


@pytest.mark.slow
def test_choices_that_find_no_memory_beside_the_first_come_after_it(
    narrow: TransformersEngine, tiny_model_dir: Path
) -> None:
    assert run(texts(narrow, PROMPT, n=4, max_tokens=100)) == [reference(tiny_model_dir, PROMPT, 100)] * 4


@pytest.mark.slow
def test_parked_choices_keep_their_log_probabilities(narrow: TransformersEngine) -> None:
    async def scored(n: int) -> list[float | None]:
        found = await deltas(narrow, PROMPT + "x" * n, str(n), max_tokens=100, logprobs=0, prompt_logprobs=0)
        return [token.logprob for delta in found for token in [*delta.prompt, *delta.tokens]]

    async def together() -> list[list[float | None]]:
        return list(await asyncio.gather(*(scored(n) for n in range(4))))

    for alone, beside in zip([run(scored(n)) for n in range(4)], run(together()), strict=True):
        assert beside[0] is None
        assert beside[1:] == pytest.approx(alone[1:], abs=1e-4)


@pytest.mark.slow
def test_a_known_beginning_is_not_computed_again_and_changes_nothing(tiny_model_dir: Path) -> None:
    engine = TransformersEngine(str(tiny_model_dir), EngineConfig(max_batch=4))
    shared = engine.text.encode(PROMPT)
    assert len(shared) > 2 * BLOCK
    for end in ("", " café", " größer"):
        before = engine.stats().prefix_hits
        assert run(texts(engine, PROMPT + end)) == [reference(tiny_model_dir, PROMPT + end)]
        hits = engine.stats().prefix_hits - before
        assert hits == 0 if end == "" else hits >= len(shared) // BLOCK * BLOCK - BLOCK
    tokens = engine.text.encode(PROMPT)
    assert len(run(engine.score(tokens))) == len(tokens) - 1  # a score needs all logits, known or not
    engine.close()


@pytest.mark.slow
def test_a_conversation_goes_on_from_its_last_answer(tiny_model_dir: Path) -> None:
    engine = TransformersEngine(str(tiny_model_dir), EngineConfig(max_batch=4))
    tokens = engine.text.encode(PROMPT)
    answer = [token.id for delta in run(deltas(engine, tokens, max_tokens=64, logprobs=0)) for token in delta.tokens]
    run(deltas(engine, [*tokens, *answer, 5, 6, 7]))
    assert engine.stats().prefix_hits >= (len(tokens) + len(answer) - 1) // BLOCK * BLOCK > len(tokens)
    engine.close()


@pytest.mark.slow
def test_memory_for_less_than_a_sequence_is_refused_or_cuts_the_context(tiny_model_dir: Path) -> None:
    memory = MIN_POSITIONS * POSITION_BYTES
    config = EngineConfig(kv_memory=memory, prefix_cache=0)
    engine = TransformersEngine(str(tiny_model_dir), config)
    assert engine.context == MIN_POSITIONS
    engine.close()
    with pytest.raises(ServeError, match=r"max_context 200 .* 128 tokens that engine\.kv_memory holds"):
        TransformersEngine(str(tiny_model_dir), config.model_copy(update={"max_context": 200}))
    with pytest.raises(ServeError, match=r"engine\.kv_memory"):
        TransformersEngine(str(tiny_model_dir), config.model_copy(update={"kv_memory": 1000}))


@pytest.mark.slow
def test_a_higher_priority_leaves_the_queue_first(tiny_model_dir: Path) -> None:
    engine = TransformersEngine(str(tiny_model_dir), EngineConfig(max_batch=1))
    order: list[str] = []

    async def ask(id: str, priority: int) -> None:
        request = GenerateRequest(id, [5, 6], 30, sampling=GREEDY, priority=priority)
        async for _ in engine.generate(request):
            pass
        order.append(id)

    async def together() -> None:
        first = asyncio.create_task(ask("first", 0))
        await asyncio.sleep(0)
        await asyncio.gather(first, ask("low", 0), ask("low too", 0), ask("high", 5))

    run(together())
    assert order.index("high") < order.index("low") < order.index("low too")
    engine.close()
