"""What a RayService serves: Ray's own models of its embedded YAML, the import path, this project's serve config."""

from __future__ import annotations

import ast
import importlib.util
import posixpath
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymodels.config import Config, ServeConfig, validate
from raymodels.errors import ConfigError
from raymodels.k8s import files
from raymodels.k8s.manifests import ManifestSet, Place, Problems
from raymodels.k8s.mounted import config_text, in_image, mount_of
from raymodels.k8s.project import importable, not_shared, places, trainings
from raymodels.k8s.quantities import amount
from raymodels.k8s.workloads import Cluster, clusters, jobs, ray_container

OUR_APPLICATION = "raymodels.serve.deploy:application"
OUR_VERSION = "raymodels.serve.deploy:version"
"""A model of its own, which the gateway of the other one may lead to."""


@dataclass(frozen=True)
class Service:
    cluster: Cluster
    serve: Place
    """serveConfigV2, parsed."""


def services(manifests: ManifestSet) -> Iterator[Service]:
    for cluster in clusters(manifests):
        place = cluster.document.at("spec", "serveConfigV2")
        if cluster.kind != "RayService" or not place:
            continue
        try:
            told = files.parse(str(place.value))
        except files.Unreadable:
            continue  # another rule's
        if isinstance(told, dict):
            yield Service(cluster, place.within(told))


def serve_config_text(manifests: ManifestSet) -> Problems:
    for document in manifests.kinds("RayService"):
        place = document.at("spec", "serveConfigV2")
        if not place.value:
            yield place, "is not set: it says what is served"
            continue
        try:
            if not isinstance(files.parse(str(place.value)), dict):
                yield place, "is no mapping: set applications"
        except files.Unreadable as error:
            yield place, f"is no YAML, in its line {error.line}: {error}"


def serve_config_keys(manifests: ManifestSet) -> Problems:
    """Ray drops keys that it does not know."""
    for service in services(manifests):
        yield from unknown_keys(service.serve, [ray_models().ServeDeploySchema])


def serve_config_values(manifests: ManifestSet) -> Problems:
    for service in services(manifests):
        yield from _refused(service.serve, ray_models().ServeDeploySchema)
        for application in service.serve.each("applications"):
            for deployment in application.each("deployments"):
                scaling = deployment.at("autoscaling_config")
                if isinstance(scaling.value, dict):
                    yield from unknown_keys(scaling, [ray_models().AutoscalingConfig])
                    yield from _refused(scaling, ray_models().AutoscalingConfig)


def _refused(place: Place, model: Any) -> Problems:
    from pydantic import ValidationError

    try:
        model.model_validate(place.value)
    except ValidationError as error:
        for one in error.errors():
            yield place.at(*(key for key in one["loc"] if _leads(key))), f"Ray refuses it: {one['msg']}"
    except (AttributeError, TypeError) as error:  # its validators stumble over what is no mapping
        yield place, f"Ray cannot read it: {error}"


def _leads(key: int | str) -> bool:
    """Pydantic names the alternatives of a union within the way to an error."""
    return isinstance(key, int) or (key.isidentifier() and key == key.lower())


def runtime_env_keys(manifests: ManifestSet) -> Problems:
    """Ray ignores keys of a runtime environment that it does not know."""
    envs = [application.at("runtime_env") for s in services(manifests) for application in s.serve.each("applications")]
    for job in jobs(manifests):
        try:
            told = files.parse(str(job.at("runtimeEnvYAML").value or "{}"))
        except files.Unreadable:
            continue  # another rule's
        envs.append(job.at("runtimeEnvYAML").within(told))
    for env in envs:
        known = {key for key in ray_models().RuntimeEnv.known_fields if not key.startswith("_")}
        for place in env.each():
            if place.path[-1] not in known:
                yield place, f"Ray has no {place.path[-1]} in a runtime environment: {', '.join(sorted(known))}"


def unknown_keys(place: Place, models: list[Any]) -> Problems:
    """Keys that none of the pydantic models has, here and below."""
    if not isinstance(place.value, dict):
        return
    fields = {name: field for model in models for name, field in model.model_fields.items()}
    for entry in place.each():
        name = entry.path[-1]
        if name not in fields:
            yield entry, f"Ray has no {name} here, and ignores it: {', '.join(sorted(fields))}"
            continue
        below = list(_models(fields[str(name)].annotation))
        for item in entry.each() if isinstance(entry.value, list) else [entry]:
            if below:
                yield from unknown_keys(item, below)


def _models(annotation: Any) -> Iterator[Any]:
    if hasattr(annotation, "model_fields"):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)


def ray_models() -> Any:
    """Ray's own models of embedded YAML.

    Raises:
        ConfigError: Ray is not installed.
    """
    from types import SimpleNamespace

    try:
        from ray.runtime_env import RuntimeEnv
        from ray.serve.config import AutoscalingConfig
        from ray.serve.schema import ServeDeploySchema
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"Ray Serve checks serveConfigV2, and is not there ({error}): pip install 'raymodels[serve]'"
        ) from error
    return SimpleNamespace(
        RuntimeEnv=RuntimeEnv, AutoscalingConfig=AutoscalingConfig, ServeDeploySchema=ServeDeploySchema
    )


def proxy_location(manifests: ManifestSet) -> Problems:
    for service in services(manifests):
        place = service.serve.at("proxy_location")
        if place.value in ("HeadOnly", "Disabled"):
            yield place, f"{place.value} leaves the workers NotReady, whose probes ask their proxies: set EveryNode"


def serve_port(manifests: ManifestSet) -> Problems:
    """The port Serve listens on is one of the Ray containers' ports: the operator makes its Service of that."""
    for service in services(manifests):
        place = service.serve.at("http_options", "port")
        for group in service.cluster.groups:
            ports = [port.at("containerPort").value for port in ray_container(group).each("ports")]
            if ports and (place.value or 8000) not in ports:
                name = group.at("groupName").value or "the head group"
                yield (
                    place,
                    f"is {place.value or 8000}, and the containers of {name} have {ports}: add it to their ports",
                )


def serve_import(manifests: ManifestSet) -> Problems:
    for service in services(manifests):
        for application in service.serve.each("applications"):
            place = application.at("import_path")
            if application.at("runtime_env", "working_dir") or application.at("runtime_env", "py_modules"):
                continue  # the code comes from elsewhere
            module, _, name = str(place.value).partition(":")
            if module.startswith("raymodels") and (wrong := _no_such(module, name)):
                yield place, f"cannot be imported: {wrong}"


def _no_such(module: str, name: str) -> str:
    if not importable(module):
        return f"there is no module {module}"
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin
    tree = ast.parse(Path(spec.origin).read_text("utf-8"))
    named = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    named |= {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return (
        "" if name in named else f"{module} has no {name}: it has {', '.join(sorted(n for n in named if n[0] != '_'))}"
    )


def configs(manifests: ManifestSet) -> Iterator[tuple[Service, Place, ServeConfig]]:
    """The serve configs that load, each with where its text stands."""
    for service in services(manifests):
        for argument in _config_arguments(service):
            place, text = _config(service, argument, manifests)
            try:
                if text is not None:
                    yield service, place, validate(files.parse(text), ServeConfig)
            except ConfigError:
                continue  # another rule's


def _parsed(text: Place) -> Place:
    """The text of a config as a place that its keys continue: the YAML of a ConfigMap's entry."""
    return text.within(files.parse(str(text.value))) if text.path[0] == "data" else text


def _config_arguments(service: Service, *paths: str) -> list[Place]:
    ours = [a for a in service.serve.each("applications") if a.at("import_path").value in (paths or (OUR_APPLICATION,))]
    return [application.at("args", "config") for application in ours]


def _config(service: Service, argument: Place, manifests: ManifestSet) -> tuple[Place, str | None]:
    """Where the config that an argument names stands, and its text; none if nothing is there."""
    path = str(argument.value)
    for group in service.cluster.groups:
        text = config_text(path, ray_container(group), group.at("template", "spec"), manifests)
        if text is not None:
            return text, str(text.value)
    file = in_image(path, manifests.app) if path.startswith("/app/") else None
    return argument, file.read_text("utf-8") if file and file.is_file() else None


def application_config(manifests: ManifestSet) -> Problems:
    """The config is there in every pod, since the application is built on any, and it loads."""
    for service in services(manifests):
        for argument in _config_arguments(service, OUR_APPLICATION, OUR_VERSION):
            place, text = _config(service, argument, manifests)
            if text is None:
                yield (
                    argument,
                    f"nothing is at {argument.value}: mount a ConfigMap of the set there, in head and workers",
                )
                continue
            try:
                config = validate(files.parse(text), ServeConfig)
                yield from _unknown_model(service, argument, config)
            except ConfigError as error:
                yield place, f"the serve config does not load: {error}"
            for group in service.cluster.groups if place is not argument else []:
                if not mount_of(str(argument.value), ray_container(group), group.at("template", "spec")):
                    told = f"{argument.value} is not mounted here: the application is built in any pod"
                    yield ray_container(group).at("volumeMounts"), told


def _unknown_model(service: Service, argument: Place, config: ServeConfig) -> Problems:
    """Of a version of its own, the model that its config does not have."""
    application = service.serve.at(*argument.path[len(service.serve.path) : -2])
    model, names = application.at("args", "model"), [model.public_name for model in config.models]
    if application.at("import_path").value == OUR_VERSION and model.value not in names:
        yield model, f"{argument.value} has no model {model.value}: it has {', '.join(names)}"


def published(manifests: ManifestSet) -> list[Config]:
    """The configs of the jobs that put a version into a registry."""
    found = [config for entry, config in trainings(manifests) if entry.script.endswith("/train.py")]
    return [config for config in found if config.publish]


def registry_shared(manifests: ManifestSet) -> Problems:
    """What is trained in this set is what is served: one registry, which every pod reaches."""
    written = {places(config)["registry"] for config in published(manifests)}
    for service, text, config in configs(manifests):
        told = text.within(files.parse(str(text.value))).at("registry") if text.path[0] == "data" else text
        if written and config.registry not in written:
            yield told, f"is {config.registry}, and the jobs publish to {', '.join(sorted(written))}: use one registry"
        yield from not_shared("model", config.registry, told, service.cluster, manifests)


def model_published(manifests: ManifestSet) -> Problems:
    """A model, or an alias of it, that no job of the set publishes, though they publish to its registry."""
    made = {publish.name: publish.alias for c in published(manifests) if (publish := c.publish)}
    for _, text, config in configs(manifests):
        for index, model in enumerate(config.models):
            if made and text.path[0] == "data" and not _is_made(model.model, made):
                told = ", ".join(f"{name}@{alias}" for name, alias in sorted(made.items()))
                place = text.within(files.parse(str(text.value))).at("models", index, "model")
                yield place, f"no job of the set publishes {model.model}: they publish {told}"


def _is_made(model: str, made: dict[str, str | None]) -> bool:
    """Whether jobs that publish names with an alias, or with none and people move it, make what is served."""
    name, _, version = model.partition("@")
    return name in made and (made[name] is None or version in ("", made[name]) or version.isdecimal())


def replicas_fit(manifests: ManifestSet) -> Problems:
    for service, text, config in configs(manifests):
        raw = _parsed(text)
        groups = service.cluster.workers
        for index, model in enumerate(config.models):
            if not any(_holds(group, model.cpus, model.gpus) for group in groups):
                told = f"a replica of {model.cpus:g} CPUs and {model.gpus:g} GPUs fits no worker pod"
                told += ": lower it, or raise their limits"
                yield raw.at("models", index, "gpus" if model.gpus else "cpus"), told
        most = sum(model.autoscaling.max_replicas for model in config.models)
        room = sum((group.at("maxReplicas").value or 0) * _most(group, config) for group in groups)
        if most > room:
            told = f"models may have {most} replicas, and the worker groups hold {room}: raise maxReplicas"
            yield (groups[0].at("maxReplicas") if groups else raw), told


def _holds(group: Place, cpus: float, gpus: float) -> bool:
    limits = ray_container(group).at("resources", "limits")
    return (
        float(amount(limits.at("cpu").value) or 0) >= cpus
        and float(amount(limits.at("nvidia.com/gpu").value) or 0) >= gpus
    )


def _most(group: Place, config: ServeConfig) -> int:
    """How many replicas of the largest model one pod of a group holds."""
    limits = ray_container(group).at("resources", "limits")
    by_cpu = float(amount(limits.at("cpu").value) or 0) // max(model.cpus for model in config.models)
    gpus = max(model.gpus for model in config.models)
    return int(min(by_cpu, float(amount(limits.at("nvidia.com/gpu").value) or 0) // gpus) if gpus else by_cpu)


def drains(manifests: ManifestSet) -> Problems:
    """The old cluster of an upgrade lives as long as its longest request."""
    for service, _, config in configs(manifests):
        place = service.cluster.document.at("spec", "rayClusterDeletionDelaySeconds")
        if (place.value if isinstance(place.value, int) else 60) <= config.http.request_timeout_s:
            told = f"is {place.value or 60}, and a request may take {config.http.request_timeout_s:g} s"
            yield place, f"{told}: raise it above that"


def mounted_files(manifests: ManifestSet) -> Problems:
    """Files that the serve config names are on a volume of the pods."""
    for service, text, config in configs(manifests):
        raw = _parsed(text)
        for key in ("keys_file", "tls_cert", "tls_key"):
            path = getattr(config.http, key)
            groups = service.cluster.workers if path and posixpath.isabs(path) else []
            if groups and not any(mount_of(path, ray_container(g), g.at("template", "spec")) for g in groups):
                yield raw.at("http", key), f"nothing is mounted at {path}: mount the Secret that has it"


def endpoint_open(manifests: ManifestSet) -> Problems:
    """Ray's token is asked for by its dashboard and its own ports, not by Serve's."""
    for _, text, config in configs(manifests):
        if config.http.keys_file is None:
            raw = _parsed(text)
            told = "is not set: whoever reaches the port may call; mount what `raymodels keys` wrote, and name it"
            yield raw.at("http", "keys_file"), told


SET_RULES = (
    serve_config_text,
    serve_config_keys,
    serve_config_values,
    runtime_env_keys,
    proxy_location,
    serve_port,
    serve_import,
    application_config,
    registry_shared,
    model_published,
    replicas_fit,
    drains,
    mounted_files,
)
PRODUCTION_RULES = (endpoint_open,)
