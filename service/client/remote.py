"""Classifying image files at a running service, through ``POST /v1/classify``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from service.client.files import UnreadableError, read
from service.client.key import headers_of
from service.client.outcome import Outcome

MAX_BODY_BYTES = 8 * 2**20
"""Of a request with several images: half of what a service takes by default. It does not tell its limit."""

MAX_IMAGE_BYTES = 64 * 2**20
MOST_IMAGES = 32
"""In one request, to a service that does not tell how many it takes."""

MOST_TRIES = 10
TIMEOUT_S = 60.0
BAD_IMAGE = (400, 413, 415, 422)


class RemoteError(Exception):
    """The service cannot be asked any further; the message says why."""


@dataclass(frozen=True)
class _Item:
    path: Path
    data: bytes = b""
    error: str | None = None


class Remote:
    """A caller of one service.

    Args:
        url: The service, without a slash at the end.
        key: The API key; ``None`` asks without one.
        max_wait_s: Longest ``Retry-After`` that is waited for.
        say: Told, in a line, why it waits.
        sleep: Waits for so many seconds.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        max_wait_s: float,
        say: Callable[[str], None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._url = url
        self._max_wait_s = max_wait_s
        self._say, self._sleep = say, sleep
        self._client = httpx.Client(headers={**headers_of(key), "User-Agent": "palisade-serve"}, timeout=TIMEOUT_S)

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client.close()

    def classify(self, files: Sequence[Path]) -> Iterator[Outcome]:
        """Yield what became of each file, in order; raises :class:`RemoteError` once the service can't be asked any further."""
        for items in self._chunks(files, self._most_images()):
            images = [item.data for item in items if item.error is None]
            answers = iter(self._ask(images) if images else ())
            for item in items:
                answer = item.error if item.error is not None else next(answers)
                yield Outcome(item.path, error=answer) if isinstance(answer, str) else Outcome(item.path, answer)

    def _chunks(self, files: Sequence[Path], most: int) -> Iterator[list[_Item]]:
        chunk: list[_Item] = []
        size = 0
        for path in files:
            try:
                item = _Item(path, read(path, MAX_IMAGE_BYTES))
            except UnreadableError as error:
                item = _Item(path, error=str(error))
            if chunk and (len(chunk) == most or size + len(item.data) > MAX_BODY_BYTES):
                yield chunk
                chunk, size = [], 0
            chunk.append(item)
            size += len(item.data)
        yield chunk

    def _most_images(self) -> int:
        """Return how many images a request may hold: what the service takes, and what the caller's windows could ever grant."""
        quota: list[int] = [window["limit"] for window in self._json("/v1/model").get("quota", [])]
        most: int = self._json("/v2/models/palisade/config", missing={}).get("max_batch_size", MOST_IMAGES)
        return max(1, min([most, *quota]))

    def _json(self, path: str, missing: dict[str, Any] | None = None) -> dict[str, Any]:
        reply = self._send("GET", path)
        if reply.status_code == 404 and missing is not None:
            return missing
        return self._object(reply)

    def _ask(self, images: list[bytes]) -> list[dict[str, Any] | str]:
        """Return each image's prediction, or what the service has against it.

        One bad image fails the request that it is in, which costs no quota: the halves are asked again until it is alone.
        """
        reply = self._send("POST", "/v1/classify", [("file", ("image", data)) for data in images])
        if reply.status_code in BAD_IMAGE:
            if len(images) == 1:
                return [_words(reply)]
            half = len(images) // 2
            return self._ask(images[:half]) + self._ask(images[half:])
        predictions: Any = self._object(reply).get("predictions")
        whole = isinstance(predictions, list) and all(isinstance(each, dict) and "label" in each for each in predictions)
        if not whole or len(predictions) != len(images):
            raise RemoteError(f"{self._url} answered without one prediction for each image: is it a Palisade service?")
        return list(predictions)

    def _send(self, method: str, path: str, files: list[tuple[str, tuple[str, bytes]]] | None = None) -> httpx.Response:
        """Send a request, again after ``Retry-After`` when the quota is used up or the service is busy."""
        tries = 0
        while True:
            tries += 1
            try:
                reply = self._client.request(method, self._url + path, files=files)
            except httpx.HTTPError as error:
                raise RemoteError(f"{self._url} cannot be asked: {error or type(error).__name__}") from error
            wait = reply.headers.get("retry-after", "")
            if reply.status_code not in (429, 503) or not wait.isdecimal() or tries == MOST_TRIES:
                return reply
            if int(wait) > self._max_wait_s:
                raise RemoteError(
                    f"{self._url} answered {reply.status_code}: {_words(reply)}; that is {wait} s, "
                    f"longer than --max-wait {self._max_wait_s:g}"
                )
            self._say(f"{self._url} answered {reply.status_code}: {_words(reply)}; waiting {wait} s")
            self._sleep(int(wait))

    def _object(self, reply: httpx.Response) -> dict[str, Any]:
        if reply.status_code != 200:
            raise RemoteError(f"{self._url} answered {reply.status_code}: {_words(reply)}")
        try:
            found = reply.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise RemoteError(f"{self._url} answered without a JSON object: is it a Palisade service?")
        return found


def _words(reply: httpx.Response) -> str:
    """Return what a service said was wrong, or the beginning of what something else said."""
    try:
        found = reply.json()
    except ValueError:
        found = None
    said = (found.get("detail") or found.get("error")) if isinstance(found, dict) else None
    return str(said) if said else " ".join(reply.text.split())[:200] or reply.reason_phrase
