"""What a server says when it cannot do as asked: OpenAI's shape, sentences of our own."""

from __future__ import annotations

from typing import Any

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
RETRY_AFTER = 1  # seconds that a refused client is told to wait
FAILED = "the model could not answer this request; others are not affected"


class ApiError(Exception):
    """One sentence for a client.

    Args:
        status: of HTTP.
        message: what is wrong, what was given, what is allowed, what to do; never a library's text.
        param: the field at fault, e.g. ``messages[0].content``.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = TYPES.get(self.status, TYPES[400])
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """That go with it."""
        if self.status in (429, 503):
            return {"retry-after": str(RETRY_AFTER)}
        if self.status == 401:  # a browser asks for the key by the second one
            return {"www-authenticate": 'Bearer, Basic realm="vlmtrim, any user name, the key as password"'}
        return {}
