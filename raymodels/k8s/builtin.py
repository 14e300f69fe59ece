"""Schemas of Kubernetes' built-in kinds, from the package kubernetes-validate: strict, of a version."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator
from kubernetes_validate import utils
from referencing import Registry, Resource

KINDS = {
    *("ConfigMap", "CronJob", "DaemonSet", "Deployment", "HorizontalPodAutoscaler", "Ingress", "Job", "Namespace"),
    *("NetworkPolicy", "PersistentVolumeClaim", "Pod", "PodDisruptionBudget", "PriorityClass", "Role", "RoleBinding"),
    *("Secret", "Service", "ServiceAccount", "StatefulSet"),
}


@cache
def validator(kind: str, api_version: str, version: str) -> Draft202012Validator | None:
    """What validates a kind, or None if Kubernetes has none of that name in that group and version."""
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    folder = f"kubernetes-json-schema/v{version}.0-local-strict"
    known = group.count("/") == 0 and ("." not in api_version.partition("/")[0] or "k8s.io" in api_version)
    if not known:
        return None
    try:
        schema = utils.schema_contents(f"{folder}/{kind.lower()}-{group}.json", version)
    except FileNotFoundError:
        return None
    return Draft202012Validator(
        schema, registry=_registry(folder, version).with_resource("", Resource.from_contents(schema))
    )


@cache
def _registry(folder: str, version: str) -> Registry[Any]:
    definitions = Resource.from_contents(utils.schema_contents(f"{folder}/_definitions.json", version))
    return definitions @ Registry()


def versions() -> list[str]:
    """Those whose schemas there are, such as 1.34."""
    return list(dict.fromkeys(utils.major_minor(version) for version in utils.all_versions()))
