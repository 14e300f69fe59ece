"""What KubeRay's operator refuses in a RayService, and what its worker probes need.

Source: ray-operator/controllers/ray/utils/validation.go of KubeRay 1.7, one function per rule.
"""

from __future__ import annotations

import re

from raymodels.k8s.manifests import Document, Problems

INCREMENTAL = "NewClusterWithIncrementalUpgrade"
TYPES = ("NewCluster", INCREMENTAL, "None")
TIMEOUT = "ray.io/initializing-timeout"
DURATION = re.compile(r"([0-9]+(\.[0-9]*)?(ns|us|µs|ms|s|m|h))+|[0-9]+")


def upgrade_type(service: Document) -> Problems:
    place = service.at("spec", "upgradeStrategy", "type")
    if place and place.value not in TYPES:
        yield place, f"{place.value} is not one of {', '.join(TYPES)}"


def incremental_upgrade(service: Document) -> Problems:
    spec = service.at("spec")
    if spec.at("upgradeStrategy", "type").value != INCREMENTAL:
        return
    if spec.at("rayClusterConfig", "enableInTreeAutoscaling").value is not True:
        yield spec.at("rayClusterConfig", "enableInTreeAutoscaling"), f"{INCREMENTAL} needs the autoscaler: set true"
    options = spec.at("upgradeStrategy", "clusterUpgradeOptions")
    if not options:
        yield options, f"{INCREMENTAL} needs it: set stepSizePercent, intervalSeconds and gatewayClassName"
        return
    surge = options.at("maxSurgePercent").value if options.at("maxSurgePercent") else 100
    step = options.at("stepSizePercent")
    if not isinstance(surge, int) or not 0 <= surge <= 100:
        yield options.at("maxSurgePercent"), "must be 0 to 100"
    elif not isinstance(step.value, int) or not 0 <= step.value <= surge:
        yield step, f"must be 0 to maxSurgePercent, {surge}"
    interval = options.at("intervalSeconds")
    if not isinstance(interval.value, int) or interval.value <= 0:
        yield interval, "must be more than 0"
    if not options.at("gatewayClassName").value:
        yield options.at("gatewayClassName"), "names the Gateway API's class that shifts the traffic: set it"


def head_service_name(service: Document) -> Problems:
    place = service.at("spec", "rayClusterConfig", "headGroupSpec", "headService", "metadata", "name")
    if place.value:
        yield place, "is refused in a RayService, whose clusters come and go: remove it"


def deletion_delay(service: Document) -> Problems:
    place = service.at("spec", "rayClusterDeletionDelaySeconds")
    if isinstance(place.value, int) and place.value < 0:
        yield place, "is negative: set 0 or more"


def initializing_timeout(service: Document) -> Problems:
    place = service.at("metadata", "annotations", TIMEOUT)
    if place.value and (not DURATION.fullmatch(str(place.value)) or not re.search("[1-9]", str(place.value))):
        yield place, f"{place.value!r} is no duration above 0, such as 30m or 1800"


SERVICE_RULES = (upgrade_type, incremental_upgrade, head_service_name, deletion_delay, initializing_timeout)
