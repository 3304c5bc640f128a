"""Debian's docker-registry on localhost, and a front that asks for a login and sends readers on."""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A registry's address, for the length of a block."""
    if shutil.which("docker-registry") is None:
        pytest.skip("needs docker-registry: apt-get install docker-registry")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = (
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {folder}}}}}\nhttp: {{addr: '{address}'}}\n"
    )
    (folder / "config.yml").write_text(settings)
    command = ["docker-registry", "serve", folder / "config.yml"]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://{address}/v2/", timeout=1).close()
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        else:
            pytest.fail((folder / "log").read_text())
        yield address
    finally:
        server.terminate()
        server.wait()


class Front(ThreadingHTTPServer):
    """Stands before a registry: ``kind`` is how one logs in, as ``user`` with ``secret``."""

    daemon_threads = True

    def __init__(self, behind: str, kind: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind, self.kind = behind, kind
        self.asked: list[tuple[str, str]] = []
        self.sent_on: list[str | None] = []  # the logins that came with what was sent on to a "bucket"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Front

    def log_message(self, *args) -> None:
        pass

    def _any(self) -> None:
        login, ours = self.headers["Authorization"], self.server
        basic = f"Basic {base64.b64encode(b'user:secret').decode()}"
        host = self.headers["Host"].partition(":")[0]
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path.startswith("/token"):
            told = (
                {"token": "good"} if login == basic and "scope=repository" in self.path else {"token": "bad"}
            )
            self._answer(200, json.dumps(told).encode())
        elif host == "localhost":
            ours.sent_on.append(login)
            self._pass_on(body)
        elif login != ("Bearer good" if ours.kind == "Bearer" else basic):
            realm = f'realm="http://{ours.address}/token",service="front",scope="repository:x:pull,push"'
            self._answer(401, **{"WWW-Authenticate": f"{ours.kind} {realm}"})
        elif self.command == "GET" and "/blobs/" in self.path:
            ours.asked.append((self.command, self.path))
            self._answer(307, Location=f"http://localhost:{ours.server_port}{self.path}")
        else:
            ours.asked.append((self.command, self.path))
            self._pass_on(body)

    def _pass_on(self, body: bytes) -> None:
        behind = http.client.HTTPConnection(self.server.behind)
        headers = {name: value for name, value in self.headers.items() if name != "Authorization"}
        behind.request(self.command, self.path, body or None, headers)
        answer = behind.getresponse()
        kept = ("Content-Type", "Location", "Link", "Docker-Content-Digest")
        kept = {name: value for name in kept if (value := answer.headers[name])}
        self._answer(answer.status, answer.read(), length=answer.headers["Content-Length"], **kept)

    def _answer(self, status: int, body: bytes = b"", length: str | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", length or str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = _any
