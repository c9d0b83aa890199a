"""A stand-in for the hub: one model and one dataset repository, and what can go wrong with them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import huggingface_hub.constants
import pytest

COMMIT = "c" * 40
REPO = "owner/name"
MODEL = {"config.json": b'{"model_type": "llama"}', "model.safetensors": bytes(range(256)) * 40}
DATA = {"rows.jsonl": b'{"instruction": "say hello", "output": "hello"}\n' * 50}
LARGE = {"model.safetensors"}
"""Kept by SHA-256 of their content, the others by git's hash."""


@dataclass
class Hub:
    """The server and what goes wrong.

    Attributes:
        statuses: answers to the next requests for a look-up or a file, one after the other; afterwards all is well.
        always: an answer to every request, None for none.
        retry_after: header of these answers.
        error_code: header of these answers, by which the client tells a missing repository from a missing file.
        cut: how many of the next bodies end half-way.
        corrupt: how many of the next bodies have another content of the same length.
        requests: method and path of each request.
        ranges: the Range headers of downloads.
        model: files of the model repository.
        data: files of the dataset repository.
    """

    port: int = 0
    statuses: list[int] = field(default_factory=list)
    always: int | None = None
    retry_after: str | None = None
    error_code: str | None = None
    cut: int = 0
    corrupt: int = 0
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    model: dict[str, bytes] = field(default_factory=lambda: MODEL)
    data: dict[str, bytes] = field(default_factory=lambda: DATA)

    @property
    def downloads(self) -> int:
        """How many bodies of files were asked for."""
        return sum(request.startswith("GET") and "/resolve/" in request for request in self.requests)


def git_hash(content: bytes) -> str:
    """The id of a file in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    """Serve until the end of the context."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.port = server.server_port
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use(patch: pytest.MonkeyPatch, port: int, cache: str) -> None:
    """Let the client of this process ask this hub, and keep its files there."""
    endpoint = f"http://127.0.0.1:{port}"
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", cache)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = urlsplit(self.path).path
            hub.requests.append(f"{self.command} {path}")
            status = hub.always or (hub.statuses.pop(0) if hub.statuses else 200)
            if status != 200:
                more = {"Retry-After": hub.retry_after, "X-Error-Code": hub.error_code}
                self.send(status, b"{}", **{name: value for name, value in more.items() if value})
                return
            data, parts = "datasets" in path, path.split("/")
            files = hub.data if data else hub.model
            if "revision" in parts:
                self.send(200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": []}).encode())
            elif "tree" in parts:
                self.send(200, json.dumps([entry(name, content) for name, content in files.items()]).encode())
            elif parts[-1] in files:
                self.file(parts[-1], files[parts[-1]])
            else:
                self.send(404, b"{}", **{"X-Error-Code": "EntryNotFound"})

        def file(self, name: str, content: bytes) -> None:
            tag = hashlib.sha256(content).hexdigest() if name in LARGE else git_hash(content)
            headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if self.command == "HEAD":
                self.send(200, content, **headers)
                return
            begin, wanted = 0, self.headers.get("Range")
            if wanted:
                hub.ranges.append(wanted)
                begin = int(wanted.removeprefix("bytes=").rstrip("-"))
                headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            body = content[begin:]
            if hub.corrupt:
                hub.corrupt -= 1
                body = body[::-1]
            half = bool(hub.cut)
            hub.cut -= half
            self.send(206 if wanted else 200, body, half=half, **headers)

        def send(self, status: int, body: bytes, half: bool = False, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if half else body)
            if half:
                self.wfile.flush()
                self.close_connection = True

    return Handler


def entry(name: str, content: bytes) -> dict[str, object]:
    """A file as the hub lists it."""
    found: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
    large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return {**found, "lfs": large} if name in LARGE else found
