"""The connection to a cluster's jobs API: its address, token and certificate, and what its answers mean."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from raymodels.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ADDRESS = "http://127.0.0.1:8265"
CONNECT_S, ANSWER_S = 10.0, 60.0
"""How long a connection may take to open or to take the next bytes, and to bring some. Ray's client waits forever."""
SCHEMES = ("http://", "https://")
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
Answer = TypeVar("Answer")


class Unreachable(ClusterError):
    """No answer, or one of a server in trouble: worth another try."""


class NotThere(ClusterError):
    """The cluster has no such job."""


@dataclass(frozen=True)
class Cluster:
    """A cluster that has answered once. ``options`` are what a command line needs to reach it again."""

    address: str
    client: JobSubmissionClient
    options: str

    def ask(self, question: Callable[[JobSubmissionClient], Answer]) -> Answer:
        """One request.

        Raises:
            Unreachable: there was no answer.
            ClusterError: the cluster refused the token or the request.
        """
        with answers(self.address):
            return question(self.client)

    def find(self, job_id: str) -> JobDetails | None:
        """A job as the cluster knows it, if it does."""
        try:
            return self.ask(lambda client: client.get_job_info(job_id))
        except NotThere:
            return None


def connect(address: str | None = None, ca: str | Path | None = None) -> Cluster:
    """Reach a cluster's dashboard, where its jobs API is.

    Args:
        address: ``http://HOST:PORT`` or ``https://HOST``; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this
            machine's port 8265.
        ca: a PEM file, or a folder of them, with the authority to trust instead of the system's.

    Raises:
        ConfigError: the address or the file cannot be used.
        ClusterError: nothing answers there, or it refuses the token.
    """
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise ClusterError(f"submitting needs Ray: pip install 'raymodels[train]' ({error})") from error

    class Client(JobSubmissionClient):  # type: ignore[misc, unused-ignore]
        """Ray's, which forwards the timeout to requests, and never gives one."""

        def _do_request(self, *args: Any, data: bytes | None = None, **kwargs: Any) -> Any:
            # Bytes would be sent in one piece, and the time to connect would be that of the whole upload.
            body = io.BytesIO(data) if data else None
            return super()._do_request(*args, data=body, timeout=(CONNECT_S, ANSWER_S), **kwargs)

    place = find_address(address)
    if ca is not None and not Path(ca).exists():
        raise ConfigError(f"--ca: there is no {ca}: give the PEM file of the authority that signed {place}")
    token = find_token()
    # Given as a header, the token is this call's: Ray's own loader reads it once per process.
    headers = {"Authorization": f"Bearer {token}"} if token else None
    with answers(place):
        client = Client(place, headers=headers, verify=str(ca) if ca else True)
    return Cluster(place, client, f"--address {place}" + (f" --ca {ca}" if ca else ""))


def find_address(given: str | None) -> str:
    """An HTTP address. Ray's own client lets the environment override what it is given, so a conflict is an error."""
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        if environment := os.environ.get(variable):
            if not environment.startswith(SCHEMES):  # Ray takes it for the address of the cluster's own store
                raise ConfigError(
                    f"{variable} is not a dashboard's address, and Ray's client prefers it to any other: "
                    "set RAY_API_SERVER_ADDRESS=http://HOST:8265"
                )
            if given is not None and given != environment:
                raise ConfigError(f"address {given} is overridden by {variable}={environment}: unset one of them")
            given = environment
            break
    address = (given or ADDRESS).rstrip("/")
    address = address if "://" in address else f"http://{address}"
    if "@" in urlsplit(address).netloc:
        # It would stand in process lists, and requests would send it in the token's place.
        raise ConfigError(
            "address: holds a user or password; leave them out, and give the token in RAY_AUTH_TOKEN_PATH"
        )
    if not address.startswith(SCHEMES):
        raise ConfigError(f"address {address}: give that of the dashboard, such as http://HOST:8265")
    return address


def goes_in_clear(address: str) -> bool:
    """Whether what is sent there, the token too, can be read on the way."""
    parts = urlsplit(address)
    return parts.scheme == "http" and parts.hostname not in LOOPBACK and find_token() is not None


def find_token() -> str | None:
    """The cluster's token, from where Ray looks for it; none if there is none or authentication is off."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip() or None
    except OSError as error:
        if named:
            raise ClusterError(f"cannot read the token at RAY_AUTH_TOKEN_PATH: {error}") from error
        return None


@contextlib.contextmanager
def answers(address: str) -> Iterator[None]:
    """Ray's and requests' errors as one that says what to do."""
    from ray.exceptions import AuthenticationError
    from requests.exceptions import SSLError

    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(
            f"the cluster at {address} refused the token: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's "
            "(on its head node: ray get-auth-token)"
        ) from error
    except OSError as error:  # ConnectionError, and the base of all errors of requests
        if (untrusted := _cause(error, SSLError)) is not None:
            raise ClusterError(
                f"the certificate of {address} is not to be trusted ({_ssl_reason(untrusted)}): "
                "give the PEM file of the authority that signed it as --ca"
            ) from error
        raise Unreachable(
            f"no Ray cluster answers at {address}: is it running, and is its dashboard port (8265) forwarded here?"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise _refusal(address, error) from error


def _refusal(address: str, error: Exception) -> ClusterError:
    """What `Request failed with status code 404: ...` means."""
    message = _gist(str(error))
    code = re.match(r"Request failed with status code (\d+)", str(error))
    kind = NotThere if code and code[1] == "404" else Unreachable if code and code[1][0] == "5" else ClusterError
    return kind(f"the cluster at {address} did not take the request: {message}")


def _gist(text: str) -> str:
    """The line that matters: the first, or the last of a traceback that the server sent."""
    lines = [line for line in text.splitlines() if line.strip()] or ["no reason given"]
    return lines[-1].strip() if "Traceback" in lines[0] else lines[0].strip()


def _cause(error: BaseException | None, kind: type[OSError]) -> BaseException | None:
    """The error of that kind that another stems from, if there is one: Ray's client raises its own in their place."""
    while error is not None and not isinstance(error, kind):
        error = error.__context__
    return error


def _ssl_reason(error: BaseException) -> str:
    found = re.search(r"certificate verify failed: ([^(\\]+)|\[SSL[^]]*\] ([^(\\]+)", str(error))
    return next(filter(None, found.groups()), "").strip() if found else first_line(error)


def first_line(value: Any) -> str:
    return str(value).strip().partition("\n")[0]
