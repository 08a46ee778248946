"""HTTP to one server: keep-alive POSTs of JSON, errors sorted by what they mean, secrets kept.

`transport = Transport(base_url, Access(...), timeout_seconds, concurrency)`; `await
transport.post("/chat/completions", body)` gives a Reply or raises Unreachable or TimedOut.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aiohttp
from yarl import URL

from phiforge.inference.endpoint.pace import retry_after

CONNECT_SECONDS = 15.0
# Shorter than uvicorn's 5 s: a connection the server is about to close is not used again.
IDLE_SECONDS = 4.0
LARGEST_BODY = 256 * 2**20


@dataclass(frozen=True)
class Reply:
    """What the server sent: status, body, and Retry-After in seconds."""

    status: int
    body: bytes
    retry_after: float | None


class Unreachable(Exception):
    """The connection failed. `sent`: the request may have reached the server (and be charged)."""

    def __init__(self, message: str, sent: bool):
        super().__init__(message)
        self.sent = sent


class TimedOut(Exception):
    """No whole reply within the time limit."""


@dataclass(frozen=True)
class Access:
    """Where the key comes from and how it is sent; values never show in repr, logs or errors.

    `key_header` "Authorization" sends "Bearer KEY"; any other header (Azure: "api-key") the key
    alone. `query` is added to the URL (Azure: api-version), `headers` to every request.
    """

    key_env: str | None = None
    key_file: Path | None = None
    key_header: str = "Authorization"
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    query: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.key_env is not None and self.key_file is not None:
            raise ValueError("api_key_env and api_key_file are both given; keep one")

    def key(self) -> str | None:
        """The key, read now. Raises ValueError, naming variable or file, when it is not there."""
        if self.key_env is not None:
            key = os.environ.get(self.key_env, "").strip()
            where = f"environment variable {self.key_env} (api_key_env)"
        elif self.key_file is not None:
            try:
                key = self.key_file.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise ValueError(
                    f"{self.key_file} (api_key_file): {error.strerror or error}"
                ) from None
            where = f"{self.key_file} (api_key_file)"
        else:
            return None
        if not key:
            raise ValueError(f"{where} is empty or not set; put the server's key there")
        if not key.isprintable() or not key.isascii():
            raise ValueError(f"{where} holds characters that no key has; is it the right one?")
        return key


class Transport:
    """One pool of connections; belongs to one event loop, opened by the first request."""

    def __init__(self, base_url: str, access: Access, timeout_seconds: float, concurrency: int):
        self._url = check_url(base_url)
        self._access = access
        self._timeout_seconds = timeout_seconds
        self._concurrency = concurrency
        self._session: aiohttp.ClientSession | None = None
        self._addresses: dict[str, Any] = {}
        self._secrets: tuple[str, ...] = ()

    @property
    def shown_url(self) -> str:
        """The base URL without anything secret."""
        return shown(self._url)

    async def post(self, path: str, body: bytes) -> Reply:
        """One POST. Raises Unreachable, TimedOut; a reply of any status is a Reply."""
        session = self._session or self._open()
        try:
            async with session.post(self._address(path), data=body, allow_redirects=False) as reply:
                content = await self._read(reply)
                wait = retry_after(reply.headers.get("Retry-After"))
                return Reply(reply.status, content, wait)
        except aiohttp.ClientConnectorError as error:
            reason = error.os_error.strerror or str(error.os_error)
            raise Unreachable(f"no connection ({reason})", sent=False) from None
        except TimeoutError as error:
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                message = f"no connection within {CONNECT_SECONDS:g} s"
                raise Unreachable(message, sent=False) from None
            raise TimedOut(f"no whole answer within {self._timeout_seconds:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            text = self.redact(str(error)) or type(error).__name__
            raise Unreachable(f"the connection broke ({text})", sent=True) from None

    async def _read(self, reply: aiohttp.ClientResponse) -> bytes:
        if (reply.content_length or 0) <= LARGEST_BODY and "Content-Length" in reply.headers:
            return await reply.read()
        pieces, size = [], 0
        async for piece in reply.content.iter_any():
            pieces.append(piece)
            size += len(piece)
            if size > LARGEST_BODY:
                reply.close()
                break
        return b"".join(pieces)

    def redact(self, text: str) -> str:
        """The text without key, header values and credentials."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _address(self, path: str) -> Any:
        if path not in self._addresses:
            url = URL(self._url.rstrip("/") + path) % dict(self._access.query)
            self._addresses[path] = url.with_user(None)
        return self._addresses[path]

    def _open(self) -> aiohttp.ClientSession:
        key = self._access.key()
        parts = urlsplit(self._url)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        headers |= self._access.headers
        if key is not None:
            bearer = self._access.key_header.lower() == "authorization"
            headers[self._access.key_header] = f"Bearer {key}" if bearer else key
            if parts.scheme == "http" and not _is_local(parts.hostname or ""):
                warnings.warn(f"{self.shown_url}: the key travels unencrypted; use https")
        given = (*self._access.headers.values(), *self._access.query.values())
        self._secrets = tuple(s for s in (key, parts.password, *given) if s and len(s) >= 6)
        auth = None
        if parts.username and key is None:
            auth = aiohttp.BasicAuth(parts.username, parts.password or "")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._concurrency, keepalive_timeout=IDLE_SECONDS, ttl_dns_cache=300
            ),
            timeout=aiohttp.ClientTimeout(
                total=self._timeout_seconds, sock_connect=CONNECT_SECONDS
            ),
            headers=headers,
            auth=auth,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self._session


def check_url(base_url: str) -> str:
    """The URL without a slash at its end. Raises ValueError for what is no http(s) URL."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"base_url is {shown(base_url)!r}; it must be like 'http://127.0.0.1:8000/v1'"
        )
    if parts.query or parts.fragment:
        raise ValueError(f"base_url {shown(base_url)!r}: give what follows '?' as query={{...}}")
    return base_url.rstrip("/")


def shown(url: str) -> str:
    """A URL without credentials, query and fragment, fit for messages."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _is_local(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
