"""Who may ask, and what a browser may do with the answer."""

import secrets
from collections.abc import Mapping

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ("127.0.0.1", "localhost")
HEADERS: Mapping[str, str] = {
    "content-security-policy": "default-src 'none'; style-src 'self'; style-src-attr 'unsafe-inline'; img-src data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
"""No script from anywhere; the address, which has the token, goes to no other page; nothing is kept on disk."""


class Guard:
    """Lets through what asks for this machine by name, with the token as the first piece of the path, to read.

    Args:
        app: What answers; it sees the path after the token.
        token: The secret of the address.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # a websocket is closed before it opens
            return await send({"type": "websocket.close", "code": 1008})

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(scope)
        answer = refusal or self.app
        if refusal is None:
            scope = {**scope, "root_path": f"/{self.token.decode()}"}
        await answer(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        first, slash, _ = scope["path"].removeprefix("/").partition("/")
        if not secrets.compare_digest(first.encode("utf-8", "surrogateescape"), self.token):
            return PlainTextResponse("403: the address must be the one that rollout explore printed\n", 403)
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").partition(":")[0]
        if host not in HOSTS:  # a foreign name that was made to point here
            return PlainTextResponse("403: this page is asked for by the name 127.0.0.1 or localhost\n", 403)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("405: this page is for reading\n", 405, {"allow": "GET, HEAD"})
        return None if slash else RedirectResponse(f"/{self.token.decode()}/")
