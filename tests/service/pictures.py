"""Encoded pictures for tests: good ones, and the hand-built ones that no encoder writes."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

BOUNDARY = "q7f3a9"


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    """A picture unlike that of any other seed: a colour of its own, grainy to a degree of its own."""
    generator = np.random.default_rng(seed)
    colour = generator.integers(0, 256, 3)
    grain = generator.integers(-1, 2, (height, width, 3)) * generator.integers(0, 60)
    return Image.fromarray(np.clip(colour + grain, 0, 255).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    """The picture as the model gets it: (3, H, W)."""
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def raw_png(width: int, height: int, depth: int, colour_type: int, scanlines: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG whose header says what it is told to; ``scanlines`` is what its pixel data really holds."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), *extra, (b"IDAT", zlib.compress(scanlines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb() -> bytes:
    """A few bytes that claim 100 million pixels; they would be found to be missing if anybody decoded it."""
    return raw_png(10_000, 10_000, 8, 2, b"")


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


def webp_bomb() -> bytes:
    """An animated WebP of two small frames on a canvas of 65535 x 65535."""
    data = bytearray(animation("WEBP"))
    canvas = data.index(b"VP8X") + 12
    data[canvas : canvas + 6] = (65534).to_bytes(3, "little") * 2
    return bytes(data)


def multipart(*files: bytes, name: str = "file", closed: bool = True) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="a"\r\nContent-Type: image/png\r\n\r\n'
    body = b"".join(head.encode() + file + b"\r\n" for file in files)
    return body + f"--{BOUNDARY}--\r\n".encode() if closed else body


MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"


def base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode()
