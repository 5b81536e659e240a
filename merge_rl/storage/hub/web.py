"""Requests for one file: https only, few redirects, a length that is known before the body.

Plain http is taken from this machine alone, where nobody can listen in or change a byte.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Final
from urllib.parse import urljoin, urlsplit

from merge_rl.errors import DownloadError
from merge_rl.version import __version__

TIMEOUT_SECONDS: Final = 30.0
MAX_REDIRECTS: Final = 5

_REDIRECTS: Final = (301, 302, 303, 307, 308)
_PASSING: Final = (408, 425, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(\d{1,18})")


class PassingError(DownloadError):
    """A failure that may be gone at the next try: a cut connection, a busy server."""


@dataclass(frozen=True, kw_only=True)
class Body:
    """What a server says about the file it is about to send."""

    status: int  # 200: from the first byte; 206: from `start`; 416: nothing left to send
    size: int  # of the whole file
    start: int
    etag: str | None
    last_modified: str | None


class _PlainErrors(urllib.request.HTTPErrorProcessor):
    """Hands every answer back as it is: `open_url` looks at where redirects lead."""

    def http_response(
        self,
        request: urllib.request.Request,  # noqa: ARG002 (the caller passes it)
        response: http.client.HTTPResponse,
    ) -> http.client.HTTPResponse:
        return response

    https_response = http_response


def shown(url: str) -> str:
    """An address for messages: without user, password and query, which may be secrets."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "the address"
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"


def is_loopback(host: str | None) -> bool:
    """Whether a host name or address means this machine."""
    if host is None or host == "localhost":
        return host is not None
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_safe(url: str) -> None:
    """Refuse an address that is not https (http on this machine) or that carries a password."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (raises for a port that is no number)
    except ValueError:
        raise DownloadError(f"not an address: {url!r}") from None
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname)):
        raise DownloadError(f"{shown(url)}: expected an https address, found {parts.scheme!r}")
    if not parts.hostname or parts.username is not None:
        problem = "found a user name in it" if parts.hostname else "found none"
        raise DownloadError(f"{shown(url)}: expected a plain host name, {problem}")


def open_url(url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    """The response to a GET, redirects followed; the caller closes it.

    Raises PassingError where another try may help, else DownloadError. A 416 (nothing at that
    range) is a response like any other.
    """
    address = url
    for _ in range(MAX_REDIRECTS + 1):
        require_safe(address)
        response = _request(address, headers)
        if response.status in (200, 206, 416):
            return response
        with closing(response):
            target = response.headers.get("Location")
            if response.status not in _REDIRECTS or not target:
                raise _refusal(url, response.status)
        address = _redirected(url, address, target)
    raise DownloadError(f"{shown(url)}: redirected more than {MAX_REDIRECTS} times")


def read_body(url: str, response: http.client.HTTPResponse) -> Body:
    """Size and identity of what follows; DownloadError where the server does not say."""
    get = response.headers.get
    if get("Content-Encoding", "identity") != "identity":
        found = get("Content-Encoding")
        raise DownloadError(f"{shown(url)}: expected the file as it is, found it {found}-encoded")
    start, size = 0, response.length
    if response.status in (206, 416):
        match = _CONTENT_RANGE.fullmatch(get("Content-Range", "").strip())
        if match is None:
            raise DownloadError(f"{shown(url)}: the server sent a part without saying which")
        start, size = int(match[1] or 0), int(match[2])
    if size is None:
        raise DownloadError(f"{shown(url)}: the server does not say how large the file is")
    return Body(
        status=response.status,
        size=size,
        start=start,
        etag=get("ETag"),
        last_modified=get("Last-Modified"),
    )


def probe(url: str) -> Body:
    """Size and identity of a file, by asking for its first byte.

    Some servers that sign their addresses allow GET alone, so that HEAD would not do.
    """
    with closing(open_url(url, {"Range": "bytes=0-0"})) as response:
        return read_body(url, response)


def _request(address: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    # No proxy can reach this machine's own loopback address.
    local = is_loopback(urlsplit(address).hostname)
    proxies = [urllib.request.ProxyHandler({})] if local else []
    opener = urllib.request.build_opener(_PlainErrors, *proxies)
    # "identity": with a compressed body, ranges and lengths would be those of another file.
    fixed = {"User-Agent": f"merge_rl/{__version__}", "Accept-Encoding": "identity"}
    request = urllib.request.Request(address, headers={**fixed, **headers})
    try:
        response: http.client.HTTPResponse = opener.open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.URLError as error:
        raise _no_connection(address, error.reason) from None
    except (OSError, http.client.HTTPException) as error:
        raise _no_connection(address, error) from None
    return response


def _redirected(url: str, address: str, target: str) -> str:
    try:
        following = urljoin(address, target)
        before, after = urlsplit(address), urlsplit(following)
    except ValueError:
        raise DownloadError(
            f"{shown(url)}: the server redirects to what is not an address"
        ) from None
    away = is_loopback(after.hostname) and not is_loopback(before.hostname)
    if away or (before.scheme == "https" and after.scheme != "https"):
        place = "this machine" if away else f"{after.scheme or 'no'} address"
        raise DownloadError(f"{shown(url)}: the server redirects to a place not allowed ({place})")
    return following


def _refusal(url: str, status: int) -> DownloadError:
    kind = PassingError if status in _PASSING else DownloadError
    reason = http.client.responses.get(status, "no known meaning")
    return kind(f"{shown(url)}: the server answered {status} ({reason})")


def _no_connection(address: str, reason: object) -> DownloadError:
    if isinstance(reason, ssl.SSLCertVerificationError):
        return DownloadError(f"{shown(address)}: the server's certificate is not valid")
    detail = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return PassingError(f"{shown(address)}: no connection: {detail}")
