"""Who may call: tenants and their API keys, read from a file and read again when it changes.

The file holds hashes. Keys have 256 random bits, so plain SHA-256 keeps them: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import tempfile
import threading
import time
from pathlib import Path

from raymodels.config import KeysConfig, TenantConfig, load, to_yaml, validate
from raymodels.errors import ConfigError
from raymodels.serve.metrics import KEYS_LOADED, KEYS_RELOAD_FAILED
from raymodels.serve.schema import Problem, Refused

log = logging.getLogger(__name__)

POLL_S = 3.0
PREFIX = "rm-"
ANYBODY = TenantConfig(name="anybody", keys=(), metrics=True)
"""Every caller of an endpoint without a keys file."""


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def hashed(key: str) -> str:
    """What the file keeps of a key: ``sha256:`` and 64 hex digits."""
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class Tenants:
    """The tenants of a keys file, or, without one, `ANYBODY`.

    Args:
        file: YAML or JSON, as `KeysConfig` describes it.

    Raises:
        ConfigError: the file is missing or wrong. Later, a wrong file is logged and the last right one stays in force.
    """

    def __init__(self, file: str | None) -> None:
        self._file = file
        # Keys are looked up by a hash that nobody outside this process can compute, so that the time which a look-up
        # takes says nothing about the keys.
        self._secret = secrets.token_bytes(32)
        self._by_hash: dict[bytes, tuple[str, TenantConfig]] = {}
        self._seen: tuple[int, ...] = ()
        self._stop = threading.Event()
        if file is None:
            log.warning("http.keys_file is not set: anybody who reaches this endpoint may call it")
        else:
            self._seen = _identity(file)
            self._read(file)

    @property
    def open(self) -> bool:
        return self._file is None

    def of(self, authorization: str | None) -> TenantConfig:
        """The tenant of a request, from its ``Authorization`` header.

        Raises:
            Refused: 401, the key is missing or unknown.
        """
        if self.open:
            return ANYBODY
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized("an API key is missing: send it as Authorization: Bearer KEY")
        presented = hashed(key.strip())
        stored, tenant = self._by_hash.get(self._blinded(presented), ("", None))
        if not hmac.compare_digest(stored, presented) or tenant is None:
            raise _unauthorized("this API key is unknown or revoked")
        return tenant

    def refresh(self) -> bool:
        """Read the file again if it has changed since it was last read; whether it was read."""
        if self._file is None:
            return False
        identity = _identity(self._file)
        if identity == self._seen:
            return False
        self._seen = identity
        try:
            self._read(self._file)
        except ConfigError as error:
            KEYS_RELOAD_FAILED.inc()
            log.error("the keys file has changed and cannot be used, the keys read before stay in force: %s", error)
            return False
        log.info("read the keys file again: %d keys", len(self._by_hash))
        return True

    def watch(self, every_s: float = POLL_S) -> None:
        """Refresh in the background until `close`."""
        if not self.open:
            threading.Thread(target=self._watch, args=(every_s,), name="keys-file", daemon=True).start()

    def close(self) -> None:
        self._stop.set()

    def _watch(self, every_s: float) -> None:
        while not self._stop.wait(every_s):
            self.refresh()

    def _read(self, file: str) -> None:
        config = load(file, root=KeysConfig)
        table = {self._blinded(key): (key, tenant) for tenant in config.tenants for key in tenant.keys}
        self._by_hash = table
        KEYS_LOADED.set(time.time())

    def _blinded(self, key_hash: str) -> bytes:
        return hmac.digest(self._secret, key_hash.encode(), "sha256")


def _identity(file: str) -> tuple[int, ...]:
    """Differs once the file was changed or replaced. Follows links: Kubernetes changes a secret by swapping one."""
    try:
        found = Path(file).stat()
    except OSError:
        return ()  # reading it says why
    return found.st_ino, found.st_dev, found.st_mtime_ns, found.st_size


def _unauthorized(message: str) -> Refused:
    return Refused(Problem(status=401, message=message, type="authentication_error", code="invalid_api_key"))


def add_key(file: str, name: str, **settings: object) -> str:
    """Make a key for a tenant and write its hash to the file, with the tenant if it is not there yet.

    Args:
        settings: fields of `TenantConfig` to set; the others stay as they are.

    Returns:
        The key. It is kept nowhere: whoever loses it needs another.

    Raises:
        ConfigError: the file or a setting is wrong.
    """
    config = load(file, root=KeysConfig) if Path(file).exists() else KeysConfig()
    raw = {tenant.name: tenant.model_dump() for tenant in config.tenants}
    tenant = raw.setdefault(name, {"name": name, "keys": ()})
    key = new_key()
    tenant |= {field: value for field, value in settings.items() if value is not None}
    tenant["keys"] = (*tenant["keys"], hashed(key))
    _write(file, list(raw.values()))
    return key


def revoke(file: str, name: str, key: str | None = None) -> int:
    """Take a tenant's keys out of the file, or one of them; returns how many. The tenant goes with its last key.

    Args:
        key: the key itself, or the beginning of its hash as `raymodels keys list` prints it.

    Raises:
        ConfigError: there is no such tenant or key, or the beginning fits several.
    """
    config = load(file, root=KeysConfig)
    tenant = next((tenant for tenant in config.tenants if tenant.name == name), None)
    if tenant is None:
        raise ConfigError(f"{file} has no tenant {name}: it has {', '.join(t.name for t in config.tenants) or 'none'}")
    revoked = set(tenant.keys)
    if key is not None:
        revoked = {stored for stored in tenant.keys if stored == hashed(key) or stored.startswith(key)}
        if len(revoked) != 1:
            raise ConfigError(f"{len(revoked)} keys of {name} are this one: see raymodels keys list")
    left = tenant.model_dump() | {"keys": tuple(stored for stored in tenant.keys if stored not in revoked)}
    rest = [left if other.name == name else other.model_dump() for other in config.tenants]
    _write(file, [entry for entry in rest if entry["keys"] or entry["name"] != name])
    return len(revoked)


def _write(file: str, tenants: list[dict[str, object]]) -> None:
    """Replace the file as one step, readable by its owner alone."""
    text = to_yaml(validate({"tenants": tenants}, KeysConfig))
    target = Path(file).resolve()
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, delete=False) as new:
            new.write(text)
        os.replace(new.name, target)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
