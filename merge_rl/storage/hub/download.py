"""One file over HTTP, resumed where it was cut; its name appears only when it is complete.

What has come so far lies beside the target as `NAME.part`, with what the server said of the file
in `NAME.part.json`. Both outlive the program, so that the next call goes on; a file that has
changed on the server is begun anew instead of being glued together.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from merge_rl.errors import DownloadError, HashMismatchError
from merge_rl.storage.files import Progress, sha256_file, told_of, write_json
from merge_rl.storage.hub.web import Body, PassingError, open_url, probe, read_body, shown

CHUNK_BYTES: Final = 2**20
ATTEMPTS: Final = 6  # in a row without news
PROBE_ATTEMPTS: Final = 3
NEWS_BYTES: Final = 2**16  # less than this in one attempt counts as none
FIRST_WAIT_SECONDS: Final = 1.0

T = TypeVar("T")
Wait = Callable[[float], None]
"""Called with seconds to wait before the next attempt."""


@dataclass(frozen=True, kw_only=True)
class Downloaded:
    """A complete file."""

    path: Path
    size: int
    sha256: str
    resumed: int  # bytes that an earlier call had fetched


def fetch_url(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    progress: Progress | None = None,
    wait: Wait = time.sleep,
) -> Downloaded:
    """Download `url` to `target`, going on with what an earlier call has left.

    Args:
        url: an https address; http on this machine.
        target: file to write; its folder is made. An existing one is replaced, unless `sha256` is
            given and is its hash already: then nothing is asked of the server.
        size: bytes it must have, None if not known.
        sha256: its hash, 64 hexadecimal digits, None if not known.
        progress: called with (bytes done, bytes in all).
        wait: how to pause between attempts.

    Broken connections and busy servers are tried again, 6 times in a row without news, with
    pauses that double from 1 second; what has come is kept for the next call. Raises DownloadError,
    and HashMismatchError for a file of another hash.
    """
    if sha256 is not None and target.is_file() and sha256_file(target) == sha256.lower():
        return Downloaded(path=target, size=target.stat().st_size, sha256=sha256.lower(), resumed=0)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _Part(target, url)
    resumed = part.done
    _fetch_all(part, size, progress, wait)
    digest = sha256_file(part.path)
    if sha256 is not None and digest != sha256.lower():
        part.discard()
        raise HashMismatchError(
            f"{shown(url)}: the file has the SHA-256 {digest}, expected {sha256.lower()}"
        )
    return Downloaded(path=target, size=part.finish(), sha256=digest, resumed=resumed)


def probe_file(url: str, *, wait: Wait = time.sleep) -> Body:
    """Size and identity of a file without its body; passing failures are tried again twice."""
    return _try_again(lambda: probe(url), lambda: 0, wait, PROBE_ATTEMPTS)


def part_path(target: Path) -> Path:
    """Where the unfinished download of `target` lies."""
    return target.with_name(f"{target.name}.part")


class _Part:
    """The unfinished file and what the server said of it."""

    def __init__(self, target: Path, url: str) -> None:
        self.target, self.url = target, url
        self.path = part_path(target)
        self._note = target.with_name(f"{target.name}.part.json")
        self.body = self._recall()

    @property
    def done(self) -> int:
        return self.path.stat().st_size if self.body is not None else 0

    @property
    def validator(self) -> str | None:
        """What a server can be asked to compare; a weak ETag does not vouch for single bytes."""
        if self.body is None:
            return None
        strong = self.body.etag and not self.body.etag.startswith("W/")
        return self.body.etag if strong else self.body.last_modified

    def begin(self, body: Body) -> None:
        """Drop what has come, and expect a file like this."""
        self.discard()
        self.path.touch()
        write_json(self._note, {"url": shown(self.url), **asdict(body)})
        self.body = body

    def discard(self) -> None:
        self._note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        self.body = None

    def finish(self) -> int:
        """Give the file its name; its size."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        self.path.replace(self.target)
        self.discard()
        return size

    def _recall(self) -> Body | None:
        try:
            note: dict[str, Any] = json.loads(self._note.read_text(encoding="utf-8"))
            same = note.pop("url") == shown(self.url)
            body, found = Body(**note), self.path.stat().st_size
            usable = same and found <= body.size
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return body if usable else None


def _fetch_all(part: _Part, size: int | None, progress: Progress | None, wait: Wait) -> None:
    def complete() -> bool:
        return part.body is not None and part.done == part.body.size

    def once() -> None:
        if not complete():
            _fetch_some(part, size, progress)

    known = part.body
    if known is not None and (part.validator is None or size not in (None, known.size)):
        part.discard()
    _try_again(once, lambda: part.done, wait)
    if progress is not None and part.body is not None:
        progress(part.body.size, part.body.size)


def _fetch_some(part: _Part, size: int | None, progress: Progress | None) -> None:
    """One request: from where the part ends, or from the start."""
    headers: dict[str, str] = {}
    if part.validator is not None:
        headers = {"Range": f"bytes={part.done}-", "If-Range": part.validator}
    with closing(open_url(part.url, headers)) as response:
        body = read_body(part.url, response)
        if size is not None and body.size != size:
            part.discard()
            raise DownloadError(
                f"{shown(part.url)}: the server announces {body.size} bytes, expected {size}"
            )
        if body.status == 200:
            part.begin(body)
        elif not _continues(part, body):
            part.discard()
            raise PassingError(f"{shown(part.url)}: the file changed during the download")
        _append(part, response, body.size, progress)


def _continues(part: _Part, body: Body) -> bool:
    before = part.body
    if before is None or body.status != 206:
        return False
    same = (body.size, body.etag, body.last_modified)
    return body.start == part.done and same == (before.size, before.etag, before.last_modified)


def _append(
    part: _Part, response: http.client.HTTPResponse, size: int, progress: Progress | None
) -> None:
    done = part.done
    with told_of(part.target, part.path), part.path.open("ab") as file:
        while done < size:
            try:
                chunk = response.read1(min(CHUNK_BYTES, size - done))
            except (OSError, http.client.HTTPException) as error:
                detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise _cut(part, done, size, detail) from None
            if not chunk:
                raise _cut(part, done, size, "closed by the server")
            file.write(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, size)
    # Without a Content-Length nothing else ends the body where it should.
    if response.chunked and response.read1(1):
        part.discard()
        raise DownloadError(f"{shown(part.url)}: the server sends more than its {size} bytes")


def _cut(part: _Part, done: int, size: int, detail: str) -> PassingError:
    where = f"after {done:,} of {size:,} bytes"
    return PassingError(f"{shown(part.url)}: the connection broke {where}: {detail}")


def _try_again(
    action: Callable[[], T], position: Callable[[], int], wait: Wait, attempts: int = ATTEMPTS
) -> T:
    failures, pause = 0, FIRST_WAIT_SECONDS
    while True:
        before = position()
        try:
            return action()
        except PassingError as error:
            news = position() - before >= NEWS_BYTES
            failures, pause = (1, FIRST_WAIT_SECONDS) if news else (failures + 1, pause)
            if failures >= attempts:
                raise DownloadError(f"{error} (tried {attempts} times)") from None
        wait(pause)
        pause *= 2
