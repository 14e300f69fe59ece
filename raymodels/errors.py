"""Every error raymodels raises on purpose, as one tree.

RaymodelsError                  something the user can act on; the message names the setting and the remedy
├── ConfigError                 a setting is unknown, out of range, or contradicts another
├── DataError                   a source is missing, empty, unreadable or not what it claims to be
├── StorageError                a place cannot be reached, read or written
│   └── AlreadyExists           an exclusive create found the name taken
├── CheckpointError             a checkpoint or run directory cannot be used
├── IntegrityError              a file is missing or differs from its recorded checksum
├── RegistryError               a model, version or alias is unknown, or an update lost a race
├── ClusterError                the cluster is unreachable or too small
│   └── ClusterLost             the cluster stopped answering while a job was followed, which may still run
├── RunInUse                    another driver is training into the run directory
├── TrainingError               a worker failed; names its rank, the cause and the remedy
│   └── Diverged                the loss is no number or grows; carries what to go back to, if anything
├── Stopped                     a run was asked to stop, and did so with all its steps committed
├── ServeError                  an endpoint could not be started
│   └── AdapterError            an adapter is not for its base model, or of a kind that is not served
├── JobError                    a submitted job failed
│   └── JobStopped              somebody stopped it
└── ClientError                 a call to an endpoint did not succeed
    ├── ConnectionFailed        no answer: refused, reset or timed out
    └── StatusError             an HTTP error answer; .status, .kind and .param carry its parts
        ├── BadRequest          400, 413, 422
        ├── NotAllowed          401, 403
        ├── NotFound            404
        ├── Overloaded          429, 503; .retry_after in seconds where the server said so
        └── ServerFailed        any other 5xx

Broken invariants are assertions, and everything else propagates as it is.
"""

from __future__ import annotations

from typing import Any


class RaymodelsError(Exception):
    """Base of all errors above. ``exit_code`` is what the command line exits with."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        # Python's own calls the class with the message alone, and fails where it takes more: all of these may be raised
        # in one process and caught in another.
        return _again, (type(self), self.args, self.__dict__)


class ConfigError(RaymodelsError):
    exit_code = 2


class DataError(RaymodelsError):
    exit_code = 2


class StorageError(RaymodelsError):
    exit_code = 2


class AlreadyExists(StorageError):
    pass


class CheckpointError(RaymodelsError):
    exit_code = 2


class IntegrityError(RaymodelsError):
    exit_code = 2


class RegistryError(RaymodelsError):
    exit_code = 2


class ClusterError(RaymodelsError):
    exit_code = 2


class ClusterLost(ClusterError):
    exit_code = 75  # EX_TEMPFAIL of sysexits.h: the same command, given again, goes on where this one was cut off


class RunInUse(RaymodelsError):
    exit_code = 2


class TrainingError(RaymodelsError):
    pass


class Diverged(TrainingError):
    """The loss is no number, or has been too high for too long. Steps are counted from 0.

    Args:
        back_to: how many steps to keep: go on from a checkpoint after at most so many; none ends the run.
        drop: the first and the last step whose batches to drop then.
    """

    def __init__(self, message: str, back_to: int | None = None, drop: tuple[int, int] | None = None) -> None:
        super().__init__(message)
        self.back_to = back_to
        self.drop = drop


class Stopped(RaymodelsError):
    exit_code = 143  # what a shell calls an end by SIGTERM


class ServeError(RaymodelsError):
    pass


class AdapterError(ServeError):
    exit_code = 2


class JobError(RaymodelsError):
    pass


class JobStopped(JobError):
    exit_code = 143  # as of `Stopped`


class ClientError(RaymodelsError):
    pass


class ConnectionFailed(ClientError):
    pass


class StatusError(ClientError):
    """An HTTP error answer.

    Args:
        message: what the server said.
        status: the HTTP status.
        kind: the ``type`` of OpenAI's error object, if any.
        param: the request field at fault, if the server named one.
        retry_after: seconds, from the ``Retry-After`` header, if there was one.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        kind: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.retry_after = retry_after


class BadRequest(StatusError):
    exit_code = 2


class NotAllowed(StatusError):
    exit_code = 2


class NotFound(StatusError):
    exit_code = 2


class Overloaded(StatusError):
    pass


class ServerFailed(StatusError):
    pass


def _again(kind: type[RaymodelsError], args: tuple[Any, ...], fields: dict[str, Any]) -> RaymodelsError:
    """An error as it was pickled."""
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(fields)
    return error
