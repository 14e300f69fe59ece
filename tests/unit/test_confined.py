"""Functions on clients' data in processes of their own: each way in which one may not return, with real processes."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import psutil
import pytest

from raymodels.serve.confined import Busy, Confined, Failed, Lost, TooLarge, TooLong, Unfinished

MIB = 2**20


@asynccontextmanager
async def confined(
    target: str = "work", workers: int = 1, seconds: float = 5, arguments: Sequence[str] = ()
) -> AsyncIterator[Confined]:
    target = f"tests.unit.confined_work:{target}"
    pool = Confined(target, workers=workers, memory_bytes=64 * MIB, seconds=seconds, arguments=arguments)
    try:
        yield pool
    finally:
        await pool.close()


def workers() -> list[psutil.Process]:
    """Those that run."""
    return psutil.Process().children()


def test_a_call_returns_what_the_function_does(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")

    async def main() -> None:
        async with confined() as pool:
            await pool.start()
            assert await pool.call(b"print to the log") == b""
            large = os.urandom(20 * MIB)
            assert await pool.call(b"echo " + large) == large
            forked, worker, niceness = map(int, (await pool.call(b"pid")).split())
            assert [process.pid for process in workers()] == [worker] != [forked]
            assert niceness > os.nice(0)
            assert b"secret" not in await pool.call(b"environment")

    asyncio.run(main())
    assert capfd.readouterr().err == "to the log\n"
    assert not workers()


def test_a_function_may_be_made_of_arguments_once() -> None:
    async def main() -> None:
        async with confined("bound", arguments=["a", "b"]) as pool:
            assert await pool.call(b"c") == b"a b c"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"spin", TooLong, "takes more than 0.2 s"),
        (b"make 70", TooLarge, "takes more than 64 MiB"),
        (b"abort", TooLarge, "takes more than 64 MiB"),
        (b"end 9", TooLarge, "takes more than 64 MiB"),
        (b"overflow", Failed, "SIGSEGV"),
        (b"raise secret", Failed, "ValueError"),
        (b"exit 3", Failed, "exit code 3"),
        (b"orphan", Lost, "SIGKILL"),
    ],
)
def test_whatever_a_call_does_only_it_ends(data: bytes, error: type[Unfinished], message: str) -> None:
    async def main() -> None:
        async with confined() as pool:
            with pytest.raises(error) as raised:
                await pool.call(data, seconds=0.2 if data == b"spin" else None)
            assert str(raised.value) == message
            copy = pickle.loads(pickle.dumps(raised.value))
            assert type(copy) is error and str(copy) == message
            assert await pool.call(b"echo on") == b"on"
            assert len(workers()) == 1

    asyncio.run(main())


def test_what_waits_is_not_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymodels.serve.confined.PATIENCE_S", 0.5)

    async def main() -> None:
        async with confined() as pool:
            assert await pool.call(b"sleep 0.3", seconds=0.2) == b""
            with pytest.raises(Busy):
                await pool.call(b"sleep 60", seconds=0.01)
            assert await pool.call(b"echo on") == b"on"

    asyncio.run(main())


def test_a_worker_that_died_while_it_waited_is_replaced() -> None:
    async def main() -> None:
        async with confined(workers=2) as pool:
            await pool.start()
            for worker in workers():
                worker.kill()
                worker.wait()
            assert await pool.call(b"echo on") == b"on"

    asyncio.run(main())


def test_calls_run_beside_each_other_and_others_wait() -> None:
    async def main() -> None:
        async with confined(workers=2) as pool:
            await pool.start()
            answers = await asyncio.gather(*(pool.call(b"interval 0.1") for _ in range(5)))
            intervals = [tuple(map(float, answer.split())) for answer in answers]
            together = [sum(began <= at < ended for began, ended in intervals) for at, _ in intervals]
            assert max(together) == 2 == len(workers())

    asyncio.run(main())


def test_a_caller_that_is_cancelled_leaves_no_worker_busy_for_longer_than_its_seconds() -> None:
    async def main() -> None:
        async with confined(seconds=0.2) as pool:
            await pool.start()
            calls = [asyncio.create_task(pool.call(b"spin")) for _ in range(20)]
            await asyncio.sleep(0.1)
            for call in calls:
                call.cancel()
            assert await pool.call(b"echo on") == b"on"
            [worker] = workers()
            assert worker.cpu_times().children_user < 0.5  # what waited has never begun

    asyncio.run(main())


def test_the_loop_goes_on_meanwhile() -> None:
    async def main() -> None:
        async with confined() as pool:
            await pool.start()
            call = asyncio.create_task(pool.call(b"echo " + bytes(16 * MIB)))
            longest, before = 0.0, time.thread_time()
            while not call.done():
                await asyncio.sleep(0)
                longest, before = max(longest, time.thread_time() - before), time.thread_time()
            assert longest < 0.03

    asyncio.run(main())


def test_a_function_that_cannot_be_imported_is_a_failure() -> None:
    async def main() -> None:
        async with confined("nothing") as pool:
            with pytest.raises(Lost, match="exit code 1"):
                await pool.start()
            with pytest.raises(Lost):
                await pool.call(b"")

    asyncio.run(main())


def test_workers_and_their_calls_die_with_their_parent() -> None:
    code = """
        import asyncio, sys
        from raymodels.serve.confined import Confined
        async def main():
            pool = Confined("tests.unit.confined_work:work", workers=1, memory_bytes=2**20, seconds=60)
            print(*(await pool.call(b"pid")).split()[1:2], flush=True)
            await pool.call(b"spin")
        asyncio.run(main())
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline().strip("b'\n")))
        while not (calls := worker.children()):
            time.sleep(0.01)
        parent.send_signal(signal.SIGKILL)
    until = time.monotonic() + 5
    while any(map(runs, [worker, *calls])):
        assert time.monotonic() < until
        time.sleep(0.01)


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended, even if nobody has asked yet how."""
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
