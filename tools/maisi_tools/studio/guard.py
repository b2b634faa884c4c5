"""Who may talk to the studio: whoever has its token; without one, this machine and pages of its own alone."""

from __future__ import annotations

import hashlib
import hmac
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from maisi_tools.errors import InputError
from maisi_tools.settings import on_this_machine

COOKIE = "maisi_studio"

SHORTEST_TOKEN = 16

HEADERS = {
    # Nothing is fetched from elsewhere, and no page of another site gets anything of this one.
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Message = MutableMapping[str, Any]


def check_access(host: str, token: str | None, certificate: str | None, key: str | None) -> None:
    """Refuse to be reached from other machines by anybody, or in plain text.

    Raises:
        InputError: another address than this machine's without token, certificate and key; a short token; or a
            certificate without its key.
    """
    if (certificate is None) != (key is None):
        raise InputError("tls_cert and tls_key go together; give both (PEM files), or neither")
    if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise InputError(f"the token has {len(token)} characters; allowed are {SHORTEST_TOKEN} and more, ASCII")
    if not on_this_machine(host) and (token is None or certificate is None):
        raise InputError(
            f"host is {host}, which other machines reach; allowed is 127.0.0.1, or another address with a token "
            "(MAISI_STUDIO_TOKEN) and TLS (--tls_cert, --tls_key)"
        )


def listen_at(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        InputError: the address is not this machine's, or the port is taken.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(f"nothing can listen at {host}, port {port} ({error}); give another --port") from error


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded.
        host: that the server is bound to.
        token: that every request needs; None for none.
        secure: whether TLS is spoken.
    """

    def __init__(self, app: Any, host: str, token: str | None, secure: bool) -> None:
        self.app, self.host, self.token, self.secure = app, host, token, secure
        self._cookie = None if token is None else hashlib.sha256(f"{COOKIE} {token}".encode()).hexdigest()

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                # no volume of a patient in a browser's cache; no newer page with an older script
                headers.setdefault("Cache-Control", "no-store" if scope["path"].startswith("/v1/") else "no-cache")
            await send(message)

        answer = self._answer(Request(scope))
        await (answer or self.app)(scope, receive, send_with_headers)

    def _answer(self, request: Request) -> Response | None:
        """What is answered in place of the app; None where the request may pass."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        try:
            name, origin_host = urlsplit(f"//{host}").hostname or "", urlsplit(origin or "").netloc
        except ValueError:
            return _refusal(403, "Host or Origin is no address")
        if on_this_machine(self.host) and not (on_this_machine(name) or name == self.host):
            return _refusal(403, f"this studio is not {host}; open it by the address that it printed")
        foreign = origin is not None and origin_host != host
        if request.method not in ("GET", "HEAD") and foreign:
            return _refusal(403, f"a page of {origin} may not use this studio")
        if self.token is None or self._cookie is None:
            return None
        if request.url.path == "/" and "token" in request.query_params:
            if not hmac.compare_digest(request.query_params["token"].encode(), self.token.encode()):
                return _refusal(401, "the token is another one; open the address that the studio printed")
            entered = RedirectResponse("/", 303)
            entered.set_cookie(COOKIE, self._cookie, httponly=True, samesite="strict", secure=self.secure)
            return entered
        bearer = request.headers.get("authorization", "").encode()
        cookie = request.cookies.get(COOKIE, "").encode()
        if hmac.compare_digest(bearer, f"Bearer {self.token}".encode()) or hmac.compare_digest(
            cookie, self._cookie.encode()
        ):
            return None
        return _refusal(401, "this studio wants its token: open the address that it printed, or send it as Bearer")


def _refusal(status: int, words: str) -> Response:
    return JSONResponse({"detail": words}, status)
