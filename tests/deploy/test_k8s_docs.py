"""What docs/operations.md says about Kubernetes can be done."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

from tests.deploy.manifests import BUILDS, K8S, KUBECTL, ROOT, build, kustomize, one, pods, service_pod

SECTION = (ROOT / "docs/operations.md").read_text().partition("\n## Kubernetes\n")[2].partition("\n## ")[0]


def test_the_overlay_in_the_documentation_builds(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
    (tmp_path / "kustomization.yaml").write_text(
        example.replace("palisade/k8s/", os.path.relpath(K8S, tmp_path.resolve()) + "/")
    )
    objects = kustomize(tmp_path)
    pod = service_pod(objects)
    assert pod["containers"][0]["image"] == "registry.example.com/palisade:0.1.0"
    settings = one(objects, "ConfigMap", pod["containers"][0]["envFrom"][0]["configMapRef"]["name"])["data"]
    assert settings["PALISADE_TIER_STANDARD_LIMITS"] == "1200/minute;20000/day"
    assert settings["PALISADE_KEYS_FILE"]


def test_the_secrets_that_pods_want_are_those_that_the_commands_make(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("{}")
    made: dict[str, set[str]] = {}
    for command in re.findall(r"^kubectl -n palisade create secret .*", SECTION, re.MULTILINE):
        script = command.replace("kubectl", str(KUBECTL), 1) + " --dry-run=client -o json"
        printed = subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        secret = json.loads(printed)
        made[secret["metadata"]["name"]] = set(secret["data"])
    wanted: dict[str, set[str]] = {}
    for name in BUILDS:
        for _, pod in pods(build(name)):
            for variable in (each for container in pod["containers"] for each in container.get("env", [])):
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    wanted.setdefault(reference["name"], set()).add(reference["key"])
            for volume in pod.get("volumes", []):
                if "secret" in volume:
                    wanted.setdefault(volume["secret"]["secretName"], set()).add("keys.json")
    assert made == wanted


def test_every_path_and_object_in_the_documentation_exists() -> None:
    for path in re.findall(r"(?<![/\w])k8s/[\w./-]*\w", SECTION):
        assert (ROOT / path).exists(), path
    listed = set(re.findall(r"^\| `([\w-]+)` \|", SECTION, re.MULTILINE))
    there = {path.name for folder in ("overlays", "components") for path in (K8S / folder).iterdir() if any(path.iterdir())}
    assert listed == there
    known = {f"{each['kind'].lower()}/{each['metadata']['name']}" for name in BUILDS for each in build(name)}
    assert set(re.findall(r"\b(?:deployment|statefulset)/[\w-]+", SECTION)) <= known
