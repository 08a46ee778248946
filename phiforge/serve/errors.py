"""What goes wrong, as the API says it: a status and OpenAI's error object.

Raise `ApiError(400, "message", param="field")`; `.body` is the JSON and `.response()` the answer.
Nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A refused or failed call: HTTP status, message, the field at fault (`param`) and a code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.message, self.headers = message, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {message, type, param, code}}."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _TYPES.get(self.status, default)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """The whole HTTP answer."""
        return json_response(self.body, self.status, self.headers)


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A value as a JSON answer, UTF-8; NaN and infinities are our own mistakes (ValueError)."""
    return Response(to_json(value), status, headers, media_type="application/json")


def to_json(value: Any) -> bytes:
    """Compact JSON. A half surrogate pair (an unknown field's name, repeated) is escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
