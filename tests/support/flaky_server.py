"""A web server on loopback that fails when told to: it serves a folder, or passes requests on to another server."""

from __future__ import annotations

import http.client
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Literal

Fault = Literal["ok", "503", "500", "403", "reset", "cut"]
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class FlakyServer:
    """`faults`: what happens to the next requests, in order; when they are used up, `then` happens to all others.

    only: which requests count, by method and path; the others pass. seen: all requests, as "GET /path".
    """

    def __init__(self, folder: Path, upstream: tuple[str, int] | None) -> None:
        self.url = ""
        self.folder = folder
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.then: Fault = "ok"
        self.only: Callable[[str, str], bool] = lambda method, path: True
        self.seen: list[str] = []
        self._lock = Lock()

    @property
    def num_requests(self) -> int:
        return len(self.seen)

    def next_fault(self, method: str, path: str) -> Fault:
        with self._lock:
            self.seen.append(f"{method} {path}")
            if not self.only(method, path):
                return "ok"
            return self.faults.pop(0) if self.faults else self.then


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, plan: FlakyServer, **options: Any) -> None:
        self._plan = plan
        super().__init__(*args, **options)

    def _answer(self) -> None:
        fault = self._plan.next_fault(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault == "ok":
            if self._plan.upstream is None:
                (super().do_HEAD if self.command == "HEAD" else super().do_GET)()
            else:
                self._pass_on(self._plan.upstream, body)
        elif fault == "reset":
            # No lingering: the kernel sends RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"half")
            self.close_connection = True
        else:
            self.send_error(int(fault))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815 - names of the base class

    def _pass_on(self, upstream: tuple[str, int], body: bytes) -> None:
        client = http.client.HTTPConnection(*upstream)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        client.request(self.command, self.path, body or None, {**headers, "Content-Length": str(len(body))})
        answer = client.getresponse()
        content = answer.read()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(content)
        client.close()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def flaky_server(folder: Path, upstream: tuple[str, int] | None = None) -> Iterator[FlakyServer]:
    """folder: what it serves, unless requests go on to `upstream` (host, port)."""
    plan = FlakyServer(folder, upstream)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder), plan=plan))
    server.daemon_threads = True  # clients keep connections open
    # A reset connection is no news.
    server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
    plan.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, args=(0.01,))  # shutdown waits as long
    thread.start()
    try:
        yield plan
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
