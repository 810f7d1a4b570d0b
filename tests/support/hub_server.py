"""A real HTTP server on the loopback that answers like the Hugging Face hub, for huggingface_hub to talk to.

It serves folders as model repositories: ``/api/models/{id}``, ``…/revision/{rev}``, ``…/tree/{rev}``,
``/api/models?author={author}`` and ``/{id}/resolve/{rev}/{file}``; and takes uploads of small files. Point a process at
it with ``HF_ENDPOINT``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/models/(?P<id>[^/]+(?:/[^/]+)??)(?:/(?P<kind>revision|tree)/(?P<rev>[^/]+)(?:/.*)?)?")
UPLOAD = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)/(?P<kind>preupload|commit)/(?P<rev>[^/]+)")
FILE = re.compile(r"/(?P<id>[^/]+(?:/[^/]+)??)/resolve/(?P<rev>[^/]+)/(?P<file>.+)")


@dataclass
class Repository:
    """A model on the server.

    Attributes:
        folder: its files.
        revisions: branch or tag -> commit.
        token: what a request must bring to see it; None: public.
        gated: visible, but nobody has been given access.
        ranges: parts of files may be asked for.
    """

    folder: Path
    revisions: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False
    ranges: bool = True

    def __post_init__(self) -> None:
        self.revisions.setdefault("main", hashlib.sha1(str(self.folder).encode()).hexdigest())

    def commit(self, revision: str) -> str | None:
        """The commit of a branch, a tag, or a commit itself."""
        return self.revisions.get(revision) or (revision if revision in self.revisions.values() else None)

    def files(self) -> list[Path]:
        """All files, sorted."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


@dataclass
class Hub:
    """A running server.

    Attributes:
        url: its address.
        requests: those it saw, as ``METHOD path``, with `` bytes=A-B`` where a part is asked for.
        uploads: repository -> file -> content.
        made: what was said when a repository was made.
        damaged: weight file -> what is sent instead of it.
        refused: weight files that may be described, but are not sent whole.
        before: called with each request before it is answered; may wait, and may raise to break the connection.
    """

    url: str
    requests: list[str] = field(default_factory=list)
    uploads: dict[str, dict[str, bytes]] = field(default_factory=dict)
    made: dict[str, dict[str, object]] = field(default_factory=dict)
    damaged: dict[str, bytes] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    before: Callable[[str], None] = lambda request: None


@contextmanager
def serve(repositories: Mapping[str, Repository]) -> Iterator[Hub]:
    """Serve ``repositories`` (id -> repository) until the block ends."""
    hub = Hub("")

    class Handler(_Handler):
        repos = repositories
        log = hub.requests
        seen = hub

    server = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing on stderr: clients are killed on purpose, and connections broken."""


class _Handler(BaseHTTPRequestHandler):
    repos: Mapping[str, Repository] = {}
    log: list[str] = []  # noqa: RUF012 (set by serve)
    seen = Hub("")
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.log.append(f"POST {path}")
        match = UPLOAD.fullmatch(path)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.seen.made[name] = asked
            self._json({"url": f"{self.seen.url}/{name}", "id": name}, True)
        elif match and match["kind"] == "preupload":
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": f["path"], **mode} for f in json.loads(body)["files"]]
            self._json({"files": files}, True)
        elif match:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            new = {file["path"]: base64.b64decode(file["content"]) for file in files}
            self.seen.uploads.setdefault(match["id"], {}).update(new)
            url = f"{self.seen.url}/{match['id']}/commit/{'c' * 40}"
            self._json({"success": True, "commitOid": "c" * 40, "commitUrl": url}, True)
        else:  # checks of a card's metadata
            self._json({"errors": [], "warnings": []}, True)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        request = " ".join([self.command, path, *filter(None, [self.headers.get("Range")])])
        self.log.append(request)
        self.seen.before(request)
        asked = parse_qs(urlsplit(self.path).query)
        if path == "/api/models":
            names = [name for name in self.repos if name.startswith(f"{asked['author'][0]}/")]
            self._json([{"id": name, "tags": [], "private": False} for name in names], body)
            return
        match = FILE.fullmatch(path) or API.fullmatch(path)
        repo = self.repos.get(match["id"]) if match else None
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if match is None or repo is None or (repo.token is not None and token != repo.token):
            self._error(404 if token else 401, "RepoNotFound", "Repository not found", body)
            return
        if repo.gated:
            self._error(403, "GatedRepo", "Access to this model is restricted", body)
            return
        commit = repo.commit(match["rev"] or "main")
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {match['rev']}", body)
        elif match.re is FILE:
            self._file(repo, commit, match["file"], body)
        elif match["kind"] == "tree":
            self._json([self._entry(repo, file) for file in repo.files()], body)
        else:
            siblings: list[dict[str, object]] = [
                {"rfilename": str(file.relative_to(repo.folder))}
                | ({"size": file.stat().st_size} if "blobs" in asked else {})
                for file in repo.files()
            ]
            self._json({"id": match["id"], "sha": commit, "siblings": siblings, "private": False, "tags": []}, body)

    def _entry(self, repo: Repository, file: Path) -> dict[str, object]:
        return {"type": "file", "path": str(file.relative_to(repo.folder)), "size": file.stat().st_size,
                "oid": hashlib.sha1(file.read_bytes()).hexdigest()}  # fmt: skip

    def _file(self, repo: Repository, commit: str, name: str, body: bool) -> None:
        file = repo.folder / name
        if not file.is_file():
            self._error(404, "EntryNotFound", "Entry not found", body)
            return
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
        if name.endswith((".safetensors", ".bin")):  # as for files in large-file storage
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted is None and name in self.seen.refused and body:
            self._error(404, "EntryNotFound", "Entry not found", body)
            return
        if wanted is None or not repo.ranges:
            self._send(200, self.seen.damaged.get(name, data), "application/octet-stream", body, headers)
            return
        start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
        headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        self._send(206, data[start:stop], "application/octet-stream", body, headers)

    def _json(self, data: object, body: bool) -> None:
        self._send(200, json.dumps(data).encode(), "application/json", body)

    def _error(self, status: int, code: str, message: str, body: bool) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), "application/json", body, headers)

    def _send(self, status: int, data: bytes, kind: str, body: bool, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)
