"""Request bodies: read within limits, and taken apart into encoded images without decoding any."""

from __future__ import annotations

import asyncio
import base64
import binascii
from dataclasses import dataclass

import orjson
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from service.decode import MEDIA_TYPES
from service.problems import bad_input, body_too_slow, overloaded, too_large, unprocessable, unsupported_type

TYPES = (*MEDIA_TYPES, "multipart/form-data", "application/json")


class BodyReader:
    """Reads bodies into memory, within a limit for each and one for all that are held at a time.

    Args:
        max_bytes: Largest body.
        max_in_flight_bytes: Bodies held together.
        deadline_s: A body must arrive within this time.
    """

    def __init__(self, max_bytes: int, max_in_flight_bytes: int, deadline_s: float) -> None:
        self._max = max_bytes
        self._max_in_flight = max_in_flight_bytes
        self._deadline_s = deadline_s
        self._held = 0

    async def read(self, request: Request) -> Body:
        """Return the whole body; close it when the request is over.

        Raises:
            Problem: 408 too slow, 413 too large, 503 too many bytes are held already.
        """
        declared = request.headers.get("content-length")
        if declared is not None and declared.isdecimal() and int(declared) > self._max:
            raise too_large(f"the body has {declared} bytes; at most {self._max} are taken")
        body = Body(self, bytearray())
        try:
            async with asyncio.timeout(self._deadline_s):
                async for chunk in request.stream():
                    if len(body.data) + len(chunk) > self._max:
                        raise too_large(f"the body has more than {self._max} bytes")
                    if self._held + len(chunk) > self._max_in_flight:
                        raise overloaded("too many request bodies are held at this moment; try again")
                    self._held += len(chunk)
                    body.size += len(chunk)
                    body.data += chunk
        except TimeoutError:
            body.close()
            raise body_too_slow(self._deadline_s) from None
        except BaseException:
            body.close()
            raise
        return body

    def give_back(self, size: int) -> None:
        """Count ``size`` bytes as no longer held."""
        self._held -= size


@dataclass
class Body:
    """A body that counts against the bytes held until it is closed."""

    reader: BodyReader
    data: bytearray
    size: int = 0

    def take(self) -> bytearray:
        """Return the bytes and keep none here; they go on counting, since their images live until the body is closed."""
        data, self.data = self.data, bytearray()
        return data

    def close(self) -> None:
        """Let go of the bytes; a second time does nothing."""
        self.reader.give_back(self.size)
        self.data, self.size = bytearray(), 0


def is_one_image(content_type: str) -> bool:
    """Tell whether a body of this ``Content-Type`` is one image as it is."""
    return _kind(content_type) in MEDIA_TYPES


def split_images(content_type: str, data: bytearray, max_images: int) -> list[bytes]:
    """Return the encoded images of a body.

    Args:
        content_type: The request's ``Content-Type``.
        data: The whole body.
        max_images: Most images.

    Raises:
        Problem: 400 the body is not what its type says, 413 too many images, 415 a type that is not taken, 422 the right syntax
            but not the right fields.
    """
    kind = _kind(content_type)
    if kind not in TYPES:
        said = f"'{kind}'" if kind else "missing"
        raise unsupported_type(f"the Content-Type is {said}; send one of {', '.join(TYPES)}")
    if not data:
        raise bad_input("the body is empty; send an image")
    if kind == "application/json":
        images = _from_json(data, max_images)
    elif kind == "multipart/form-data":
        images = _from_multipart(content_type, data, max_images)
    else:
        images = [bytes(data)]
    if not images:
        raise unprocessable("there is no image in the body")
    return images


def _kind(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _from_json(data: bytearray, max_images: int) -> list[bytes]:
    try:
        # Counted before parsing, since a million small values cost a hundred times their bytes.
        _check_count(data.count(b",") + 1, max_images)
        values = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise bad_input(f"the body is not JSON: {error}") from error
    if not isinstance(values, dict) or values.keys() != {"images"} or not isinstance(values["images"], list):
        raise unprocessable('the body must be {"images": ["<base64>", ...]} and nothing else')
    _check_count(len(values["images"]), max_images)
    return [_from_base64(number, text) for number, text in enumerate(values["images"], 1)]


def _from_base64(number: int, text: object) -> bytes:
    if not isinstance(text, str):
        raise unprocessable(f"image {number} must be a base64 string, not {type(text).__name__}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_input(f"image {number} is not base64: {error}") from error


def _from_multipart(content_type: str, data: bytearray, max_images: int) -> list[bytes]:
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise bad_input("the multipart Content-Type names no boundary")
    parts = _Parts(max_images)
    try:
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
        parser.write(bytes(data))
        parser.finalize()
    except FormParserError as error:
        raise bad_input(f"the body is not multipart/form-data: {error}") from error
    if not parts.ended:
        raise bad_input("the multipart body is cut short: its closing boundary is missing")
    return [bytes(file) for file in parts.files]


class _Parts:
    """Collects the parts called ``file`` from the parser's callbacks and refuses any other."""

    def __init__(self, max_files: int) -> None:
        self._max_files = max_files
        self.files: list[bytearray] = []
        self.ended = False
        self._field = bytearray()
        self._value = bytearray()
        self._name = b""

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_headers_finished": self._open,
            "on_part_data": lambda data, start, end: self.files[-1].extend(data[start:end]),
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._name = b""

    def _header(self) -> None:
        if bytes(self._field).lower() == b"content-disposition":
            self._name = parse_options_header(bytes(self._value))[1].get(b"name", b"")
        self._field.clear()
        self._value.clear()

    def _open(self) -> None:
        if self._name != b"file":
            raise unprocessable(f"the multipart field is called {self._name.decode(errors='replace')!r}; call it 'file'")
        _check_count(len(self.files) + 1, self._max_files)
        self.files.append(bytearray())

    def _end(self) -> None:
        self.ended = True


def _check_count(count: int, max_images: int) -> None:
    if count > max_images:
        raise too_large(f"{count} images in one request; at most {max_images} are taken")
