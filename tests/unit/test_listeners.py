"""Deltas find who asked for them, on whatever loop; no more wait than may; a failure reaches everybody."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from raymodels.errors import ServeError
from raymodels.serve.engine import Delta, GenerateRequest, QueueFull
from raymodels.serve.listeners import Listeners


def listeners(most: int = 8) -> tuple[Listeners, list[str]]:
    """Listeners, and the ids that they have given up."""
    aborted: list[str] = []

    def abort(id: str) -> None:
        if found.remove(id):
            aborted.append(id)

    found = Listeners(most, abort)
    return found, aborted


def request(id: str, n: int = 1) -> GenerateRequest:
    return GenerateRequest(id, [1], 5, n=n)


def delta(text: str, choice: int = 0, last: bool = False) -> Delta:
    return Delta(choice, text, 1, finish="stop" if last else None)


def in_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_deltas_come_in_order_until_every_choice_has_finished() -> None:
    found, aborted = listeners()

    async def listen() -> list[str]:
        stream = found.add(request("a", n=2))
        found.add(request("b"))
        items = [delta("x"), delta("y", 1, last=True), delta("z", last=True), delta("never")]
        in_a_thread(lambda: found.put([("a", item) for item in items] + [("b", delta("b")), ("c", delta("c"))]))
        return [item.text async for item in stream]

    assert asyncio.run(listen()) == ["x", "y", "z"]
    assert aborted == ["a"] and found.choices == 1


def test_every_loop_is_handed_its_own() -> None:
    found, aborted = listeners(most=40)
    ready, heard = threading.Barrier(5), dict[str, list[str]]()

    async def listen(loop: str) -> None:
        streams = {f"{loop}{n}": found.add(request(f"{loop}{n}")) for n in range(10)}
        ready.wait(10)

        async def follow(id: str, stream: AsyncIterator[Delta]) -> None:
            heard[id] = [item.text async for item in stream]

        await asyncio.gather(*(follow(id, stream) for id, stream in streams.items()))

    threads = [threading.Thread(target=lambda loop=loop: asyncio.run(listen(loop))) for loop in "abcd"]
    for thread in threads:
        thread.start()
    ready.wait(10)
    ids = [f"{loop}{n}" for loop in "abcd" for n in range(10)]
    for last in (False, True):
        found.put([(id, delta(f"{id}{last}", last=last)) for id in ids])
    for thread in threads:
        thread.join(10)
    assert heard == {id: [f"{id}False", f"{id}True"] for id in ids}
    assert sorted(aborted) == sorted(ids) and found.choices == 0


def test_no_more_choices_wait_than_may() -> None:
    found, _ = listeners(most=5)

    async def fill() -> None:
        found.add(request("a", n=4))
        with pytest.raises(QueueFull, match="4 choices are running or queued"):
            found.add(request("b", n=2))
        found.add(request("c"))
        found.remove("a")
        found.add(request("d", n=4))

    asyncio.run(fill())
    assert found.choices == 5


def test_closing_a_stream_aborts_its_request() -> None:
    found, aborted = listeners()

    async def leave() -> None:
        stream = found.add(request("a"))
        found.put([("a", delta("x"))])
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    assert aborted == ["a"]
    found.put([("a", delta("too late"))])


def test_a_failure_ends_all_and_lets_nobody_in() -> None:
    found, aborted = listeners()

    async def listen() -> None:
        streams = [found.add(request("a")), found.add(request("b"))]
        found.check()
        in_a_thread(lambda: found.fail(ServeError("first")))
        in_a_thread(lambda: found.fail(ServeError("second")))
        for stream in streams:
            with pytest.raises(ServeError, match="first"):
                await anext(stream)
        with pytest.raises(ServeError, match="first"):
            found.add(request("c"))

    asyncio.run(listen())
    with pytest.raises(ServeError, match="first"):
        found.check()
    assert aborted == ["a", "b"] and found.choices == 0


def test_a_caller_that_has_gone_with_its_loop_harms_nobody() -> None:
    found, _ = listeners()

    async def ask() -> AsyncIterator[Delta]:
        return found.add(request("a"))

    gone = asyncio.run(ask())
    found.put([("a", delta("x"))])
    found.fail(ServeError("the engine is closed"))
    assert gone and found.choices == 1
