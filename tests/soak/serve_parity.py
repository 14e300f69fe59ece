"""What is served is what was trained: logits, log-probabilities, and streamed text against unstreamed.

The bars: at every ZeRO stage the exported model's logits within 1e-5 of the trainer's own; the served log-probability
of every prompt token within 1e-4 of transformers' on an exported directory; and no difference between streamed and
unstreamed text in 50 prompts with characters of several bytes.
"""

from __future__ import annotations

import json
import random
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.endpoint import MODEL, serving, tiny_model
from benchmarks.report import Bar, report
from raymodels.checkpoint.export import export as write
from raymodels.checkpoint.layout import open_checkpoint
from raymodels.config import Config, load
from raymodels.data.prepare import prepare
from raymodels.testing import run_ranks, train_here
from tests.soak.size import small

WORDS = ["def ", "return ", "größer ", "naïve ", "日本語 ", "🙂", "👍🏽", "for x in ", "Ω", "\n    ", "模型 "]
PROMPTS = 50
PROBE = torch.arange(10, 74).unsqueeze(0)


def trained_logits(config: Config, prepared_place: str) -> torch.Tensor:
    """Train to the end; the trainer's own logits on `PROBE`, of shape [1, tokens, vocabulary]."""
    session, _ = train_here(config, prepared_place)
    session.engine.eval()
    with torch.no_grad():
        logits: torch.Tensor = session.engine(input_ids=PROBE).logits
    return logits


def logit_difference(stage: int, folder: Path) -> float:
    """The largest |trainer - export| after four steps of two ranks at a ZeRO stage."""
    overrides = [f"run.storage={folder}/{stage}", f"data.prepared={folder}", f"zero.stage={stage}", "publish=null"]
    overrides += ["train.steps=4", "train.warmup_steps=0", "eval.samples=8", "data.eval_fraction=0.2"]
    overrides += [f"data.source={sysconfig.get_path('stdlib')}/asyncio/*.py", "data.tokenizer.vocab_size=1024"]
    config = load(Path(__file__).parents[2] / "jobs/configs/demo.yaml", overrides)
    logits = run_ranks(trained_logits, 2, config, prepare(config).place)[0]
    exported = write(open_checkpoint(config.place), folder / f"exported-{stage}")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(exported)(input_ids=PROBE).logits
    return float((found - logits).abs().max())


def prompts() -> list[str]:
    draw = random.Random(7)
    return ["".join(draw.choices(WORDS, k=draw.randint(1, 40))) for _ in range(PROMPTS)]


def logprob_differences(http: httpx.Client, folder: Path) -> list[float]:
    """|served - transformers| for every token but the first of every prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    differences = []
    for prompt in prompts():
        answer = ask(http, prompt=prompt, max_tokens=0, echo=True, logprobs=0)
        served = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
        ids = tokenizer(prompt).input_ids
        with torch.inference_mode():
            rows = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        expected = rows[range(len(ids) - 1), ids[1:]].tolist()
        differences += [abs(a - b) for a, b in zip(served, expected, strict=True)]
    return differences


def stream_mismatches(http: httpx.Client, max_tokens: int) -> int:
    fields = {"max_tokens": max_tokens, "temperature": 0}
    return sum(
        ask(http, prompt=prompt, **fields)["choices"][0]["text"] != streamed(http, prompt=prompt, **fields)
        for prompt in prompts()
    )


def ask(http: httpx.Client, **fields: Any) -> Any:
    return http.post("/v1/completions", json={"model": MODEL, **fields}).raise_for_status().json()


def streamed(http: httpx.Client, **fields: Any) -> str:
    with http.stream("POST", "/v1/completions", json={"model": MODEL, "stream": True, **fields}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


def main() -> int:
    hidden, layers, max_tokens = (64, 2, 24) if small() else (256, 6, 64)
    with tempfile.TemporaryDirectory() as temporary:
        logits = [logit_difference(stage, Path(temporary)) for stage in range(4)]
        folder = Path(temporary) / "export"
        tiny_model(folder, hidden, layers)
        # Chunks shorter than the prompts: a prompt computed in one piece would be the very computation compared with.
        model = {"engine": {"prefill_chunk": 32}}
        start = time.perf_counter()
        with (
            serving(Path(temporary), folder, model) as endpoint,
            httpx.Client(base_url=endpoint.url, timeout=120) as http,
        ):
            ready = time.perf_counter() - start
            differences, mismatches = logprob_differences(http, folder), stream_mismatches(http, max_tokens)
    rows = [
        *(
            {"comparison": f"logits, trainer and export, ZeRO stage {stage}", "cases": PROBE.numel(), "worst": worst}
            for stage, worst in enumerate(logits)
        ),
        {
            "comparison": "prompt logprobs, served and transformers",
            "cases": len(differences),
            "worst": max(differences),
        },
        {"comparison": "text, streamed and unstreamed", "cases": PROMPTS, "worst": float(mismatches)},
        {"comparison": "seconds until the endpoint was ready", "cases": 1, "worst": ready},
    ]
    bars = [
        Bar("logit_difference", max(logits), "<=", 1e-5),
        Bar("served_logprob_difference", max(differences), "<=", 1e-4),
        Bar("stream_mismatches", mismatches, "==", 0),
    ]
    return report("serve_parity", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
