"""https at the gateway's own port: who is answered, what is refused before anything listens, and renewal."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.hazmat.primitives.serialization import load_pem_private_key as load_key
from ray import serve
from ray.serve._private.http_util import start_asgi_http_server
from ray.serve.config import HTTPOptions
from starlette.types import Receive, Scope, Send

from raymodels.client import AsyncClient, Client
from raymodels.config import HttpConfig, ServeConfig, validate
from raymodels.errors import ConfigError, ConnectionFailed, ServeError
from raymodels.serve import deploy
from raymodels.serve.listener import Listener, shared_port
from raymodels.serve.tls import Certificate, certificate

HOST = "127.0.0.1"
KEY = "rm-secret"


class Files:
    """A CA of the test and a server's certificate from it, as files."""

    def __init__(self, folder: Path, **dates: datetime) -> None:
        self.ca = trustme.CA()
        self.ca_file, self.cert, self.key = (str(folder / name) for name in ("ca.pem", "tls.crt", "tls.key"))
        self.ca.cert_pem.write_to_path(self.ca_file)
        self.issue(**dates)

    def issue(self, **dates: datetime) -> None:
        server = self.ca.issue_cert(HOST, **dates)
        server.private_key_pem.write_to_path(self.key)
        chain = b"".join(blob.bytes() for blob in server.cert_chain_pems)
        Path(self.cert).write_bytes(chain)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


async def one_model(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers `/v1/models` and completions to who has the key."""
    while (await receive()).get("more_body"):
        pass
    allowed = (b"authorization", f"Bearer {KEY}".encode()) in scope["headers"]
    listed = {"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "raymodels"}]}
    chunk = {"choices": [{"index": 0, "text": "hello", "finish_reason": "stop"}]}
    body = json.dumps(listed) if scope["method"] == "GET" else f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    if not allowed:
        body = json.dumps({"error": {"message": "an API key is missing"}})
    await send({"type": "http.response.start", "status": 200 if allowed else 401, "headers": []})
    await send({"type": "http.response.body", "body": body.encode()})


@contextmanager
def listening(certificate: Certificate) -> Iterator[str]:
    """The listener in another thread; gives HOST:PORT."""
    port, loop, stop = free_port(), asyncio.new_event_loop(), asyncio.Event()
    ready = threading.Event()

    async def run() -> None:
        listener = Listener(one_model, shared_port(HOST, port), certificate)
        ready.set()
        await stop.wait()
        await listener.drain()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), name="listener")
    thread.start()
    assert ready.wait(10)
    try:
        yield f"{HOST}:{port}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def test_https_is_answered_and_http_is_not(files: Files) -> None:
    with listening(Certificate(files.cert, files.key)) as place:
        with Client(f"https://{place}", KEY, ca=files.ca_file) as client:
            assert [model.id for model in client.models()] == ["tiny"]
        with Client(f"http://{place}", KEY, retries=0) as plain, pytest.raises(ConnectionFailed):
            plain.models()


def test_the_async_client_verifies_too(files: Files) -> None:
    async def models(place: str, ca: str | None) -> list[str]:
        client = AsyncClient(f"https://{place}", KEY, ca=ca)
        async with client:
            return [model.id for model in await client.models()]

    with listening(Certificate(files.cert, files.key)) as place:
        assert asyncio.run(models(place, files.ca_file)) == ["tiny"]
        with pytest.raises(ConnectionFailed, match="not trusted"):
            asyncio.run(models(place, None))


@pytest.mark.parametrize("trusting", ["another CA", "the public ones"])
def test_a_certificate_of_somebody_else_is_refused_at_once(files: Files, tmp_path: Path, trusting: str) -> None:
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    ca = str(tmp_path / "other.pem") if trusting == "another CA" else None
    with (
        listening(Certificate(files.cert, files.key)) as place,
        Client(f"https://{place}", KEY, ca=ca, retries=99) as client,
        pytest.raises(ConnectionFailed, match=r"not trusted .*: give its CA's file as ca"),
    ):
        client.models()


def test_the_command_line(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from raymodels import cli

    def run(*options: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["raymodels", "complete", "x", "--url", url, "--model", "tiny", *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr()

    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    monkeypatch.delenv("RAYMODELS_API_KEY", raising=False)
    with listening(Certificate(files.cert, files.key)) as place:
        url = f"https://{place}"
        assert run("--ca", files.ca_file, "--api-key-file", str(key))[:2] == (0, "hello\n")
        code, _, said = run("--ca", files.ca_file)
        assert code == 2 and "API key is missing" in said
        monkeypatch.setenv("RAYMODELS_API_KEY", KEY)
        assert run("--ca", files.ca_file)[0] == 0
        code, _, said = run("--ca", files.ca_file, "--api-key-file", str(tmp_path / "none"))
        assert code == 2 and "--api-key-file: cannot read" in said
        key.write_text("rm-two words")
        code, _, said = run("--ca", files.ca_file, "--api-key-file", str(key))
        assert code == 2 and "two" not in said
        code, _, said = run("--ca", str(key))
        assert code == 2 and "ca: " in said and "no PEM file" in said


def expired(files: Files) -> None:
    now = datetime.now(UTC)
    files.issue(not_before=now - timedelta(days=9), not_after=now - timedelta(days=1))


def from_tomorrow(files: Files) -> None:
    now = datetime.now(UTC)
    files.issue(not_before=now + timedelta(days=1), not_after=now + timedelta(days=9))


def anothers_key(files: Files) -> None:
    files.ca.issue_cert(HOST).private_key_pem.write_to_path(files.key)


def encrypted_key(files: Files) -> None:
    key = load_key(Path(files.key).read_bytes(), None)
    Path(files.key).write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))


WRONG: list[tuple[Callable[[Files], object], str]] = [
    (lambda files: Path(files.cert).unlink(), r"http\.tls_cert: cannot read .*tls\.crt: No such file"),
    (lambda files: Path(files.key).unlink(), r"http\.tls_key: cannot read .*tls\.key: No such file"),
    (
        lambda files: (Path(files.key).unlink(), Path(files.key).mkdir()),
        r"http\.tls_key: cannot read .*: Is a directory",
    ),
    (lambda files: Path(files.cert).write_text("no"), r"http\.tls_cert: .* no certificate in PEM"),
    (lambda files: Path(files.key).write_text("no"), r"http\.tls_key: .* no private key in PEM"),
    (anothers_key, r"http\.tls_key: .* is not the key of .*tls\.crt"),
    (encrypted_key, r"http\.tls_key: .* is encrypted"),
    (expired, r"http\.tls_cert: .* expired at"),
    (from_tomorrow, r"http\.tls_cert: .* is not valid before"),
]


@pytest.mark.parametrize("spoil, message", WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_certificate_is_refused(files: Files, spoil: Callable[[Files], object], message: str) -> None:
    spoil(files)
    with pytest.raises(ConfigError, match=message):
        Certificate(files.cert, files.key)
    config = validate({"models": [{"model": "m"}], "http": {"tls_cert": files.cert, "tls_key": files.key}}, ServeConfig)
    with pytest.raises(ConfigError, match=message):  # before Ray or Serve are started, and a model is looked for
        deploy.deploy(config)


@pytest.mark.parametrize("one, other", [("tls_cert", "tls_key"), ("tls_key", "tls_cert")])
def test_certificate_and_key_belong_together(one: str, other: str) -> None:
    with pytest.raises(ConfigError, match=f"{other} is missing"):
        validate({"models": [{"model": "m"}], "http": {one: "x"}}, ServeConfig)


def test_without_the_settings_there_is_none() -> None:
    assert certificate(HttpConfig()) is None


def test_a_renewed_certificate_is_shown_to_new_connections(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    def serial(place: str) -> int:
        with Client(f"https://{place}", KEY, ca=files.ca_file) as client:
            shown = client._http.get("/").extensions["network_stream"].get_extra_info("ssl_object").getpeercert()
        return int(shown["serialNumber"], 16)

    used = Certificate(files.cert, files.key)
    with listening(used) as place:
        first = serial(place)
        assert not used.renew()
        files.issue()
        assert used.renew()
        second = serial(place)
        assert second != first
        anothers_key(files)
        assert not used.renew() and "is not the key" in caplog.text
        assert serial(place) == second
        files.issue()
        assert used.renew()
        assert serial(place) not in (first, second)


def test_kuberay_is_told_where_tls_ends(files: Files, tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(
        json.dumps({"models": [{"model": "m"}], "http": {"tls_cert": files.cert, "tls_key": files.key}}), "utf-8"
    )
    with pytest.raises(ConfigError, match=r"http\.tls_cert: .*serveConfigV2"):
        deploy.application({"config": str(config)})


def test_serves_proxies_are_given_the_certificate(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what `deploy` starts Serve with, the function that listens in its proxies answers https."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(serve, "start", lambda http_options, **_: given.update(http_options))
    http = HttpConfig(ingress="proxy", port=0, tls_cert=files.cert, tls_key=files.key)
    url = deploy._start_http(http)
    assert url.startswith("https://127.0.0.1:")

    async def ask() -> list[str]:
        loop = asyncio.get_running_loop()
        serving, server = await start_asgi_http_server(one_model, HTTPOptions(**given), event_loop=loop)
        while not server.started:
            await asyncio.sleep(0.01)
        async with AsyncClient(url, KEY, ca=files.ca_file) as client:
            found = [model.id for model in await client.models()]
        server.should_exit = True
        await serving
        return found

    assert asyncio.run(ask()) == ["tiny"]
    given.clear()
    assert deploy._start_http(http.model_copy(update={"ingress": "direct", "port": 1})) == "https://127.0.0.1:1"
    assert "ssl_certfile" not in given  # the gateway has the port, the proxy another on this host alone
    assert given["host"] == "127.0.0.1"


def test_a_serve_that_speaks_plain_http_is_not_taken_for_one_that_does_not(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = SimpleNamespace(http_config=HTTPOptions(host=HOST, port=8000))
    monkeypatch.setattr(serve.context, "_get_global_client", lambda: running)
    http = HttpConfig(ingress="proxy", tls_cert=files.cert, tls_key=files.key)
    with pytest.raises(ServeError, match=r"http\.tls_cert: .* plain HTTP"):
        deploy._running_url(http)
    assert deploy._running_url(HttpConfig(ingress="proxy")) == "http://127.0.0.1:8000"
