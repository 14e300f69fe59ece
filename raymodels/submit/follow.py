"""A job's log as it grows, each line once, and the status that ends it, over connections that break."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from raymodels.errors import ClusterLost
from raymodels.submit.connect import Answer, Cluster, NotThere, Unreachable

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

POLL_S = 1.0
FAILURES, OPEN_S, ASK_S = 5, 5.0, 5.0
"""After so many streams of a log that end so soon without text, it is asked for, so often."""
PENDING_S = 30.0
"""After so long one is told that a job has not started, and what Ray makes of it."""
LOG_END_S = 30.0
"""How long to try for the end of a log once the job's own end is known. Ray cannot read one that is no UTF-8."""
SILENT_S = 300.0
"""After so long without text the stream is opened anew: what a proxy dropped without a word looks like a silent job."""


@dataclass(frozen=True)
class Following:
    """How a job is followed: who is shown its lines, who is told what is amiss, how long a cluster may be away."""

    line: Callable[[str], object]
    notice: Callable[[str], object]
    lost_after_s: float


def follow(cluster: Cluster, job_id: str, how: Following) -> tuple[JobDetails, str]:
    """Show the log as it grows until the job's status is terminal; the final status and the last line shown.

    Raises:
        ClusterLost: the cluster did not answer for ``how.lost_after_s``, or no longer knows the job.
        ClusterError: it refuses the token.
    """
    lines, stream = _Lines(how.line), _Stream(cluster.client, job_id)
    with ThreadPoolExecutor(1) as pool:
        tail = pool.submit(asyncio.run, stream.run())
        try:
            info = _until_terminal(cluster, job_id, how, lines, stream, tail)
        finally:
            stream.over.set()
        tail.result()
    lines.take(stream.arriving)
    briefly = replace(how, lost_after_s=min(how.lost_after_s, LOG_END_S))
    try:
        lines.see(insist(cluster, job_id, briefly, lambda client: client.get_job_logs(job_id)))
    except ClusterLost:
        how.notice(f"note: {job_id} ended {info.status.value}, but the end of its log could not be read")
    lines.end()
    return info, lines.last


def _until_terminal(
    cluster: Cluster, job_id: str, how: Following, lines: _Lines, stream: _Stream, tail: Future[None]
) -> JobDetails:
    """Show lines until the job's status is terminal. The end of the log's stream would prove nothing."""
    started, said, asked = time.monotonic(), False, float("-inf")
    while True:
        lines.show(stream.arriving, for_s=POLL_S)
        if tail.done():
            tail.result()
        info = insist(cluster, job_id, how, lambda client: client.get_job_info(job_id), stream.break_off)
        if info.status.is_terminal():
            return info
        if info.status.value == "RUNNING" and stream.failures >= FAILURES and time.monotonic() - asked > ASK_S:
            if asked < 0:
                how.notice(
                    f"note: no websocket brings the log, as behind some proxies: its lines come every {ASK_S:g} s"
                )
            with contextlib.suppress(Unreachable, NotThere):
                lines.see(cluster.ask(lambda client: client.get_job_logs(job_id)))
            asked = time.monotonic()
        if info.status.value == "PENDING" and not said and time.monotonic() - started > PENDING_S:
            how.notice(f"note: {job_id} is PENDING: {info.message}")
            said = True


def insist(
    cluster: Cluster,
    job_id: str,
    how: Following,
    question: Callable[[JobSubmissionClient], Answer],
    on_silence: Callable[[], object] = lambda: None,
) -> Answer:
    """Ask until there is an answer, or the cluster has been away for too long.

    Raises:
        ClusterLost: it has, or no longer knows the job.
    """
    since = time.monotonic()
    said = False
    while True:
        try:
            answer = cluster.ask(question)
        except NotThere as error:
            raise ClusterLost(
                f"the cluster at {cluster.address} no longer knows {job_id}: it was restarted, and its jobs are gone; "
                "the same submit again starts the job anew"
            ) from error
        except Unreachable as error:
            on_silence()
            if time.monotonic() - since > how.lost_after_s:
                raise ClusterLost(
                    f"the cluster at {cluster.address} has not answered for {how.lost_after_s:g} s; {job_id} may still "
                    f"run: the same submit again, or raymodels logs {job_id} --follow {cluster.options}, goes on here"
                ) from error
            if not said:
                how.notice(f"note: {cluster.address} does not answer; trying for {how.lost_after_s:g} s")
                said = True
            time.sleep(POLL_S)
        else:
            if said:
                how.notice(f"note: {cluster.address} answers again")
            return answer


class _Lines:
    """A job's log, each line shown once however often its stream begins anew."""

    def __init__(self, follow: Callable[[str], object]) -> None:
        self.last = ""
        self._follow = follow
        self._shown = 0
        self._rest = ""

    def show(self, arriving: queue.Queue[tuple[int, str]], for_s: float) -> None:
        """Show what arrives in the next seconds."""
        until = time.monotonic() + for_s
        while (left := until - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                self._add(*arriving.get(timeout=left))

    def take(self, arriving: queue.Queue[tuple[int, str]]) -> None:
        """Show what has arrived already."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._add(*arriving.get_nowait())

    def see(self, whole: str) -> None:
        """Show what the stream did not bring."""
        self._add(0, whole)

    def end(self) -> None:
        """Show the last line even if it does not end."""
        if self._rest:
            self._add(self._shown, "\n")

    def _add(self, offset: int, text: str) -> None:
        new = text[max(0, self._shown - offset) :]
        self._shown += len(new)
        *lines, self._rest = (self._rest + new).split("\n")
        for line in lines:
            self.last = line.strip() or self.last
            self._follow(line)


class _Stream:
    """A job's log from the cluster, from its start again whenever a connection ends or is known to be dead."""

    def __init__(self, client: JobSubmissionClient, job_id: str) -> None:
        self.arriving: queue.Queue[tuple[int, str]] = queue.Queue()  # text with its offset in the log
        self.over = threading.Event()
        self.cut = threading.Event()
        self._client, self._job_id = client, job_id
        self._heard = 0.0
        self.failures = 0  # how often it ended at once since it last brought text

    def break_off(self) -> None:
        """Nothing can come through the connection that there is."""
        self.cut.set()
        self.failures = 0

    async def run(self) -> None:
        """Read until ``over`` is set."""
        while not self.over.is_set():
            self.cut.clear()
            self._heard = time.monotonic()
            reading = asyncio.ensure_future(self._read())
            while not (self.over.is_set() or self.cut.is_set() or reading.done() or self._silent()):
                await asyncio.wait([reading], timeout=POLL_S / 4)
            self.failures += reading.done() and time.monotonic() - self._heard < OPEN_S
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
            await asyncio.sleep(0 if self.over.is_set() else POLL_S)

    def _silent(self) -> bool:
        return time.monotonic() - self._heard > SILENT_S

    async def _read(self) -> None:
        import aiohttp

        offset = 0
        # What breaks the stream shows in the job's status, which is polled, or is gone when it is opened again.
        with contextlib.suppress(aiohttp.ClientError, OSError, RuntimeError):
            async for text in self._client.tail_job_logs(self._job_id):
                self._heard, self.failures = time.monotonic(), 0
                self.arriving.put((offset, text))
                offset += len(text)
