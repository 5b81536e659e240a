"""The Hub's client, huggingface_hub: where it asks, and that it keeps quiet.

It finds the token itself, in HF_TOKEN or where `hf auth login` keeps it; nothing here passes or
stores one.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from merge_rl.errors import DownloadError, HubError
from merge_rl.storage.hashing import Progress
from merge_rl.storage.web import require_safe
from merge_rl.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

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
