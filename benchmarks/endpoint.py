"""An endpoint to measure: a published model deployed as a user would, what its processes are, and requests to it."""

from __future__ import annotations

import json
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch
from ray import serve
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raymodels.config import ServeConfig, validate
from raymodels.registry import Registry
from raymodels.serve.deploy import GATEWAY, Endpoint, deploy
from raymodels.serve.engine import EngineStats
from raymodels.serve.replica import Process

MODEL = "tiny"
APPLICATION = f"{MODEL}--v1"
ASKS = 400
CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)


def tiny_model(folder: Path, hidden: int = 64, layers: int = 2, context: int = 512) -> Path:
    """A Llama with random weights and a byte-level tokenizer trained on Python's own json package."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    sources = sorted((Path(sysconfig.get_path("stdlib")) / "json").glob("*.py"))
    tokenizer.train_from_iterator((source.read_text() for source in sources), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=context,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


@contextmanager
def serving(
    folder: Path, model_dir: Path, model: dict[str, Any] | None = None, http: dict[str, Any] | None = None
) -> Iterator[Endpoint]:
    """Publish a model directory under the name `MODEL` and deploy it.

    Args:
        folder: for the registry.
        model: more settings of the model, as in a config.
        http: settings of the gateway; any free port.
    """
    registry = Registry(str(folder / "registry"))
    if not registry.names():
        registry.publish(MODEL, str(model_dir), {})
    served = {"model": MODEL, **(model or {})}
    raw = {"registry": registry.place, "models": [served], "http": {"port": 0, **(http or {})}}
    with deploy(validate(raw, ServeConfig)) as endpoint:
        yield endpoint


def replica_processes(count: int, timeout_s: float = 120) -> dict[int, Process]:
    """The processes of a model's replicas, as they say themselves: pid -> process.

    Raises:
        TimeoutError: so many were not found.
    """
    handle, deadline = serve.get_app_handle(APPLICATION), time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found: dict[int, Process] = {}
        for _ in range(20 * count):
            process = handle.process.remote().result(timeout_s=timeout_s)
            found[process.pid] = process
            if len(found) == count:
                return found
    raise TimeoutError(f"{len(found)} of {count} replicas were found in {timeout_s:g} s")


def proxy_url() -> str:
    """Of Ray Serve's own proxy, whatever clients of the endpoint use."""
    options = serve.context._get_global_client().http_config
    return f"http://{options.host}:{options.port}"


def gateway_process() -> Process:
    """The gateway's, of which there must be one."""
    process: Process = serve.get_app_handle(GATEWAY).process.remote().result()
    return process


def engine_stats() -> EngineStats:
    """Of the one replica."""
    stats: EngineStats = serve.get_app_handle(APPLICATION).stats.remote().result()
    return stats


@dataclass
class Outcome:
    """How a request ended. ``status`` is 0 where there was no answer at all."""

    status: int = 0
    finished: bool = False
    """Whether all of the answer came."""
    error: str = ""
    """The code of the error that was sent, or what the client found instead of an answer."""
    tokens: int = 0
    first_s: float = 0.0
    total_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    """Between the pieces of the answer."""


def client(url: str, timeout_s: float, headers: dict[str, str] | None = None) -> aiohttp.ClientSession:
    """Of an endpoint, with any number of connections. To be made in an event loop.

    aiohttp takes a tenth of the processor time of httpx, which would be taken from what is measured.
    """
    timeout, connector = aiohttp.ClientTimeout(timeout_s), aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(url, timeout=timeout, connector=connector, headers=headers)


async def request(http: aiohttp.ClientSession, **fields: Any) -> Outcome:
    """Ask for a completion, streamed or not."""
    outcome, start = Outcome(), time.perf_counter()
    last = 0.0
    body = {"model": MODEL, **fields} | ({"stream_options": {"include_usage": True}} if fields.get("stream") else {})
    try:
        async with http.post("/v1/completions", json=body) as answer:
            outcome.status, content = answer.status, b""
            async for piece in answer.content.iter_any():
                now = time.perf_counter()
                outcome.first_s = outcome.first_s or now - start
                outcome.gaps_s += [now - last] if last else []
                content, last = content + piece, now
        _judge(outcome, content, answer.headers.get("Content-Type", ""))
    except (aiohttp.ClientError, TimeoutError) as error:
        outcome.error = type(error).__name__
    outcome.total_s = time.perf_counter() - start
    return outcome


def _judge(outcome: Outcome, content: bytes, media_type: str) -> None:
    if not media_type.startswith("text/event-stream"):
        try:
            body = json.loads(content)
        except ValueError:
            outcome.error = f"not JSON: {content[:200]!r}"
            return
        outcome.finished = outcome.status == 200
        if outcome.finished:
            outcome.tokens = body["usage"]["completion_tokens"]
        else:
            outcome.error = body["error"]["code"] or body["error"]["type"]
        return
    *events, rest = content.split(b"\n\n")
    outcome.finished = not rest and events[-1:] == [b"data: [DONE]"]
    last = json.loads(events[-2 if outcome.finished else -1].removeprefix(b"data: ")) if events else {}
    if outcome.finished:
        outcome.tokens = last["usage"]["completion_tokens"]
    else:
        outcome.error = last.get("error", {}).get("code") or "cut off"
