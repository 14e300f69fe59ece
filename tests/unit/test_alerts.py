"""Alerts fire where they should and not where they should not, by Prometheus' own `promtool` on made-up series."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.promql import alerts

PROMTOOL = shutil.which("promtool")

T, S = "ray_raymodels_train_", "raymodels_serve_"
RUN, MODEL = '{run="a", ray_io_cluster="c"}', '{model="m"}'
ALIVE = ('ray_node_cpu_count{ray_io_cluster="c", app_kubernetes_io_component="train"}', "8x800")
WALL = (f"{T}wall_seconds{RUN}", "0+60x800")


def histogram(name: str, fast: str, slow: str) -> list[tuple[str, str]]:
    """Cumulative counts up to 0.1 s, to 5 s as many, and all within 60 s."""
    bounds = {"0.1": fast, "5": fast, "60": slow, "+Inf": slow}
    return [(f'{S}{name}_bucket{{model="m", le="{bound}"}}', values) for bound, values in bounds.items()]


def share(kind: str, a_minute: float) -> list[tuple[str, str]]:
    return [(f'{T}seconds_total{{run="a", kind="{kind}", ray_io_cluster="c"}}', f"0+{a_minute}x800"), WALL]


# Alert -> (series with a value a minute that fire it, series that do not).
CASES: dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
    "TrainingStandsStill": (
        [(f"{T}step{RUN}", "0+1x600 600x200"), ALIVE],
        [(f"{T}step{RUN}", "0+1x800"), ALIVE],
    ),
    "TrainingRestartsOften": ([(f"{T}restarts{RUN}", "0x740 1 2 3x60")], [(f"{T}restarts{RUN}", "3x800")]),
    "TrainingGoodputLow": (
        [(f"{T}goodput_ratio{RUN}", "0.5x800"), WALL],
        [(f"{T}goodput_ratio{RUN}", "0.9x800"), WALL],
    ),
    "TrainingWaitsForData": (share("data", 12), share("data", 3)),
    "TrainingHeldUpBySaves": (share("blocked_by_save", 6), share("blocked_by_save", 1)),
    "TrainingLosesWork": (share("lost_to_rework", 9), share("lost_to_rework", 2)),
    "TrainingSlowsDown": (
        [(f"{T}tokens_per_second{RUN}", "100x700 60x100")],
        [(f"{T}tokens_per_second{RUN}", "100x700 90x100")],
    ),
    "TrainingLossGrows": ([(f"{T}loss{RUN}", "2x700 3x100")], [(f"{T}loss{RUN}", "3x700 2x100")]),
    "GpuTooHot": (
        [('ray_node_gpu_temperature_celsius{pod="p", GpuIndex="0"}', "90x800")],
        [('ray_node_gpu_temperature_celsius{pod="p", GpuIndex="0"}', "70x800")],
    ),
    "PodNearMemoryLimit": (
        [('ray_node_mem_used{pod="p"}', "94x800"), ('ray_node_mem_total{pod="p"}', "100x800")],
        [('ray_node_mem_used{pod="p"}', "50x800"), ('ray_node_mem_total{pod="p"}', "100x800")],
    ),
    "PodDiskNearlyFull": (
        [('ray_node_disk_utilization_percentage{pod="p"}', "95x800")],
        [('ray_node_disk_utilization_percentage{pod="p"}', "50x800")],
    ),
    "ServeGatewaySilent": ([], [(f"{S}replicas{MODEL}", "0x800")]),
    "ServeApplicationFailed": (
        [('ray_serve_application_status{application="raymodels", ray_io_cluster="c"}', "1x800")],
        [('ray_serve_application_status{application="raymodels", ray_io_cluster="c"}', "6x800")],
    ),
    "ServeModelWithoutReplica": (
        [(f"{S}replicas{MODEL}", "0x800"), (f"{S}queue_requests{MODEL}", "3x800")],
        [(f"{S}replicas{MODEL}", "0x800"), (f"{S}queue_requests{MODEL}", "0x800")],
    ),
    "ServeErrors": (
        [
            (f'{S}requests_total{{model="m", status="{code}"}}', f"0+{each}x800")
            for code, each in ((200, 90), (503, 10))
        ],
        [
            (f'{S}requests_total{{model="m", status="{code}"}}', f"0+{each}x800")
            for code, each in ((200, 90), (429, 10))
        ],
    ),
    "ServeQueueRefuses": (
        [(f'{S}refused_total{{model="m", reason="queue_full"}}', "0+60x800")],
        [(f'{S}refused_total{{model="m", reason="context_length_exceeded"}}', "0+60x800")],
    ),
    "ServeFirstTokenSlow": (
        histogram("time_to_first_token_seconds", "0+50x800", "0+100x800"),
        histogram("time_to_first_token_seconds", "0+99x800", "0+100x800"),
    ),
    "ServeTokensSlow": (
        histogram("inter_token_latency_seconds", "0+50x800", "0+100x800"),
        histogram("inter_token_latency_seconds", "0+99x800", "0+100x800"),
    ),
    "ServeQueueSlow": (
        histogram("queue_seconds", "0+50x800", "0+100x800"),
        histogram("queue_seconds", "0+99x800", "0+100x800"),
    ),
    "ServeScalingBlocked": (
        [('ray_raymodels_serve_replicas_wanted{model="m--v1"}', "4x800"), (f"{S}replicas{MODEL}", "2x800")],
        [('ray_raymodels_serve_replicas_wanted{model="m--v1"}', "2x800"), (f"{S}replicas{MODEL}", "2x800")],
    ),
    "ServePodsPending": (
        [('autoscaler_pending_nodes{NodeType="replicas"}', "1x800")],
        [('autoscaler_pending_nodes{NodeType="replicas"}', "0x800")],
    ),
    "ServeKvMemoryFull": (
        [(f"{S}kv_cache_usage_ratio{MODEL}", "0.99x800")],
        [(f"{S}kv_cache_usage_ratio{MODEL}", "0.5x800")],
    ),
    "ServeHealthChecksFail": (
        [('ray_serve_health_check_failures_total{application="raymodels", deployment="m--v1"}', "0+1x800")],
        [('ray_serve_health_check_failures_total{application="raymodels", deployment="m--v1"}', "1x800")],
    ),
    "ServeTableNotUsed": (
        [(f"{S}table_failures_total", "0x790 1x10")],
        [(f"{S}table_failures_total", "1x800")],
    ),
    "ServeKeysNotRead": (
        [(f"{S}keys_reload_failures_total", "0x790 1x10")],
        [(f"{S}keys_reload_failures_total", "1x800")],
    ),
}


def test_every_alert_has_a_case() -> None:
    assert CASES.keys() == {rule["alert"] for _, rule in alerts()}


@pytest.mark.slow
@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (Debian: apt-get install prometheus)")
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """At minute 800, each in a world of its own: once with what fires it, once without."""
    assert PROMTOOL
    for _, rule in alerts():  # alone, or every rule would be evaluated in every world
        alert = rule["alert"]
        rules = {"groups": [{"name": alert, "rules": [rule]}]}
        (tmp_path / f"{alert}.rules.yaml").write_text(yaml.safe_dump(rules))
        tests = {
            "rule_files": [f"{alert}.rules.yaml"],
            "evaluation_interval": "5m",
            "tests": [world(alert, series, firing) for series, firing in zip(CASES[alert], (True, False), strict=True)],
        }
        (tmp_path / f"{alert}.yaml").write_text(yaml.safe_dump(tests))
    files = [f"{alert}.yaml" for alert in CASES]
    done = subprocess.run(
        [PROMTOOL, "test", "rules", *files], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def world(alert: str, series: list[tuple[str, str]], firing: bool) -> dict[str, Any]:
    return {
        "name": f"{alert} {'fires' if firing else 'is silent'}",
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series],
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})',
                "eval_time": "800m",
                "exp_samples": [{"labels": "{}", "value": 1}] if firing else [],
            }
        ],
    }
