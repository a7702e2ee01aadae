"""Reloading: another checkpoint is loaded and warmed beside the one in use, and takes its place without a failed request."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from model.checkpoint import Header, resolve
from service.problems import Problem, draining
from service.scheduler import Scheduler
from service.serving import ModelFacts, VersionedEngine
from service.snapshot import Snapshot

log = logging.getLogger(__name__)


class ReplaceableEngine(VersionedEngine, Protocol):
    """An engine that can be replaced by another while requests arrive."""

    @property
    def facts(self) -> ModelFacts | None:
        """What it runs."""
        ...

    @property
    def is_up(self) -> bool:
        """Whether it would run a batch at once."""
        ...

    async def stop(self) -> None:
        """End it; nobody uses it any more."""
        ...


class Garage(Protocol):
    """Where engines are made: threads of this process, or processes of their own."""

    @property
    def engine(self) -> ReplaceableEngine:
        """The one in use."""
        ...

    async def make(self, snapshot: Snapshot) -> ReplaceableEngine:
        """Load and warm an engine beside the one in use; the snapshot is its own from now on, whatever comes of it.

        Raises:
            ValueError: The checkpoint cannot be used (``CheckpointError``), or not with these settings.
            RuntimeError: There is not enough memory, say.
        """
        ...

    async def changed(self, engine: Any) -> None:
        """Learn that this engine, which :meth:`make` made, is in use now."""
        ...


@dataclass(frozen=True)
class Outcome:
    """How a reload ended.

    Attributes:
        time: When, in UTC, as RFC 3339 writes it.
        checkpoint: What was to be loaded.
        outcome: ``done``; or ``refused``, then the model before goes on answering; or ``failed``, by an error of the service.
        version: Of the model that answers since then.
        previous: Of the model that answered before.
        seconds: How long it took, loading and warming included.
        detail: Why it was refused or failed; empty if it was done.
    """

    time: str
    checkpoint: str
    outcome: str
    version: str
    previous: str
    seconds: float
    detail: str = ""


class Reloader:
    """Puts another checkpoint in place of the one in use. One reload at a time.

    Args:
        configured: The checkpoint of the settings: ``compact`` or a path.
        header: Of the checkpoint in use; another one must have its input size and class names.
        scheduler: Hands requests to the engine.
        garage: Makes engines.

    Attributes:
        checkpoint: The one in use, as it was asked for.
        path: Its file.
        is_busy: Whether a reload is going on.
        last: How the last one ended; ``None`` if there was none.
    """

    def __init__(self, configured: str, header: Header, scheduler: Scheduler, garage: Garage) -> None:
        self.checkpoint, self.path = configured, resolve(configured).absolute()
        self.is_busy = False
        self.last: Outcome | None = None
        self._configured = configured
        self._header = header
        self._scheduler = scheduler
        self._garage = garage

    async def reload(self, checkpoint: str | None) -> Outcome:
        """Load ``checkpoint``, by default the one of the settings (its file is read again), and answer with it from now on.

        Every request is answered by one of the two models, whole. The one before is kept when the new one cannot be used.

        Raises:
            Problem: 409, a reload is going on, or the checkpoint has another input size or other classes; 422, it cannot be
                used; 503, the machine has no room for two, the engine in use hangs, or the service is about to stop.
        """
        if not self._scheduler.is_ready:
            raise draining()
        if self.is_busy:
            raise Problem(409, "a reload is going on: wait until it is over, then ask again", "reload-in-progress")
        self.is_busy = True
        name, previous, started = checkpoint or self._configured, self._scheduler.version, time.monotonic()

        def over(outcome: str, detail: str = "") -> Outcome:
            now = datetime.now(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")
            seconds = round(time.monotonic() - started, 3)
            self.last = Outcome(now, name, outcome, self._scheduler.version, previous, seconds, detail)
            return self.last

        try:
            await self._replace(name)
        except Problem as problem:
            over("refused", problem.detail)
            log.warning("%s is not taken, version %s goes on: %s", name, previous, problem.detail)
            raise
        except Exception as error:
            over("failed", "an internal error; the service's log says more")
            log.error("the reload of %s failed: %r", name, error)  # whoever answers the request logs the trace
            raise
        finally:
            self.is_busy = False
        outcome = over("done")
        log.info("%s is in use: version %s, before %s, after %.2f s", name, outcome.version, previous, outcome.seconds)
        return outcome

    async def _replace(self, name: str) -> None:
        try:
            snapshot = await asyncio.to_thread(Snapshot, name)
            try:
                self._check_fit(snapshot)
            except Problem:
                snapshot.close()
                raise
            origin = snapshot.origin
            engine = await self._garage.make(snapshot)
        except ValueError as error:
            raise Problem(422, str(error), "bad-checkpoint") from error
        except (OSError, RuntimeError) as error:
            raise Problem(503, f"{name} could not be loaded beside the model in use: {error}", "reload-failed") from error
        before = self._garage.engine
        await self._put_in_use(engine, name)
        self.checkpoint, self.path = name, origin
        # At the same time: if the one before is down, the batches wait for it until it is stopped.
        await asyncio.gather(self._garage.changed(engine), before.stop())

    async def _put_in_use(self, engine: ReplaceableEngine, name: str) -> None:
        """Answer with an engine from now on, or stop it; raises ``Problem`` 503 if that cannot be done."""
        try:
            if not engine.is_up:
                raise Problem(
                    503, f"{name}: its engine died as soon as it was warm; the service's log says more", "reload-failed"
                )
            await self._scheduler.change_engine(engine)
        except TimeoutError:
            await engine.stop()
            detail = f"{name} is not taken: a request stays with the model in use, which seems to hang; restart the service"
            raise Problem(503, detail, "reload-failed") from None
        except BaseException:
            await engine.stop()
            raise

    def _check_fit(self, snapshot: Snapshot) -> None:
        """Raise ``Problem`` 409 unless callers can't tell the shapes and labels of the checkpoint from those in use."""
        ours, theirs = self._header, snapshot.header
        size, other = _size(ours), _size(theirs)
        if size != other:
            detail = f"its input size is {other} pixels, that of the model in use is {size}"
        elif ours.class_names != theirs.class_names:
            detail = _difference(ours.class_names, theirs.class_names)
        elif _kind(ours) != _kind(theirs):
            detail = f"its experts {_kind(theirs)}, those of the model in use {_kind(ours)}"
        else:
            return
        raise Problem(
            409, f"{snapshot.origin}: {detail}; callers rely on it, so start a new service for this checkpoint", "does-not-fit"
        )


def _kind(header: Header) -> str:
    """Return how the experts' answers become one, as far as callers that are shown certificates can tell."""
    if not header.architecture.votes:
        return "are weighed by a gate"
    return f"vote, {header.architecture.num_experts} of them{', with certificates' if header.is_certified else ''}"


def _size(header: Header) -> str:
    return f"{header.architecture.height} x {header.architecture.input_width}"


def _difference(ours: tuple[str, ...], theirs: tuple[str, ...]) -> str:
    if len(ours) != len(theirs):
        return f"it has {len(theirs)} classes, the model in use {len(ours)}"
    index = next(index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
    return f"its class {index} is called '{theirs[index]}', in the model in use '{ours[index]}'"
