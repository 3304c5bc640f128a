"""A small S3 server that can misbehave: ``python s3_server.py PORT_FILE [FAULT_FILE]`` or in a thread.

It knows what the tier needs: GET, HEAD, PUT (also only if absent), DELETE, LIST. It checks no signature.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class S3(ThreadingHTTPServer):
    """Objects in memory; ``fault`` is what it does instead of answering: a status, or a word."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.fault: int | str = ""
        self.mutex = threading.Lock()

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_REGION": "us-east-1",
        }

    def handle_error(self, request, client_address) -> None:
        """Clients that go away are what is tested."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3

    def log_message(self, *args) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("length", str(len(body))))
        for name, value in {"Last-Modified": "Thu, 26 Nov 2026 05:00:00 GMT", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.fault == "slow" and len(body) > 256:
            for start in range(0, len(body), 1024):
                self.wfile.write(body[start : start + 1024])
                time.sleep(0.1)
        elif self.server.fault == "reset" and body:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.shutdown(2)
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _any(self) -> None:
        parts = urlsplit(self.path)
        name = unquote(parts.path).lstrip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.mutex:
            self.server.asked.append((self.command, name))
        fault = self.server.fault
        if isinstance(fault, int):
            self._answer(fault, b"<Error><Code>Fault</Code></Error>")
        elif fault == "hang":
            time.sleep(60)
        else:
            getattr(self, f"_{self.command.lower()}")(name, parse_qs(parts.query), body)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _any

    def _get(self, name: str, query: dict, _body: bytes) -> None:
        if "list-type" in query:
            bucket = name.rstrip("/") + "/"
            prefix = query.get("prefix", [""])[0]
            found = [
                n.removeprefix(bucket) for n in sorted(self.server.objects) if n.startswith(bucket + prefix)
            ]
            rows = "".join(
                f"<Contents><Key>{escape(each)}</Key><Size>{len(self.server.objects[bucket + each])}</Size>"
                "<LastModified>2026-11-26T05:00:00.000Z</LastModified><ETag>x</ETag></Contents>"
                for each in found
            )
            self._answer(
                200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()
            )
            return
        data = self.server.objects.get(name)
        if data is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        self._answer(200, data, ETag=f'"{hashlib.md5(data).hexdigest()}"')

    def _head(self, name: str, _query: dict, _body: bytes) -> None:
        data = self.server.objects.get(name)
        if data is None:
            self._answer(404)
        else:
            self._answer(200, length=str(len(data)), ETag=f'"{hashlib.md5(data).hexdigest()}"')

    def _put(self, name: str, _query: dict, body: bytes) -> None:
        with self.server.mutex:
            if self.headers.get("If-None-Match") == "*" and name in self.server.objects:
                self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                return
            self.server.objects[name] = body
        self._answer(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')

    def _delete(self, name: str, _query: dict, _body: bytes) -> None:
        with self.server.mutex:
            self.server.objects.pop(name, None)
        self._answer(204)


def serve() -> S3:
    """A server in a thread of this process."""
    server = S3()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    own = S3()
    Path(sys.argv[1]).write_text(str(own.server_port))
    own.serve_forever()
