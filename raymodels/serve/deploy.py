"""From a config to an endpoint: every model version as an application of its own, and the gateway in front of them."""

from __future__ import annotations

import hashlib
import logging
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self, cast
from urllib.parse import urlsplit

import ray
from ray import serve
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.exceptions import RayActorError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.api import RunTarget
from ray.serve.exceptions import RayServeException

import raymodels
from raymodels import niceness, storage
from raymodels.cluster import connect
from raymodels.config import EngineConfig, HttpConfig, KeysConfig, ModelServeConfig, ServeConfig, load
from raymodels.errors import ConfigError, RegistryError, ServeError
from raymodels.registry import Registry, Version
from raymodels.serve.adapter_sources import check_all, fingerprint, resolved
from raymodels.serve.gateway import Gateway
from raymodels.serve.proxy import IN_PROXIES
from raymodels.serve.replica import ModelDeployment
from raymodels.serve.routing import Route
from raymodels.serve.scaling import serve_settings
from raymodels.serve.tls import check
from raymodels.serve.unready import MISSING, POLL_S, Unready, log_changes, unready_applications, wait_until_running

log = logging.getLogger(__name__)

GATEWAY = "gateway"
LOCAL = "127.0.0.1"
# The gateway calls replicas by gRPC from its own event loop, instead of through actor calls made in another thread.
DIRECTLY = {"RAY_SERVE_USE_GRPC_BY_DEFAULT": "1", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
MESSAGE_BYTES = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"
"""Read by gateways and replicas as they start; gRPC's own limit is 4 MiB. A private name, seen in Ray 2.60."""
WATCH_S = 5.0
ASK_S = 10.0
VERSION_POLL_S = 10.0
SHUTDOWN_S = 30.0


@dataclass
class Endpoint:
    """A running endpoint. Used as a context manager, it closes at the end."""

    url: str
    models: dict[str, str]
    """Model name -> the version behind it, as NAME@3."""
    applications: list[str]
    owns_serve: bool
    owns_ray: bool

    def wait(self) -> None:
        """Block until the process is interrupted, or the endpoint is ended by somebody else.

        Serve replaces what has failed. So a lost replica or node is a warning in the log, not the endpoint's end.

        Raises:
            ServeError: Serve has been shut down, or an application of the endpoint deleted.
        """
        unready: Unready = {}
        while True:
            before, unready = unready, _watch(self.applications, unready)
            log_changes(before, unready)
            time.sleep(WATCH_S)

    def close(self) -> None:
        """Delete the endpoint's applications, and end whatever was started for it."""
        if self.owns_serve:
            _shut_down_serve()
        else:
            for name in self.applications:
                serve.delete(name)
        if self.owns_ray:
            ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def deploy(config: ServeConfig) -> Endpoint:
    """Serve the models of a config; returns when all of them answer.

    Every model version becomes the Serve application NAME--vN. Uses the Ray and the Serve that are there, else starts
    them: Ray on the cluster that RAY_ADDRESS names, or on this machine. A Serve has one gateway: deploying to one that
    has it already replaces its table, once the new models run; if they do not, what ran before is left as it was.

    Raises:
        ConfigError: ``http.keys_file`` or the certificate cannot be used.
        ClusterError: the cluster does not answer, or refuses the token.
        RegistryError: a model, version or alias is unknown.
        AdapterError: an adapter cannot be served over its model; says why.
        IntegrityError: a file of a version differs from its checksum; names it.
        ServeError: the endpoint is not ready within ``start_timeout_s``; says which part and why.
    """
    http = _http(config)
    versions = {model.public_name: _verified(config, model) for model in config.models}
    targets = [
        RunTarget(_replicas(config, model, versions), name=_name(version), route_prefix=None)
        for model, version in zip(config.models, versions.values(), strict=True)
    ]
    table = _table(config, versions)
    engines = {_name(versions[model.public_name]): model.engine for model in config.models}
    gateway = RunTarget(_gateway(http, table, engines).bind(http), name=GATEWAY, route_prefix="/")
    owns_ray, owns_serve = connect(), not serve.status().proxies
    present = set(serve.status().applications)
    endpoint = Endpoint(
        url=_start_http(http) if owns_serve else _running_url(http),
        models={name: versions[route.parent or name].reference for name, route in table.items()},
        applications=[*dict.fromkeys(target.name for target in targets), GATEWAY],
        owns_serve=owns_serve,
        owns_ray=owns_ray,
    )
    deadline = time.monotonic() + config.start_timeout_s
    try:
        # A gateway that is already there keeps its table until the new models answer.
        for stage in [[*targets, gateway]] if GATEWAY not in present else [targets, [gateway]]:
            serve.run_many(_distinct(stage), wait_for_applications_running=False)
            wait_until_running([target.name for target in stage], deadline, config.start_timeout_s)
        _wait_until_listening(endpoint.url, deadline, config.start_timeout_s)
        _warn_of_niceness()
    except BaseException:
        endpoint.applications = [name for name in endpoint.applications if name not in present]
        endpoint.close()
        raise
    return endpoint


def application(args: dict[str, str]) -> serve.Application:
    """The gateway and all models of a config as one Serve application, for ``import_path`` in KubeRay's serveConfigV2.

    Its ``args`` are ``config``, the path of a serve config on the cluster. Neither Serve nor KubeRay builds an
    application again that has failed, so this waits ``version_wait_s`` for versions that a job is to publish.

    A builder may return only one application, so here the models are deployments beside the gateway instead of
    applications of their own. Other ``args`` replace all of them: Serve takes the args for the version of everything
    that is built from them. The gateway's table is its ``user_config``, and one that serveConfigV2 gives to the
    deployment ``gateway`` takes its place without a restart.
    """
    config = _config(args, "application", {"config"})
    if config.http.tls_cert is not None:
        raise ConfigError(
            "http.tls_cert: KubeRay's Service leads to Serve's proxies, which read ssl_certfile and ssl_keyfile from "
            "http_options in serveConfigV2: leave it out here, and let the Ingress end TLS"
        )
    registry = Registry(storage.absolute(config.registry))
    deadline = time.monotonic() + config.version_wait_s
    versions = {model.public_name: _published(registry, model.model, deadline) for model in config.models}
    bound = {_name(versions[model.public_name]): _replicas(config, model, versions) for model in config.models}
    engines = {_name(versions[model.public_name]): model.engine for model in config.models}
    # KubeRay's Service leads to Serve's proxies.
    http = config.http.model_copy(update={"ingress": "proxy"})
    return cast(serve.Application, _gateway(http, _table(config, versions), engines).bind(http, None, bound, engines))


def version(args: dict[str, str]) -> serve.Application:
    """One model of a config as an application of its own, for ``import_path``: the gateway's table may lead to it next.

    Its ``args`` are ``config``, as for `application`, and ``model``, the name that the config serves it as.
    """
    config = _config(args, "version", {"config", "model"})
    model = next((model for model in config.models if model.public_name == args["model"]), None)
    if model is None:
        raise ConfigError(f"args.model: {args['config']} has no model {args['model']}")
    deadline = time.monotonic() + config.version_wait_s
    registry = Registry(storage.absolute(config.registry))
    return _replicas(config, model, {model.public_name: _published(registry, model.model, deadline)})


def _config(args: dict[str, str], builder: str, keys: set[str]) -> ServeConfig:
    if args.keys() != keys:
        wanted = " and ".join(sorted(keys))
        raise ConfigError(f"args of {__name__}:{builder} must be {wanted} alone, not {sorted(args)}")
    return load(args["config"], root=ServeConfig)


def _published(registry: Registry, reference: str, deadline: float) -> Version:
    while True:
        try:
            return registry.resolve(reference)
        except RegistryError as error:
            if time.monotonic() >= deadline:
                raise
            print(f"waiting for {reference}: {error}", flush=True)
        time.sleep(VERSION_POLL_S)


def _verified(config: ServeConfig, model: ModelServeConfig) -> Version:
    version = Registry(storage.absolute(config.registry)).resolve(model.model)
    version.verify()
    return version


def _name(version: Version) -> str:
    return f"{version.name}--v{version.number}"


def _table(config: ServeConfig, versions: dict[str, Version]) -> dict[str, Route]:
    """Model name -> route, of models and of their adapters."""
    table = {name: Route({_name(version): 1.0}) for name, version in versions.items()}
    for model in config.models:
        route = replace(table[model.public_name], parent=model.public_name)
        table |= dict.fromkeys(model.adapters, route)
    return table


def _adapters(config: ServeConfig, versions: dict[str, Version], version: Version) -> dict[str, str]:
    """Name -> resolved source of all adapters over a version, each checked. Models of one version share replicas."""
    registry = Registry(storage.absolute(config.registry))
    of = {name for name, other in versions.items() if _name(other) == _name(version)}
    models = [model for model in config.models if model.public_name in of]
    found = {name: resolved(source, registry) for model in models for name, source in model.adapters.items()}
    check_all(found, registry, version)
    return found


def _replicas(config: ServeConfig, model: ModelServeConfig, versions: dict[str, Version]) -> serve.Application:
    engine, scaling, version = model.engine, model.autoscaling, versions[model.public_name]
    adapters = _adapters(config, versions, version)
    threads = engine.threads or max(1, int(model.cpus))
    deployment = ModelDeployment.options(
        name=_name(version),
        ray_actor_options={
            "num_cpus": model.cpus,
            "num_gpus": model.gpus,
            # Read when torch is loaded; without it every replica would start a thread per core of the machine.
            "runtime_env": {
                "env_vars": {"OMP_NUM_THREADS": str(threads), MESSAGE_BYTES: str(config.http.message_bytes)}
            },
        },
        # Twice what the engine holds, so that it is the engine which refuses: it counts choices, not requests.
        max_ongoing_requests=2 * (engine.max_batch + engine.max_queue),
        max_queued_requests=engine.max_queue,
        autoscaling_config=serve_settings(scaling),
        version=_digest(
            storage.absolute(config.registry),
            version.reference,
            engine.model_dump_json(),
            threads,
            config.http.message_bytes,
            sorted((name, fingerprint(source)) for name, source in adapters.items()),
        ),
        _internal=True,
    )
    return deployment.bind(storage.absolute(config.registry), version.reference, engine, threads, adapters)


def _digest(*arguments: object) -> str:
    """A deployment's version. Serve leaves its processes alone as long as that is the same."""
    return hashlib.sha256(repr((raymodels.__version__, *arguments)).encode()).hexdigest()[:16]


def _gateway(http: HttpConfig, table: dict[str, Route], engines: dict[str, EngineConfig]) -> Any:
    """The gateway's deployment. A table in here can be changed without a restart, one among its arguments cannot."""
    # Its port is looked for where Serve's own proxies are by default.
    node = {HEAD_NODE_RESOURCE_NAME: 0.001} if http.ingress == "direct" else {}
    environment = DIRECTLY | {MESSAGE_BYTES: str(http.message_bytes)}
    gateway = cast(Any, Gateway).options(
        name=GATEWAY,
        num_replicas=http.gateway_replicas,
        ray_actor_options={"num_cpus": http.gateway_cpus, "resources": node, "runtime_env": {"env_vars": environment}},
        max_ongoing_requests=10_000,
    )
    routes = {
        "table": {name: asdict(route) for name, route in table.items()},
        "engines": {name: engine.model_dump(mode="json") for name, engine in engines.items()},
    }
    return gateway.options(user_config=routes, version=_digest(http.model_dump_json()), _internal=True)


def _http(config: ServeConfig) -> HttpConfig:
    """The settings with a port for the gateway, and with files that all find and in which nothing is wrong."""
    changes: dict[str, Any] = {}
    if config.http.ingress == "direct":
        changes["port"] = config.http.port or _free_port(config.http.host)
    if config.http.keys_file is not None:
        changes["keys_file"] = storage.absolute(config.http.keys_file)
        load(changes["keys_file"], root=KeysConfig)
    if config.http.tls_cert is not None and config.http.tls_key is not None:
        changes |= {name: str(Path(getattr(config.http, name)).absolute()) for name in ("tls_cert", "tls_key")}
        check(changes["tls_cert"], changes["tls_key"])
    return config.http.model_copy(update=changes)


def _distinct(targets: list[RunTarget]) -> list[RunTarget]:
    """Two names for one version share its application."""
    return list({target.name: target for target in targets}.values())


def _start_http(http: HttpConfig) -> str:
    """Start Serve, with its proxy on the port, or where that is the gateway's on any other; the URL for clients."""
    direct = http.ingress == "direct"
    host, port = (LOCAL, _free_port(LOCAL)) if direct else (http.host, http.port or _free_port(http.host))
    # The gateway ends a request on time, with an answer in the right shape; the proxy only in case it could not.
    options = {"host": host, "port": port, "request_timeout_s": http.request_timeout_s + 30}
    if not direct and http.tls_cert is not None:
        options |= {"ssl_keyfile": http.tls_key, "ssl_certfile": http.tls_cert}
    serve.start(http_options=options, controller_options={"runtime_env": {"env_vars": IN_PROXIES}})
    return _url(http.host, http.port if direct else port, http.tls_cert is not None)


def _shut_down_serve() -> None:
    """As `serve.shutdown`, whose call ends with the controller that should answer it: Ray prints that as a failure."""
    client = serve.context._get_global_client()
    client.shutdown_cached_handles()
    ray.get(client._controller.graceful_shutdown.remote(wait=False))
    deadline = time.monotonic() + SHUTDOWN_S
    while _controller_lives() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    serve.context._disconnect()


def _controller_lives() -> bool:
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def _running_url(http: HttpConfig) -> str:
    if http.ingress == "direct":
        return _url(http.host, http.port, http.tls_cert is not None)
    options = serve.context._get_global_client().http_config
    if http.tls_cert is not None and not options.ssl_certfile:
        raise ServeError("http.tls_cert: the Serve that runs here speaks plain HTTP: end it first, with serve shutdown")
    return _url(options.host, options.port, bool(options.ssl_certfile))


def _url(host: str, port: int, tls: bool) -> str:
    return f"http{'s' if tls else ''}://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _wait_until_listening(url: str, deadline: float, timeout_s: float) -> None:
    place = urlsplit(url)
    while True:
        try:
            socket.create_connection((str(place.hostname), place.port or 80), timeout=POLL_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ServeError(f"nothing answers at {url} after start_timeout_s {timeout_s:g}: {error}") from error
            time.sleep(POLL_S)


def _warn_of_niceness() -> None:
    """Say so if the Ray that is there lets others go before what it serves."""
    try:
        found = serve.get_app_handle(GATEWAY).process.remote().result(timeout_s=ASK_S).niceness
    except (TimeoutError, RayServeException, RayActorError) as error:
        log.warning("the gateway does not say at which priority it runs: %s", error)
        return
    if found > niceness.SERVER:
        log.warning("the endpoint gives way to others on its machine (niceness %d): %s", found, niceness.REMEDY)


def _watch(names: list[str], before: Unready) -> Unready:
    """What is not running of an endpoint that was; as before while Serve's controller restarts, which ends no replica.

    Raises:
        ServeError: as `Endpoint.wait`.
    """
    try:
        unready = unready_applications(names)
    except RayActorError as error:
        if _controller_lives():
            return before
        raise ServeError("Ray Serve was shut down by somebody else: serve again") from error
    if missing := [name for name, (status, _) in unready.items() if status == MISSING]:
        raise ServeError(f"{', '.join(missing)} of this endpoint was deleted by somebody else: serve again")
    return unready
