"""Who may come in: API keys, and no web pages of other sites.

`app.add_middleware(Gate, keys=..., hosts=...)`. Refusals are error objects; every answer carries
an x-request-id (the client's own, or a new one). Nothing is written.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phiforge.serve.errors import ApiError

OPEN_PATHS = frozenset({"/health", "/ready"})  # no key needed
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Gate:
    """Wraps an application. No CORS header is ever sent, so browsers keep other sites' pages from
    reading; this refuses what they send, too."""

    def __init__(
        self, app: ASGIApp, keys: Collection[str] = (), hosts: Collection[str] | None = None
    ) -> None:
        self._app = app
        self._keys = [_digest(key) for key in keys]
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else "req_" + secrets.token_hex(12)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        refusal = self._refusal(headers, scope["path"])
        if refusal is not None:
            await refusal.response()(scope, receive, named)
        else:
            await self._app(scope, receive, named)

    def _refusal(self, headers: Headers, path: str) -> ApiError | None:
        host = headers.get("host", "").lower()
        if self._hosts is not None and host and _hostname(host) not in self._hosts:
            known = ", ".join(sorted(self._hosts))
            return ApiError(403, f"Host is {host!r}; allowed: {known}", code="unknown_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host:
            return ApiError(403, f"pages of {origin!r} may not call this API", code="cross_origin")
        if self._keys and path not in OPEN_PATHS and not self._known(headers):
            message = "no valid API key; send the header Authorization: Bearer KEY"
            wanted = {"www-authenticate": "Bearer"}
            return ApiError(401, message, code="invalid_api_key", headers=wanted)
        return None

    def _known(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # Every key is compared, whole: the time taken tells nothing about any.
        same = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(same)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
