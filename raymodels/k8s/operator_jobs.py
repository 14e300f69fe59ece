"""What KubeRay's operator refuses in a RayJob's spec, or a RayCronJob's, though the schema takes it.

Source: ray-operator/controllers/ray/utils/validation.go of KubeRay 1.7, one function per rule.
"""

from __future__ import annotations

import re
import zoneinfo
from itertools import pairwise

from raymodels.k8s import files
from raymodels.k8s.manifests import ManifestSet, Place, Problems

QUEUE = "kueue.x-k8s.io/queue-name"
SELECTOR = "ray.io/cluster"
# The modes that paste the entrypoint into a shell; HTTPMode and InteractiveMode do not.
PASTED = (None, "K8sJobMode", "SidecarMode")
SHELL = re.compile(r"&&|[;|$`<>&\n]")
SINGLE, DOUBLE = re.compile("'[^']*'"), re.compile('"[^"]*"')
MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
FIELD = re.compile(r"(\*|[0-9A-Za-z]+(-[0-9A-Za-z]+)?)(/[0-9]+)?|\?")
RANGES = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
NAMES = re.compile("jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|sun|mon|tue|wed|thu|fri|sat", re.IGNORECASE)
EVERY = re.compile(r"@(yearly|annually|monthly|weekly|daily|midnight|hourly|every ([0-9.]+(ns|us|ms|s|m|h))+)")
ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


def submission_mode(job: Place) -> Problems:
    mode = job.at("submissionMode")
    if mode and mode.value not in MODES:
        yield mode, f"{mode.value} is not one of {', '.join(MODES)}"


def suspend_needs_shutdown(job: Place) -> Problems:
    if job.at("suspend").value and not job.at("shutdownAfterJobFinishes").value:
        yield job.at("suspend"), "needs shutdownAfterJobFinishes: true"
    if job.at("suspend").value and job.at("clusterSelector").value:
        yield job.at("suspend"), "is refused with clusterSelector: remove one of the two"


def ttl_needs_shutdown(job: Place) -> Problems:
    ttl = job.at("ttlSecondsAfterFinished")
    if isinstance(ttl.value, int) and ttl.value < 0:
        yield ttl, "is negative: set 0 or more"
    elif ttl.value and not job.at("shutdownAfterJobFinishes").value:
        yield ttl, "needs shutdownAfterJobFinishes: true"


def one_cluster(job: Place) -> Problems:
    spec, selector = job.at("rayClusterSpec"), job.at("clusterSelector")
    if not spec and not selector.value:
        yield spec, "neither rayClusterSpec nor clusterSelector is set: set one"
    elif spec and selector.value:
        yield selector, "excludes rayClusterSpec, which would be ignored: keep one"
    if selector.value and not selector.at(SELECTOR).value:
        yield selector.at(SELECTOR), "clusterSelector does not name the cluster: set ray.io/cluster"


def selector_modes(job: Place) -> Problems:
    if job.at("clusterSelector").value:
        if job.at("submissionMode").value == "SidecarMode":
            yield job.at("submissionMode"), "SidecarMode is refused with clusterSelector: set another"
        if job.at("backoffLimit").value:
            yield job.at("backoffLimit"), "is refused with clusterSelector: remove it"


def interactive_retries(job: Place) -> Problems:
    if job.at("submissionMode").value == "InteractiveMode" and job.at("backoffLimit").value:
        yield job.at("backoffLimit"), "is refused in InteractiveMode: remove it"


def sidecar_mode(job: Place) -> Problems:
    if job.at("submissionMode").value == "SidecarMode":
        for key in ("submitterPodTemplate", "submitterConfig"):
            if job.at(key):
                yield job.at(key), "is refused in SidecarMode: remove it"
        policy = job.at("rayClusterSpec", "headGroupSpec", "template", "spec", "restartPolicy")
        if policy.value not in (None, "Never"):
            yield policy, "must be Never, or unset, in SidecarMode"


def deadlines(job: Place) -> Problems:
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if isinstance(job.at(key).value, int) and job.at(key).value <= 0:
            yield job.at(key), "must be more than 0: set it, or remove it"


def backoff_limit(job: Place) -> Problems:
    if isinstance(job.at("backoffLimit").value, int) and job.at("backoffLimit").value < 0:
        yield job.at("backoffLimit"), "is negative: set 0 or more"


def entrypoint_shell(job: Place) -> Problems:
    """Else the operator's script runs a part of it elsewhere than in the cluster."""
    place = job.at("entrypoint")
    # Within quotes bash leaves all of them alone, but for $ and ` within double ones.
    text = DOUBLE.sub(lambda quoted: re.sub("[^$`]", "", quoted.group()), SINGLE.sub("", str(place.value).strip()))
    found = SHELL.search(text) if job.at("submissionMode").value in PASTED else None
    if place and found:
        yield (
            place,
            f"has {found.group()!r}, and is pasted into bash unquoted: put what it does into a script of the image",
        )


def runtime_env_text(job: Place) -> Problems:
    place = job.at("runtimeEnvYAML")
    try:
        told = files.parse(place.value) if place else {}
    except files.Unreadable as error:
        yield place, f"is no YAML: {error}"
        return
    if told is not None and not isinstance(told, dict):
        yield place, "is no mapping: set keys such as env_vars"


def deletion_strategy(job: Place) -> Problems:
    strategy = job.at("deletionStrategy")
    if not strategy:
        return
    rules = strategy.at("deletionRules")
    legacy = [strategy.at(key) for key in ("onSuccess", "onFailure") if strategy.at(key)]
    if rules.value and job.at("shutdownAfterJobFinishes").value:
        yield rules, "excludes shutdownAfterJobFinishes: remove one of the two"
    if rules.value and legacy:
        yield legacy[0], "excludes deletionRules: keep one of the two"
    if not rules.value and len(legacy) != 2:
        yield strategy, "needs deletionRules, or both onSuccess and onFailure"
    for place in legacy:
        policy = place.at("policy")
        if policy.value == "DeleteNone" and job.at("shutdownAfterJobFinishes").value:
            yield policy, "excludes shutdownAfterJobFinishes: remove one of the two"
        yield from _deletion_policy(job, policy)
    for rule in rules.each():
        yield from _deletion_policy(job, rule.at("policy"))


def _deletion_policy(job: Place, policy: Place) -> Problems:
    if job.at("clusterSelector").value and policy.value in ("DeleteCluster", "DeleteWorkers"):
        yield policy, f"{policy.value} is refused with clusterSelector: the cluster is not the job's"
    elif policy.value == "DeleteWorkers" and job.at("rayClusterSpec", "enableInTreeAutoscaling").value:
        yield policy, "DeleteWorkers is refused with autoscaling: use DeleteCluster"


def deletion_rules_order(job: Place) -> Problems:
    """Per condition, workers go before their cluster, and that before the job."""
    ages: dict[tuple[str, str], dict[str, tuple[int, Place]]] = {}
    for rule in job.each("deletionStrategy", "deletionRules"):
        condition, policy = rule.at("condition"), str(rule.at("policy").value)
        told = [key for key in ("jobStatus", "jobDeploymentStatus") if condition.at(key)]
        if len(told) != 1:
            yield condition, "needs one of jobStatus and jobDeploymentStatus"
            continue
        seconds = condition.at("ttlSeconds").value or 0
        if seconds < 0:
            yield condition.at("ttlSeconds"), "is negative: set 0 or more"
        known = ages.setdefault((told[0], str(condition.at(told[0]).value)), {})
        if policy in known:
            yield rule.at("policy"), f"{policy} is given twice for this condition: keep one"
        known[policy] = (seconds, condition.at("ttlSeconds"))
    for (_, status), known in ages.items():
        ordered = [(policy, *known[policy]) for policy in ORDER if policy in known]
        for (before, less, _), (after, more, place) in pairwise(ordered):
            if more < less:
                yield place, f"after {status}, {after} ({more} s) comes before {before} ({less} s): raise it"


def schedule(manifests: ManifestSet) -> Problems:
    for document in manifests.kinds("RayCronJob"):
        place, zone = document.at("spec", "schedule"), document.at("spec", "timeZone")
        if place and "TZ" in str(place.value):
            yield place, "names a time zone: use timeZone"
        elif place and not _is_schedule(str(place.value)):
            yield place, f"{place.value!r} is no cron schedule: minute, hour, day, month, weekday"
        if zone.value is not None and (not zone.value or zone.value not in zoneinfo.available_timezones() | {"Local"}):
            yield zone, f"{zone.value!r} is no time zone: set one such as Europe/Berlin"


def _is_schedule(text: str) -> bool:
    if text.startswith("@"):
        return EVERY.fullmatch(text) is not None
    parts = text.split()
    return len(parts) == 5 and all(map(_is_field, parts, RANGES))


def _is_field(text: str, bounds: tuple[int, int]) -> bool:
    for part in text.split(","):
        if not FIELD.fullmatch(part):
            return False
        told = NAMES.sub("1", part.partition("/")[0]).replace("*", "").replace("?", "")
        numbers = [int(number) if number.isdecimal() else -1 for number in told.split("-") if number]
        if not all(bounds[0] <= number <= bounds[1] for number in numbers) or numbers != sorted(numbers):
            return False
        if part.endswith("/0"):
            return False
    return True


def kueue(manifests: ManifestSet) -> Problems:
    """What Kueue asks of a RayJob or RayCluster that it queues."""
    for document in manifests.kinds("RayJob", "RayCluster"):
        if not document.at("metadata", "labels", QUEUE):
            continue
        spec = document.at("spec")
        if document.kind == "RayJob":
            if spec.at("clusterSelector").value:
                yield spec.at("clusterSelector"), "is refused by Kueue: give the job a rayClusterSpec"
            if spec.at("shutdownAfterJobFinishes").value is not True:
                told = "Kueue frees the quota only with shutdownAfterJobFinishes: true: set it"
                yield spec.at("shutdownAfterJobFinishes"), told
            if spec.at("deletionStrategy", "deletionRules").value:
                yield spec.at("deletionStrategy", "deletionRules"), "is refused with Kueue: remove it"


SET_RULES = (schedule, kueue)
JOB_RULES = (
    submission_mode,
    suspend_needs_shutdown,
    ttl_needs_shutdown,
    one_cluster,
    selector_modes,
    interactive_retries,
    sidecar_mode,
    deadlines,
    backoff_limit,
    entrypoint_shell,
    runtime_env_text,
    deletion_strategy,
    deletion_rules_order,
)
