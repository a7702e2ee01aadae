"""The tuner: measures every way to run a checkpoint on this machine and keeps the fastest that agrees with the reference."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np

from model import tuned
from model.checkpoint import read_header
from model.device import STACKS, available, choose_device, has_torch, processor
from model.fast_path import NO_INT8_VOTE, check_top_k
from model.plan import ExecutionName
from model.tuned import Identity, Tuning, artefact
from service.replay import Replay, read_replay
from service.settings import Settings
from service.stopwatch import ExecutionFailedError, Images, Stopwatch
from service.tuning import Agreement, Answers, Judgement, choose, fastest, measure, probe, summary

ROUNDS = 3
REFERENCE = "reference-float32"
COMPARED_ONLY = ("compiled",)
"""Kinds that are measured but never chosen: compiling would delay every start, and ``aotinductor`` is the same code."""


class Tuner:
    """One run of ``palisade-serve tune``.

    Args:
        options: Of the command: ``checkpoint``, ``replay``, ``seconds``, ``batch_sizes``, ``only`` and ``json``.
        settings: Device, threads, top-k and the folder for what is kept.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        ValueError: An option does not fit this machine or checkpoint.
        OSError: The replay cannot be read.
    """

    def __init__(self, options: argparse.Namespace, settings: Settings) -> None:
        if not has_torch():
            raise ValueError("torch is not installed, as in the image for CPUs, and tuning compares with its answers")
        self._options = options
        self._checkpoint: str = options.checkpoint or settings.checkpoint
        self._header = read_header(self._checkpoint)
        architecture = self._header.architecture
        self._voters = architecture.num_experts if architecture.votes else 0
        self._device = choose_device(settings.device)
        self._top_k, self._threads = check_top_k(self._header, settings.top_k or None), settings.threads
        self._replay: Replay | None = options.replay and read_replay(options.replay, self._header)
        self._identity = Identity.here(self._header.weights_sha256, self._device, self._threads, self._top_k)
        self._folder = Path(settings.tuning_dir) if settings.tuning_dir else tuned.default_folder()
        self._names = self._candidates(options.only)
        self._agreements: dict[str, Agreement] = {}
        self._judgements: dict[str, Judgement] = {}

    def tune(self) -> Path:
        """Measure and choose; return the file in which the choice is kept."""
        tuned.make_folder(self._folder)
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="palisade-")))
            with Stopwatch(REFERENCE, self._checkpoint, self._device, self._top_k, self._threads) as reference:
                expected = self._answers(reference)
            with _progress(len(self._names), "agreement with the reference") as tick:
                watches = [watch for name in self._names if (watch := self._admit(name, expected, scratch, stack, tick))]
            if not watches:
                raise ValueError("no execution that was tried runs here and agrees with the reference: nothing is kept")
            sizes = self._options.batch_sizes
            with _progress(ROUNDS * len(sizes) * len(watches), "images/s") as tick:
                rates = measure(watches, sizes, self._options.seconds, ROUNDS, tick)
            return self._keep(rates, scratch)

    def _candidates(self, only: Sequence[str]) -> list[str]:
        experts = self._header.architecture.num_experts
        quantised = [f"openvino-int8-x{stack}" for stack in sorted({min(stack, experts) for stack in STACKS[1:]})]
        if self._voters and any(ExecutionName.parse(name).precision == "int8" for name in only):
            raise ValueError(f"--only {','.join(only)}: {NO_INT8_VOTE}")
        if only:
            return list(only)
        names = available(self._device, experts, self._top_k)
        whole = self._top_k is None and not self._voters and any(name.startswith("openvino-") for name in names)
        return [*names, *(quantised if self._replay and whole else [])]

    def _admit(
        self, name: str, expected: Answers, scratch: Path, stack: ExitStack, tick: Callable[[str], object]
    ) -> Stopwatch | None:
        """Return an execution's stopwatch; ``None``, said aloud, if it does not run here or does not agree.

        Raises:
            ValueError: The experts vote, and it does not agree.
        """
        try:
            watch = stack.enter_context(self._start(name, scratch))
            answers = self._answers(watch)
            ours, theirs = (np.concatenate(list(side.values())) for side in (answers, expected))
            agreement = Agreement.between(name, ours, theirs, self._voters)
            if not agreement.holds(name):
                self._disagree(name, agreement)
            if ExecutionName.parse(name).precision == "int8":
                self._judge(name, expected, answers)
        except ExecutionFailedError as error:
            self._say(f"left out: {error}")
            return None
        finally:
            tick(name)
        self._agreements[name] = agreement
        return watch

    def _disagree(self, name: str, agreement: Agreement) -> None:
        far = f"{name}: its answers are too far from the reference's: {agreement}"
        if self._voters:
            # Or whoever poisons one expert could choose in which precision the others' open votes are rounded.
            raise ValueError(
                f"{far}; where experts vote nothing is left out for that, as one of them could decide by it how the others' "
                "votes are rounded: nothing is kept, and the service runs as before; find that expert and train it again"
            )
        raise ExecutionFailedError(far)

    def _answers(self, watch: Stopwatch) -> Answers:
        """Return probabilities ``(N, C)`` for random images, and for the replay's that int8 is judged by."""
        images: dict[str, Images] = {"random": probe(self._header.architecture)}
        if self._replay:
            judged = self._replay.split()[1]
            images |= {"clean": judged.clean, "attacked": judged.attacked}
        return {name: watch.predict(part).probabilities for name, part in images.items()}

    def _start(self, name: str, scratch: Path) -> Stopwatch:
        file = artefact(self._identity, name)
        where = scratch / file if file else None
        if where:
            calibration = None
            if ExecutionName.parse(name).precision == "int8":
                assert self._replay
                calibration = self._replay.split()[0].inputs
            Stopwatch.build(name, self._checkpoint, self._device, where, calibration)
        return Stopwatch(name, self._checkpoint, self._device, self._top_k, self._threads, where)

    def _judge(self, name: str, expected: Answers, answers: Answers) -> None:
        assert self._replay
        float32, int8 = ({images: side[images] for images in ("clean", "attacked")} for side in (expected, answers))
        judgement = self._judgements[name] = Judgement.between(self._replay.split()[1].labels, float32, int8)
        self._say(f"{name}: {judgement}")
        if not judgement.accepted:
            raise ExecutionFailedError(f"{name}: too much accuracy is lost")

    def _say(self, text: str) -> None:
        """Print a line; it goes to standard error where standard output is for JSON alone."""
        stream = sys.stderr if self._options.json else sys.stdout
        try:
            from tqdm import tqdm
        except ImportError:
            print(text, file=stream)
        else:
            tqdm.write(text, file=stream)  # which leaves the bar whole

    def _keep(self, rates: dict[str, dict[int, list[float]]], scratch: Path) -> Path:
        """Choose, print and write the choice with the files that it needs."""
        plans = choose({name: row for name, row in rates.items() if ExecutionName.parse(name).kind not in COMPARED_ONLY})
        if not plans:
            raise ValueError("only executions that are compiled at every start were measured: nothing is kept")
        precision = fastest(plans, rates)
        self._say(_table(rates, self._agreements))
        for name, plan in plans.items():
            self._say(f"{name}: {plan}{' <- precision auto' if name == precision else ''}")
        needed = [artefact(self._identity, name) for plan in plans.values() for name in plan.executions]
        stems = {Path(name).stem for name in needed if name}
        files = {}
        for made in sorted(scratch.iterdir()):
            if made.stem in stems:
                files[made.name] = tuned.keep(self._folder, made)
        found = summary(rates, self._agreements, self._judgements)
        today, machine = datetime.now(UTC).date().isoformat(), processor(self._device)[0]
        path = tuned.write(self._folder, self._identity, Tuning(plans, precision, today, machine, files, found))
        for old in self._folder.glob(f"{self._identity.stem}.*"):
            if old.name not in files and old != path:
                old.unlink()
        return path


def _table(rates: dict[str, dict[int, list[float]]], agreements: dict[str, Agreement]) -> str:
    """Return the median images/s by execution and batch size, and the largest difference from the reference."""
    batches = list(next(iter(rates.values())))
    rows = [f"{'images/s at batch':24s}" + "".join(f"{batch:>9d}" for batch in batches) + "  largest difference"]
    for name, row in rates.items():
        figures = "".join(f"{median(row[batch]):9.1f}" for batch in batches)
        compared = "  (compiled at every start: not chosen)" if ExecutionName.parse(name).kind in COMPARED_ONLY else ""
        rows.append(f"{name:24s}{figures}  {agreements[name].largest:.2g}{compared}")
    return "\n".join(rows)


@contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[str], object]]:
    """Show a bar if tqdm is installed (extra ``train``), else a line for each tenth; yields what is called after each step."""
    try:
        from tqdm import tqdm
    except ImportError:
        done = 0

        def tick(name: str) -> None:
            nonlocal done
            done += 1
            if done * 10 // total != (done - 1) * 10 // total:
                print(f"{what}: {done} of {total} ({name})", file=sys.stderr)

        yield tick
        return
    with tqdm(total=total, desc=what, dynamic_ncols=True) as bar:

        def move(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        yield move
