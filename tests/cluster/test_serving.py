"""A real endpoint over HTTP: Ray Serve, the gateway, replicas of tiny models; the clients are httpx and openai."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raymodels.config import ServeConfig, to_yaml, validate
from raymodels.errors import ConfigError, IntegrityError, RegistryError, ServeError
from raymodels.registry import Registry
from raymodels.serve.deploy import Endpoint, application, deploy

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
MAX_BODY = 50_000
WORDS = ["the", "model", "naïve", "café", "模型", "größer", "🙂", "👍🏽", "x = 1\n", "日本語"]
CHAT = [{"role": "user", "content": "the café 模型"}]


@pytest.fixture(scope="module")
def lively_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with larger weights and a chat template: its answers differ, and hold broken characters too."""
    folder = tmp_path_factory.mktemp("lively")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        AutoTokenizer.from_pretrained(tiny_model_dir),
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.dim() > 1 else 1)
    model.save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def registry(lively_dir: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    registry = Registry(str(tmp_path_factory.mktemp("registry")))
    registry.publish("lively", str(lively_dir), {}, alias="prod")
    registry.publish("plain", str(tiny_model_dir), {})
    return registry


def config(registry: Registry, *models: dict[str, Any]) -> ServeConfig:
    http = {"port": 0, "max_body_bytes": MAX_BODY}
    return validate({"registry": registry.place, "models": list(models), "http": http}, ServeConfig)


@pytest.fixture(scope="module")
def endpoint(ray_cluster: Any, registry: Registry) -> Iterator[Endpoint]:
    engine = {"max_batch": 4, "max_queue": 4}
    lively = {"model": "lively@prod", "cpus": 0.5, "engine": engine}
    with deploy(config(registry, lively, {"model": "plain", "served_as": "base", "cpus": 0.5})) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def http(endpoint: Endpoint) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def ai(endpoint: Endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def complete(http: httpx.Client, **fields: Any) -> Any:
    answer = http.post("/v1/completions", json={"model": "lively", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(http: httpx.Client, path: str = "/v1/completions", **fields: Any) -> list[Any]:
    with http.stream("POST", path, json={"model": "lively", "stream": True, **fields}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def running(http: httpx.Client) -> float:
    """Choices that the lively replica works on."""
    from ray import serve

    return float(serve.get_app_handle("lively--v1").stats.remote().result().running)


def test_health(http: httpx.Client, endpoint: Endpoint) -> None:
    assert http.get("/healthz").status_code == 200
    deadline = time.monotonic() + 2  # the gateway may have looked just before the last replica was there
    while (answer := http.get("/readyz").json()) != {"status": "ready"}:
        assert time.monotonic() < deadline, answer
        time.sleep(0.1)
    assert endpoint.models == {"lively": "lively@1", "base": "plain@1"}


def test_logprobs_of_a_prompt_are_those_of_transformers(http: httpx.Client, lively_dir: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(lively_dir), AutoTokenizer.from_pretrained(lively_dir)
    prompt = "the model reads a naïve café 模型 🙂"
    choice = complete(http, prompt=prompt, max_tokens=0, echo=True, logprobs=1)["choices"][0]
    ids = tokenizer(prompt).input_ids
    with torch.inference_mode():
        rows = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    assert choice["text"] == prompt
    assert choice["logprobs"]["token_logprobs"][0] is None
    expected = rows[range(len(ids) - 1), ids[1:]].tolist()
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][1:]]
    assert best == pytest.approx(rows[:-1].max(-1).values.tolist(), abs=1e-4)


def test_streamed_text_is_the_unstreamed_text(http: httpx.Client) -> None:
    draw = random.Random(7)
    for _ in range(20):
        prompt = " ".join(draw.choices(WORDS, k=draw.randint(1, 8)))
        whole = complete(http, prompt=prompt, max_tokens=24, temperature=0)["choices"][0]
        parts = [chunk["choices"][0] for chunk in events(http, prompt=prompt, max_tokens=24, temperature=0)]
        assert "".join(part["text"] for part in parts) == whole["text"]
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == whole["finish_reason"]


def test_streamed_logprobs_are_the_unstreamed_ones(http: httpx.Client) -> None:
    fields = {"prompt": "the 模型", "max_tokens": 12, "temperature": 0, "logprobs": 2, "echo": True}
    whole = complete(http, **fields)["choices"][0]
    parts = [chunk["choices"][0] for chunk in events(http, **fields)]
    for key in ("tokens", "token_logprobs", "text_offset"):
        assert [value for part in parts for value in part["logprobs"][key]] == whole["logprobs"][key]
    assert "".join(part["text"] for part in parts) == whole["text"]


def test_usage_counts_tokens(http: httpx.Client, lively_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(lively_dir)
    fields = {"prompt": ["the model", "x"], "n": 2, "max_tokens": 5, "seed": 3}
    expected = sum(len(tokenizer(prompt).input_ids) for prompt in fields["prompt"])
    usage = complete(http, **fields)["usage"]
    assert usage["prompt_tokens"] == expected
    assert usage["completion_tokens"] <= 20
    chunks = events(http, **fields, stream_options={"include_usage": True})
    assert chunks[-1] | {"choices": []} == chunks[-1]
    assert chunks[-1]["usage"] == usage
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_several_prompts_and_choices_are_numbered_through(http: httpx.Client) -> None:
    fields = {"max_tokens": 6, "temperature": 0}
    both = complete(http, prompt=["the model", "模型"], n=2, **fields)["choices"]
    assert [choice["index"] for choice in both] == [0, 1, 2, 3]
    single = [complete(http, prompt=prompt, **fields)["choices"][0]["text"] for prompt in ("the model", "模型")]
    assert [choice["text"] for choice in both] == [single[0], single[0], single[1], single[1]]


def test_token_ids_are_a_prompt_too(http: httpx.Client, lively_dir: Path) -> None:
    ids = AutoTokenizer.from_pretrained(lively_dir)("the model reads").input_ids
    by_ids = complete(http, prompt=ids, max_tokens=6, temperature=0)["choices"][0]["text"]
    assert by_ids == complete(http, prompt="the model reads", max_tokens=6, temperature=0)["choices"][0]["text"]


def test_a_seed_repeats(http: httpx.Client) -> None:
    fields = {"prompt": "the", "seed": 9, "temperature": 1.2, "max_tokens": 12}
    first, again = (complete(http, **fields)["choices"][0]["text"] for _ in range(2))
    assert first == again != complete(http, **{**fields, "seed": 10})["choices"][0]["text"]


def test_an_empty_prompt_is_answered(http: httpx.Client) -> None:
    assert complete(http, prompt="", max_tokens=3)["usage"]["prompt_tokens"] == 1


def test_the_openai_client(ai: openai.OpenAI) -> None:
    assert {model.id for model in ai.models.list()} == {"lively", "base"}
    assert ai.models.retrieve("base").id == "base"
    completion = ai.completions.create(model="lively", prompt="the", max_tokens=8, temperature=0)
    parts = ai.completions.create(model="lively", prompt="the", max_tokens=8, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == completion.choices[0].text
    chat: Any = {"model": "lively", "messages": CHAT, "max_tokens": 8, "temperature": 0}
    answer = ai.chat.completions.create(**chat, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.role == "assistant"
    assert all(len(token.top_logprobs) == 2 for token in answer.choices[0].logprobs.content)
    pieces = [chunk.choices[0].delta for chunk in ai.chat.completions.create(**chat, stream=True)]
    assert pieces[0].role == "assistant"
    assert "".join(piece.content or "" for piece in pieces) == answer.choices[0].message.content


def test_chat_is_the_completion_of_the_template(http: httpx.Client) -> None:
    prompt = f"user: {CHAT[0]['content']}\nassistant:"
    expected = complete(http, prompt=prompt, max_tokens=12, temperature=0)["choices"][0]["text"]
    body = {"model": "lively", "messages": CHAT, "max_completion_tokens": 12, "temperature": 0}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == expected


BAD: list[tuple[str, Any, int, str | None]] = [
    ("/v1/completions", b"{bad json", 400, None),
    ("/v1/completions", b"\xff\xfe", 400, None),
    ("/v1/completions", b"[" * 20_000, 400, None),
    ("/v1/completions", [1, 2], 400, None),
    ("/v1/completions", {"model": "lively"}, 400, "prompt"),
    ("/v1/completions", {"model": "nobody", "prompt": "x"}, 404, "model"),
    ("/v1/completions", {"model": "lively", "prompt": 5}, 400, "prompt"),
    ("/v1/completions", b'{"model": "lively", "prompt": "\\ud800"}', 400, "prompt"),
    ("/v1/completions", {"model": "lively", "prompt": "x", "max_tokens": "5"}, 400, "max_tokens"),
    ("/v1/completions", {"model": "lively", "prompt": "x", "max_tokens": 256}, 400, "max_tokens"),
    ("/v1/completions", {"model": "lively", "prompt": [1] * 300}, 400, "prompt"),
    ("/v1/completions", {"model": "lively", "prompt": [10**9]}, 400, "prompt"),
    ("/v1/completions", {"model": "lively", "prompt": ["x"] * 9}, 400, "prompt"),
    ("/v1/completions", {"model": "lively", "prompt": "x", "n": 5}, 400, "n"),
    ("/v1/completions", {"model": "lively", "prompt": "x", "logprobs": 21}, 400, "logprobs"),
    ("/v1/completions", {"model": "lively", "prompt": "x", "logit_bias": {"9999": 2}}, 400, "logit_bias"),
    ("/v1/completions", {"model": "lively", "prompt": "x" * MAX_BODY}, 413, None),
    ("/v1/chat/completions", {"model": "lively", "messages": []}, 400, "messages"),
    (
        "/v1/chat/completions",
        {"model": "lively", "messages": [{"role": "user", "content": "x" * 2000}]},
        400,
        "messages",
    ),
    ("/v1/chat/completions", {"model": "base", "messages": CHAT}, 400, None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "status", "param"), BAD)
def test_bad_input(http: httpx.Client, path: str, body: Any, status: int, param: str | None, stream: bool) -> None:
    if isinstance(body, dict) and stream:
        body = {**body, "stream": True}
    answer = http.post(path, content=body if isinstance(body, bytes) else json.dumps(body))
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_a_body_without_a_length_is_cut_off_too(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", content=(b"x" * 1000 for _ in range(200)))
    assert answer.status_code == 413


def test_unknown_paths_answer_in_the_same_shape(http: httpx.Client) -> None:
    assert http.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert http.get("/v1/completions").status_code == 405
    assert http.get("/v1/models/nobody").json()["error"]["code"] == "model_not_found"


def test_the_openai_client_sees_its_own_errors(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ai.completions.create(model="nobody", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        ai.completions.create(model="lively", prompt="x", max_tokens=1000)
    assert (bad.value.param, bad.value.code) == ("max_tokens", "context_length_exceeded")


def test_a_full_queue_is_429_with_retry_after(endpoint: Endpoint) -> None:
    body = {"model": "lively", "prompt": "x", "max_tokens": 200, "n": 2, "logprobs": 20}

    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{endpoint.url}/v1/completions", json=body, timeout=60)

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(24)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert all(answer.json()["error"]["type"] == "rate_limit_error" for answer in refused)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(endpoint: Endpoint, http: httpx.Client, stream: bool) -> None:
    body = {"model": "lively", "prompt": "x", "max_tokens": 250, "n": 4, "logprobs": 20, "stream": stream}

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=60) as client:
            while True:  # on a busy machine the answer may be complete before it was seen to run
                asking = asyncio.create_task(client.post("/v1/completions", json=body))
                while not asking.done():
                    if await asyncio.to_thread(running, http) == 4:
                        asking.cancel()
                        return

    asyncio.run(leave())
    deadline = time.monotonic() + 60
    while running(http):
        assert time.monotonic() < deadline


def test_metrics_count_requests_and_tokens(http: httpx.Client) -> None:
    complete(http, prompt="the", max_tokens=2)
    events(http, prompt="the", max_tokens=2)
    page = re.sub(r'gateway="\w+",', "", http.get("/metrics").text)
    assert 'raymodels_serve_requests_total{model="lively",route="completions",status="200",tenant="anybody"}' in page
    assert 'raymodels_serve_requests_total{model="",route="completions",status="400",tenant="anybody"}' in page
    assert 'raymodels_serve_time_to_first_token_seconds_count{model="lively",route="completions"}' in page
    assert 'raymodels_serve_tokens_out_total{model="lively",tenant="anybody"}' in page
    queries = re.search(r'raymodels_serve_prefix_cache_queries{model="lively"} (\S+)', page)
    assert queries and float(queries[1]) > 0  # asked of the engine itself


def test_a_changed_byte_is_refused_by_name(registry: Registry, tiny_model_dir: Path) -> None:
    version = registry.publish("spoilt", str(tiny_model_dir), {})
    file = Path(version.model_place) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"model\.safetensors was changed"):
        deploy(config(registry, {"model": "spoilt"}))


@pytest.mark.parametrize("reference", ["nobody", "lively@7", "lively@canary"])
def test_an_unknown_model_version_or_alias_is_refused(registry: Registry, reference: str) -> None:
    with pytest.raises(RegistryError):
        deploy(config(registry, {"model": reference}))


def test_a_replica_that_cannot_start_says_why_and_disturbs_nothing(
    endpoint: Endpoint, http: httpx.Client, registry: Registry, tiny_model_dir: Path
) -> None:
    registry.publish("long", str(tiny_model_dir), {})
    bad = {"model": "long", "cpus": 0.5, "engine": {"max_context": 4096}}
    with pytest.raises(ServeError, match=r"engine\.max_context 4096 is over the model's 256 positions"):
        deploy(config(registry, bad))
    assert complete(http, prompt="the", max_tokens=2)
    assert set(endpoint.models) == {model["id"] for model in http.get("/v1/models").json()["data"]}


def test_one_application_holds_gateway_and_models(registry: Registry, tmp_path: Path) -> None:
    """What KubeRay builds from serveConfigV2, built and checked but not started: the shape is `deploy`'s."""
    path = tmp_path / "serve.yaml"
    path.write_text(to_yaml(config(registry, {"model": "lively"}, {"model": "plain"})))
    application({"config": str(path)})
    with pytest.raises(ConfigError, match="must be config alone"):
        application({"konfig": str(path)})
