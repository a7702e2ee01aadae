"""How fast experts train: images/s of forward and backward, and the share of the matrix rate that this is.

    python -m benchmarks.training_throughput [--device cpu] [--widths 8,16,64] [--precisions float32,bfloat16]
        [--batch 128] [--seconds 3] [--compile]

For every width and precision, and compiled if ``--compile`` is given: one forward and backward with the gradients of all
parameters (a training pass), and one with the gradient of the images alone (an attack's step). The share is the network's
floating-point operations per second, counted by torch, over those of a large square matrix product of the same precision,
measured in the same process just before.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.hardware import describe
from model.backbone import ResNet18

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Measure, print a table and end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--widths", default="8,16,64")
    parser.add_argument("--precisions", default=",".join(DTYPES))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=3.0, help="per figure")
    parser.add_argument("--compile", action="store_true", help="also measure compiled networks")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.backends.cudnn.allow_tf32 = False  # as matrix products are: both float32 figures are of float32
    torch.backends.cudnn.benchmark = True
    dtypes = {name: DTYPES[name] for name in options.precisions.split(",")}
    rates = {name: matrix_rate(dtype, device, options.seconds) for name, dtype in dtypes.items()}
    for name, rate in rates.items():
        print(f"matrix product, {name}: {rate / 1e12:.2f} TFLOP/s")
    rows = []
    for width in map(int, options.widths.split(",")):
        for name, dtype in dtypes.items():
            for compiled in (False, True) if options.compile else (False,):
                row = {"width": width, "dtype": name, "compiled": compiled, "batch": options.batch}
                row |= measure(width, dtype, device, options.batch, options.seconds, compiled=compiled)
                row["share"] = row["training_flops"] * row["training_images_per_s"] / rates[name]
                rows.append(row)
                print(
                    f"width {width:3d} {name:9s} {'compiled' if compiled else 'eager   '} training pass "
                    f"{row['training_images_per_s']:9.1f} images/s, attack step {row['attack_images_per_s']:9.1f}, "
                    f"{100 * row['share']:.1f} % of the matrix rate"
                )
    record = {"benchmark": "training_throughput", "device": str(device), "hardware": describe()}
    print(json.dumps({**record, "matrix_flop_per_s": rates, "rows": rows}))


def measure(
    width: int, dtype: torch.dtype, device: torch.device, batch: int, seconds: float, *, compiled: bool
) -> dict[str, float]:
    """Return images/s and operations per image of a training pass and of an attack's step."""
    torch._dynamo.reset()  # it gives up compiling after a few sizes of one function
    network = ResNet18(width, 10).to(device).to(memory_format=torch.channels_last)
    images = torch.rand(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)

    def loss(inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return nn.functional.cross_entropy(network(inputs).float(), labels)

    def training() -> None:
        loss(images).backward()
        network.zero_grad(set_to_none=True)

    def attack() -> None:
        inputs = images.detach().requires_grad_(True)
        loss(inputs).backward(inputs=[inputs])

    flops = {"training": operations(training) / batch, "attack": operations(attack) / batch}
    if compiled:
        network.compile(dynamic=False)
    found: dict[str, float] = {}
    for name, run in (("training", training), ("attack", attack)):
        if name == "attack":
            network.eval().requires_grad_(False)  # or compiled code would compute the parameters' gradients, too
        found[f"{name}_images_per_s"] = batch * rate(run, device, seconds)
        found[f"{name}_flops"] = flops[name]
    return found


def matrix_rate(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Return FLOP/s of a large square matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 * rate(lambda: left @ right, device, seconds)


def operations(run: Callable[[], object]) -> float:
    """Return the floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def rate(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return calls per second over about ``seconds``, after two calls to warm up."""
    run(), run()
    wait(device)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        run()
        count += 1
        if count % 8 == 0:
            wait(device)  # or the queue of a GPU would run ahead of the clock
    wait(device)
    return count / (time.perf_counter() - started)


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
