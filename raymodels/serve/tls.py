"""The certificate of an endpoint: what is wrong with it, before anything listens, and its renewal while it is used."""

from __future__ import annotations

import asyncio
import logging
import ssl
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from raymodels.config import HttpConfig
from raymodels.errors import ConfigError

log = logging.getLogger(__name__)

RENEW_S = 60.0
"""How often the files are looked at. cert-manager renews weeks before the end."""


class Certificate:
    """A certificate with its key, ready for connections.

    Args:
        cert: PEM, the certificate first and what leads to its CA after it.
        key: PEM, not encrypted.

    Raises:
        ConfigError: a file cannot be used, they do not belong together, or the certificate is not valid now.
    """

    def __init__(self, cert: str, key: str) -> None:
        self._cert, self._key = cert, key
        self._seen = self._identity()
        check(cert, key)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # TLS 1.2 and later
        self.context.load_cert_chain(cert, key)

    def renew(self) -> bool:
        """Show the files' new certificate to new connections, if they hold one; whether they did.

        A wrong one is logged, and the one before it stays: the files of a renewal may not change at the same moment.
        """
        seen = self._identity()
        if seen == self._seen:
            return False
        try:
            check(self._cert, self._key)
        except ConfigError as error:
            log.error("the certificate has changed and cannot be used, the one before it stays: %s", error)
            return False
        self.context.load_cert_chain(self._cert, self._key)
        self._seen = seen
        log.info("read the certificate again: %s", self._cert)
        return True

    async def watch(self, every_s: float = RENEW_S) -> None:
        """Renew until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            self.renew()

    def _identity(self) -> tuple[tuple[int, int] | None, ...]:
        """Differs once a file was changed or replaced. Follows links: Kubernetes changes a secret by swapping one."""
        return tuple(_stat(file) for file in (self._cert, self._key))


def certificate(http: HttpConfig) -> Certificate | None:
    """The one that the settings name, if they name one; raises as `Certificate`."""
    return Certificate(http.tls_cert, http.tls_key) if http.tls_cert and http.tls_key else None


def check(cert: str, key: str) -> None:
    """Raise ConfigError, naming the setting, unless the files are a certificate that is valid now and its key."""
    texts = {name: _read(name, file) for name, file in (("tls_cert", cert), ("tls_key", key))}
    try:
        first = x509.load_pem_x509_certificates(texts["tls_cert"])[0]
    except ValueError as error:
        raise ConfigError(f"http.tls_cert: {cert} holds no certificate in PEM: {error}") from error
    if b"PRIVATE KEY-----" not in texts["tls_key"]:
        raise ConfigError(f"http.tls_key: {key} holds no private key in PEM")
    if b"ENCRYPTED" in texts["tls_key"]:
        raise ConfigError(f"http.tls_key: {key} is encrypted: `openssl pkey -in KEY -out PLAIN` decrypts it")
    now = datetime.now(UTC)
    if not first.not_valid_before_utc <= now <= first.not_valid_after_utc:
        word, when = (
            ("expired at", first.not_valid_after_utc)
            if now > first.not_valid_after_utc
            else ("is not valid before", first.not_valid_before_utc)
        )
        raise ConfigError(f"http.tls_cert: {cert} {word} {when:%Y-%m-%d %H:%M} UTC: renew it, or set this clock right")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"http.tls_key: {key} is not the key of {cert}, the file of http.tls_cert") from error
        raise ConfigError(f"http.tls_cert, http.tls_key: {cert} and {key} cannot be used: {error.reason}") from error


def _read(setting: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"http.{setting}: cannot read {file}: {error.strerror}") from error


def _stat(file: str) -> tuple[int, int] | None:
    try:
        found = Path(file).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
