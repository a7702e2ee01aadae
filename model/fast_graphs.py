"""The graphed fast execution: the dense mixture as CUDA graphs, one per bucket of batch sizes.

On a GPU a small network costs more to launch than to compute. A CUDA graph is recorded once and launched as a whole, so it
has the shapes and the addresses that it was recorded with: inputs are copied to a fixed place, and a batch runs in the smallest
bucket that holds it.

Sources: torch's notes on CUDA semantics, sections "CUDA Graphs" and "Use pinned memory buffers"; NVIDIA's CUDA programming
guide, section "Cross-stream dependencies and events" (fork and join while capturing).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import torch

from model.fast import Prediction, check_images
from model.fast_dense import DenseMixture
from model.mixture import Mixture

WARM_UPS = 3
"""Runs before a capture, so that libraries have loaded, chosen their kernels and taken their memory."""


@dataclass(frozen=True)
class _Slot:
    """What one batch on its way occupies; with two of them the next batch is copied in while one computes.

    Attributes:
        pinned: Page-locked bytes that hold a batch's images, uint8 or float32.
        staging: As many bytes on the device.
        probabilities: Page-locked, ``(max_batch, C)`` float32.
        gate: Page-locked, ``(max_batch, E)`` float32.
        arrived: The images are in ``staging``.
        done: The answer is in ``probabilities`` and ``gate``, and everything may be used anew.
    """

    pinned: torch.Tensor
    staging: torch.Tensor
    probabilities: torch.Tensor
    gate: torch.Tensor
    arrived: torch.cuda.Event
    done: torch.cuda.Event


class GraphedMixture:
    """A mixture that only predicts, by replaying CUDA graphs.

    Make it, and predict with it, on one thread; while it is made, nothing else in the process may use the device.

    Args:
        mixture: The reference, in eval mode, on a CUDA device; it is copied. Its ``top_k`` must keep every expert.
        dtype: What the experts compute in; ``None`` chooses :func:`model.fast.fastest_dtype`.
        max_batch: Images of the largest graph; larger batches are split, and copying one part overlaps computing another.
        stack: Experts per network of grouped convolutions; the networks run side by side, each on its own stream.

    Raises:
        ValueError: The mixture is elsewhere, in training mode or skips experts, or a number is out of range.
    """

    def __init__(self, mixture: Mixture, dtype: torch.dtype | None = None, max_batch: int = 64, stack: int = 1) -> None:
        self.device = mixture.mean.device
        if self.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a mixture on a CUDA device, not on {self.device}: load it there first")
        self.buckets = buckets_up_to(max_batch)
        self._dense = DenseMixture(mixture, dtype, stack)
        self.architecture, self.dtype = self._dense.architecture, self._dense.dtype
        classes, experts = self.architecture.num_classes, self.architecture.num_experts
        with torch.cuda.device(self.device), torch.inference_mode():
            self._compute, self._copy = torch.cuda.Stream(), torch.cuda.Stream()
            self._lanes = [torch.cuda.Stream() for _ in self._dense.groups]
            # All that outlives a replay is allocated here, outside the graphs' own memory, which the graphs share.
            self._images = torch.zeros(max_batch, *self._shape, device=self.device)
            self._probabilities = torch.zeros(max_batch, classes, device=self.device)
            self._gate = torch.zeros(max_batch, experts, device=self.device)
            self._slots = [self._make_slot(max_batch) for _ in range(2)]
            torch.cuda.synchronize()
            self._pool = torch.cuda.graph_pool_handle()
            # The largest first: what it took from the device is enough for all the others.
            self._graphs = {bucket: self._capture(bucket) for bucket in reversed(self.buckets)}

    @torch.inference_mode()
    def predict(self, images: torch.Tensor) -> Prediction:
        """Classify images ``(B, 3, H, W)``, uint8 or float32 in ``[0, 1]``; images and answer are on the CPU."""
        check_images(images, self.architecture)
        answers: list[Prediction] = []
        pending: deque[tuple[_Slot, int]] = deque()
        with torch.cuda.device(self.device):
            for slot, part in zip(cycle(self._slots), images.cpu().split(self.buckets[-1]), strict=False):
                if len(pending) == len(self._slots):
                    answers.append(_collect(*pending.popleft()))
                self._submit(slot, part)
                pending.append((slot, len(part)))
            answers += [_collect(*each) for each in pending]
        return Prediction(torch.cat([a.probabilities for a in answers]), torch.cat([a.gate for a in answers]))

    @property
    def _shape(self) -> tuple[int, int, int]:
        return 3, self.architecture.height, self.architecture.input_width

    def _make_slot(self, max_batch: int) -> _Slot:
        size = self._images.nbytes
        return _Slot(
            pinned=torch.empty(size, dtype=torch.uint8, pin_memory=True),
            staging=torch.empty(size, dtype=torch.uint8, device=self.device),
            probabilities=torch.empty(max_batch, self.architecture.num_classes, pin_memory=True),
            gate=torch.empty(max_batch, self.architecture.num_experts, pin_memory=True),
            arrived=torch.cuda.Event(),
            done=torch.cuda.Event(),
        )

    def _capture(self, bucket: int) -> torch.cuda.CUDAGraph:
        """Record the forward of the first ``bucket`` rows of the fixed images into the same rows of the fixed answers."""
        # TF32 would round float32 to 10 bits of mantissa, beyond the tolerance; benchmarking happens in the warm-up only.
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            with torch.cuda.stream(self._compute):
                for _ in range(WARM_UPS):
                    self._forward(bucket)
            self._compute.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Only this thread's calls can spoil the capture: another may read the device's free memory for a metric.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._compute, capture_error_mode="thread_local"):
                self._forward(bucket)
        return graph

    def _forward(self, bucket: int) -> None:
        main = torch.cuda.current_stream()
        normalised = self._dense.normalise(self._images[:bucket])
        narrowed = normalised.to(self._dense.dtype)
        logits = []
        for lane, group in zip(self._lanes, self._dense.groups, strict=True):
            lane.wait_stream(main)
            with torch.cuda.stream(lane):
                logits.append(group(narrowed))
        gate = self._dense.weigh(normalised)  # beside the experts
        for lane in self._lanes:
            main.wait_stream(lane)
        probabilities, weights = self._dense.finish(gate, logits)
        self._probabilities[:bucket].copy_(probabilities)
        self._gate[:bucket].copy_(weights)

    def _submit(self, slot: _Slot, images: torch.Tensor) -> None:
        """Set one batch of at most the largest bucket on its way; the slot must be idle."""
        count = len(images)
        size = images.numel() * images.element_size()
        host = slot.pinned[:size].view(images.dtype).view(images.shape)
        staged = slot.staging[:size].view(images.dtype).view(images.shape)
        host.copy_(images)
        with torch.cuda.stream(self._copy):
            staged.copy_(host, non_blocking=True)
            slot.arrived.record()
        with torch.cuda.stream(self._compute):
            self._compute.wait_event(slot.arrived)
            # Rows of the bucket beyond the batch keep older images; rows do not influence each other, and theirs are not read.
            if images.dtype == torch.uint8:
                torch.div(staged, 255, out=self._images[:count])
            else:
                self._images[:count].copy_(staged)
            self._graphs[bucket_for(count, self.buckets)].replay()
            slot.probabilities[:count].copy_(self._probabilities[:count], non_blocking=True)
            slot.gate[:count].copy_(self._gate[:count], non_blocking=True)
            slot.done.record()


def _collect(slot: _Slot, count: int) -> Prediction:
    """Wait for a slot's answer and copy it out."""
    slot.done.synchronize()
    return Prediction(slot.probabilities[:count].clone(), slot.gate[:count].clone())


def buckets_up_to(max_batch: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... below ``max_batch``, then ``max_batch`` itself; raises ``ValueError`` if that is less than 1."""
    if max_batch < 1:
        raise ValueError(f"max_batch must be 1 or more, not {max_batch}")
    return (*(2**power for power in range((max_batch - 1).bit_length())), max_batch)


def bucket_for(batch: int, buckets: Sequence[int]) -> int:
    """Return the smallest bucket that holds ``batch`` images; ``buckets`` ascend.

    Raises:
        ValueError: There are no images, or more than the largest bucket holds.
    """
    if not 1 <= batch <= buckets[-1]:
        raise ValueError(f"a batch must have from 1 to {buckets[-1]} images (the largest bucket), not {batch}")
    return next(bucket for bucket in buckets if bucket >= batch)
