"""Servers on the loopback address: plain files with faults, and the Hub's endpoints.

Both are real HTTP servers, so that the real clients are tested with what goes over the wire. Faults
are queued by method and path; each request that matches takes one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_loopbackTESTtokenNotARealOne000000"


class Cut(NamedTuple):
    """Break the connection after so many bytes of the body, sent or received."""

    after: int


@dataclass
class Fault:
    """A status to answer with, or where to cut."""

    reply: int | Cut
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Request:
    """One request as it came."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Reply:
    """One answer; `announced` overrides the Content-Length, `chunked` leaves it out."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    announced: int | None = None
    chunked: bool = False


class LoopbackServer:
    """Answers requests by `answer`, after the queued faults."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.faults: list[tuple[str, re.Pattern[str], list[Fault]]] = []
        self.stopped = False
        self._lock = threading.Lock()
        self._server = _QuietServer(("127.0.0.1", 0), _handler_class(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.daemon = True
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        self.stopped = True  # connections that are kept open end as well
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    def fail(self, method: str, pattern: str, *faults: int | Cut | Fault) -> None:
        """Queue faults for requests of `method` whose path matches `pattern`."""
        queue = [item if isinstance(item, Fault) else Fault(item) for item in faults]
        self.faults.append((method, re.compile(pattern), queue))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for wanted, pattern, queue in self.faults:
                if wanted == method and queue and pattern.search(path):
                    return queue.pop(0)
        return None

    def asked(self, method: str, pattern: str = "") -> list[Request]:
        """The requests of a method whose path matches."""
        found = [r for r in self.requests if r.method == method and re.search(pattern, r.path)]
        return list(found)

    def answer(self, request: Request) -> Reply:
        raise NotImplementedError


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Connections that are cut on purpose are no news."""


def _handler_class(server: LoopbackServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 20
        # Head and body leave in one piece: the body would wait 40 ms for the head's receipt.
        wbufsize = -1
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

        def handle_any(self) -> None:
            parts = urlsplit(self.path)
            fault = server.take_fault(self.command, parts.path)
            cut = fault.reply if fault and isinstance(fault.reply, Cut) else None
            if server.stopped:
                self.drop()
                return
            length = int(self.headers.get("Content-Length", 0))
            receiving = cut is not None and self.command in ("PUT", "POST")
            body = self.read_body(cut.after if cut and receiving else length)
            request = Request(
                self.command, unquote(parts.path), parse_qs(parts.query), dict(self.headers), body
            )
            server.requests.append(request)
            if receiving:
                self.drop()
            elif fault is not None and isinstance(fault.reply, int):
                self.send(Reply(fault.reply, fault.body, dict(fault.headers)), None)
            else:
                self.send(server.answer(request), cut)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

        def read_body(self, length: int) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(length)
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def send(self, reply: Reply, cut: Cut | None) -> None:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if reply.chunked:
                self.send_header("Transfer-Encoding", "chunked")
            elif "Content-Length" not in reply.headers:
                size = len(reply.body) if reply.announced is None else reply.announced
                self.send_header("Content-Length", str(size))
            self.end_headers()
            if self.command == "HEAD":
                return
            body = reply.body if cut is None else reply.body[: cut.after]
            if reply.chunked:
                body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
            self.wfile.write(body)
            self.wfile.flush()
            if cut is not None or reply.announced is not None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

        def drop(self) -> None:
            """Close with a reset, as a broken line does."""
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    return Handler


# ------------------------------------------------------------------------------- plain files


@dataclass
class Page:
    """A file, or what a server makes of one."""

    data: bytes
    etag: str | None = '"one"'
    modified: str | None = None
    ranges: bool = True
    heeds_if_range: bool = True
    announced: int | None = None
    chunked: bool = False
    extra: bytes = b""  # sent after the data
    location: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


class FileServer(LoopbackServer):
    """Pages by path; `change` replaces one after so many requests."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        super().__init__()

    def put(self, path: str, data: bytes, **options: Any) -> str:
        """Serve a page; its address."""
        self.pages[path] = Page(data, **options)
        return self.url + path

    def answer(self, request: Request) -> Reply:
        page = self.pages.get(request.path)
        if page is None:
            return Reply(404)
        if page.location is not None:
            return Reply(302, headers={"Location": page.location})
        headers = dict(page.headers)
        headers |= {"ETag": page.etag} if page.etag else {}
        headers |= {"Last-Modified": page.modified} if page.modified else {}
        begin, end = self._span(request, page)
        if begin is None:
            reply = Reply(200, page.data + page.extra, headers, page.announced, page.chunked)
        elif begin >= len(page.data):
            reply = Reply(416, headers={**headers, "Content-Range": f"bytes */{len(page.data)}"})
        else:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(page.data)}"
            body = page.data[begin:end] + page.extra
            reply = Reply(206, body, headers, page.announced, page.chunked)
        return reply

    def _span(self, request: Request, page: Page) -> tuple[int | None, int]:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if match is None or not page.ranges:
            return None, len(page.data)
        wanted = request.headers.get("If-Range")
        if page.heeds_if_range and wanted not in (None, page.etag, page.modified):
            return None, len(page.data)
        end = min(int(match[2]) + 1, len(page.data)) if match[2] else len(page.data)
        return int(match[1]), end


# ------------------------------------------------------------------------------------ the Hub


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """One branch of a repository."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def commit(self, message: str) -> str:
        content = repr((sorted(self.files.items()), len(self.commits))).encode()
        self.commits.append(hashlib.sha1(content).hexdigest())
        self.messages.append(message)
        return self.commits[-1]


Route = Callable[["HubServer", Request, "re.Match[str]"], Reply]


class HubServer(LoopbackServer):
    """The endpoints that pushing and downloading use, with repositories in memory."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # large files by SHA-256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.part_bytes: int | None = None  # None: large files go up in one piece
        self.listing: list[dict[str, Any]] | None = None  # what a hostile repository lists
        self.sizes: dict[str, int] = {}  # of large files, where it lies about them
        self.conditions: dict[str, Callable[[bytes], bytes]] = {}  # damage on the way
        self.xet_folder: Path | None = None  # storage of the newer protocol
        self.xet_hashes: dict[str, str] = {}  # its name for a file
        super().__init__()

    def add_repo(self, name: str, files: Mapping[str, bytes], *, private: bool = False) -> Repo:
        self.repos[name] = Repo(private, dict(files))
        self.repos[name].commit("first")
        return self.repos[name]

    def answer(self, request: Request) -> Reply:
        for method, pattern, route in _ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match is not None and request.method in method:
                return route(self, request, match)
        return _error(404, "no such endpoint")

    def repo_of(self, request: Request, match: re.Match[str], *, write: bool) -> Repo | Reply:
        given = request.headers.get("Authorization") or request.headers.get("authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            return _error(401, "Invalid credentials in Authorization header")
        repo = self.repos.get(match["repo"])
        if write and given is None:
            return _error(401, "Invalid username or password.")
        if repo is None or (repo.private and given is None):
            return _error(404 if given else 401, "Repository not found", "RepoNotFound")
        revision = unquote(match.groupdict().get("revision") or "main")
        if revision not in ("main", *repo.commits):
            return _error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo

    def is_large(self, name: str, data: bytes) -> bool:
        return name.endswith((".safetensors", ".png", ".pkl")) or len(data) > 10_000_000


def _json(value: object, status: int = 200) -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _error(status: int, message: str, code: str | None = None) -> Reply:
    reply = _json({"error": message}, status)
    reply.headers["X-Error-Message"] = message
    if code:
        reply.headers["X-Error-Code"] = code
    return reply


def _create(hub: HubServer, request: Request, match: re.Match[str]) -> Reply:
    if "Authorization" not in request.headers and "authorization" not in request.headers:
        return _error(401, "Invalid username or password.")
    wanted = json.loads(request.body)
    name = f"{wanted['organization']}/{wanted['name']}"
    url = {"url": f"{hub.url}/{name}", "name": name}
    if name in hub.repos:
        return _json({**url, "error": "You already created this model repo"}, 409)
    hidden = wanted.get("private", wanted.get("visibility") == "private")
    hub.repos[name] = Repo(bool(hidden))
    hub.repos[name].files[".gitattributes"] = b"*.safetensors filter=lfs\n"
    hub.repos[name].commit("initial commit")
    return _json(url)


def _info(hub: HubServer, request: Request, match: re.Match[str]) -> Reply:
    repo = hub.repo_of(request, match, write=False)
    if isinstance(repo, Reply):
        return repo
    siblings = hub.listing
    if siblings is None:
        siblings = [_entry(hub, name, data) for name, data in sorted(repo.files.items())]
    head = re.match(r"---\n(.*?)---\n", repo.files.get("README.md", b"").decode(), re.DOTALL)
    card = {"cardData": yaml.safe_load(head[1])} if head else {}
    document = {"id": match["repo"], "sha": repo.commits[-1], "private": repo.private, **card}
    return _json({**document, "siblings": siblings, "tags": [], "downloads": 0})


def _entry(hub: HubServer, name: str, data: bytes) -> dict[str, Any]:
    entry = {"rfilename": name, "size": hub.sizes.get(name, len(data)), "blobId": blob_id(data)}
    if hub.is_large(name, data):
        digest = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
    return entry


def _tree(hub: HubServer, request: Request, match: re.Match[str]) -> Reply:
    repo = hub.repo_of(request, match, write=False)
    if isinstance(repo, Reply):
        return repo
    return _json(
        [
            {"type": "file", "path": name, "size": len(data), "oid": blob_id(data)}
            for name, data in sorted(repo.files.items())
        ]
    )


def _validate(hub: HubServer, request: Request, match: re.Match[str]) -> Reply:
    bad = b"not-yaml: [" in request.body
    errors = [{"message": "broken"}] if bad else []
    return _json({"errors": errors, "warnings": []}, 400 if bad else 200)


def _preupload(hub: HubServer, request: Request, match: re.Match[str]) -> Reply:
    repo = hub.repo_of(request, match, write=True)
    if isinstance(repo, Reply):
        return repo
    files = []
    for item in json.loads(request.body)["files"]:
        name, old = item["path"], repo.files.get(item["path"])
        large = hub.is_large(name, b"")
        oid = None
        if old is not None:
            oid = hashlib.sha256(old).hexdigest() if large else blob_id(old)
        mode = "lfs" if large else "regular"
        files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return _json({"files": files})


def _batch(hub: HubServer, request: Request, match: re.Match[str]) -> Reply:
    repo = hub.repo_of(request, match, write=True)
    if isinstance(repo, Reply):
        return repo
    objects = []
    for item in json.loads(request.body)["objects"]:
        oid, size = item["oid"], item["size"]
        entry: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in hub.objects:
            href, header = f"{hub.url}/upload/{oid}?X-Signature=secret", {}
            if hub.part_bytes is not None:
                count = -(-size // hub.part_bytes)
                header = {str(i): f"{hub.url}/upload/{oid}/{i}" for i in range(1, count + 1)}
                header["chunk_size"] = str(hub.part_bytes)
                href = f"{hub.url}/complete/{oid}"
            verify = {"href": f"{hub.url}/verify/{oid}", "header": {}}
            entry["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
        objects.append(entry)
    return _json({"transfer": "basic", "objects": objects})


def _upload(hub: HubServer, request: Request, match: re.Match[str]) -> Reply:
    if hashlib.sha256(request.body).hexdigest() != match["oid"]:
        return _error(400, "the content has another hash")
    hub.objects[match["oid"]] = request.body
    return Reply(200)


def _upload_part(hub: HubServer, request: Request, match: re.Match[str]) -> Reply:
    hub.parts[match["oid"], int(match["part"])] = request.body
    return Reply(200, headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


def _complete(hub: HubServer, request: Request, match: re.Match[str]) -> Reply:
    oid = match["oid"]
    numbers = [part["partNumber"] for part in json.loads(request.body)["parts"]]
    whole = b"".join(hub.parts[oid, number] for number in numbers)
    if hashlib.sha256(whole).hexdigest() != oid:
        return _error(400, "the parts make another file")
    hub.objects[oid] = whole
    return Reply(200)


def _verify(hub: HubServer, request: Request, match: re.Match[str]) -> Reply:
    wanted = json.loads(request.body)
    found = hub.objects.get(wanted["oid"])
    return Reply(200 if found is not None and len(found) == wanted["size"] else 404)


def _commit(hub: HubServer, request: Request, match: re.Match[str]) -> Reply:
    repo = hub.repo_of(request, match, write=True)
    if isinstance(repo, Reply):
        return repo
    lines = [json.loads(line) for line in request.body.splitlines() if line]
    changed = dict(repo.files)
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            changed[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in hub.objects:
                return _error(400, f"{value['path']}: the object is missing")
            changed[value["path"]] = hub.objects[value["oid"]]
        elif line["key"] == "deletedFile":
            del changed[value["path"]]
    repo.files = changed
    oid = repo.commit(lines[0]["value"]["summary"])
    url = f"{hub.url}/{match['repo']}/commit/{oid}"
    return _json({"success": True, "commitOid": oid, "commitUrl": url, "pullRequestUrl": None})


def _resolve(hub: HubServer, request: Request, match: re.Match[str]) -> Reply:
    repo = hub.repo_of(request, match, write=False)
    if isinstance(repo, Reply):
        return repo
    name, commit = match["name"], {"X-Repo-Commit": repo.commits[-1]}
    data = repo.files.get(name)
    if data is None:
        reply = _error(404, "Entry not found", "EntryNotFound")
        reply.headers |= commit
        return reply
    if not hub.is_large(name, data):
        sent = hub.conditions.get(name, bytes)(data)
        return Reply(200, sent, {**commit, "ETag": f'"{blob_id(data)}"'})
    digest = hashlib.sha256(data).hexdigest()
    hub.objects[digest] = data
    linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
    # Another host, as in earnest: clients go there without their token.
    elsewhere = hub.url.replace("127.0.0.1", "localhost")
    location = {"Location": f"{elsewhere}/cdn/{digest}/{name}?X-Signature=secret"}
    if name in hub.xet_hashes:
        route = f"{hub.url}/api/models/{match['repo']}/xet-read-token/{repo.commits[-1]}"
        linked |= {"X-Xet-Hash": hub.xet_hashes[name], "X-Xet-Refresh-Route": route}
    return Reply(302, headers={**commit, **linked, **location})


def _xet_token(hub: HubServer, request: Request, match: re.Match[str]) -> Reply:
    repo = hub.repo_of(request, match, write=match["right"] == "write")
    if isinstance(repo, Reply) or hub.xet_folder is None:
        return repo if isinstance(repo, Reply) else _error(404, "no such storage")
    # The storage's client keeps files in a folder when it is given one.
    place, ends = f"local://{hub.xet_folder}", int(time.time()) + 3600
    reply = _json({"casUrl": place, "exp": ends, "accessToken": "xet-token"})
    names = ("X-Xet-Cas-Url", "X-Xet-Token-Expiration", "X-Xet-Access-Token")
    reply.headers |= dict(zip(names, (place, str(ends), "xet-token"), strict=True))
    return reply


def _cdn(hub: HubServer, request: Request, match: re.Match[str]) -> Reply:
    data = hub.objects[match["oid"]]
    data = hub.conditions.get(match["name"], bytes)(data)
    span = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
    if span is None:
        return Reply(200, data, {"ETag": f'"{match["oid"]}"'})
    begin = int(span[1])
    place = f"bytes {begin}-{len(data) - 1}/{len(data)}"
    return Reply(206, data[begin:], {"ETag": f'"{match["oid"]}"', "Content-Range": place})


_REPO = r"(?P<repo>[^/]+/[^/]+?)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES: list[tuple[tuple[str, ...], str, Route]] = [
    (("POST",), "/api/repos/create", _create),
    (("POST",), "/api/validate-yaml", _validate),
    (("GET",), f"/api/models/{_REPO}/tree/{_REVISION}", _tree),
    (("GET",), f"/api/models/{_REPO}(?:/revision/{_REVISION})?", _info),
    (("GET",), f"/api/models/{_REPO}/xet-(?P<right>read|write)-token/{_REVISION}", _xet_token),
    (("POST",), f"/api/models/{_REPO}/preupload/{_REVISION}", _preupload),
    (("POST",), f"/api/models/{_REPO}/commit/{_REVISION}", _commit),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _batch),
    (("PUT",), r"/upload/(?P<oid>[0-9a-f]+)", _upload),
    (("PUT",), r"/upload/(?P<oid>[0-9a-f]+)/(?P<part>\d+)", _upload_part),
    (("POST",), r"/complete/(?P<oid>[0-9a-f]+)", _complete),
    (("POST",), r"/verify/(?P<oid>[0-9a-f]+)", _verify),
    (("HEAD", "GET"), f"/{_REPO}/resolve/{_REVISION}/(?P<name>.+)", _resolve),
    (("GET",), r"/cdn/(?P<oid>[0-9a-f]+)/(?P<name>.+)", _cdn),
]


# -------------------------------------------------------------------------------- for fixtures


@contextmanager
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, no connection to anything but this machine can be opened."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo
    local = ("127.0.0.1", "::1", "localhost")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in local:
            raise AssertionError(f"a test tried to reach {address[0]!r}")
        connect(self, address)

    def guarded_look_up(host: Any, *rest: Any, **options: Any) -> Any:
        if host not in local:
            raise AssertionError(f"a test tried to look up {host!r}")
        return look_up(host, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        # Every new client would read the certificates of the world, for a tenth of a second.
        patch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            patch.delenv(name, raising=False)
            patch.delenv(name.upper(), raising=False)
        yield


@contextmanager
def hub_client(monkeypatch: pytest.MonkeyPatch, hub: HubServer, home: Path) -> Iterator[None]:
    """Inside, huggingface_hub speaks to `hub`, logged in, with a cache of its own.

    The client reads most of its environment when it is imported, so that its constants are set as
    well. Its pauses between attempts are left out.
    """
    import huggingface_hub
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    environment = {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_XET_CACHE": str(home / "xet"), "HF_HUB_OFFLINE": False,
    }  # fmt: skip

    class NoPause:
        sleep = staticmethod(lambda _seconds: None)

    with monkeypatch.context() as patch:
        for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_DEBUG", "HF_HUB_OFFLINE"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        for name, setting in settings.items():
            # Older clients have no Xet, and copy some constants where they are used.
            for module in (constants, file_download):
                if module is constants or hasattr(module, name):
                    patch.setattr(module, name, setting, raising=False)
        for module in (_http, file_download):
            patch.setattr(module, "time", NoPause)
        close: Callable[[], None] = getattr(huggingface_hub, "close_session", lambda: None)
        close()
        yield
        close()


@contextmanager
def running(server: LoopbackServer) -> Iterator[None]:
    """The server, stopped at the end."""
    try:
        yield
    finally:
        with suppress(OSError):
            server.stop()
