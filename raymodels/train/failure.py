"""Why a worker failed, as plain data that reaches the driver whole: its rank and place, its traceback, its causes.

Ray Train hands the driver bare exceptions: without their tracebacks, and not at all those that cannot be unpickled.
"""

from __future__ import annotations

import os
import pickle
import socket
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from raymodels.errors import RaymodelsError

LIBRARY = sysconfig.get_path("stdlib")


@dataclass(frozen=True)
class Link:
    """One exception of a chain.

    Attributes:
        kinds: the dotted names of its class and of that's bases.
        handled: it was not given as a cause: the one before it in the chain was raised while it was handled.
        where: ``file:line in function``, the innermost that is of no library, if there is one.
        modules: of all its frames.
    """

    kinds: tuple[str, ...]
    message: str
    errno: int | None
    handled: bool
    where: str
    modules: frozenset[str]

    @property
    def name(self) -> str:
        return self.kinds[0].rpartition(".")[2]


@dataclass(frozen=True)
class Failure:
    """How one rank failed, told by itself. ``error`` is what it raised, if that was one of our own."""

    rank: int
    host: str
    node: str
    pid: int
    time: float
    at: str
    links: tuple[Link, ...]
    trace: str
    error: RaymodelsError | None


class WorkerFailure(Exception):
    """Carries a `Failure` to the driver; as text it is the traceback."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure

    def __str__(self) -> str:
        return self.failure.trace


@contextmanager
def telling(rank: int, node: str, at: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Have whatever is raised in here reach the driver as a `WorkerFailure`.

    Args:
        node: Ray's id of it.
        at: says where the rank is, such as "step 12, phase data".
    """
    try:
        yield
    except BaseException as error:  # also SystemExit, which ends a worker all the same
        failure = Failure(
            rank=rank,
            host=socket.gethostname(),
            node=node,
            pid=os.getpid(),
            time=time.time(),
            at=at(),
            links=chain(error),
            trace="".join(traceback.format_exception(error)),
            error=error if isinstance(error, RaymodelsError) and _survives(error) else None,
        )
        raise WorkerFailure(failure) from None


def chain(error: BaseException) -> tuple[Link, ...]:
    """An exception, its cause, that's cause and so on."""
    links: list[Link] = []
    seen: set[int] = set()
    current: BaseException | None = error
    handled = False
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        links.append(_link(current, handled))
        handled = handled or current.__cause__ is None
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return tuple(links)


def _link(error: BaseException, handled: bool) -> Link:
    kinds = tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__ if kind is not object)
    frames = list(traceback.walk_tb(error.__traceback__))
    own = [pair for pair in frames if not _of_a_library(pair[0].f_code.co_filename)] or frames
    where = f"{own[-1][0].f_code.co_filename}:{own[-1][1]} in {own[-1][0].f_code.co_name}" if own else ""
    modules = frozenset(frame.f_globals.get("__name__", "") for frame, _ in frames)
    errno = error.errno if isinstance(error, OSError) else None
    return Link(kinds, str(error), errno, handled, where, modules)


def _of_a_library(file: str) -> bool:
    return "site-packages" in file or file.startswith((LIBRARY, "<frozen"))


def _survives(error: RaymodelsError) -> bool:
    """Whether it is the same after being pickled, which an exception with arguments of its own need not be."""
    try:
        return str(pickle.loads(pickle.dumps(error))) == str(error)
    except Exception:
        return False
