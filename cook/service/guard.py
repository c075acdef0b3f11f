"""The outermost layer of the application: headers, Host and Origin, body size and type, authentication."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections import Counter
from typing import Any, NoReturn

from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cook.service.access import UNSAFE, Access, Denied

MAX_BODY = 1_000_000
BODY_TIMEOUT = 30.0
"""Seconds that a client may take to send a body."""
PUBLIC = ("/login", "/v1/login", "/v1/health")
"""Paths that need no token; the files of the page are public too, since they contain no data."""
STATIC = "/static/"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
_LOG = logging.getLogger("cook.service")
_ADDED = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]


class Guard:
    """Lets requests through to the application that are allowed; `scope["state"]["owner"]` is then their owner.

    Args:
        app: The application.
        access: Authentication, and the names by which the server is reached.
        max_body: Bytes.
        body_timeout: Seconds.
    """

    def __init__(
        self, app: ASGIApp, access: Access, *, max_body: int = MAX_BODY, body_timeout: float = BODY_TIMEOUT
    ) -> None:
        self._app, self._access = app, access
        self._max_body, self._body_timeout = max_body, body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        started = False

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = list(message.get("headers", []))
                given = {name.lower() for name, _ in headers}
                headers += [(name, value) for name, value in _ADDED if name not in given]
                message = {**message, "headers": headers}
            await send(message)

        try:
            owner = self._admit(scope)
            if scope["method"] in UNSAFE:
                receive = await self._with_body(scope, receive)
        except Denied as denial:
            await self._refusal(scope, denial)(scope, receive, guarded)
            return
        scope.setdefault("state", {})["owner"] = owner
        try:
            await self._app(scope, receive, guarded)
        except Exception:
            _LOG.exception("%s %s", scope["method"], scope["path"])
            if started:
                raise
            await error_response(500, "the server failed; its output says why")(scope, receive, guarded)

    def _admit(self, scope: Scope) -> str | None:
        pairs = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        headers, path = dict(pairs), scope["path"]
        for name, count in Counter(name for name, _ in pairs).items():
            if count > 1 and name in ("host", "origin", "authorization", "content-type", "content-length"):
                raise Denied(400, f"the header {name} appears twice")
        owner, by_cookie = self._access.authenticate(headers, cookie_parser(headers.get("cookie", "")))
        self._access.address.check(scope["method"], headers, by_cookie=by_cookie and owner is not None)
        if owner is None and path not in PUBLIC and not path.startswith(STATIC):
            raise Denied(401, "a token is needed: send it as `Authorization: Bearer TOKEN`")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        if scope["method"] in UNSAFE and kind != "application/json" and (kind or has_body):
            raise Denied(415, "only bodies of the type application/json are read")
        if headers.get("content-length", "0").isdecimal() and int(headers.get("content-length", "0")) > self._max_body:
            raise Denied(413, f"the body is larger than {self._max_body} bytes")
        return owner

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """Reads the body, and returns a function that gives it to the application."""
        try:
            async with asyncio.timeout(self._body_timeout):
                body = await self._read(receive)
        except TimeoutError:
            raise Denied(408, "the body did not arrive in time") from None
        if body:
            check_json(body)
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        return again

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise Denied(400, "the body is not complete")
            body += message.get("body", b"")
            if len(body) > self._max_body:
                raise Denied(413, f"the body is larger than {self._max_body} bytes")
            if not message.get("more_body", False):
                return bytes(body)

    @staticmethod
    def _refusal(scope: Scope, denial: Denied) -> Response:
        path = scope["path"]
        if denial.status == 401 and scope["method"] == "GET" and not path.startswith("/v1/"):
            return RedirectResponse("/login", status_code=303)
        # What is left of the body is not read.
        headers = {"Connection": "close"} if scope["method"] in UNSAFE else {}
        headers |= {"WWW-Authenticate": "Bearer"} if denial.status == 401 else {}
        return error_response(denial.status, denial.reason, headers=headers)


def error_response(
    status: int, error: str, problems: list[str] | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """The response to a request that failed; `problems` lists all mistakes."""
    return JSONResponse({"error": error, "problems": problems or [error]}, status_code=status, headers=headers)


def check_json(body: bytes) -> None:
    """Refuses JSON that other programs, or Python itself, read in another way or cannot write again.

    Raises:
        Denied: It is not valid, has a key twice, a number that is not finite, half a character, or is nested deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"the key {twice[:80]!r} appears twice in one object")
        return dict(pairs)

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    def finite(digits: str) -> float:
        return float(digits) if math.isfinite(float(digits)) else no_constant("a number that is too large")

    try:
        value = json.loads(body, object_pairs_hook=unique, parse_constant=no_constant, parse_float=finite)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        raise Denied(422, "the body is not valid UTF-8, or contains half of a surrogate pair") from None
    except RecursionError:
        raise Denied(422, "the body is nested too deeply") from None
    except ValueError as error:
        raise Denied(422, f"the body is not valid JSON: {error}") from None
