"""What the network reaches and what is watched: policies, public ports, monitors, alerts, budgets."""

from __future__ import annotations

from collections.abc import Iterator

from raymodels.k8s.manifests import ManifestSet, Place, Problems
from raymodels.k8s.selectors import monitored, selects
from raymodels.k8s.workloads import JOBS, clusters, pods

# The dashboard with the jobs API, the Ray client, GCS: whoever reaches them runs code in the cluster.
PRIVATE_PORTS = {8265: "dashboard", 10001: "client", 6379: "gcs-server"}
PRIVATE_NAMES = {*PRIVATE_PORTS.values(), "redis", "gcs"}
PUBLIC_TYPES = ("LoadBalancer", "NodePort")
REMEDIES = ("remedy", "runbook_url")


def public_service(manifests: ManifestSet) -> Problems:
    """Ray's own ports behind an address that the whole network has."""
    for service in _services(manifests):
        kind = service.at("spec", "type")
        ports = [port for port in service.each("spec", "ports") if _private(port)]
        if kind.value in PUBLIC_TYPES and (ports or "headService" in service.path):
            named = ", ".join(str(port.at("port").value) for port in ports) or "8265, 10001 and 6379"
            yield kind, f"{kind.value} opens {named}, where whoever comes runs code: use ClusterIP and port-forward"


def _services(manifests: ManifestSet) -> Iterator[Place]:
    yield from (document.root for document in manifests.kinds("Service"))
    for cluster in clusters(manifests):
        yield cluster.head.at("headService")
    for document in manifests.kinds("RayService"):
        yield document.at("spec", "serveService")


def _private(port: Place) -> bool:
    told = {port.at(key).value for key in ("port", "targetPort", "name")}
    return bool(told & (PRIVATE_PORTS.keys() | PRIVATE_NAMES))


def head_service_type(manifests: ManifestSet) -> Problems:
    for cluster in clusters(manifests):
        place = cluster.head.at("serviceType")
        if place.value in PUBLIC_TYPES:
            yield place, f"{place.value} opens 8265, 10001 and 6379, where whoever comes runs code: remove it"
        if cluster.head.at("enableIngress").value:
            yield cluster.head.at("enableIngress"), "publishes the dashboard, where whoever comes runs code: remove it"


def public_route(manifests: ManifestSet) -> Problems:
    for document in manifests.kinds("Ingress"):
        backends = [document.at("spec", "defaultBackend", "service", "port")]
        for rule in document.at("spec").each("rules"):
            backends += [path.at("backend", "service", "port") for path in rule.each("http", "paths")]
        for port in backends:
            for key in ("number", "name"):
                if port.at(key).value in PRIVATE_PORTS.keys() | PRIVATE_NAMES:
                    yield port.at(key), f"publishes {port.at(key).value}, where whoever comes runs code: remove it"
    for document in manifests.kinds("HTTPRoute", "GRPCRoute", "TLSRoute", "TCPRoute"):
        for rule in document.at("spec").each("rules"):
            for backend in rule.each("backendRefs"):
                if backend.at("port").value in PRIVATE_PORTS:
                    told = f"publishes {backend.at('port').value}, where whoever comes runs code: remove it"
                    yield backend.at("port"), told


def budget_form(manifests: ManifestSet) -> Problems:
    """Pods whose owner has no scale subresource take an integer minAvailable alone.

    Source: kubernetes.io/docs/tasks/run-application/configure-pdb, arbitrary workloads and arbitrary selectors.
    """
    for document in manifests.kinds("PodDisruptionBudget"):
        chosen = [pod for pod in pods(manifests) if selects(document.at("spec", "selector"), pod.labels)]
        if not any(pod.role in ("head", "worker") for pod in chosen):
            continue
        spec = document.at("spec")
        if spec.at("maxUnavailable"):
            yield spec.at("maxUnavailable"), "is not evaluated for Ray's pods: use minAvailable with a number"
        elif not isinstance(spec.at("minAvailable").value, int):
            yield spec.at("minAvailable"), "must be a number for Ray's pods, which have no scale to take a part of"


def budget_of_gang(manifests: ManifestSet) -> Problems:
    """A gang that loses one pod starts again from its last commit: a drain must not take any."""
    for document in manifests.kinds("PodDisruptionBudget"):
        chosen = [pod for pod in pods(manifests) if selects(document.at("spec", "selector"), pod.labels)]
        owners = {pod.document for pod in chosen}
        if len(owners) != 1 or not all(pod.cluster and pod.cluster.kind in JOBS for pod in chosen):
            continue
        least, count = document.at("spec", "minAvailable"), sum(pod.count for pod in chosen)
        if isinstance(least.value, int) and least.value != count:
            [owner] = owners
            yield least, f"is {least.value}, and it selects {count} pods of {owner.kind}/{owner.name}: set {count}"


def network_policy_missing(manifests: ManifestSet) -> Problems:
    policies = manifests.kinds("NetworkPolicy")
    for pod in pods(manifests):
        if pod.cluster and pod.cluster.spec.at("networkPolicy"):
            continue
        chosen = [policy for policy in policies if selects(policy.at("spec", "podSelector"), pod.labels)]
        if pod.role != "submitter" and not any("Ingress" in _types(policy.root) for policy in chosen):
            told = f"no NetworkPolicy for ingress selects the {pod.role} pods: whoever is in the cluster reaches them"
            yield pod.spec, f"{told}; select ray.io/cluster, or their labels"


def _types(policy: Place) -> list[str]:
    return policy.at("spec", "policyTypes").value or ["Ingress"]


def open_policy(manifests: ManifestSet) -> Problems:
    """An ingress rule that names nobody lets everybody in to the private ports."""
    for policy in manifests.kinds("NetworkPolicy"):
        for rule in policy.at("spec").each("ingress"):
            if rule.at("from").value and not any(_anybody(peer) for peer in rule.each("from")):
                continue
            ports = list(rule.each("ports"))
            if not ports:
                yield rule, "lets everybody in to every port: say from whom, and to which ports"
            for port in ports:
                yield from _opened(port)


def _anybody(peer: Place) -> bool:
    """All addresses, or all pods of all namespaces."""
    every_pod = peer.at("namespaceSelector").value == {} and not peer.at("podSelector").value
    return every_pod or str(peer.at("ipBlock", "cidr").value).endswith("/0")


def _opened(port: Place) -> Problems:
    """The private ports within an entry of a rule: a port, a range, or all of a protocol."""
    first, last = port.at("port"), port.at("endPort")
    if port.at("protocol").value not in (None, "TCP"):
        return
    if not first:
        yield port, "lets everybody in to every port: say from whom, and to which port"
    elif last and not isinstance(first.value, int):
        yield last, f"makes no range with {first.value}, which is a name: give the first port as a number"
    elif last:
        within = [str(number) for number in sorted(PRIVATE_PORTS) if first.value <= number <= last.value]
        if within:
            yield last, f"lets everybody in to {', '.join(within)}: say from whom"
    elif first.value in PRIVATE_PORTS.keys() | PRIVATE_NAMES:
        yield first, f"lets everybody in to {first.value}: say from whom"


def monitor_missing(manifests: ManifestSet) -> Problems:
    """Ray's metrics of a cluster's heads and workers."""
    watched = [pod for monitor in manifests.kinds("PodMonitor") for pod in monitored(monitor, pods(manifests))]
    seen = {(pod.spec.document, pod.spec.path) for pod in watched}
    for pod in pods(manifests):
        if pod.role in ("head", "worker") and (pod.spec.document, pod.spec.path) not in seen:
            yield pod.spec, f"no PodMonitor selects the {pod.role} pods: their metrics are lost"


def alerts_missing(manifests: ManifestSet) -> Problems:
    if clusters(manifests) and not any(_alerts(manifests)):
        yield clusters(manifests)[0].document.root, "the set has no PrometheusRule with an alert: add one"


def alert_remedy(manifests: ManifestSet) -> Problems:
    for alert in _alerts(manifests):
        if not any(alert.at("annotations", key).value for key in REMEDIES):
            yield alert.at("annotations"), f"{alert.at('alert').value} names no remedy: add annotations.{REMEDIES[0]}"
        if not alert.at("annotations", "summary").value:
            yield alert.at("annotations", "summary"), f"{alert.at('alert').value} has no summary: say what is wrong"


def _alerts(manifests: ManifestSet) -> Iterator[Place]:
    for document in manifests.kinds("PrometheusRule"):
        for group in document.at("spec").each("groups"):
            yield from (rule for rule in group.each("rules") if rule.at("alert"))


SET_RULES = (public_service, head_service_type, public_route, budget_form, budget_of_gang, open_policy)
PRODUCTION_RULES = (network_policy_missing, monitor_missing, alerts_missing, alert_remedy)
