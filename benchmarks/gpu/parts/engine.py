"""The packed engine: conformance, invariance in batches, speed beside its peers, int8, LoRA, where a step goes."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import inspect
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.machine import MIDDLE, Machine, forget, prepared
from benchmarks.gpu.sheet import Sheet

if TYPE_CHECKING:
    from raymodels.serve.engine import Engine

ROOT = Path(__file__).parents[3]
SUITE = "tests/unit/test_engine_conformance.py"
SUITE_S = 150
TOGETHER = 64
KV_MEMORY = {True: "24GB", False: "256MB"}
LORA_RANK = 8


def measure(machine: Machine, sheet: Sheet) -> None:
    model = write_model(machine)
    with sheet.guarded("invariance"):
        _invariance(machine, sheet, model)
    with sheet.guarded("tokens/s"):
        _speed(machine, sheet, model)
    with sheet.guarded("where a step goes"):
        _where_a_step_goes(machine, sheet, model)
    for name, peer in {"transformers' continuous batching": continuous, "transformers' generate": generate}.items():
        with sheet.guarded(name):
            _peer(machine, sheet, model, name, peer)
    if importlib.util.find_spec("vllm"):
        with sheet.guarded("vLLM"):
            _peer(machine, sheet, model, "vLLM", vllm)
    else:
        sheet.not_run("vLLM", "it is not installed")
    with sheet.guarded("int8"):
        _int8(machine, sheet, model)
    with sheet.guarded("LoRA"):
        _lora(machine, sheet, model)
    with sheet.guarded("conformance suite"):
        _conformance(sheet)


def write_model(machine: Machine) -> Path:
    """A random model with the tokenizer of the prepared data, in Hugging Face layout; bf16 on a card."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place = prepared(
        machine.config("engine", machine.size(MIDDLE), 512, {"steps": 9, "global_batch": 1, "micro_batch": 1})
    )
    tokenizer = AutoTokenizer.from_pretrained(Path(place) / "tokenizer")
    size = machine.size(MIDDLE)
    shape = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        intermediate_size=size.hidden_size * 8 // 3 // 64 * 64,
        max_position_embeddings=2048,
        initializer_range=0.05,  # so that texts differ from prompt to prompt
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(1)
    with machine.device:
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16 if machine.cuda else torch.float32)
    folder = machine.folder / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    forget(machine)
    return folder


def prompts(machine: Machine, count: int) -> list[list[int]]:
    """Prompts of about 20 tokens that share no beginning."""
    import random

    draw = random.Random(count)
    return [[draw.randrange(3, machine.vocabulary) for _ in range(draw.randint(12, 28))] for _ in range(count)]


def open_engine(machine: Machine, model: Path, **settings: Any) -> Engine:
    from raymodels.config import EngineConfig
    from raymodels.serve.transformers_engine import TransformersEngine

    adapters = settings.pop("adapters", {})
    config = {"max_batch": 256, "kv_memory": KV_MEMORY[machine.cuda], "prefix_cache": 0, **settings}
    threads = (os.cpu_count() or 1) if machine.cuda else 1  # on a CPU another part runs beside it
    return TransformersEngine(str(model), EngineConfig.model_validate(config), threads, adapters)


def ask(
    engine: Engine, asked: list[list[int]], tokens: int, adapters: list[str | None] | None = None
) -> tuple[list[str], list[int], list[float]]:
    """Greedy answers to all prompts at once: the texts, the tokens of each, the seconds to each first token."""
    from raymodels.serve.engine import GenerateRequest, Sampling

    async def one(at: int, prompt: list[int]) -> tuple[str, int, float]:
        adapter = adapters[at] if adapters else None
        request = GenerateRequest(str(at), prompt, tokens, sampling=Sampling(temperature=0), adapter=adapter)
        start, first, text, generated = time.perf_counter(), 0.0, "", 0
        async for delta in engine.generate(request):
            first = first or time.perf_counter() - start
            text, generated = text + delta.text, delta.generated
        return text, generated, first

    async def together() -> list[tuple[str, int, float]]:
        return list(await asyncio.gather(*(one(at, prompt) for at, prompt in enumerate(asked))))

    texts, counts, firsts = zip(*asyncio.run(together()), strict=True)
    return list(texts), list(counts), list(firsts)


def close(machine: Machine, engine: Engine) -> None:
    engine.close()
    gc.collect()
    forget(machine)


def new_tokens(machine: Machine) -> int:
    return 64 if machine.cuda else 8


def _invariance(machine: Machine, sheet: Sheet, model: Path) -> None:
    count = TOGETHER if machine.cuda else 8
    asked = prompts(machine, count)
    for dtype in ("float32", "bfloat16") if machine.cuda else ("float32",):
        engine = open_engine(machine, model, dtype=dtype)
        alone = [ask(engine, [prompt], new_tokens(machine))[0][0] for prompt in asked]
        found, _, _ = ask(engine, asked, new_tokens(machine))
        close(machine, engine)
        differ, what = sum(a != b for a, b in zip(alone, found, strict=True)), f"{dtype}: of {count} texts, other"
        if dtype == "float32":
            sheet.bar(f"{what} in a batch than alone", differ, "==", 0)
        else:
            sheet.figure(f"{what} in a batch than alone", differ)


def _speed(machine: Machine, sheet: Sheet, model: Path) -> None:
    engine = open_engine(machine, model)
    for clients in (1, 8, 64, 256) if machine.cuda else (1, 8):
        asked = prompts(machine, clients)
        ask(engine, asked, new_tokens(machine))
        start = time.perf_counter()
        _, counts, firsts = ask(engine, asked, new_tokens(machine))
        rate = sum(counts) / (time.perf_counter() - start)
        sheet.figure(f"raymodels, {clients} at once: tokens/s", round(rate, 1))
        sheet.figure(
            f"raymodels, {clients} at once: median ms to the first token", round(1e3 * statistics.median(firsts), 1)
        )
    close(machine, engine)


def _peer(machine: Machine, sheet: Sheet, model: Path, name: str, peer: Any) -> None:
    run = peer(machine, model)
    for clients in (1, 8, 64, 256) if machine.cuda else (1, 8):
        asked = prompts(machine, clients)
        run(asked)
        start = time.perf_counter()
        generated = run(asked)
        sheet.figure(f"{name}, {clients} at once: tokens/s", round(generated / (time.perf_counter() - start), 1))
    forget(machine)


def _loaded(machine: Machine, model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(model, dtype="auto", attn_implementation="sdpa")
    return found.to(machine.device).eval()


def generate(machine: Machine, model: Path) -> Any:
    """transformers' generate over one padded batch."""
    import torch

    loaded = _loaded(machine, model)
    end = loaded.config.eos_token_id

    @torch.inference_mode()
    def run(asked: list[list[int]]) -> int:
        longest = max(map(len, asked))
        ids = torch.tensor([[end] * (longest - len(each)) + each for each in asked], device=machine.device)
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in asked], device=machine.device)
        new = new_tokens(machine)
        out = loaded.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=end)
        return int((out[:, longest:] != end).sum())

    return run


def continuous(machine: Machine, model: Path) -> Any:
    """transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    loaded = _loaded(machine, model)
    end = loaded.config.eos_token_id
    generation = GenerationConfig(
        max_new_tokens=new_tokens(machine), do_sample=False, eos_token_id=end, pad_token_id=end
    )
    fields = inspect.signature(ContinuousBatchingConfig).parameters
    page = "page_size" if "page_size" in fields else "block_size"  # its name before transformers 5.19
    batching: dict[str, Any] = {page: 32, "num_blocks": 2048 if machine.cuda else 64, "max_batch_tokens": 512}
    if not machine.cuda:
        batching["use_cuda_graph"] = False

    def run(asked: list[list[int]]) -> int:
        config = ContinuousBatchingConfig(**batching)
        found = loaded.generate_batch(
            asked, generation_config=generation, continuous_batching_config=config, progress_bar=False
        )
        return sum(len(each.generated_tokens) for each in found.values())

    return run


def vllm(machine: Machine, model: Path) -> Any:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    engine = LLM(str(model), max_model_len=2048, disable_log_stats=True, gpu_memory_utilization=0.4)
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens(machine))

    def run(asked: list[list[int]]) -> int:
        found = engine.generate([{"prompt_token_ids": each} for each in asked], sampling, use_tqdm=False)
        return sum(len(each.outputs[0].token_ids) for each in found)

    return run


def _where_a_step_goes(machine: Machine, sheet: Sheet, model: Path) -> None:
    """At 1 request: the card's kernels and the calls that launch them, by torch's profiler; the rest is Python's."""
    from torch.profiler import ProfilerActivity, profile

    engine = open_engine(machine, model)
    [prompt], tokens = prompts(machine, 1), new_tokens(machine)
    ask(engine, [prompt], tokens)
    start = time.perf_counter()
    _, [steps], _ = ask(engine, [prompt], tokens)
    whole = (time.perf_counter() - start) / steps
    sheet.figure("a step at 1 request, ms", round(1e3 * whole, 3))
    if machine.cuda:
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as profiled:
            _, [steps], _ = ask(engine, [prompt], tokens)
            machine.synchronize()
        events = profiled.events() or []
        kernels = [event for event in events if str(event.device_type).endswith("CUDA")]
        launches = [event for event in events if "LaunchKernel" in event.name]
        busy, launching = (sum(e.time_range.elapsed_us() for e in some) / steps / 1e6 for some in (kernels, launches))
        sheet.figure("of it: kernels run, ms", round(1e3 * busy, 3), f"{len(kernels) / steps:.0f} a step")
        sheet.figure("of it: launching them, ms", round(1e3 * launching, 3), f"{len(launches) / steps:.0f} a step")
        sheet.figure("of it: neither, Python and torch, ms", round(1e3 * max(0.0, whole - busy - launching), 3))
    else:
        sheet.not_run("of it: kernels, launches, Python", "there are kernels on a card alone")
    close(machine, engine)


def _int8(machine: Machine, sheet: Sheet, model: Path) -> None:
    asked = prompts(machine, 8)
    engine = open_engine(machine, model)
    expected = asyncio.run(engine.score(asked[0]))
    close(machine, engine)
    engine = open_engine(machine, model, quantization="int8")
    found = asyncio.run(engine.score(asked[0]))
    ask(engine, asked, new_tokens(machine))
    start = time.perf_counter()
    _, counts, _ = ask(engine, asked, new_tokens(machine))
    rate = sum(counts) / (time.perf_counter() - start)
    close(machine, engine)
    off = statistics.mean(abs(a - b) for a, b in zip(found, expected, strict=True))
    sheet.figure("int8, 8 at once: tokens/s", round(rate, 1))
    sheet.bar("int8: mean difference of log-probabilities, nats", off, "<=", 0.1)


def write_adapter(folder: Path, model: Path, seed: int) -> Path:
    """A random LoRA adapter in PEFT's format, over the attention's projections."""
    import json

    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    draw, weights = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    for name, module in base.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            key = f"base_model.model.{name}.lora_"
            weights[f"{key}A.weight"] = torch.randn(LORA_RANK, module.in_features, generator=draw) * 0.05
            weights[f"{key}B.weight"] = torch.randn(module.out_features, LORA_RANK, generator=draw) * 0.05
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": LORA_RANK,
        "lora_alpha": 4 * LORA_RANK,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def _lora(machine: Machine, sheet: Sheet, model: Path) -> None:
    folders = {name: str(write_adapter(machine.folder / name, model, at)) for at, name in enumerate("ab")}
    engine = open_engine(machine, model, adapters=folders, dtype="float32")
    asked = [prompt for prompt in prompts(machine, 4) for _ in range(3)]
    names: list[str | None] = [None, "a", "b"] * 4
    alone = [
        ask(engine, [prompt], new_tokens(machine), [name])[0][0] for prompt, name in zip(asked, names, strict=True)
    ]
    ask(engine, asked, new_tokens(machine), names)
    start = time.perf_counter()
    found, counts, _ = ask(engine, asked, new_tokens(machine), names)
    rate = sum(counts) / (time.perf_counter() - start)
    close(machine, engine)
    sheet.figure("LoRA, 12 requests over 2 adapters and the base, float32: tokens/s", round(rate, 1))
    sheet.bar("LoRA: texts that two adapters or the base share", 12 - len(set(alone)), "<=", 2)
    differ = sum(a != b for a, b in zip(alone, found, strict=True))
    sheet.bar("LoRA: of 12 texts, other in a shared batch than alone", differ, "==", 0)


def _conformance(sheet: Sheet) -> None:
    """The tests that exist, by pytest: what it prints last counts."""
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=", "-o", "addopts=--import-mode=importlib"]
    command = [sys.executable, "-m", "pytest", *options, SUITE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SUITE_S, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:])
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout[-300:])}
    failing = counts.get("failed", 0) + counts.get("error", 0) + (done.returncode not in (0, 1))
    sheet.figure("conformance suite: passed", counts.get("passed", 0))
    sheet.bar("conformance suite: failed", failing, "==", 0)
    sheet.bar("conformance suite: run", counts.get("passed", 0) + failing, ">=", 10)
