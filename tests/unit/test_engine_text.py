"""Text that is decoded token by token equals text that is decoded at once, whatever the tokens."""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from raymodels.serve.engine import Sampling
from raymodels.serve.sampling import Sampler
from raymodels.serve.text import Text, TextStream

SAMPLE = "the café — 日本語のテキスト 🙂👍🏽 größer Ωmega"


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback"])
def text(request: pytest.FixtureRequest, tiny_model_dir: Path) -> Text:
    if request.param == "byte-level":
        return Text(AutoTokenizer.from_pretrained(tiny_model_dir))
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special[:2], show_progress=False)
    tokenizer.train_from_iterator([SAMPLE] * 5, trainer)
    tokenizer.add_tokens(special[2:])
    return Text(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>"))


def streamed(text: Text, prompt: list[int], ids: list[int], stops: tuple[str, ...] = ()) -> str:
    stream, found = TextStream(text, prompt, stops), ""
    for id in ids:
        found += stream.push(id)
        if stream.stopped:
            return found
    return found + stream.flush()


def test_any_tokens_stream_to_their_text(text: Text, request: pytest.FixtureRequest) -> None:
    exact = "byte-level" in request.node.name  # byte fallback decodes a run with one bad byte to nothing but bad bytes
    for seed in range(300):
        draw = random.Random(seed)
        ids = [draw.randrange(text.size) for _ in range(draw.randint(1, 80))]
        found = streamed(text, [], ids)
        assert found == text.decode(ids) or not exact


def test_characters_in_any_order_stream_to_their_text(text: Text) -> None:
    for seed in range(100):
        characters = random.Random(seed).sample(SAMPLE, len(SAMPLE))
        ids = text.encode("".join(characters).strip())
        assert streamed(text, [], ids) == text.decode(ids)


def test_a_continuation_keeps_its_space(text: Text) -> None:
    ids = text.encode(SAMPLE)
    for cut in range(1, len(ids)):
        before = text.decode(ids[:cut])
        if not before.endswith("�"):
            assert before + streamed(text, ids[:cut], ids[cut:]) == text.decode(ids)


def test_a_stop_string_is_never_shown_in_part(text: Text) -> None:
    ids = text.encode(SAMPLE)
    whole = text.decode(ids)
    for start in range(1, len(whole) - 4):
        for size in (1, 2, 4):
            stop = whole[start : start + size]
            assert streamed(text, [], ids, (stop, "unseen")) == whole[: whole.index(stop)]


def test_what_looked_like_a_stop_string_is_released(text: Text) -> None:
    ids = text.encode(SAMPLE)
    assert streamed(text, [], ids, ("the cafés", "Ωmegas")) == text.decode(ids)


def test_the_bytes_of_tokens_make_the_text(text: Text) -> None:
    ids = text.encode(SAMPLE, add_special_tokens=False)
    assert b"".join(text.raw(id) for id in ids).decode().strip() == SAMPLE


def tokens_of(text: Text, *pieces: bytes) -> list[int]:
    """A token for each of these bytes: in byte-level BPE, or with byte fallback."""
    found = {text.raw(id): id for id in reversed(range(text.size))}
    return [found[bytes([byte])] for piece in pieces for byte in piece]


@pytest.mark.parametrize(
    "repeated",
    [b"\x80", b"\xe2", b"\xf0\x9f", b"\xf0\x9f\x98", b"\xe2\x82\xff", b"\xed\xa0\x80", b"\xc3\xc3\xa9", None],
)
def test_bytes_that_become_no_character_hold_nothing_back(text: Text, repeated: bytes | None) -> None:
    """Three bytes can begin a character; whatever follows, no more tokens than that wait, nor are decoded again."""
    ids = (tokens_of(text, repeated) if repeated else [next(iter(text.ends))]) * (300 // len(repeated or b"."))
    stream, found = TextStream(text, text.encode("the café")), ""
    for at, id in enumerate(ids):
        found += stream.push(id)
        assert len(text.decode(ids[: at + 1])) - len(found) <= 3
        assert len(stream._window) <= 20
    assert found + stream.flush() == text.decode(ids)


def test_a_token_may_end_one_character_and_begin_the_next() -> None:
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "\u00a9\u00c3"]  # the bytes 0xA9 and 0xC3
    bpe = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, [("\u00a9", "\u00c3")]))
    bpe.decoder = decoders.ByteLevel()
    text, across = Text(PreTrainedTokenizerFast(tokenizer_object=bpe)), len(pieces) - 1
    assert text.raw(across) == b"\xa9\xc3"
    ids = [*tokens_of(text, b"a\xc3"), *[across] * 200, *tokens_of(text, b"\xa9b")]
    stream, found = TextStream(text), ""
    for at, id in enumerate(ids):
        found += stream.push(id)
        assert found == text.decode(ids[: at + 1]).removesuffix("�")
        assert len(stream._window) <= 8


def test_a_lone_surrogate_is_no_text(text: Text) -> None:
    with pytest.raises(UnicodeEncodeError):
        text.encode("\ud800")


def test_a_bias_of_the_whole_vocabulary_costs_as_much_as_one_token(text: Text) -> None:
    """It is one row, made for a request's first token; with a list of a bias for each, a token took 10 ms."""
    row = torch.randn(50_000)
    pairs = tuple((id, 0.5) for id in range(50_000))
    penalties = {"temperature": 0.0, "presence_penalty": 0.1, "frequency_penalty": 0.1}

    def seconds(sampling: Sampling) -> float:
        sampler, times = Sampler(sampling, 0), list[float]()
        for _ in range(40):
            start = time.perf_counter()
            sampler.draw(row)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    one = seconds(Sampling(logit_bias=pairs[:1], **penalties))
    assert seconds(Sampling(logit_bias=pairs, **penalties)) < 3 * one


def test_penalties_and_biases_of_one_token_add_up() -> None:
    sampling = Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((2, 1.0), (2, 0.5)))
    sampler, drawn = Sampler(sampling, 0), list[int]()
    row = torch.tensor([1.0, 0.9, 0.0])
    for _ in range(6):
        drawn.append(sampler.draw(row))
    # 2 begins at 1.5 and falls to 0.75, 0 from 1 to 0.25, 1 from 0.9 to 0.15, 2 to 0.5, 0.25 ...
    assert drawn == [2, 0, 1, 2, 2, 0]


LOGITS = torch.tensor([0.1, 0.7, 0.2]).log().repeat(1000, 1)


def share(sampling: Sampling) -> list[float]:
    sampler = Sampler(sampling, choice=0)
    drawn = torch.tensor([sampler.draw(row) for row in LOGITS])
    return [float((drawn == id).float().mean()) for id in range(3)]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=0), [0, 1, 0]),
        (Sampling(seed=1), [0.1, 0.7, 0.2]),
        (Sampling(top_k=1, seed=1), [0, 1, 0]),
        (Sampling(top_k=2, seed=1), [0, 7 / 9, 2 / 9]),
        (Sampling(top_p=0.5, seed=1), [0, 1, 0]),
        (Sampling(top_p=0.85, seed=1), [0, 7 / 9, 2 / 9]),
        (Sampling(top_k=2, top_p=0.75, seed=1), [0, 1, 0]),
        (Sampling(temperature=0.5, seed=1), [0.01 / 0.54, 0.49 / 0.54, 0.04 / 0.54]),
        (Sampling(temperature=1e-6, seed=1), [0, 1, 0]),
    ],
)
def test_tokens_are_drawn_with_their_probability(sampling: Sampling, expected: list[float]) -> None:
    assert share(sampling) == pytest.approx(expected, abs=0.05)
