"""The mixture as an OpenVINO graph, built straight from a checkpoint's arrays: no torch, no conversion.

Batch norms are folded into the convolutions. Experts are stacked: one grouped convolution does the same layer of several
experts, which keeps the processor's units busy at small batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import openvino
from openvino import Node
from openvino import opset13 as ops

from model.architecture import Activation, Architecture

Weights = Mapping[str, npt.NDArray[np.float32]]

_EPSILON = 1e-5  # of torch's batch norm


def build_graph(architecture: Architecture, weights: Weights, stack: int) -> openvino.Model:
    """Return the whole mixture as a graph.

    Args:
        architecture: The shapes.
        weights: Every tensor of the checkpoint, as :func:`model.checkpoint.read_weights` gives them.
        stack: How many experts share a grouped convolution, from 1 to ``E``; the last group may be smaller.

    Returns:
        A model from images ``(B, 3, H, W)`` float32 in ``[0, 1]`` to ``probabilities`` ``(B, C)`` and ``gate`` ``(B, E)``.

    Raises:
        ValueError: ``stack`` is not from 1 to ``E``.
    """
    experts = range(architecture.num_experts)
    if not 1 <= stack <= len(experts):
        raise ValueError(f"stack must be from 1 to {len(experts)} (the number of experts), not {stack}")
    images, normalised = _input(architecture)
    gate = _equal(images, architecture) if architecture.votes else _gate(normalised, weights)  # (B, E)
    stacks = [_experts(normalised, architecture, weights, experts[i : i + stack]) for i in experts[::stack]]
    log_probs = ops.concat(stacks, 0, name="mixing.experts")  # (E, B, C)
    log_weights = ops.unsqueeze(ops.transpose(gate, _integers(1, 0)), _integers(2))  # (E, B, 1)
    shares = ops.exp(ops.add(log_weights, log_probs, name="mixing.weigh"), name="mixing.exp")  # (E, B, C)
    mixed = ops.reduce_sum(shares, _integers(0), name="mixing.sum")  # (B, C)
    if architecture.votes:
        counted = ops.add(_votes(log_probs, architecture.num_classes), mixed, name="mixing.count")
        mixed = ops.divide(counted, _scalar(architecture.num_experts + 1), name="mixing.share")
    return _model(images, probabilities=mixed, gate=ops.exp(gate))


def build_gate(architecture: Architecture, weights: Weights) -> openvino.Model:
    """Return the gate alone: images ``(B, 3, H, W)`` to ``log_weights`` ``(B, E)``, the logarithms of its weights."""
    images, normalised = _input(architecture)
    return _model(images, log_weights=_gate(normalised, weights))


def build_expert(architecture: Architecture, weights: Weights, index: int) -> openvino.Model:
    """Return one expert alone: images ``(B, 3, H, W)`` to ``log_probabilities`` ``(B, C)``."""
    images, normalised = _input(architecture)
    return _model(images, log_probabilities=ops.squeeze(_experts(normalised, architecture, weights, [index]), _integers(0)))


def _input(architecture: Architecture) -> tuple[Node, Node]:
    """Return the parameter for images and the node that has them normalised, both ``(B, 3, H, W)``."""
    images = ops.parameter([-1, 3, architecture.height, architecture.input_width], np.float32, name="images")
    mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (architecture.mean, architecture.std))
    return images, ops.divide(ops.subtract(images, ops.constant(mean)), ops.constant(std))


def _model(images: Node, **outputs: Node) -> openvino.Model:
    model = openvino.Model(list(outputs.values()), [images], "palisade")
    for output, name in zip(model.outputs, outputs, strict=True):
        output.set_names({name})
    return model


def _gate(normalised: Node, weights: Weights) -> Node:
    """Return the logarithms of the gate's weights, ``(B, E)``."""
    features = normalised
    for position in (0, 3, 6):
        name = f"gate.features.{position}"
        kernel, bias = _folded(weights, name, f"gate.features.{position + 1}")
        features = ops.relu(_convolution(features, kernel, bias, 2, 1, name))
    pooled = ops.reduce_mean(features, _integers(2, 3), name="gate.pool")  # (B, 4 * gate_width)
    head = ops.matmul(pooled, ops.constant(weights["gate.head.weight"]), False, True, name="gate.head")
    return ops.log_softmax(ops.add(head, ops.constant(weights["gate.head.bias"])), 1)


def _equal(images: Node, architecture: Architecture) -> Node:
    """Return equal weights of all experts for every image, as logarithms, ``(B, E)``."""
    batch = ops.gather(ops.shape_of(images), _integers(0), _integers(0))
    equal = ops.constant(np.full((1, 1), -np.log(architecture.num_experts), np.float32))
    return ops.broadcast(equal, ops.concat([batch, _integers(architecture.num_experts)], 0), name="mixing.equal")


def _votes(log_probs: Node, classes: int) -> Node:
    """Return how many experts' likeliest class is each class, ``(B, C)``, for log-probabilities ``(E, B, C)``."""
    best = ops.topk(log_probs, _scalar(1, np.int64), 2, "max", "value", name="mixing.best").output(1)  # (E, B, 1)
    chosen = ops.one_hot(best, _scalar(classes, np.int64), _scalar(1), _scalar(0), -1, name="mixing.vote")  # (E, B, 1, C)
    return ops.reduce_sum(chosen, _integers(0, 2), name="mixing.votes")


def _experts(normalised: Node, architecture: Architecture, weights: Weights, indices: Sequence[int]) -> Node:
    """Return the log-probabilities of ``g`` experts, ``(g, B, C)``, computed side by side."""
    groups, label = len(indices), "experts." + "+".join(map(str, indices))

    def layer(x: Node, convolution: str, norm: str, stride: int = 1, groups: int = groups) -> Node:
        parts = [_folded(weights, f"experts.{k}.{convolution}", f"experts.{k}.{norm}") for k in indices]
        kernel, bias = (np.concatenate(values) for values in zip(*parts, strict=True))  # (g * outputs, inputs, k, k)
        return _convolution(x, kernel, bias, stride, groups, f"{label}.{convolution}")

    x = _activate(layer(normalised, "stem.0", "stem.1", groups=1), architecture.activation)  # (B, g * width, H, W)
    for index, block in enumerate(architecture.blocks()):
        name = f"blocks.{index}"
        y = _activate(layer(x, f"{name}.conv1", f"{name}.bn1", block.stride), architecture.activation)
        y = layer(y, f"{name}.conv2", f"{name}.bn2")
        if block.projects:
            x = layer(x, f"{name}.downsample.0", f"{name}.downsample.1", block.stride)
        x = _activate(ops.add(x, y), architecture.activation)
    pooled = ops.reduce_mean(x, _integers(2, 3), name=f"{label}.pool")  # (B, g * 8 * width)
    features = ops.transpose(ops.reshape(pooled, _integers(0, groups, -1), True), _integers(1, 0, 2))  # (g, B, 8 * width)
    matrix = np.stack([weights[f"experts.{k}.head.weight"].T for k in indices])  # (g, 8 * width, C)
    bias = np.stack([weights[f"experts.{k}.head.bias"] for k in indices])[:, None]  # (g, 1, C)
    logits = ops.add(ops.matmul(features, ops.constant(matrix), False, False, name=f"{label}.head"), ops.constant(bias))
    return ops.log_softmax(logits, 2)


def _folded(weights: Weights, convolution: str, norm: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the kernel and the bias of a convolution that has taken over the batch norm after it."""
    scale = weights[f"{norm}.weight"] / np.sqrt(weights[f"{norm}.running_var"] + np.float32(_EPSILON))
    kernel = weights[f"{convolution}.weight"] * scale[:, None, None, None]
    return kernel, weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale


def _convolution(
    x: Node, kernel: npt.NDArray[np.float32], bias: npt.NDArray[np.float32], stride: int, groups: int, name: str
) -> Node:
    """Convolve ``(B, inputs, H, W)`` with a ``(outputs, inputs / groups, k, k)`` kernel, padded to keep H and W at stride 1."""
    strides, padding, dilation = [stride] * 2, [kernel.shape[-1] // 2] * 2, [1, 1]
    if groups == 1:
        y = ops.convolution(x, ops.constant(kernel), strides, padding, padding, dilation, name=name)
    else:
        grouped = kernel.reshape(groups, -1, *kernel.shape[1:])
        y = ops.group_convolution(x, ops.constant(grouped), strides, padding, padding, dilation, name=name)
    return ops.add(y, ops.constant(bias.reshape(1, -1, 1, 1)))


def _activate(x: Node, activation: Activation) -> Node:
    return ops.relu(x) if activation == "relu" else ops.swish(x)


def _scalar(value: float, kind: type[np.generic] = np.float32) -> Node:
    return ops.constant(np.array(value, kind))


def _integers(*values: int) -> Node:
    return ops.constant(np.array(values, np.int64))
