"""The gateway's table in a RayService: the ``user_config`` of its deployment, which changes without a restart."""

from __future__ import annotations

import re
from collections.abc import Iterator

from raymodels.config import ServeConfig, TableConfig, validate
from raymodels.errors import ConfigError
from raymodels.k8s.manifests import ManifestSet, Place, Problems
from raymodels.k8s.serving import OUR_APPLICATION, Service, configs, services

GATEWAY = "gateway"
"""As `raymodels.serve.deploy` names its deployment."""


def serve_table(manifests: ManifestSet) -> Problems:
    """The gateway keeps the table that it has if the new one cannot be used; what leads to nothing is answered 503."""
    built = {service.cluster.document: config for service, _, config in configs(manifests)}
    for service, place in _tables(manifests):
        try:
            given = validate(place.value, TableConfig)
        except ConfigError as error:
            yield place, f"the gateway cannot use it: {error}"
            continue
        names = {application.at("name").value for application in service.serve.each("applications")}
        config = built.get(service.cluster.document)
        for model, route in given.table.items():
            for application in route.applications:
                if application not in names and not (config and _is_beside(application, config)):
                    told = f"leads to {application}, which is no application here, and no version of a model beside it"
                    yield place.at("table", model), told


def _tables(manifests: ManifestSet) -> Iterator[tuple[Service, Place]]:
    for service in services(manifests):
        for application in service.serve.each("applications"):
            for deployment in application.each("deployments") if _is_ours(application) else ():
                if deployment.at("name").value == GATEWAY and deployment.at("user_config"):
                    yield service, deployment.at("user_config")


def _is_ours(application: Place) -> bool:
    return bool(application.at("import_path").value == OUR_APPLICATION)


def _is_beside(application: str, config: ServeConfig) -> bool:
    """Whether it is a deployment of the gateway's own application, NAME--v3: an alias may stand for any number."""
    return any(re.fullmatch(re.escape(m.model.partition("@")[0]) + r"--v\d+", application) for m in config.models)


SET_RULES = (serve_table,)
