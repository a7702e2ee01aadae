"""Decoding: encoded images of any size to the model's pixels, within hard limits."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from service.problems import Problem, bad_input, deadline_passed, too_large, unprocessable, unsupported_type

FORMATS = ("PNG", "JPEG", "WEBP")
MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp")

PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"

SMALL_BYTES = 16_384
SMALL_SIDE = 128
"""A PNG within both decodes in less time than handing it to another thread takes (benchmarks/decoding.py)."""

MAX_SIDE = 65_535
"""Pixels; resizing a thin image needs memory in proportion to its longest side."""

MAX_SCANS = 20
"""Scans of a progressive JPEG of ``max_pixels``; encoders write about ten."""

Image.MAX_IMAGE_PIXELS = None  # decode() has its own, stricter limit


@dataclass(frozen=True)
class Decoder:
    """Decodes images to the model's input size. Pure: may be called from many threads.

    Attributes:
        height: Output height in pixels.
        width: Output width in pixels.
        max_bytes: Largest encoded image.
        max_pixels: Largest image, width times height, checked before any pixel is decoded.
    """

    height: int
    width: int
    max_bytes: int
    max_pixels: int

    def decode_all(self, encoded: list[bytes], expired: Callable[[], bool] = lambda: False) -> np.ndarray:
        """Return ``(N, 3, H, W)`` uint8; raises the problem of the first bad image, numbered from 1 when there are several.

        Args:
            encoded: The images.
            expired: Asked before each image; when true, nobody waits for the answer any more and decoding stops.
        """
        images = np.empty((len(encoded), 3, self.height, self.width), np.uint8)
        for number, data in enumerate(encoded, 1):
            if expired():
                raise deadline_passed()
            try:
                images[number - 1] = self.decode(data)
            except Problem as problem:
                if len(encoded) > 1:
                    problem.detail = f"image {number} of {len(encoded)}: {problem.detail}"
                raise
        return images

    def decode(self, data: bytes) -> np.ndarray:
        """Return one image as ``(3, H, W)`` uint8 RGB.

        EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits, and the whole image is
        resized (bicubic, antialiased, without keeping the aspect ratio).

        Raises:
            Problem: 400 not an image or damaged, 413 too large, 415 a format that is not taken, 422 animated.
        """
        if not data:
            raise bad_input("the image is empty")
        if len(data) > self.max_bytes:
            raise too_large(f"the image has {len(data)} bytes; at most {self.max_bytes} are taken")
        try:
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                self._check(image, data)
                image.load()
                rgb = _to_rgb(_upright(image))
                if rgb.size != (self.width, self.height):
                    rgb = rgb.resize((self.width, self.height), Image.Resampling.BICUBIC)
                pixels = np.asarray(rgb)  # (H, W, 3); the image may be the file, which closes here
        except Problem:
            raise
        except UnidentifiedImageError as error:
            raise _unidentified(data) from error
        except Exception as error:  # Pillow's decoders raise all sorts of errors on damaged files
            raise bad_input(f"the image is damaged: {error}") from error
        return pixels.transpose(2, 0, 1)

    def _check(self, image: Image.Image, data: bytes) -> None:
        """Refuse what would cost too much, from the header alone."""
        if max(image.size) > MAX_SIDE:
            raise too_large(f"the image is {image.width} x {image.height}; at most {MAX_SIDE} pixels a side are taken")
        if image.width * image.height > self.max_pixels:
            raise too_large(f"the image is {image.width} x {image.height}; at most {self.max_pixels} pixels are taken")
        # A progressive JPEG goes over all its pixels once per scan, and a scan may be a few bytes long. Scan markers can't
        # occur inside compressed data, so counting them bounds the work.
        if (
            image.format in ("JPEG", "MPO")
            and data.count(b"\xff\xda") * image.width * image.height > MAX_SCANS * self.max_pixels
        ):
            raise too_large("the JPEG has too many scans for its size; save it again")
        # A JPEG's further pictures are previews and gain maps of the same photo: the first one is the photo.
        frames = 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
        if frames > 1:
            raise unprocessable(f"the image is animated ({frames} frames); send one frame")


def is_small_png(data: bytes) -> bool:
    """Tell from its first bytes whether an image is a PNG that costs next to nothing to decode."""
    if len(data) > SMALL_BYTES or data[:16] != PNG_START or len(data) < 24:
        return False
    width: int
    height: int
    width, height = struct.unpack_from(">II", data, 16)
    return max(width, height) <= SMALL_SIDE


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF says; one whose EXIF makes no sense stays as it lies."""
    with suppress(SyntaxError, ValueError, KeyError, TypeError, struct.error):
        ImageOps.exif_transpose(image, in_place=True)  # what already stands upright is not copied
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip instead of scale
        wide, transparent = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray((wide.astype(np.uint32) >> 8).astype(np.uint8))
        if transparent is not None:
            image.putalpha(Image.fromarray(np.where(wide == transparent, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _unidentified(data: bytes) -> Problem:
    taken = ", ".join(FORMATS)
    for name, magic in (("GIF", b"GIF8"), ("BMP", b"BM"), ("TIFF", b"II*\0"), ("TIFF", b"MM\0*"), ("PDF", b"%PDF")):
        if data.startswith(magic):
            return unsupported_type(f"the image is a {name}; {taken} are taken")
    return bad_input(f"this is not an image that can be read; {taken} are taken")
