"""Every object is valid: for the three newest versions of Kubernetes, and for the operators whose objects we write."""

from __future__ import annotations

import json
import subprocess

import pytest
import yaml
from packaging.version import Version

from tests.deploy.manifests import BUILDS, ROOT, Manifest, build

CLIENTS = ROOT / "build/clients/bin/python"
NATIVE = {"v1", "apps/v1", "batch/v1", "autoscaling/v2", "networking.k8s.io/v1", "policy/v1"}


def custom(group: str) -> list[Manifest]:
    """Return every different object of one API group, of all builds."""
    found = {yaml.safe_dump(each): each for name in BUILDS for each in build(name) if each["apiVersion"].startswith(group)}
    assert found
    return list(found.values())


@pytest.mark.parametrize("name", BUILDS)
def test_kubernetes_takes_every_object(name: str) -> None:
    utils = pytest.importorskip("kubernetes_validate.utils")
    newest = sorted(set(utils.all_versions()), key=Version)[-3:]
    assert len(newest) == 3
    for each in build(name):
        for version in newest if each["apiVersion"] in NATIVE else ():
            assert utils.validate(each, version, strict=True) == version.rpartition(".")[0]


@pytest.mark.parametrize("kind", ["ServiceMonitor", "PrometheusRule"])
def test_the_prometheus_operator_takes_its_objects(kind: str) -> None:
    models = pytest.importorskip("cloudcoil.models.prometheus_operator.v1")
    for each in [each for each in custom("monitoring.coreos.com") if each["kind"] == kind]:
        understood = getattr(models, kind).model_validate(each)
        assert understood.model_dump(by_alias=True, exclude_unset=True, mode="json") == each  # nothing was passed over


def test_keda_takes_its_object() -> None:
    models = pytest.importorskip("cloudcoil.models.keda.v1alpha1")
    for each in custom("keda.sh"):
        understood = models.ScaledObject.model_validate(each)
        assert understood.model_dump(by_alias=True, exclude_unset=True, mode="json") == each  # nothing was passed over


def test_kubeflow_takes_its_objects() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    for each in custom("trainer.kubeflow.org"):
        understood = getattr(models, f"TrainerV1alpha1{each['kind']}").from_dict(each)
        assert understood.to_dict() == each  # nothing was passed over


KSERVE = """
import json, re, sys
import kserve.models as models

def check(value, kind, where):
    if kind.startswith("list["):
        for each in value:
            check(each, kind[5:-1], where)
    elif kind.startswith("dict("):
        for key, each in value.items():
            check(each, kind[5:-1].split(", ")[1], f"{where}.{key}")
    elif hasattr(models, kind):
        model = getattr(models, kind)
        names = {given: own for own, given in model.attribute_map.items()}
        for key, each in value.items():
            assert key in names, f"{where} has no field {key}"
            check(each, model.openapi_types[names[key]], f"{where}.{key}")
    elif kind in ("str", "int", "bool"):
        assert type(value).__name__ == kind, f"{where} is {value!r}, not {kind}"

for manifest in json.load(sys.stdin):
    version = manifest["apiVersion"].rpartition("/")[2].capitalize()
    check(manifest, version + manifest["kind"], manifest["kind"])
    print(manifest["kind"])
"""


@pytest.mark.skipif(not CLIENTS.exists(), reason="kserve's client is not installed: make clients")
def test_kserve_takes_its_objects() -> None:
    objects = custom("serving.kserve.io")
    checked = subprocess.run(
        [str(CLIENTS), "-c", KSERVE], input=json.dumps(objects), capture_output=True, text=True, timeout=300
    )
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.split() == [each["kind"] for each in objects]
