"""The gateway's own port: clients that leave, and the end of the gateway."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from raymodels.errors import ServeError
from raymodels.serve.listener import Listener, shared_port


class App:
    """Reads the body, answers after a while, and says how each request ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.begun = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        self.begun.set()
        try:
            await asyncio.sleep(float(scope["path"][1:]))
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})
            await asyncio.sleep(0.05)  # what is done after the answer is not cut off
            self.ended.append("answered")
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_requests_end_with_their_answer_or_their_client() -> None:
    async def main() -> list[str]:
        app, port = App(), free_port()
        listener = Listener(app, shared_port("127.0.0.1", port))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            for _ in range(2):
                assert (await http.post("/0", content=b"x" * 300_000)).text == "ok"
            app.begun.clear()
            leaver = asyncio.create_task(http.post("/30", content=b"x"))
            await app.begun.wait()
            leaver.cancel()
            async with asyncio.timeout(60):
                while len(app.ended) < 3:
                    await asyncio.sleep(0.01)
            app.begun.clear()
            last = asyncio.create_task(http.post("/0.3", content=b"x"))
            await app.begun.wait()
            await listener.drain()
            assert (await last).text == "ok"
            with pytest.raises(httpx.ConnectError):
                await http.post("/0")
            await asyncio.sleep(0.1)
        return app.ended

    assert sorted(asyncio.run(main())) == ["answered"] * 3 + ["cancelled"]


def test_gateways_share_a_port() -> None:
    async def main() -> None:
        app, port = App(), free_port()
        first, second = Listener(app, shared_port("127.0.0.1", port)), Listener(app, shared_port("127.0.0.1", port))
        await asyncio.sleep(0.2)
        await first.drain()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            assert (await http.get("/0")).text == "ok"
        await second.drain()

    asyncio.run(main())


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ServeError, match=r"http\.port: .* in use"):
        shared_port("127.0.0.1", other.getsockname()[1])
