"""The demo page: its files, read once and served from memory under a strict Content-Security-Policy."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Cache-Control": "no-cache",  # kept, but asked for again each time: an upgraded server is never met by an old script
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class File:
    """One file of the page.

    Attributes:
        content: Its bytes.
        media_type: Its ``Content-Type``.
        etag: A quoted digest of the bytes.
    """

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> File:
        """Read a file of one of ``MEDIA_TYPES``."""
        content = path.read_bytes()
        return cls(content, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:20]}"')

    def answer(self, request: Request) -> Response:
        """Return the file, or 304 when the browser has it already."""
        headers = {**HEADERS, "ETag": self.etag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def page_routes() -> list[Route]:
    """Return the routes of the page: ``/`` and, for what it loads, ``/page/...``.

    The files are looked up by name in memory, so that no request can reach any other file of the machine.
    """
    files = {
        path.relative_to(FOLDER).as_posix(): File.read(path)
        for path in sorted(FOLDER.rglob("*"))
        if path.is_file() and path.suffix in MEDIA_TYPES
    }
    index = files.pop("index.html")

    async def start(request: Request) -> Response:
        return index.answer(request)

    async def part(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in files:
            raise HTTPException(404, "the page has no such file")
        return files[name].answer(request)

    return [Route("/", start), Route("/page/{name:path}", part)]
