"""The main job: prepare, train with ZeRO, publish, serve and call. `make demo` runs it; a second time it resumes."""

import sys
import time
from pathlib import Path

from raymodels.client import Client
from raymodels.config import ServeConfig, load
from raymodels.display import duration, following
from raymodels.serve.deploy import deploy
from raymodels.train.launch import RunResult, train

CONFIGS = Path(__file__).parent / "configs"
PROMPT = "def "


def main() -> int:
    start = time.monotonic()
    config = load(CONFIGS / "demo.yaml")
    with following(config.train.steps) as on_event:
        trained = train(config, on_event)
    show(trained)

    with deploy(load(CONFIGS / "serve.yaml", root=ServeConfig)) as endpoint, Client(endpoint.url) as client:
        print(f"\nserving {endpoint.models} at {endpoint.url}; a completion as it streams in:\n")
        print(PROMPT, end="")
        first, tokens = time.monotonic(), 0
        for delta in client.stream(PROMPT, max_tokens=64, temperature=0.8, seed=17):
            print(delta.text, end="", flush=True)
            tokens = delta.usage.completion_tokens if delta.usage else tokens
        print(f"\n\nserving: {tokens / (time.monotonic() - first):.0f} tokens/s for one client")
    print(f"all of it took {duration(time.monotonic() - start)}")
    return 0


def show(trained: RunResult) -> None:
    """The figures of the run and where everything lies."""
    entropy, held_out = trained.prepared.unigram_entropy("eval"), trained.metrics["eval_loss"]
    print(
        f"\nheld-out loss: {held_out:.3f} nats/token, {entropy - held_out:.3f} below the unigram entropy {entropy:.3f}"
    )
    print(f"training: {trained.metrics['tokens_per_second']:,.0f} tokens/s")
    if trained.phases:
        phases = "  ".join(f"{name} {seconds:.1f}" for name, seconds in trained.phases.items())
        print(f"seconds to the first step: {sum(trained.phases.values()):.1f}  ({phases})")
    places = {"data": trained.prepared.place, "run": trained.place, "checkpoint": trained.checkpoint.place}
    assert trained.version
    for name, place in {**places, f"version {trained.version.reference}": trained.version.place}.items():
        print(f"{name}: {place}")


if __name__ == "__main__":
    sys.exit(main())
