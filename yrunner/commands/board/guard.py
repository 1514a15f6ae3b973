"""Who may ask the page for anything: only a browser that was given the address with the token.

Every program of this machine and every page in the browser can reach a local port. So a request
needs the cookie that the address sets, this host's name and no other origin; one that changes
something needs the page's own header too, which no other page can send.
"""

import hmac
import ipaddress
import secrets
from collections.abc import Iterable
from urllib.parse import parse_qs

from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 2 * 2**20
"""Bytes of a request: a page of edited rows."""
LONGEST_ADDRESS = 4096
REQUEST_HEADER = b"x-yrun-board"
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")

FRAME = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
)
"""Policy of a run's page: its script runs in an origin of its own and reaches no network."""
SHELL = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app, self._host = app, host
        self.port = 0
        self.token = secrets.token_urlsafe(32)
        """In the printed address."""
        self._session = secrets.token_urlsafe(32)
        """In the cookie: the address may be seen in a log or over a shoulder, this never is."""
        self.request_key = secrets.token_urlsafe(32)
        """In the page itself, to be sent with every request that changes something."""

    @property
    def address(self) -> str:
        """What to open in a browser."""
        host = "127.0.0.1" if self._host in ("0.0.0.0", "::", "") else self._host
        return f"http://{_bracketed(host)}:{self.port}/?token={self.token}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it before the app sees it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a web socket
            await send({"type": "websocket.close", "code": 1008})
            return
        refused = self._refusal(scope)
        if refused is not None:
            await _with_headers(refused)(scope, receive, send)
            return
        await self._app(scope, _limited(receive), _adding_headers(send))

    def _refusal(self, scope: Scope) -> Response | None:
        """Why a request is not answered; None if it may be."""
        headers = _single(scope["headers"])
        if headers is None or len(scope["raw_path"]) + len(scope["query_string"]) > LONGEST_ADDRESS:
            return PlainTextResponse("bad request", 400)
        if not self._is_own_host(headers.get(b"host", b"").decode("latin-1")):
            return PlainTextResponse("this name is not the board's", 421)
        if not self._is_own_page(scope, headers):
            return PlainTextResponse("asked by another page", 403)
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return PlainTextResponse("no such method", 405)
        token = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["path"] == "/" and token and _same(token, self.token):
            return self._welcome()
        if not _same(self._cookie_in(headers), self._session):
            return PlainTextResponse("open the address that yrun board has printed", 403)
        return self._refused_change(scope, headers) if scope["method"] == "POST" else None

    def _refused_change(self, scope: Scope, headers: dict[bytes, bytes]) -> Response | None:
        key = headers.get(REQUEST_HEADER, b"").decode("latin-1")
        kind = headers.get(b"content-type", b"").split(b";")[0].strip()
        if b"origin" not in headers or not _same(key, self.request_key):
            return PlainTextResponse("not asked by the board's page", 403)
        if kind != b"application/json":
            return PlainTextResponse("JSON is expected", 415)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > LARGEST_BODY:
            return PlainTextResponse("too large", 413)
        return None

    def _is_own_host(self, said: str) -> bool:
        """Whether a request was sent to a name of this server.

        A foreign name may have been made to point here (DNS rebinding); an address cannot.
        """
        name, _, port = said.rpartition(":")
        if port != str(self.port):
            return False
        if name in LOCAL_NAMES or name == _bracketed(self._host):
            return True
        return self._host in ("0.0.0.0", "::") and _is_address(name)

    def _is_own_page(self, scope: Scope, headers: dict[bytes, bytes]) -> bool:
        origin = headers.get(b"origin")
        if origin is not None and origin != b"http://" + headers[b"host"]:
            return False
        return headers.get(b"sec-fetch-site", b"none") in (b"none", b"same-origin")

    @property
    def _cookie(self) -> str:
        """Cookies are shared by all ports of a host, so the name has the port."""
        return f"yrun_board_{self.port}"

    def _cookie_in(self, headers: dict[bytes, bytes]) -> str:
        """The value of the board's cookie among those of every program of this host."""
        pairs = headers.get(b"cookie", b"").decode("latin-1").split(";")
        cookies = dict(pair.strip().partition("=")[::2] for pair in pairs)
        return cookies.get(self._cookie, "")

    def _welcome(self) -> Response:
        """Set the cookie, and take the token out of the address."""
        answer = RedirectResponse("/", 303)
        answer.set_cookie(self._cookie, self._session, httponly=True, samesite="strict")
        return answer


def _single(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes] | None:
    """The headers by name; None if one that decides is sent twice: which one would count?"""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in found and name in (b"host", b"origin", b"content-length", REQUEST_HEADER):
            return None
        # A browser may send its cookies in several headers.
        found[name] = found[name] + b"; " + value if name in found else value
    return found


def _same(given: str, right: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), right.encode())


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _limited(receive: Receive) -> Receive:
    """Stop reading a body that is larger than it said."""
    size = 0

    async def limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > LARGEST_BODY:
            return {"type": "http.disconnect"}
        return message

    return limited


def _adding_headers(send: Send) -> Send:
    async def add(message: Message) -> None:
        if message["type"] == "http.response.start":
            has = {name for name, _ in message["headers"]}
            own = {**ALWAYS, "Content-Security-Policy": SHELL}
            message["headers"] = [
                *message["headers"],
                *(
                    (name.lower().encode(), value.encode())
                    for name, value in own.items()
                    if name.lower().encode() not in has
                ),
            ]
        await send(message)

    return add


def _with_headers(answer: Response) -> Response:
    answer.headers.update({**ALWAYS, "Content-Security-Policy": SHELL})
    return answer
