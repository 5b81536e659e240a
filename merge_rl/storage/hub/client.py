"""What went wrong at the Hub, in one sentence that holds no token.

Errors are told apart by status and by the names of their classes: the client has changed its HTTP
library more than once, and with it the classes themselves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from merge_rl.errors import DownloadError, HubError, MergeRLError
from merge_rl.storage.files import Progress
from merge_rl.storage.hub.web import require_safe
from merge_rl.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi


T = TypeVar("T")
PAUSES: Final = (1.0, 4.0, 16.0)  # seconds between attempts, on top of the client's own

_PASSING: Final = (408, 425, 429, 500, 502, 503, 504)
_NETWORK: Final = {
    "ChunkedEncodingError", "ConnectError", "ConnectionError", "NetworkError",
    "RemoteProtocolError", "Timeout", "TimeoutError", "TimeoutException", "TransportError",
}  # fmt: skip
_TOKEN_NAMES: Final = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SECRETS: Final = (
    re.compile(r"(?i)\b(?:bearer|basic)\s+[^\s\"',;]+"),
    re.compile(r"\b(?:hf|api_org)_(?:[A-Za-z0-9]{16,}|(?:oauth|jwt)_[\w.-]+)"),
    re.compile(r"(?<=://)[^/\s@]+@"),
    re.compile(r"(?<=[^\s?])\?[^\s\"'<>)]+"),  # the query of a signed address
)
_QUOTA = re.compile(r"(?i)quota|storage limit|payment required")
_SAID_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})\b")
_LOGIN: Final = "run `hf auth login`, or set HF_TOKEN"


class UnreachableError(HubError):
    """Nothing answered: what is stored here may do."""


def scrub(text: str) -> str:
    """`text` on one line, without the tokens in use and without what looks like one."""
    for token in _tokens():
        text = text.replace(token, "***")
    for pattern in _SECRETS:
        text = pattern.sub("***", text)
    return " ".join(text.split())


def call_hub(
    action: Callable[[], T],
    subject: str,
    *,
    wait: Callable[[float], None] = time.sleep,
    hasty: bool = False,
) -> T:
    """The result of `action`; passing failures are tried again, others become a HubError.

    `subject` begins the sentence: the repository, or one of its files. A `hasty` call is not made
    again where nothing answers.
    """
    for pause in (*PAUSES, None):
        try:
            return action()
        except MergeRLError:
            raise
        except Exception as error:  # the client's errors have no common root
            if isinstance(error, OSError) and error.errno is not None and error.filename:
                raise  # of the disk
            away = hasty and _kind(error) is UnreachableError
            if pause is None or away or not _is_passing(error):
                # The original would show request headers in a traceback.
                raise _kind(error)(f"{subject}: {_sentence(error)}") from None
        wait(pause)
    raise AssertionError("the last attempt returns or raises")


def _sentence(error: BaseException) -> str:
    names, status = _names(error), _status(error)
    said = _server_message(error)
    for name, sentence in _BY_NAME.items():
        # An unknown repository and a missing login look alike: the status tells more.
        if name in names and not (status in (401, 403) and name == "RepositoryNotFoundError"):
            return sentence
    if status == 401:
        return _unauthorised(error)
    if status in (402, 413, 507) or _QUOTA.search(said):
        return f"the account has no storage left for this ({status}){_quoted(said)}"
    if status == 403:
        return f"the token has no right to do this (403); use one with write access{_quoted(said)}"
    if status == 404:
        return "not on the Hub (404), or private and not readable with this token"
    if status in (409, 412):
        return (
            f"something else changed the repository at the same time ({status}); "
            "run the command again"
        )
    if status == 429:
        return "too many requests (429); wait some minutes and run the command again"
    if status is not None and status >= 500:
        return (
            f"the Hub has a problem of its own ({status}); run the command again later, "
            "what has arrived is not sent again"
        )
    if isinstance(error, ValueError):  # the client's own words, of a model card for one
        return _shorten(scrub(str(error)))
    if status is not None:
        return f"the Hub refused with status {status}{_quoted(said)}"
    for item in _chain(error):
        if _class_names(item) & _NETWORK:
            detail = _shorten(scrub(str(item))) or "no details"
            return f"no connection to the Hub, or it broke: {detail}"
    root = error
    while root.__cause__ is not None:  # "error while uploading" says less than what it wraps
        root = root.__cause__
    return _shorten(scrub(f"{type(root).__name__}: {root}"))


_BY_NAME: Final = {
    "OfflineModeIsEnabled": "not asked for, because HF_HUB_OFFLINE is set",
    "LocalTokenNotFoundError": f"not logged in: {_LOGIN}",
    "RevisionNotFoundError": "the repository has no such revision",
    "EntryNotFoundError": "the repository has no such file",
    "GatedRepoError": "the repository is gated: accept its conditions on its page, logged in",
    "DisabledRepoError": "the repository is disabled",
    "RepositoryNotFoundError": "no such repository on the Hub, or private and not readable",
    "XetAuthenticationError": f"the Hub's storage refused the token: {_LOGIN}",
}


def _unauthorised(error: BaseException) -> str:
    requests = [getattr(getattr(i, "response", None), "request", None) for i in _chain(error)]
    known = [request for request in requests if request is not None]
    sent = any(request.headers.get("authorization") for request in known)
    if sent or (not known and _tokens()):
        return f"the Hub does not accept the token (401), it is wrong or expired: {_LOGIN}"
    return f"not logged in (401): {_LOGIN}"


def _is_passing(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return status in _PASSING
    names = _names(error)
    return bool(names & _NETWORK) and "OfflineModeIsEnabled" not in names


def _kind(error: BaseException) -> type[HubError]:
    away = _status(error) is None and bool(_names(error) & _NETWORK)
    return UnreachableError if away else HubError


def _status(error: BaseException) -> int | None:
    for item in _chain(error):
        status = getattr(getattr(item, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        # The storage client has no responses: it tells the status in words.
        match = _SAID_STATUS.search(str(item))
        if match is not None:
            return int(match[1])
    return None


def _server_message(error: BaseException) -> str:
    for item in _chain(error):
        said = getattr(item, "server_message", None)
        if isinstance(said, str) and said:
            return said
    return ""


def _quoted(said: str) -> str:
    return f"; it says: {_shorten(scrub(said))}" if said else ""


def _shorten(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from; uploads wrap theirs."""
    item: BaseException | None = error
    for _ in range(10):
        if item is None:
            return
        yield item
        item = item.__cause__ or item.__context__


def _names(error: BaseException) -> set[str]:
    """Names of the classes of an error and of what it came from."""
    return {name for item in _chain(error) for name in _class_names(item)}


def _class_names(error: BaseException) -> set[str]:
    names = {cls.__name__ for cls in type(error).__mro__}
    # Raised when nothing answered and nothing is stored here: its cause says why.
    return set() if "LocalEntryNotFoundError" in names else names


def _tokens() -> list[str]:
    from huggingface_hub import constants

    found = [os.environ.get(name, "").strip() for name in _TOKEN_NAMES]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found.append(Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8").strip())
    return sorted((token for token in found if len(token) >= 4), key=len, reverse=True)


HUB_LIBRARY: Final[Mapping[str, Any]] = {"library_name": "merge_rl", "library_version": __version__}
_LOGGERS: Final = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "urllib3")


def endpoint() -> str:
    """Address of the Hub: HF_ENDPOINT, else the public one. No token is sent over plain http."""
    from huggingface_hub import constants

    address = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    try:
        require_safe(address)
    except DownloadError as error:
        raise HubError(f"HF_ENDPOINT: {error}") from None
    return address


def client() -> HfApi:
    """The Hub's client for `endpoint()`."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), **HUB_LIBRARY)


@contextmanager
def quiet_client() -> Iterator[None]:
    """No log lines of the client, and bars on a terminal only.

    Its lines, and those of the HTTP libraries below it, name signed addresses.
    """
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    bars = not sys.stderr.isatty() and not are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            enable_progress_bars()


def meter_class(subject: str, size: int | None, progress: Progress | None) -> Any:
    """A progress bar for the client that draws nothing, reports, and stops endless bodies."""

    class Meter:
        def __init__(self, *_: object, initial: int = 0, **__: object) -> None:
            self.n, self.total = initial, size

        def update(self, count: float | None = 1) -> None:
            self.n += int(count or 0)
            if size is not None and self.n > size:
                raise HubError(f"{subject}: the server sends more than the {size} bytes it listed")
            if progress is not None and size is not None:
                progress(self.n, size)

        def __enter__(self) -> Meter:
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing is drawn."""

        def close(self, *_: object, **__: object) -> None:
            """Nothing is drawn."""

        refresh = set_postfix_str = set_transfer_postfix_str = update_transfer = close

    return Meter
