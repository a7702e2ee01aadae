"""What the load clients send: POST requests, rendered beforehand, with smooth pictures in them."""

from __future__ import annotations

import http.client
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

INFER = "/v2/models/palisade/infer"
BOUNDARY = "palisade-7f3a9c51"
Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Requests:
    """POST requests that differ in their bodies only; clients send them in turn, over and over.

    Attributes:
        path: Where they go.
        headers: Besides ``Host`` and ``Content-Length``.
        bodies: At least one.
        images: Images in each body.
    """

    path: str
    headers: dict[str, str]
    bodies: Sequence[bytes] = field(repr=False)
    images: int = 1

    def to(self, prefix: str, headers: Mapping[str, str]) -> Requests:
        """Return the same requests for a service behind a path prefix, with more headers, as a key's."""
        return Requests(prefix + self.path, {**self.headers, **headers}, self.bodies, self.images)

    def rendered(self, host: str = "127.0.0.1") -> list[bytes]:
        """Return whole HTTP/1.1 requests."""
        lines = [f"POST {self.path} HTTP/1.1", f"Host: {host}", *(f"{k}: {v}" for k, v in self.headers.items())]
        head = "\r\n".join(lines)
        return [f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body for body in self.bodies]

    def write(self, folder: Path, host: str = "127.0.0.1") -> int:
        """Write each rendered request into a file, ``0.http`` and so on; return how many there are."""
        rendered = self.rendered(host)
        for number, request in enumerate(rendered):
            (folder / f"{number}.http").write_bytes(request)
        return len(rendered)


def single_images(count: int = 256, size: Size = (32, 32), seed: int = 0) -> Requests:
    """Return requests of one PNG each for ``POST /v1/classify``: smooth noise, about as large as photos once compressed."""
    return Requests("/v1/classify", {"Content-Type": "image/png"}, [_png(each) for each in _pictures(count, size, seed)])


def multipart(images: int, count: int = 8, size: Size = (32, 32), seed: int = 0) -> Requests:
    """Return requests of several PNGs each for ``POST /v1/classify``."""
    part = b'Content-Disposition: form-data; name="file"; filename="image.png"\r\nContent-Type: image/png\r\n\r\n'
    files = [_png(pixels) for pixels in _pictures(images * count, size, seed)]
    bodies = []
    for start in range(0, len(files), images):
        parts = b"".join(b"--%b\r\n%b%b\r\n" % (BOUNDARY.encode(), part, file) for file in files[start : start + images])
        bodies.append(parts + b"--%b--\r\n" % BOUNDARY.encode())
    return Requests("/v1/classify", {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}, bodies, images)


def tensors(images: int = 64, count: int = 8, size: Size = (32, 32), seed: int = 0) -> Requests:
    """Return Open Inference Protocol requests, each with one binary UINT8 tensor ``(images, 3, H, W)``."""
    shape = (images, 3, *size)
    tensor = {"name": "images", "datatype": "UINT8", "shape": shape, "parameters": {"binary_data_size": int(np.prod(shape))}}
    outputs = [{"name": "probabilities", "parameters": {"binary_data": True}}]
    header = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(header))}
    return Requests(INFER, headers, [header + pixels.tobytes() for pixels in _batches(images, count, size, seed)], images)


def json_tensors(images: int = 1, count: int = 8, size: Size = (32, 32), seed: int = 0) -> Requests:
    """Return Open Inference Protocol requests, each with one UINT8 tensor ``(images, 3, H, W)`` in JSON."""
    bodies = []
    for pixels in _batches(images, count, size, seed):
        tensor = {"name": "images", "datatype": "UINT8", "shape": pixels.shape, "data": pixels.ravel().tolist()}
        bodies.append(json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode())
    return Requests(INFER, {"Content-Type": "application/json"}, bodies, images)


def probe(url: str, requests: Requests) -> None:
    """Send one request; raises ``RuntimeError`` with the server's words when it isn't answered 200, or ``OSError``."""
    ask(url, requests.path, requests.headers, requests.bodies[0])


def ask(url: str, path: str, headers: Mapping[str, str], body: bytes | None = None) -> bytes:
    """Return the body of an answer with status 200; without a body of its own the request is a GET.

    No proxy is asked, and no redirect followed, which could tell the key to another host: the load that follows does neither.

    Raises:
        RuntimeError: Any other status, with the server's words; or an answer that is not HTTP's.
        OSError: Nobody answers.
    """
    request = urllib.request.Request(url + path, body, dict(headers))  # noqa: S310 (the user's own address)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects).open(request, timeout=60) as answer:
            content: bytes = answer.read()
            return content
    except urllib.error.HTTPError as error:
        with error:
            text = error.read(500).decode(errors="replace")
        where = error.headers.get("Location") if error.code // 100 == 3 else None
        told = f"by a redirect to {where}; give the service's own address" if where else f"{error.code}: {text}"
        raise RuntimeError(f"{request.get_method()} {path} was answered {told}") from error
    except http.client.HTTPException as error:
        raise RuntimeError(f"{request.get_method()} {path} was not answered as HTTP has it ({error!r})") from error


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Takes a redirect for an error."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow nothing."""


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _batches(images: int, count: int, size: Size, seed: int) -> list[np.ndarray]:
    """Return ``count`` different arrays ``(images, 3, H, W)`` uint8."""
    pixels = np.stack(list(_pictures(images * count, size, seed))).transpose(0, 3, 1, 2)  # (N, 3, H, W)
    return np.split(pixels, count)


def _pictures(count: int, size: Size, seed: int) -> Iterator[np.ndarray]:
    """Yield different smooth pictures ``(H, W, 3)`` uint8."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        yield np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))
