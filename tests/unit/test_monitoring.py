"""Dashboards and alerts ask for what is exported: metrics are taken from where they are defined, here and in Ray."""

from __future__ import annotations

import ast
import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml
from pydantic import BaseModel

from raymodels.config import AutoscalingConfig, Config, EngineConfig, HttpConfig
from raymodels.ledger import KINDS, account
from tests.unit.promql import (
    MONITORING,
    Exported,
    Metric,
    Question,
    alerts,
    dashboard_questions,
    dashboards,
    faults,
    questions,
    selectors,
    unwrapped,
)

pytestmark = pytest.mark.slow  # it imports Ray's dashboard and Serve

# What Prometheus and its operator add to every series.
EVERYWHERE = frozenset({"container", "endpoint", "instance", "job", "namespace", "pod"})
SECTIONS = {"engine": EngineConfig, "autoscaling": AutoscalingConfig, "http": HttpConfig}
PROMTOOL = shutil.which("promtool")
SETTING = re.compile(r"\b([a-z]+)\.([a-z_]+)\b")


@pytest.fixture(scope="module")
def exported() -> Exported:
    """Everything that the PodMonitors scrape, by the port that shows it."""
    shown = {"serve": gateway_metrics(), "as-metrics": autoscaler_metrics()}
    shown["metrics"] = {f"ray_{name}": metric for name, metric in rays_metrics().items()}
    added = scraped_labels()
    assert added.keys() == shown.keys()
    return {
        name: Metric(metric.type, metric.labels | added[port] | EVERYWHERE)
        for port, metrics in shown.items()
        for name, metric in metrics.items()
    }


def scraped_labels() -> dict[str, frozenset[str]]:
    """Port -> the labels that every pod's series there get from the pod."""
    added: dict[str, frozenset[str]] = {}
    for monitor in yaml.safe_load_all((MONITORING / "scrape.yaml").read_text()):
        labels = frozenset(re.sub(r"\W", "_", label) for label in monitor["spec"]["podTargetLabels"])
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            added[endpoint["port"]] = added.get(endpoint["port"], labels) & labels
    return added


def stored(name: str, kind: str, labels: Any) -> Iterator[tuple[str, Metric]]:
    """The names under which Prometheus keeps a metric."""
    labels = frozenset(labels)
    if kind == "histogram":
        yield f"{name}_bucket", Metric("bucket", labels | {"le"})
        yield from ((f"{name}_{part}", Metric("counter", labels)) for part in ("count", "sum"))
    elif kind == "counter":
        yield name.removesuffix("_total") + "_total", Metric("counter", labels)
    else:
        assert kind == "gauge", f"{name} is a {kind}"
        yield name, Metric("gauge", labels)


def prometheus_metrics(metrics: Any) -> dict[str, Metric]:
    """Of prometheus_client's collectors, which tell their labels only in private."""
    described = [(metric.describe()[0], metric._labelnames) for metric in metrics]
    return {name: found for told, labels in described for name, found in stored(told.name, told.type, labels)}


def gateway_metrics() -> dict[str, Metric]:
    from prometheus_client.metrics import MetricWrapperBase

    from raymodels.serve import metrics

    return prometheus_metrics(
        [found for found in (*vars(metrics).values(), *metrics.ENGINE.values()) if isinstance(found, MetricWrapperBase)]
    )


def autoscaler_metrics() -> dict[str, Metric]:
    from prometheus_client.metrics import MetricWrapperBase
    from ray.autoscaler._private.prom_metrics import AutoscalerPrometheusMetrics

    made = AutoscalerPrometheusMetrics(session_name="s")
    return prometheus_metrics([found for found in vars(made).values() if isinstance(found, MetricWrapperBase)])


def rays_metrics() -> dict[str, Metric]:
    """What Ray exports with its prefix: its own metrics, Serve's, and ours that are made with ``ray.util.metrics``."""
    import ray.serve
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    found = {
        gauge.name: Metric("gauge", frozenset(str(tag) for tag in gauge.view.columns))
        for gauge in METRICS_GAUGES.values()
    }
    for file in (Path(ray.serve.__file__).parent / "_private").rglob("*.py"):
        found |= made_in(file)
    return found | training_metrics() | scaling_metrics()


def made_in(file: Path) -> dict[str, Metric]:
    """The metrics with a constant name and constant tags that a module makes; of tags by condition, those of all."""
    tree = ast.parse(file.read_text())
    found: dict[str, Metric] = {}
    named = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        kind = ast.unparse(call.func).rpartition(".")[2].lower()
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        name, tags = call.args[0] if call.args else given.get("name"), given.get("tag_keys")
        tags = named.get(tags.id) if isinstance(tags, ast.Name) else tags
        labels = [set(ast.literal_eval(node)) for node in ast.walk(tags) if isinstance(node, ast.Tuple)] if tags else []
        if kind in ("counter", "gauge", "histogram") and isinstance(name, ast.Constant) and labels:
            found |= dict(stored(name.value, kind, set.intersection(*labels)))
    return found


def training_metrics() -> dict[str, Metric]:
    """The gauges that a report sets, by reporting."""
    import ray.util.metrics

    from raymodels.train import gauges

    made: list[dict[str, Any]] = []

    class Noted(ray.util.metrics.Gauge):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self.info)

    report = {"time": 2.0, "kind": "report", "step": 1, "world_size": 1, "memory_bytes": [1], "seconds": {"step": 1.0}}
    events = [{"time": 1.0, "kind": "started", "attempt": 1, "resumed_from_step": 0}, report]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gauges, "Gauge", Noted)
        patch.setattr(gauges.ray, "is_initialized", lambda: True)
        gauges._gauge.cache_clear()
        gauges.show("run", report | dict.fromkeys(gauges.FIGURES, 1.0), account(events))
    gauges._gauge.cache_clear()
    return {info["name"]: Metric("gauge", frozenset(info["tag_keys"])) for info in made}


def scaling_metrics() -> dict[str, Metric]:
    from raymodels.serve.scaling import ServePolicy

    policy = ServePolicy()
    infos = {"counter": policy._changes.info, "gauge": policy._wanted.info}
    return dict(pair for kind, info in infos.items() for pair in stored(info["name"], kind, info["tag_keys"]))


@pytest.mark.parametrize("question", questions(), ids=lambda question: question.where)
def test_what_is_asked_is_exported(question: Question, exported: Exported) -> None:
    assert faults(question, exported) == []


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("sum(rate(raymodels_serve_requests[5m]))", "nothing exports raymodels_serve_requests"),
        ("raymodels_train_step", "nothing exports raymodels_train_step"),
        ("max by (rnu) (ray_raymodels_train_step)", "no series has the label rnu of max by"),
        ('raymodels_serve_replicas{tenant="a"}', "no series has the label tenant of raymodels_serve_replicas"),
        ("sum by (model) (raymodels_serve_replicas)", "no series has the label tenant of the text beside it"),
        ("rate(ray_raymodels_train_step[5m])", "rate of ray_raymodels_train_step, which is a gauge"),
        ("delta(raymodels_serve_requests_total[5m])", "delta of raymodels_serve_requests_total, which is a counter"),
        (
            "histogram_quantile(0.9, sum by (model) (rate(raymodels_serve_queue_seconds_bucket[5m])))",
            "no series has the label le of histogram_quantile",
        ),
        (
            "sum by (model) (raymodels_serve_replicas) / sum(raymodels_serve_running_requests)",
            "/ joins series by ['model'] with series by []",
        ),
    ],
)
def test_a_wrong_question_is_found(expression: str, fault: str, exported: Exported) -> None:
    shown = frozenset({"tenant"}) if "the text" in fault else frozenset()
    assert faults(Question("here", expression, shown), exported) == [f"here: {fault}"]


def test_what_is_exported_is_shown(exported: Exported) -> None:
    """No figure of the gateway or of a run is on no dashboard and in no alert."""
    asked = " ".join(question.expression for question in questions())
    ours = {name for name in exported if "raymodels_" in name and not name.endswith(("_sum", "_count"))}
    assert {name for name in ours if not re.search(rf"\b{name}\b", asked)} == set()


def test_kinds_of_seconds_are_the_ledgers() -> None:
    asked = [kind for question in questions() for kind in re.findall(r'kind="(\w+)"', question.expression)]
    assert asked
    assert set(asked) <= KINDS.keys()


@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (Debian: apt-get install prometheus)")
def test_every_panel_has_an_answer(exported: Exported, tmp_path: Path) -> None:
    """Prometheus itself evaluates them on two pods' series of every metric: joins of many to many are errors there."""
    assert PROMTOOL
    asked = [(question.where, re.sub(r"\$\w+", ".*", question.expression)) for question in dashboard_questions()]
    names = {selector.name for _, expression in asked for selector in selectors(expression)}
    world = {
        "interval": "1m",
        "input_series": [series for name in sorted(names) for series in made_up(name, exported[name])],
        "promql_expr_test": [
            {"expr": f"count({expression}) > bool 0", "eval_time": "60m", "exp_samples": [{"labels": "{}", "value": 1}]}
            for _, expression in asked
        ],
    }
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [world]}))
    done = subprocess.run(
        [PROMTOOL, "test", "rules", "tests.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def made_up(name: str, metric: Metric) -> Iterator[dict[str, str]]:
    """Series of a metric on two pods of each component, rising by 1 a minute."""
    values = {
        "pod": ("p", "q"),
        "app_kubernetes_io_component": ("train", "serve"),
        "kind": tuple(KINDS),
        "status": ("200", "503"),
        "le": ("1", "+Inf"),
    }
    labels = sorted(metric.labels)
    for combined in itertools.product(*(values.get(label, ("x",)) for label in labels)):
        pairs = ", ".join(f'{label}="{value}"' for label, value in zip(labels, combined, strict=True))
        yield {"series": f"{name}{{{pairs}}}", "values": "0+1x60"}


@pytest.mark.parametrize(("where", "rule"), alerts(), ids=[where for where, _ in alerts()])
def test_an_alert_names_its_remedy(where: str, rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"]["summary"]
    remedy = rule["annotations"]["remedy"]
    assert len(remedy) > 40
    for section, key in SETTING.findall(remedy):
        found = SECTIONS.get(section) or Config.model_fields.get(section)
        if found:
            model = found if isinstance(found, type) else found.annotation
            assert isinstance(model, type)
            assert issubclass(model, BaseModel)
            assert key in model.model_fields, f"{where}: there is no setting {section}.{key}"


def test_alerts_are_conditions() -> None:
    """An alert that only names a figure would always fire."""
    for where, rule in alerts():
        assert is_condition(promql.parse(rule["expr"])), where


def is_condition(node: Any) -> bool:
    node = unwrapped(node)
    if isinstance(node, promql.Call):
        return node.func.name == "absent"
    operator = str(node.op)
    return operator in ("<", ">", "<=", ">=", "==", "unless") or (operator == "and" and is_condition(node.lhs))


def test_dashboards_are_what_the_component_delivers() -> None:
    [generator] = yaml.safe_load((MONITORING / "kustomization.yaml").read_text())["configMapGenerator"]
    assert {Path(file).name for file in generator["files"]} == dashboards().keys()
    assert generator["options"]["labels"] == {"grafana_dashboard": "1"}


@pytest.mark.parametrize("name", dashboards())
def test_a_dashboard_is_sound(name: str) -> None:
    board = dashboards()[name]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"] for variable in board["templating"]["list"]}
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel.get("targets", []):
            assert set(re.findall(r"\$(?!__)(\w+)", target["expr"])) <= variables
            assert target["datasource"]["uid"] == "${datasource}"
    assert len({board["uid"] for board in dashboards().values()}) == len(dashboards())


def test_gateways_are_scraped_through_one_pod() -> None:
    """Whichever is asked shows the figures of all: on several pods they would count several times."""
    monitors = list(yaml.safe_load_all((MONITORING / "scrape.yaml").read_text()))
    [gateway] = [m for m in monitors if "serve" in [e["port"] for e in m["spec"]["podMetricsEndpoints"]]]
    assert gateway["spec"]["selector"]["matchLabels"]["ray.io/node-type"] == "head"


SEEN_BY_ALL = re.compile(r"\braymodels_serve_(replicas|replica_changes|engine|kv_cache|prefix_cache|keys)")
BY_MAXIMUM = re.compile(r"(max|min|absent)( by \([^)]*\) )?\((increase\()?$|\} / $")  # a ratio is a gateway's


def test_what_every_gateway_sees_is_not_summed_over_them() -> None:
    asked = [question.expression for question in questions() if "(" in question.expression]
    seen = [(text[: found.start()], text) for text in asked for found in SEEN_BY_ALL.finditer(text)]
    assert len(seen) > 10
    for before, text in seen:
        assert BY_MAXIMUM.search(before), text
