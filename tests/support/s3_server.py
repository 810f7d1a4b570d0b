"""A real HTTP server on the loopback that answers like an S3 object store, for s3fs to talk to.

Only what an upload and a listing need: buckets, objects, version 2 listings, deletion. Signatures are not checked.
Point a process at it with ``AWS_ENDPOINT_URL``.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Store:
    """A running server: its address, ``bucket/key`` -> content, and what was asked as ``METHOD bucket/key``."""

    url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextmanager
def serve() -> Iterator[Store]:
    """Serve an empty store until the block ends."""
    store = Store()

    class Handler(_Handler):
        seen = store

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        store.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    seen = Store()
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""

    def _asked(self) -> tuple[str, dict[str, list[str]], bytes]:
        parts = urlsplit(self.path)
        path = unquote(parts.path).strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" in (self.headers.get("Content-Encoding") or ""):
            body = _joined(body)
        self.seen.requests.append(f"{self.command} {path}")
        return path, parse_qs(parts.query, keep_blank_values=True), body

    def do_PUT(self) -> None:
        path, _, body = self._asked()
        if "/" in path:
            self.seen.objects[path] = body
        self._answer(200, etag=_etag(body))

    def do_DELETE(self) -> None:
        path, _, _ = self._asked()
        self.seen.objects.pop(path, None)
        self._answer(204)

    def do_POST(self) -> None:
        path, query, body = self._asked()
        keys = re.findall(r"<Key>(.*?)</Key>", body.decode()) if "delete" in query else []
        for key in keys:
            self.seen.objects.pop(f"{path}/{key}", None)
        done = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        self._answer(200, f"<DeleteResult>{done}</DeleteResult>".encode())

    def do_HEAD(self) -> None:
        path, _, _ = self._asked()
        body = self.seen.objects.get(path)
        if "/" in path and body is None:
            self._answer(404)
        else:
            self._answer(200, body or b"", etag=_etag(body or b""), send=False)

    def do_GET(self) -> None:
        path, query, _ = self._asked()
        if "list-type" in query:
            self._answer(200, self._listing(path, query).encode())
        elif path in self.seen.objects:
            self._answer(200, self.seen.objects[path], etag=_etag(self.seen.objects[path]))
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>not there</Message></Error>")

    def _listing(self, bucket: str, query: dict[str, list[str]]) -> str:
        prefix, delimiter = (query.get(name, [""])[0] for name in ("prefix", "delimiter"))
        found, folders = "", set[str]()
        for path, body in sorted(self.seen.objects.items()):
            key = path.removeprefix(f"{bucket}/")
            if key == path or not key.startswith(prefix):
                continue
            head, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if cut:
                folders.add(prefix + head + cut)
                continue
            found += (
                f"<Contents><Key>{escape(key)}</Key><LastModified>{DATE}</LastModified><ETag>{_etag(body)}</ETag>"
                f"<Size>{len(body)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            )
        found += "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders)
        )
        return f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"

    def _answer(self, status: int, body: bytes = b"", etag: str = "", send: bool = True) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        if etag:
            self.send_header("ETag", etag)
        self.end_headers()
        if send and self.command != "HEAD":
            self.wfile.write(body)


def _etag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


def _joined(body: bytes) -> bytes:
    """The content of a chunked upload: lines of hexadecimal sizes between pieces of data."""
    found = b""
    while body:
        line, _, body = body.partition(b"\r\n")
        size = int(line.partition(b";")[0] or b"0", 16)
        if not size:
            break
        found, body = found + body[:size], body[size + 2 :]
    return found
