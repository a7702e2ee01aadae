"""The mixture by OpenVINO on a processor: the fastest way there, with about 200 MiB of memory and no torch."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import openvino

from model.architecture import Architecture
from model.device import native_bfloat16
from model.execution import Prediction
from model.openvino_graph import Weights, build_expert, build_gate, build_graph

Precision = Literal["float32", "bfloat16"]
Images = npt.NDArray[np.float32]
Infer = Callable[[Images], list[npt.NDArray[np.float32]]]

_HINTS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVinoMixture:
    """A mixture that only predicts, in the calling thread's time and on OpenVINO's threads.

    Args:
        architecture: The shapes.
        weights: Every tensor of the checkpoint, as :func:`model.checkpoint.read_weights` gives them.
        precision: What convolutions compute in; softmax and mixing are in float32 either way.
        stack: How many experts share a grouped convolution, from 1 to ``E``. Under ``top_k`` experts run one by one.
        top_k: Run only the ``k`` experts with the largest gate weights, renormalised; ``None`` runs all.
        threads: How many threads to compute with; 0 leaves it to OpenVINO.
        streams: How many threads may call :meth:`predict` at one time. Each call then computes with its share of the threads,
            and none waits for another's: together they get further than one call with all threads, each alone takes longer.

    Attributes:
        name: What this execution is called: ``openvino-<precision>-x<stack>``.

    Raises:
        ValueError: ``stack`` or ``top_k`` is not from 1 to ``E``.
    """

    name: str

    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        precision: Precision,
        stack: int,
        top_k: int | None = None,
        threads: int = 0,
        streams: int = 1,
    ) -> None:
        experts = architecture.num_experts
        if top_k is not None and not 1 <= top_k <= experts:
            raise ValueError(f"top_k must be from 1 to {experts} (the number of experts) or None, not {top_k}")
        self._predict: Callable[[Images], Prediction]
        if top_k is None or top_k == experts:
            self._predict = _Whole(build_graph(architecture, weights, stack), precision, threads, streams)
        else:
            stack = 1
            self._predict = _Chosen(architecture, weights, precision, top_k, threads, streams)
        self.name = f"openvino-{precision}-x{stack}"

    @classmethod
    def from_file(cls, path: Path, stack: int, threads: int = 0, streams: int = 1) -> OpenVinoMixture:
        """Return the quantised mixture that :func:`save_model` wrote; ``stack`` only names it.

        What is not quantised runs in bfloat16 where the processor multiplies it natively, else in float32.

        Raises:
            FileNotFoundError: The file or the ``.bin`` file beside it is missing.
        """
        for part in (path, path.with_suffix(".bin")):
            if not part.is_file():
                raise FileNotFoundError(f"{part}: no such file; a quantised model is an .xml and a .bin file, so tune again")
        made = cls.__new__(cls)
        precision: Precision = "bfloat16" if native_bfloat16("cpu") else "float32"
        made._predict = _Whole(openvino.Core().read_model(path), precision, threads, streams)
        made.name = f"openvino-int8-x{stack}"
        return made

    def predict(self, images: npt.NDArray[np.uint8] | Images) -> Prediction:
        """Classify images ``(B, 3, H, W)``, uint8 or float32 in ``[0, 1]``, for any ``B`` from 1."""
        if images.dtype == np.uint8:
            return self._predict(np.divide(images, np.float32(255), dtype=np.float32))
        return self._predict(np.ascontiguousarray(images, np.float32))


class _Whole:
    """All experts in one graph."""

    def __init__(self, model: openvino.Model, precision: Precision, threads: int, streams: int) -> None:
        self._infer = _compiled(model, precision, threads, streams)

    def __call__(self, images: Images) -> Prediction:
        probabilities, gate = self._infer(images)  # (B, C), (B, E)
        return Prediction(probabilities, gate)


class _Chosen:
    """Only the experts that the gate chooses, each on the images that it was chosen for."""

    def __init__(
        self, architecture: Architecture, weights: Weights, precision: Precision, k: int, threads: int, streams: int
    ) -> None:
        self._k = k
        self._classes = architecture.num_classes
        # In float32, so that rounding never chooses another expert than the reference.
        self._gate = _compiled(build_gate(architecture, weights), "float32", threads, streams)
        self._experts = [
            _compiled(build_expert(architecture, weights, index), precision, threads, streams)
            for index in range(architecture.num_experts)
        ]

    def __call__(self, images: Images) -> Prediction:
        (log_weights,) = self._gate(images)  # (B, E)
        chosen = np.argsort(-log_weights, axis=1, kind="stable")[:, : self._k]  # (B, k)
        kept = np.exp(np.take_along_axis(log_weights, chosen, axis=1))
        kept /= kept.sum(axis=1, keepdims=True)
        gate = np.zeros_like(log_weights)
        np.put_along_axis(gate, chosen, kept, axis=1)
        probabilities = np.zeros((len(images), self._classes), np.float32)
        for index, expert in enumerate(self._experts):
            rows = np.flatnonzero((chosen == index).any(axis=1))
            if len(rows):
                (log_probs,) = expert(images[rows])  # (rows, C)
                probabilities[rows] += gate[rows, index, None] * np.exp(log_probs)
        return Prediction(probabilities, gate)


def quantise(architecture: Architecture, weights: Weights, stack: int, calibration: npt.NDArray[np.float32]) -> openvino.Model:
    """Return the mixture with the experts' convolutions in int8, by NNCF's post-training quantisation.

    The ranges of activations are the smallest and largest values that the calibration images lead to, since values that are cut
    off cost these networks more than coarser steps do. The gate, pooling, the last layers and mixing stay as they are: they
    take hardly any time, and NNCF would cut off log-probabilities and products of weight and probability.

    Args:
        architecture: The shapes.
        weights: Every tensor of the checkpoint, as :func:`model.checkpoint.read_weights` gives them.
        stack: How many experts share a grouped convolution, from 1 to ``E``.
        calibration: Images that look like those to come, ``(N, 3, H, W)`` float32 in ``[0, 1]``; 300 training images do.

    Raises:
        ImportError: NNCF is not installed.
        ValueError: ``stack`` is not from 1 to ``E``, or the images are not of the model's shape.
    """
    shape = (3, architecture.height, architecture.input_width)
    if calibration.ndim != 4 or calibration.shape[1:] != shape or not len(calibration):
        raise ValueError(f"calibration images must be (N, {', '.join(map(str, shape))}) with N from 1, not {calibration.shape}")
    try:
        import nncf
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet
    except ImportError as error:
        raise ImportError(f"int8 needs NNCF ({error}): install the extra tune, as in: pip install 'palisade[tune]'") from error
    nncf.set_log_level(logging.ERROR)
    with redirect_stdout(io.StringIO()):  # it prints progress bars
        return nncf.quantize(
            build_graph(architecture, weights, stack),
            nncf.Dataset(np.split(calibration, len(calibration))),
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(calibration),
            ignored_scope=nncf.IgnoredScope(patterns=[r"gate\..*", r"experts\..*\.(pool|head)", r"mixing\..*"]),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
            ),
        )


def save_model(model: openvino.Model, path: Path) -> None:
    """Write a quantised mixture: the graph to ``path``, which ends in ``.xml``, and its weights beside it, in ``.bin``."""
    openvino.save_model(model, path, compress_to_fp16=False)


def _compiled(model: openvino.Model, precision: Precision, threads: int, streams: int) -> Infer:
    """Compile a graph for as many callers at one time as there are streams, and return what runs it.

    It maps an input to all outputs, each an array of its own.
    """
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _HINTS[precision]}
    settings |= {"NUM_STREAMS": streams} if streams > 1 else {"PERFORMANCE_HINT": "LATENCY"}
    if threads > 0:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    idle: SimpleQueue[openvino.InferRequest] = SimpleQueue()
    for _ in range(streams):
        idle.put(compiled.create_infer_request())

    def infer(images: Images) -> list[npt.NDArray[np.float32]]:
        request = idle.get()
        try:
            # The outputs are copied, since the next inference overwrites OpenVINO's buffers.
            return list(request.infer([images], share_inputs=True, share_outputs=False).values())
        finally:
            idle.put(request)

    return infer
