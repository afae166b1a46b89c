"""Something between client and server that hears everything and may answer in its place."""

import json
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

# What concerns one connection only, and what httpx makes anew.
_HOP = {"connection", "host", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@dataclass
class Heard:
    """One request; ``path`` begins behind ``/api/v1/``."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    status: int = 0

    @property
    def key(self) -> str:
        return self.headers["x-api-key"]

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    """Given in place of the server's."""

    status: int
    body: dict[str, Any]


@dataclass
class Proxy:
    """A running proxy.

    Attributes:
        answers: In place of the server's, by path.
        changes: What becomes of requests on their way to the server; looked at once each.
        heard: All requests so far.
    """

    url: str = ""
    answers: dict[str, Answer] = field(default_factory=dict[str, Answer])
    changes: list[Callable[[Heard], None]] = field(default_factory=list[Callable[[Heard], None]])
    heard: list[Heard] = field(default_factory=list[Heard])
    _arrived: threading.Condition = field(default_factory=threading.Condition)

    def paths(self) -> list[str]:
        return [one.path for one in self.heard]

    def add(self, one: Heard) -> None:
        with self._arrived:
            self.heard.append(one)
            self._arrived.notify_all()

    def wait_for(self, path: str, timeout_s: float, times: int = 1) -> list[Heard]:
        """The requests with this path, once there are so many."""

        def there() -> list[Heard]:
            return [one for one in self.heard if one.path == path]

        with self._arrived:
            assert self._arrived.wait_for(lambda: len(there()) >= times, timeout_s), self.paths()
        return there()


@contextmanager
def proxy(target: str) -> Generator[Proxy]:
    """Stand before the server at ``target`` for the length of the block."""
    running = Proxy()
    with httpx.Client(base_url=f"{target}/api/v1/", timeout=45.0) as forward:

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            wbufsize = -1  # else each part of an answer is a packet of its own, which is slow

            def _handle(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                path = self.path.removeprefix("/api/v1/")
                headers = {name.lower(): value for name, value in self.headers.items()}
                one = Heard(self.command, path, headers, self.rfile.read(length))
                replace = running.answers.get(path)
                if replace is not None:
                    one.status = replace.status
                    self._send(replace.status, {}, json.dumps(replace.body).encode())
                else:
                    for change in running.changes:
                        change(one)
                    passed = {k: v for k, v in one.headers.items() if k not in _HOP}
                    answer = forward.request(one.method, one.path, content=one.body, headers=passed)
                    one.status = answer.status_code
                    self._send(answer.status_code, answer.headers, answer.content)
                running.add(one)

            def _send(self, status: int, headers: Any, body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in _HOP | {"content-encoding"}:
                        self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                self.wfile.flush()

            do_GET = do_POST = do_PUT = do_DELETE = _handle

            def log_message(self, format: str, *args: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            server.block_on_close = False  # clients keep their connections
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            running.url = f"http://127.0.0.1:{server.server_port}"
            try:
                yield running
            finally:
                server.shutdown()
                thread.join()
