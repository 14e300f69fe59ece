"""Watch a run's workers from the driver: name a rank that stands, and end its process so that the run restarts.

A tiny actor on every node, the sentry, reads what that node's workers mark (`heartbeat`), takes stacks and can kill; a
thread of the driver asks all of them twice a second and has `verdict` judge.
"""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import Any, Protocol

import psutil  # type: ignore[import-untyped]

from raymodels.train.heartbeat import Beat, here, process, read_beats
from raymodels.train.stacks import Stack, dump
from raymodels.train.verdict import Bounds, Slow, Verdict, accuse, overdue, slow_ranks

POLL_SECONDS = 0.5
ANSWER_SECONDS = 2.0  # after which a node's last answer is taken to grow old
STACKS_SECONDS = 20.0
NODES_SECONDS = 10.0  # between two looks for nodes that joined

OnVerdict = Callable[[Verdict], None]
OnSlow = Callable[[Slow], None]


class Nodes(Protocol):
    """The nodes of a run, seen from the driver."""

    def beats(self) -> list[Beat]: ...
    def stacks(self, beats: Sequence[Beat]) -> dict[int, Stack]: ...
    def kill(self, beat: Beat) -> None: ...


class Sentry:
    """One node, seen from itself: an actor of that node, or plainly where all ranks run on this one."""

    def __init__(self, folder: str, node: str = "") -> None:
        self._folder, self._node = folder, node

    def beats(self) -> list[Beat]:
        return read_beats(self._folder, self._node)

    def stacks(self, beats: Sequence[Beat]) -> dict[int, Stack]:
        """By rank."""
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda beat: dump(beat.pid, beat.thread), beats)
            return {beat.rank: stack for beat, stack in zip(beats, found, strict=True)}

    def kill(self, beat: Beat) -> None:
        """SIGKILL, which also ends a stopped process; nothing if it has ended."""
        if found := process(beat):
            with suppress(psutil.NoSuchProcess):
                found.kill()

    def clear(self) -> None:
        """Remove the folder, at the end."""
        shutil.rmtree(here(self._folder), ignore_errors=True)


class RayNodes:
    """The nodes of the connected Ray cluster, a sentry on each."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._sentries: dict[str, Any] = {}
        self._asked: dict[str, Any] = {}  # beats that a sentry owes
        self._known: dict[str, tuple[float, list[Beat]]] = {}  # when it answered last, and what
        self._looked = float("-inf")

    def beats(self) -> list[Beat]:
        """Of all nodes; of one that does not answer, the last known, grown old."""
        import ray
        from ray.exceptions import ActorUnschedulableError, RayActorError

        self._post_sentries()
        for node, sentry in self._sentries.items():
            if node not in self._asked:
                self._asked[node] = sentry.beats.remote()
        answered, _ = ray.wait(list(self._asked.values()), num_returns=len(self._asked), timeout=ANSWER_SECONDS)
        there, now = set(answered), time.monotonic()
        for node, promise in list(self._asked.items()):
            if promise in there:
                del self._asked[node]
                try:
                    self._known[node] = (now, ray.get(promise))
                except (RayActorError, ActorUnschedulableError):  # with its node, or alone: then it is posted anew
                    self._known.pop(node, None)
                    del self._sentries[node]
        return [_aged(beat, now - then) for then, beats in self._known.values() for beat in beats]

    def stacks(self, beats: Sequence[Beat]) -> dict[int, Stack]:
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        there: dict[str, list[Beat]] = {}
        for beat in beats:
            there.setdefault(beat.node, []).append(beat)
        promises = [
            sentry.stacks.remote(there[node])
            for node, sentry in self._sentries.items()
            if node not in self._asked and node in there
        ]
        ray.wait(promises, num_returns=len(promises), timeout=STACKS_SECONDS)
        found: dict[int, Stack] = {}
        for promise in promises:
            with suppress(GetTimeoutError, RayActorError):  # then these ranks have no stacks
                found |= ray.get(promise, timeout=0)
        return found

    def kill(self, beat: Beat) -> None:
        """Asks the node's sentry, without waiting for it: the node may be frozen."""
        if beat.node in self._sentries:
            self._sentries[beat.node].kill.remote(beat)

    def close(self) -> None:
        """Remove what the workers wrote, on the nodes that answer, and the sentries."""
        import ray

        cleared = [sentry.clear.remote() for sentry in self._sentries.values()]
        if cleared:
            ray.wait(cleared, num_returns=len(cleared), timeout=ANSWER_SECONDS)
        for sentry in self._sentries.values():
            ray.kill(sentry)

    def _post_sentries(self) -> None:
        if time.monotonic() - self._looked < NODES_SECONDS:
            return
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from raymodels.cluster import alive_nodes

        self._looked = time.monotonic()
        alive = alive_nodes()
        for gone in self._sentries.keys() - alive:
            del self._sentries[gone]
            self._known.pop(gone, None)
            self._asked.pop(gone, None)
        for node in alive - self._sentries.keys():
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            actor = ray.remote(num_cpus=0, scheduling_strategy=there)(Sentry)
            self._sentries[node] = actor.remote(self._folder, node)


class Monitor:
    """Looks at a run's ranks until it is told to stop, and ends the process of one that stands."""

    def __init__(
        self, nodes: Nodes, on_verdict: OnVerdict, on_slow: OnSlow | None = None, bounds: Bounds | None = None
    ) -> None:
        self._nodes, self._on_verdict, self._on_slow = nodes, on_verdict, on_slow
        self._bounds = bounds or Bounds()
        self._stop = threading.Event()
        self._named: set[int] = set()  # process ids that a verdict named
        self._slow: set[int] = set()  # process ids that were slow at the last look

    def run(self, first_look_s: float = 0.0) -> None:
        self._stop.wait(first_look_s)
        while not self._stop.wait(POLL_SECONDS):
            self.look()

    def stop(self) -> None:
        self._stop.set()

    def look(self) -> Verdict | None:
        """One look: the verdict, if there is a new one."""
        beats = self._nodes.beats()
        self._tell_slow(beats)
        if not overdue(beats, self._bounds):
            return None
        stacks = self._nodes.stacks(beats)
        again = self._nodes.beats()
        verdict = accuse(again, stacks, self._bounds)
        if verdict is None or verdict.pid in self._named or _moved(beats, again, verdict.pid):
            return None
        self._named.add(verdict.pid)
        self._on_verdict(verdict)
        self._nodes.kill(next(beat for beat in again if beat.pid == verdict.pid))
        return verdict

    def _tell_slow(self, beats: Sequence[Beat]) -> None:
        slow = slow_ranks(beats)
        for each in slow:
            if each.pid not in self._slow and self._on_slow:
                self._on_slow(each)
        self._slow = {each.pid for each in slow}


@contextmanager
def watch(
    on_verdict: OnVerdict, on_slow: OnSlow | None = None, bounds: Bounds | None = None, first_look_s: float = 0.0
) -> Iterator[str]:
    """Watch the Ray workers that mark where they are in the folder that this yields, until the end.

    Args:
        on_verdict: is called in a thread, before the process that the verdict names is killed.
        on_slow: is called once each time that a rank falls behind the others.
        first_look_s: when to begin. Sentries are processes too, and slow the workers' start while they start.

    What the callbacks raise, or the watch itself, is raised again at the end.
    """
    folder = f"raymodels-beats-{uuid.uuid4().hex[:12]}"  # in each node's folder for temporary files
    nodes = RayNodes(folder)
    monitor = Monitor(nodes, on_verdict, on_slow, bounds)
    with closing(nodes), ThreadPoolExecutor(1, thread_name_prefix="watch") as pool:
        watching = pool.submit(monitor.run, first_look_s)
        try:
            yield folder
        finally:
            monitor.stop()
        watching.result()


def _moved(before: Sequence[Beat], after: Sequence[Beat], pid: int) -> bool:
    """Whether a process marked anything while the stacks were taken: then they tell of another moment."""
    return [beat.marks for beat in before if beat.pid == pid] != [beat.marks for beat in after if beat.pid == pid]


def _aged(beat: Beat, seconds: float) -> Beat:
    if seconds < ANSWER_SECONDS:
        return beat
    return replace(beat, quiet=beat.quiet + seconds, silent=beat.silent + seconds, status="unreachable")
