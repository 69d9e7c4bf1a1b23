"""A real HTTP server of files that behaves as servers do: well, or badly in a way of its own."""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Files(BaseHTTPRequestHandler):
    """GET /BEHAVIOUR/path: `well`, `truncates`, `busy`, `rangeless`, `stalls_for_good`."""

    protocol_version = "HTTP/1.1"
    server: "FileServer"

    def do_GET(self) -> None:
        behaviour, _, name = self.path.lstrip("/").partition("/")
        path = self.server.root / name
        if not path.is_file():
            return self._answer(404, b"there is no such file")
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(found[1]) if found and behaviour != "rangeless" else 0
        with self.server.lock:
            self.server.requests.append((self.path, start))
            self.server.counts[self.path] += 1
            count = self.server.counts[self.path]
        if behaviour == "busy" and count % 3:
            return self._answer(503, b"come back later")
        if behaviour == "always_busy":
            return self._answer(503, b"come back later")
        cut = len(data)
        if behaviour == "truncates" and count % 2:
            cut = start + (len(data) - start) // 2
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        return self._answer(206 if start else 200, data[start:cut], len(data) - start, headers)

    def _answer(
        self,
        status: int,
        body: bytes,
        length: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        with self.server.lock:
            self.server.sent += len(body)
        self.wfile.write(body)
        if length is not None and length != len(body):
            self.close_connection = True

    def log_message(self, *_: Any) -> None:  # noqa: ANN401
        """Stay quiet."""


class FileServer(ThreadingHTTPServer):
    """Serves the files below a folder on this machine's loopback."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Files)
        self.root = root
        self.lock = threading.Lock()
        self.requests: list[tuple[str, int]] = []
        self.counts: Counter[str] = Counter()
        self.sent = 0

    def url(self, behaviour: str) -> str:
        """The root under a behaviour."""
        return f"http://127.0.0.1:{self.server_address[1]}/{behaviour}"


@contextmanager
def serving(root: Path) -> Iterator[FileServer]:
    """Serve a folder."""
    with FileServer(root) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
