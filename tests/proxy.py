"""A proxy in front of a server, which can be away, slow, silent or broken from a chosen moment on."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Literal

Mode = Literal["pass", "gone", "slow", "silent", "broken"]
NOBODY = 0
"""Port of a server that is never asked."""
_BROKEN = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Proxy:
    """Forwards connections to a loopback port.

    Modes: `pass`; `gone` (as if no process listened); `slow` (each message of the client waits for `delay` seconds);
    `silent` (connections are accepted and nothing is ever answered); `broken` (500 to every request).

    Attributes:
        calls: the messages of clients that came while it was slow, silent or broken.
    """

    def __init__(self, target: int, mode: Mode = "pass", delay: float = 0.0) -> None:
        self.target, self.delay, self.calls = target, delay, 0
        self.mode: Mode = "gone"
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.set(mode)

    @property
    def address(self) -> str:
        """Of the API behind it."""
        return f"http://127.0.0.1:{self.port}/api"

    def set(self, mode: Mode) -> None:
        """From now on be so; connections that are open are cut, but where it only becomes slow or silent."""
        self.mode = mode
        if mode == "gone" and self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        if mode in ("gone", "broken"):
            self._cut(*self._open)
        if mode != "gone" and self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self._open.add(client)
        server: socket.socket | None = None
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                self.calls += self.mode in ("slow", "silent", "broken")
                while self.mode == "silent":
                    time.sleep(0.02)
                if self.mode == "broken":
                    client.sendall(_BROKEN)
                    break
                if self.mode == "slow":
                    time.sleep(self.delay)
                if server is None:
                    server = socket.create_connection(("127.0.0.1", self.target))
                    self._open.add(server)
                    threading.Thread(target=self._answer, args=(server, client), daemon=True).start()
                server.sendall(data)
        self._cut(client, *([server] if server else []))

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                client.sendall(data)
        self._cut(server, client)

    def _cut(self, *sockets: socket.socket) -> None:
        for each in sockets:
            self._open.discard(each)
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
