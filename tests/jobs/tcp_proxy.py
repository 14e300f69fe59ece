"""A TCP proxy whose network can be cut or slow: open connections end, new ones are refused, until it is mended."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable

BUFFER = 65536


class TcpProxy:
    """Forwards a port of this machine to another.

    Args:
        target: the other port.
        context: for TLS on its own side.
        upload: the bytes a second that it takes from clients.
        request, answer: are shown each piece before it is forwarded; False ends its connection instead.
    """

    def __init__(
        self,
        target: int,
        context: ssl.SSLContext | None = None,
        upload: float | None = None,
        request: Callable[[bytes], bool] = lambda piece: True,
        answer: Callable[[bytes], bool] = lambda piece: True,
    ) -> None:
        self._target, self._context, self._upload = target, context, upload
        self._request, self._answer = request, answer
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.port = 0
        self.mend()

    def mend(self) -> None:
        """Listen, on the same port as before."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        if self._upload:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # accept() returns at once
        self._listener.close()
        with self._lock:
            for end in self._open:
                self._shut(end)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=[listener.accept()[0]], daemon=True).start()

    def _serve(self, accepted: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            self._secured(accepted) as client,
            socket.create_connection(("127.0.0.1", self._target)) as server,
        ):
            with self._lock:
                self._open |= {client, server}
            back = threading.Thread(target=self._pump, args=[server, client, self._answer], daemon=True)
            back.start()
            self._pump(client, server, self._request, self._upload)
            back.join()
            with self._lock:
                self._open -= {client, server}

    def _secured(self, accepted: socket.socket) -> socket.socket:
        return self._context.wrap_socket(accepted, server_side=True) if self._context else accepted

    def _pump(
        self, source: socket.socket, sink: socket.socket, passes: Callable[[bytes], bool], rate: float | None = None
    ) -> None:
        with contextlib.suppress(OSError):
            while (data := source.recv(BUFFER)) and passes(data):
                sink.sendall(data)
                if rate:
                    time.sleep(len(data) / rate)
        for end in (source, sink):
            self._shut(end)

    @staticmethod
    def _shut(end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
