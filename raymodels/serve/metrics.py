"""What gateways measure, for Prometheus. Each counts in its own process; tenants appear by name.

The same figures are also there under the names that vLLM gives them, as dashboards and autoscalers know those.
A page has those of all gateways, told apart by the label ``gateway``: who asks does not choose which one answers.
What a request does is counted by its own gateway: sum that. Replicas and engines are seen by all: take the maximum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
LABELS = ("model", "route")

REQUESTS = Counter("raymodels_serve_requests", "requests by HTTP status", (*LABELS, "tenant", "status"))
REFUSED = Counter("raymodels_serve_refused", "requests refused, by the error's code", ("model", "tenant", "reason"))
FINISHED = Counter("raymodels_serve_finished", "choices by why they ended", ("model", "reason"))
FIRST_TOKEN = Histogram(
    "raymodels_serve_time_to_first_token_seconds", "from request to first text", LABELS, buckets=BUCKETS
)
INTER_TOKEN = Histogram(
    "raymodels_serve_inter_token_latency_seconds",
    "between two tokens of a choice; of tokens sent together, their mean",
    LABELS,
    buckets=TOKEN_BUCKETS,
)
DURATION = Histogram(
    "raymodels_serve_request_seconds", "from request to the end of its answer", LABELS, buckets=BUCKETS
)
TOKENS_IN = Counter("raymodels_serve_tokens_in", "prompt tokens", ("model", "tenant"))
TOKENS_OUT = Counter("raymodels_serve_tokens_out", "generated tokens", ("model", "tenant"))

RUNNING = Gauge("raymodels_serve_running_requests", "requests that the model works on", ("model",))
QUEUE_REQUESTS = Gauge("raymodels_serve_queue_requests", "requests waiting in the gateway", ("model",))
QUEUE_TOKENS = Gauge("raymodels_serve_queue_tokens", "tokens, estimated, of the requests waiting", ("model",))
QUEUE_SECONDS = Histogram("raymodels_serve_queue_seconds", "waiting in the gateway", ("model",), buckets=BUCKETS)

REPLICAS = Gauge("raymodels_serve_replicas", "replicas that are running", ("model",))
REPLICA_CHANGES = Counter("raymodels_serve_replica_changes", "changes of that number, by why", ("model", "reason"))

TABLES_REFUSED = Counter("raymodels_serve_table_failures", "changed routing tables that could not be used")

KEYS_LOADED = Gauge("raymodels_serve_keys_loaded_timestamp_seconds", "when the keys in force were read")
KEYS_RELOAD_FAILED = Counter("raymodels_serve_keys_reload_failures", "changed keys files that could not be used")

ENGINE = {
    "running": Gauge("raymodels_serve_engine_running", "choices in the batch", ("model",)),
    "queued": Gauge("raymodels_serve_engine_queued", "requests waiting for a place in the batch", ("model",)),
    "kv_usage": Gauge("raymodels_serve_kv_cache_usage_ratio", "share of the KV memory in use, 0 to 1", ("model",)),
    "prefix_queries": Gauge("raymodels_serve_prefix_cache_queries", "prompt tokens looked up", ("model",)),
    "prefix_hits": Gauge("raymodels_serve_prefix_cache_hits", "prompt tokens found computed", ("model",)),
}

CLIENT_LEFT = 499

# vLLM's name -> ours.
ALIASES: dict[str, Collector] = {
    "vllm:num_requests_running": RUNNING,
    "vllm:num_requests_waiting": QUEUE_REQUESTS,
    "vllm:kv_cache_usage_perc": ENGINE["kv_usage"],
    "vllm:gpu_cache_usage_perc": ENGINE["kv_usage"],
    "vllm:time_to_first_token_seconds": FIRST_TOKEN,
    "vllm:inter_token_latency_seconds": INTER_TOKEN,
    "vllm:time_per_output_token_seconds": INTER_TOKEN,
    "vllm:e2e_request_latency_seconds": DURATION,
    "vllm:request_queue_time_seconds": QUEUE_SECONDS,
    "vllm:prompt_tokens": TOKENS_IN,
    "vllm:generation_tokens": TOKENS_OUT,
    "vllm:request_success": FINISHED,
}
RENAMED_LABELS = {"model": "model_name", "reason": "finished_reason"}


class Aliases(Collector):
    """Metrics under other names, copied when they are read. Labels that the originals have beyond vLLM's are kept."""

    def __init__(self, aliases: Mapping[str, Collector]) -> None:
        self._aliases = aliases

    def collect(self) -> Iterable[Metric]:
        for alias, original in self._aliases.items():
            for metric in original.collect():
                copy = Metric(alias, metric.documentation, metric.type)
                copy.samples = [_renamed(sample, metric.name, alias) for sample in metric.samples]
                yield copy

    def describe(self) -> Iterable[Metric]:
        return [Metric(alias, "", "unknown") for alias in self._aliases]


def _renamed(sample: Sample, name: str, alias: str) -> Sample:
    labels = {RENAMED_LABELS.get(label, label): value for label, value in sample.labels.items()}
    return sample._replace(name=alias + sample.name.removeprefix(name), labels=labels)


REGISTRY.register(Aliases(ALIASES))


class Gateways(Collector):
    """The figures of several gateways as those of one process, with the label ``gateway``.

    Args:
        figures: a gateway's name -> what `own_figures` gave there.
    """

    def __init__(self, figures: Mapping[str, Iterable[Metric]]) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        found: dict[str, Metric] = {}
        for gateway, metrics in self._figures.items():
            for metric in metrics:
                whole = found.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                whole.samples += [s._replace(labels={**s.labels, "gateway": gateway}) for s in metric.samples]
        return found.values()


def own_figures() -> list[Metric]:
    """What this process has measured so far."""
    return list(REGISTRY.collect())


def metrics_page(found: Mapping[str, Iterable[Metric]]) -> bytes:
    """What Prometheus reads: each gateway's `own_figures`, by its name."""
    return generate_latest(Gateways(found))


def engine_stats(model: str, stats: Mapping[str, float]) -> None:
    """Show what a model's engine says of itself; keys are those of `ENGINE`, others are left out."""
    for key, gauge in ENGINE.items():
        if key in stats:
            gauge.labels(model).set(stats[key])


def replicas_changed(model: str, replicas: int, reason: str) -> None:
    """Show a model's replicas, and why their number is another one now."""
    REPLICAS.labels(model).set(replicas)
    REPLICA_CHANGES.labels(model, reason).inc()


def table_refused() -> None:
    TABLES_REFUSED.inc()


def replicas_gone(model: str) -> None:
    """Show no replicas and no engine of a model that is served no more; what was counted of it stays."""
    for gauge in (REPLICAS, *ENGINE.values()):
        gauge.remove(model)
