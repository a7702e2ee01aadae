"""The packaged fast execution: the dense mixture compiled ahead of time (AOTInductor), run by machines without a compiler."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import torch

from model.architecture import Architecture
from model.fast import Prediction, as_unit
from model.fast_compiled import FREEZING
from model.fast_dense import DenseMixture
from model.mixture import Mixture


def export_package(mixture: Mixture, path: Path, dtype: torch.dtype | None = None, stack: int | None = None) -> None:
    """Compile a mixture for any batch size and write it, weights included, to a ``.pt2`` file; an old one is replaced.

    The code fits this version of torch, and this machine's processor or its CUDA device if the mixture is on one. It takes tens
    of seconds and a C++ compiler (``g++``, or what ``CXX`` names); what is generated on the way stays in the folder that
    ``TORCHINDUCTOR_CACHE_DIR`` names.

    Args:
        mixture: The reference, in eval mode. Its ``top_k`` must keep every expert.
        path: Where to write; the name must end in ``.pt2``.
        dtype: What the experts compute in; ``None`` chooses :func:`model.fast.fastest_dtype`.
        stack: Experts per network of grouped convolutions; ``None`` stacks all.

    Raises:
        ValueError: The name ends otherwise, the mixture is in training mode or skips experts, or ``stack`` is out of range.
    """
    if path.suffix != ".pt2":
        raise ValueError(f"{path}: the name of a package must end in .pt2")
    dense = DenseMixture(mixture, dtype, stack)
    architecture = dense.architecture
    example = torch.zeros(2, 3, architecture.height, architecture.input_width, device=dense.device)
    facts = {
        "architecture": json.dumps(architecture.to_json()),
        "device": dense.device.type,
        "dtype": str(dense.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial.pt2")
    try:
        with torch.no_grad():
            shapes = ({0: torch.export.Dim("batch", min=1)},)
            exported = torch.export.export(dense, (example,), dynamic_shapes=shapes)
            options = {**FREEZING, "aot_inductor.metadata": facts}
            torch._inductor.aoti_compile_and_package(exported, package_path=str(partial), inductor_configs=options)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class PackagedMixture:
    """A mixture that only predicts, loaded from a package that :func:`export_package` wrote.

    **A package is a program.** Loading runs the native code in the file with all the rights of this process, and no check can
    tell good code from bad: load packages only from a folder that nobody but you can write to. A checkpoint, in contrast, is
    only numbers. Loading unpacks the code into the temporary folder (``TMPDIR``), which must allow execution.

    Args:
        path: The package.
        device: Where to run; its type must be the one that the package was made for.

    Raises:
        ValueError: The file is no package, or was made for another version of torch or another type of device. All of this is
            found out before any of its code runs.
    """

    def __init__(self, path: Path, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        facts = _read_facts(path)
        for name, here in (("torch", torch.__version__), ("device", self.device.type)):
            if facts[name] != here:
                raise ValueError(f"{path}: made for {name} {facts[name]}, but this is {name} {here}: export it anew")
        self.architecture = Architecture.from_json(json.loads(facts["architecture"]))
        self.dtype: torch.dtype = getattr(torch, facts["dtype"])
        index = -1 if self.device.index is None else self.device.index
        self._run = torch._inductor.aoti_load_package(str(path), device_index=index)

    @torch.inference_mode()
    def predict(self, images: torch.Tensor) -> Prediction:
        """Classify images ``(B, 3, H, W)``, uint8 or float32 in ``[0, 1]``, on any device; the answer is on the package's."""
        return Prediction(*self._run(as_unit(images, self.architecture, self.device).contiguous()))


def _read_facts(path: Path) -> dict[str, str]:
    """Return what :func:`export_package` noted in a package."""
    facts: dict[str, str] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("_metadata.json"):
                    facts |= json.loads(archive.read(name))
    except (OSError, zipfile.BadZipFile, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a package of a mixture ({error}): export it anew") from error
    missing = {"architecture", "device", "dtype", "torch"} - facts.keys()
    if missing:
        raise ValueError(
            f"{path}: not a package of a mixture (it doesn't note its {', '.join(sorted(missing))}): export it anew"
        )
    return facts
