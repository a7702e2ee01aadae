"""One execution of the mixture in a process of its own, timed on request.

Two executions in one process disturb each other: torch's worker threads spin for a while after their work and take OpenVINO's
cores. A process that waits for its next request costs nothing, so executions can take turns and share the machine's ups and
downs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from model.checkpoint import load_checkpoint, read_header, read_weights
from model.execution import COMPILED_STACK, Execution, Prediction, make_executions
from model.plan import ExecutionName

REFERENCES = ("reference-float32", "reference-bfloat16")
"""Beside the executions: the reference mixture as it is, a straightforward loop over its experts, channels-last."""

Images = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
Request = dict[str, Any]


class ExecutionFailedError(RuntimeError):
    """An execution cannot be made or run here; the message is its own."""


class Stopwatch:
    """The process of one execution.

    Args:
        name: An execution's name (:class:`model.plan.ExecutionName`) or one of :data:`REFERENCES`.
        checkpoint: ``compact``, the checkpoint inside the package, or a path.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        top_k: How many experts run per image; ``None`` means all.
        threads: CPU threads; 0 means all cores.
        file: What the execution is loaded from, if it is loaded from a file.
        max_batch_size: Images of the largest CUDA graph.

    Raises:
        ExecutionFailedError: It cannot be made.
    """

    def __init__(
        self,
        name: str,
        checkpoint: str,
        device: str,
        top_k: int | None = None,
        threads: int = 0,
        file: Path | None = None,
        max_batch_size: int = 64,
    ) -> None:
        self._start(name)
        made = {"name": name, "checkpoint": checkpoint, "device": device, "top_k": top_k, "threads": threads}
        try:
            self._ask({**made, "file": file and str(file), "max_batch_size": max_batch_size})
        except BaseException:
            self.close()
            raise

    @classmethod
    def build(
        cls, name: str, checkpoint: str, device: str, file: Path, calibration: npt.NDArray[np.float32] | None = None
    ) -> None:
        """Make the file that an execution is loaded from: compile ahead of time, or quantise.

        Args:
            name: The execution's name.
            checkpoint: ``compact``, the checkpoint inside the package, or a path.
            device: ``cpu``, ``cuda`` or ``cuda:N``.
            file: The file to write.
            calibration: Images ``(N, 3, H, W)`` float32 in ``[0, 1]``, to quantise with.

        Raises:
            ExecutionFailedError: It cannot be made.
        """
        maker = cls.__new__(cls)
        maker._start(name)
        with maker, tempfile.TemporaryDirectory() as folder:
            images = Path(folder) / "calibration.npy"
            if calibration is not None:
                np.save(images, calibration)
            made = {"name": name, "checkpoint": checkpoint, "device": device, "file": str(file)}
            maker._ask({"do": "build", **made, "calibration": str(images)})

    def _start(self, name: str) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "service.stopwatch"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )

    def rate(self, batch: int, seconds: float) -> float:
        """Return images/s at a batch size, over about ``seconds`` after a warm-up."""
        return float(self._ask({"do": "rate", "batch": batch, "seconds": seconds}))

    def predict(self, images: Images) -> Prediction:
        """Classify images ``(N, 3, H, W)``, uint8 or float32 in ``[0, 1]``, in batches."""
        with tempfile.TemporaryDirectory() as folder:
            np.save(Path(folder) / "images.npy", images)
            self._ask({"do": "predict", "folder": folder})
            return Prediction(np.load(Path(folder) / "probabilities.npy"), np.load(Path(folder) / "gate.npy"))

    def flop(self) -> float:
        """Return the floating-point operations of one image; for references only."""
        return float(self._ask({"do": "flop"}))

    def matrix_rate(self, seconds: float) -> float:
        """Return FLOP/s of a large square matrix product in the reference's precision; for references only."""
        return float(self._ask({"do": "matrix_rate", "seconds": seconds}))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _ask(self, request: Request) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):  # the end of its output says the same
            self._process.stdin.write(f"{json.dumps(request)}\n".encode())
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise ExecutionFailedError(f"{self.name}: its process ended: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ExecutionFailedError(f"{self.name}: {answer['error']}")
        return answer["value"]

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"status {status}"


class _Reference:
    """The straightforward way: the reference as it is, in one precision throughout."""

    def __init__(self, name: str, checkpoint: str, device: str, top_k: int | None, threads: int) -> None:
        import torch

        if threads:
            torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = False  # as in what is compared with it
        self.device, self.dtype = torch.device(device), getattr(torch, name.removeprefix("reference-"))
        self.mixture = load_checkpoint(checkpoint, device).to(self.dtype).to(memory_format=torch.channels_last)
        self.mixture.top_k = top_k

    def predict(self, images: Images) -> Prediction:
        import torch

        with torch.inference_mode():
            inputs = torch.from_numpy(images).to(self.device)
            inputs = inputs.float().div_(255) if inputs.dtype == torch.uint8 else inputs
            inputs = inputs.to(self.dtype).contiguous(memory_format=torch.channels_last)
            probabilities = self.mixture(inputs).exp().float().cpu().numpy()  # (B, C)
        return Prediction(probabilities, np.zeros((len(images), 0), np.float32))

    def flop(self) -> float:
        from torch.utils.flop_counter import FlopCounterMode

        architecture = self.mixture.architecture
        with FlopCounterMode(display=False) as counter:
            self.predict(np.zeros((1, 3, architecture.height, architecture.input_width), np.uint8))
        return float(counter.get_total_flops())

    def matrix_rate(self, seconds: float) -> float:
        import torch

        size = 8192 if self.device.type == "cuda" else 2048
        left, right = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))

        def product() -> None:
            torch.mm(left, right)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        return 2 * size**3 * _calls_per_s(product, seconds)


class _Watched:
    """The child's side: what is asked of an execution, and the answers."""

    def __init__(self, request: Request) -> None:
        name, checkpoint = request.pop("name"), request.pop("checkpoint")
        architecture = read_header(checkpoint).architecture
        self._shape = (3, architecture.height, architecture.input_width)
        file, most = request.pop("file"), request.pop("max_batch_size")
        self._execution: Execution
        if name in REFERENCES:
            self._execution = _Reference(name, checkpoint, **request)
        else:
            files = {name: Path(file)} if file else {}
            self._execution = make_executions([name], checkpoint, **request, max_batch_size=most, files=files)[name]

    def answer(self, request: Request) -> object:
        if request["do"] == "rate":
            return self._rate(request["batch"], request["seconds"])
        if request["do"] == "predict":
            self._predict(Path(request["folder"]))
            return None
        assert isinstance(self._execution, _Reference)
        return self._execution.flop() if request["do"] == "flop" else self._execution.matrix_rate(request["seconds"])

    def _rate(self, batch: int, seconds: float) -> float:
        images = np.random.default_rng(0).integers(0, 256, (batch, *self._shape), dtype=np.uint8)
        return batch * _calls_per_s(lambda: self._execution.predict(images), seconds)

    def _predict(self, folder: Path) -> None:
        images = np.load(folder / "images.npy")
        parts = [self._execution.predict(part) for part in np.array_split(images, range(64, len(images), 64))]
        np.save(folder / "probabilities.npy", np.concatenate([part.probabilities for part in parts]))
        np.save(folder / "gate.npy", np.concatenate([part.gate for part in parts]))


def _build(do: str, name: str, checkpoint: str, device: str, file: str, calibration: str) -> None:
    what = ExecutionName.parse(name)
    if what.precision == "int8":
        from model.openvino import quantise, save_model

        header, weights = read_weights(checkpoint)
        save_model(quantise(header.architecture, weights, what.stack, np.load(calibration)), Path(file))
        return
    import torch

    from model.fast_package import export_package

    export_package(load_checkpoint(checkpoint, device), Path(file), getattr(torch, what.precision), COMPILED_STACK)


def _calls_per_s(call: Callable[[], object], seconds: float) -> float:
    """Return calls per second over about ``seconds``, after two calls to warm up."""
    call(), call()
    count, started = 0, time.perf_counter()
    while True:
        call()
        count += 1
        if (elapsed := time.perf_counter() - started) >= seconds:
            return count / elapsed


def main() -> None:
    """Make the execution that the first line of standard input asks for, then answer each further line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the answers
    watched: _Watched | None = None
    for line in sys.stdin:
        try:
            request, value = json.loads(line), None
            if watched:
                value = watched.answer(request)
            elif request.get("do") == "build":
                _build(**request)
            else:
                watched = _Watched(request)
            print(json.dumps({"value": value}), file=answers)
        except Exception as error:  # whatever it is, it is this execution's, and the others go on
            print(json.dumps({"error": f"{type(error).__name__}: {str(error).strip()[:500]}"}), file=answers)


if __name__ == "__main__":
    main()
