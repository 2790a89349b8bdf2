"""A web server on loopback that serves a folder and fails when told to."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Literal

Fault = Literal["ok", "503", "500", "403", "reset", "cut"]


class FlakyServer:
    """`faults`: what happens to the next requests, in order; when they are used up, `then` happens to all others."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.faults: list[Fault] = []
        self.then: Fault = "ok"
        self.num_requests = 0

    def next_fault(self) -> Fault:
        self.num_requests += 1
        return self.faults.pop(0) if self.faults else self.then


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, script: list[FlakyServer], **options: Any) -> None:
        self._script = script
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        self._answer(super().do_GET)

    def do_HEAD(self) -> None:
        self._answer(super().do_HEAD)

    def _answer(self, serve: Any) -> None:
        fault = self._script[0].next_fault()
        if fault == "ok":
            serve()
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

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def flaky_server(folder: Path) -> Iterator[FlakyServer]:
    script: list[FlakyServer] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder), script=script))
    # A reset connection is no news.
    server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
    script.append(FlakyServer(f"http://127.0.0.1:{server.server_address[1]}", folder))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield script[0]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
