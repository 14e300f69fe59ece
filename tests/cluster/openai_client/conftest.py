"""One deployed endpoint of a tiny model, and the openai client of one of its tenants.

``RAYMODELS_TEST_ENGINE`` names the engine; every case is about the wire, and so the same for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer

from raymodels.config import ServeConfig, validate
from raymodels.registry import Registry
from raymodels.serve.deploy import deploy
from raymodels.serve.tenants import add_key
from tests.cluster.openai_client.asking import MAX_BODY
from tests.random_models import random_model

TEMPLATE = (
    "{% for tool in tools or [] %}{% if loop.first %}Answer with <tool_call>.\n{% endif %}{{ tool.function.name }}\n"
    "{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)


def engine_settings() -> dict[str, Any]:
    """Of the engine under test, by default the one that an endpoint takes by itself."""
    kind = os.environ.get("RAYMODELS_TEST_ENGINE")
    return {"max_batch": 8, "max_queue": 16} | ({"kind": kind} if kind else {})


@pytest.fixture(scope="package")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose answers differ from prompt to prompt, with a chat template that knows tools."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = TEMPLATE
    # vLLM has no CPU kernels for heads under 32. Logits are small enough for penalties to count.
    shape = {"hidden_size": 128, "initializer_range": 0.2, "max_position_embeddings": 1024}
    return random_model(tmp_path_factory.mktemp("talkative"), tokenizer, **shape)


@pytest.fixture(scope="package")
def tokenizer(model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="package")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file = str(tmp_path_factory.mktemp("keys") / "keys.yaml")
    return {"file": file, "team": add_key(file, "team"), "slow": add_key(file, "slow", requests_per_minute=1)}


@pytest.fixture(scope="package")
def url(
    ray_cluster: Any, model_dir: Path, keys: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    registry = Registry(str(tmp_path_factory.mktemp("registry")))
    registry.publish("tiny", str(model_dir), {})
    models = [{"model": "tiny", "cpus": 0.5, "engine": engine_settings()}]
    http = {"port": 0, "max_body_bytes": MAX_BODY, "keys_file": keys["file"]}
    with deploy(validate({"registry": registry.place, "models": models, "http": http}, ServeConfig)) as endpoint:
        yield f"{endpoint.url}/v1"


@pytest.fixture(scope="package")
def ai(url: str, keys: dict[str, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=keys["team"], max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def endless(tokenizer: Any) -> dict[str, Any]:
    """What takes the tiny model seconds: eight texts up to the end of the context."""
    return {"max_tokens": 1000, "n": 8, "logprobs": 20, "logit_bias": {str(tokenizer.eos_token_id): -100}}
