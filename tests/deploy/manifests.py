"""What kustomize makes of k8s/: every overlay as it is, and every component on an overlay that it is meant for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
KUBECTL = shutil.which("kubectl", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))

Manifest = dict[str, Any]

OVERLAYS = sorted(f"overlays/{path.name}" for path in (K8S / "overlays").iterdir())
TRAINING = ["training/job", "training/trainjob"]
ON_TOP = {
    "redis": "overlays/cpu",
    "monitoring": "overlays/gpu",
    "keda": "overlays/scaled",
    "kserve": None,  # it takes the base's place
    "ingress": "overlays/cpu",
    "model-from-url": "overlays/cpu",
    "keys": "overlays/dev",
}
"""What each component is built on here."""

EVERYTHING = "overlays/scaled with every component"
BUILDS = [*OVERLAYS, *TRAINING, *(f"components/{name}" for name in ON_TOP), EVERYTHING]
SERVING = [name for name in BUILDS if name not in (*TRAINING, "components/kserve")]
"""The builds that have the Deployment of the service."""


@cache
def build(name: str) -> tuple[Manifest, ...]:
    """Return the objects of a build, one of ``BUILDS``."""
    if name == EVERYTHING:
        return _kustomize_on("overlays/scaled", ["keda", "monitoring", "ingress", "model-from-url"])
    folder, _, component = name.partition("/")
    if folder == "components":
        return _kustomize_on(ON_TOP[component], [component])
    return kustomize(K8S / name)


def kustomize(folder: Path) -> tuple[Manifest, ...]:
    """Return the objects of a kustomization."""
    assert KUBECTL, "kubectl is not installed: `make setup` puts it into .venv"
    made = subprocess.run([KUBECTL, "kustomize", str(folder)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert not made.stderr, made.stderr  # a warning of something deprecated
    return tuple(yaml.safe_load_all(made.stdout))


def _kustomize_on(overlay: str | None, components: list[str]) -> tuple[Manifest, ...]:
    with tempfile.TemporaryDirectory() as folder:
        top = os.path.relpath(K8S, Path(folder).resolve())
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [f"{top}/{overlay}"] if overlay else [],
            "components": [f"{top}/components/{name}" for name in components],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return kustomize(Path(folder))


def of_kind(objects: tuple[Manifest, ...], kind: str) -> list[Manifest]:
    """Return the objects of one kind."""
    return [each for each in objects if each["kind"] == kind]


def one(objects: tuple[Manifest, ...], kind: str, name: str = "palisade") -> Manifest:
    """Return the only object of a kind and name."""
    (found,) = [each for each in of_kind(objects, kind) if each["metadata"]["name"] == name]
    return found


def pods(objects: tuple[Manifest, ...]) -> Iterator[tuple[str, Manifest]]:
    """Yield every pod's specification, with the object that it belongs to."""
    for each in objects:
        where = f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield where, each["spec"]["template"]["spec"]
        elif each["kind"] == "ServingRuntime":
            predictor = one(objects, "InferenceService")["spec"]["predictor"]
            yield where, {**predictor, **each["spec"]}
        elif each["kind"] == "TrainingRuntime":
            for job in each["spec"]["template"]["spec"]["replicatedJobs"]:
                yield where, job["template"]["spec"]["template"]["spec"]


def service_pod(objects: tuple[Manifest, ...]) -> Manifest:
    """Return the specification of the pod that serves, by a Deployment or by KServe."""
    (found,) = [pod for where, pod in pods(objects) if where in ("Deployment palisade", "ServingRuntime palisade")]
    return found


def environment(objects: tuple[Manifest, ...], container: Manifest) -> dict[str, str]:
    """Return a container's variables; ``<what it comes from>`` for those that the cluster fills in."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= one(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in container.get("env", []):
        found[variable["name"]] = variable.get("value", f"<{next(iter(variable.get('valueFrom', {'': 0})))}>")
    return found


def main() -> None:
    """Write every build into a folder, for tools that read files."""
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in BUILDS:
        (folder / f"{name.replace('/', '-').replace(' ', '-')}.yaml").write_text(yaml.safe_dump_all(build(name)))


if __name__ == "__main__":
    main()
