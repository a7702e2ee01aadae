"""The mixture by OpenVINO on a processor: the fastest way there, with about 200 MiB of memory and no torch."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import cached_property, partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import openvino

from model.architecture import Architecture
from model.device import cores, native_bfloat16
from model.execution import Prediction
from model.openvino_graph import Weights, build_expert, build_gate, build_graph

Precision = Literal["float32", "bfloat16"]
Images = npt.NDArray[np.float32]

_HINTS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVinoMixture:
    """A mixture that only predicts, in the calling thread's time and on OpenVINO's threads.

    A single image has all threads, which OpenVINO lets share every layer. Of a larger batch each thread has some images, so
    that they wait for each other once and not at every layer.

    Args:
        architecture: The shapes.
        weights: Every tensor of the checkpoint, as :func:`model.checkpoint.read_weights` gives them.
        precision: What convolutions compute in; softmax and mixing are in float32 either way.
        stack: How many experts share a grouped convolution, from 1 to ``E``. Under ``top_k`` experts run one by one.
        top_k: Run only the ``k`` experts with the largest gate weights, renormalised; ``None`` runs all.
        threads: How many threads to compute with; 0 means one for each core.

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
    ) -> None:
        experts, threads = architecture.num_experts, threads or cores()
        if top_k is not None and not 1 <= top_k <= experts:
            raise ValueError(f"top_k must be from 1 to {experts} (the number of experts) or None, not {top_k}")
        self._way: _Stacked | _Chosen
        if top_k is not None and top_k < experts:
            stack = 1
            self._way = _Chosen(architecture, weights, precision, top_k)
        else:
            self._way = _Stacked(build_graph(architecture, weights, stack), precision, threads)
        self.name = f"openvino-{precision}-x{stack}"

    @classmethod
    def from_file(cls, path: Path, stack: int, threads: int = 0) -> OpenVinoMixture:
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
        made._way = _Stacked(openvino.Core().read_model(path), precision, threads or cores())
        made.name = f"openvino-int8-x{stack}"
        return made

    def predict(self, images: npt.NDArray[np.uint8] | Images) -> Prediction:
        """Classify images ``(B, 3, H, W)``, uint8 or float32 in ``[0, 1]``, for any ``B`` from 1, with all threads."""
        return self._way(_pixels(images))

    def lane(self, lanes: int) -> Lane:
        """Return this execution on one lane's share of the threads: so many may run it at one time, each with its own share."""
        return Lane(self._way.lane(lanes))


class Lane:
    """An execution on a share of the threads; see :meth:`OpenVinoMixture.lane`."""

    def __init__(self, way: Callable[[Images], Prediction]) -> None:
        self._way = way

    def predict(self, images: npt.NDArray[np.uint8] | Images) -> Prediction:
        """Classify images ``(B, 3, H, W)``, uint8 or float32 in ``[0, 1]``, for any ``B`` from 1."""
        return self._way(_pixels(images))


class _Stacked:
    """All experts in one graph; every thread has a share of the images, and a single image has all threads."""

    def __init__(self, model: openvino.Model, precision: Precision, threads: int) -> None:
        self._model, self._precision, self._threads = model, precision, threads
        streams = _compiled(model, precision, streams=threads, threads=threads)
        self._idle: SimpleQueue[openvino.InferRequest] = SimpleQueue()
        for _ in range(threads):
            self._idle.put(streams.create_infer_request())
        self._alone = Lock()
        self._taking = Lock()  # one caller at a time takes what it needs, so that no two wait for each other's

    def __call__(self, images: Images) -> Prediction:
        if len(images) == 1 < self._threads:
            with self._alone:
                return Prediction(*_outputs(_run([(self._gang, images)])[0]))
        return self._run(images, self._threads)

    def lane(self, lanes: int) -> Callable[[Images], Prediction]:
        return partial(self._run, share=max(1, self._threads // lanes))

    @cached_property
    def _gang(self) -> openvino.InferRequest:
        return _compiled(self._model, self._precision, streams=1, threads=self._threads).create_infer_request()

    def _run(self, images: Images, share: int) -> Prediction:
        shares = np.array_split(images, min(share, len(images)))
        with self._taking:
            requests = [self._idle.get() for _ in shares]
        try:
            done = [_outputs(request) for request in _run(list(zip(requests, shares, strict=True)))]
        finally:
            for request in requests:
                self._idle.put(request)
        probabilities, gate = zip(*done, strict=True)
        return Prediction(np.concatenate(probabilities), np.concatenate(gate))  # (B, C), (B, E)


class _Chosen:
    """Only the experts that the gate chooses, each on the images that it was chosen for, side by side."""

    def __init__(self, architecture: Architecture, weights: Weights, precision: Precision, k: int) -> None:
        self._k = k
        self._classes = architecture.num_classes
        # In float32, so that rounding never chooses another expert than the reference.
        self._gate = _compiled(build_gate(architecture, weights), "float32", streams=1, threads=1).create_infer_request()
        self._experts = [
            _compiled(build_expert(architecture, weights, index), precision, streams=1, threads=1).create_infer_request()
            for index in range(architecture.num_experts)
        ]
        self._busy = Lock()

    def __call__(self, images: Images) -> Prediction:
        with self._busy:
            return self._run(images)

    def lane(self, lanes: int) -> Callable[[Images], Prediction]:
        del lanes  # they take turns: an expert is one network with one thread
        return self

    def _run(self, images: Images) -> Prediction:
        ((log_weights,),) = map(_outputs, _run([(self._gate, images)]))  # (B, E)
        chosen = np.argsort(-log_weights, axis=1, kind="stable")[:, : self._k]  # (B, k)
        kept = np.exp(np.take_along_axis(log_weights, chosen, axis=1))
        kept /= kept.sum(axis=1, keepdims=True)
        gate = np.zeros_like(log_weights)
        np.put_along_axis(gate, chosen, kept, axis=1)
        rows = [np.flatnonzero((chosen == index).any(axis=1)) for index in range(len(self._experts))]
        busy = [index for index, each in enumerate(rows) if len(each)]
        done = _run([(self._experts[index], images[rows[index]]) for index in busy])
        probabilities = np.zeros((len(images), self._classes), np.float32)
        for index, request in zip(busy, done, strict=True):
            (log_probs,) = _outputs(request)  # (rows, C)
            probabilities[rows[index]] += gate[rows[index], index, None] * np.exp(log_probs)
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


def _pixels(images: npt.NDArray[np.uint8] | Images) -> Images:
    if images.dtype == np.uint8:
        return np.divide(images, np.float32(255), dtype=np.float32)
    return np.ascontiguousarray(images, np.float32)


def _compiled(model: openvino.Model, precision: Precision, streams: int, threads: int) -> openvino.CompiledModel:
    """Compile a graph for as many requests at one time as there are streams, which share the threads evenly."""
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
    }
    return openvino.Core().compile_model(model, "CPU", settings)


def _run(work: Sequence[tuple[openvino.InferRequest, Images]]) -> list[openvino.InferRequest]:
    """Run requests side by side, the last one in this thread, and return them when all are done."""
    *others, (last, images) = work
    for request, share in others:
        request.start_async([share], share_inputs=True)
    last.infer([images], share_inputs=True, share_outputs=True)
    for request, _ in others:
        request.wait()
    return [request for request, _ in work]


def _outputs(request: openvino.InferRequest) -> list[npt.NDArray[np.float32]]:
    """Return copies of a request's outputs: the next inference overwrites OpenVINO's buffers."""
    return [tensor.data.copy() for tensor in request.output_tensors]
