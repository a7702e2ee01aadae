"""The training Job and the TrainJob; the Job's command, on two "nodes" of this machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.ports import held_port
from model.checkpoint import Header, read_header, save_checkpoint
from model.mixture import Mixture
from tests.deploy.manifests import ROOT, TRAINING, build, one, pods
from tests.service.conftest import PATIENCE_S
from tests.training.conftest import SETTINGS
from training.cli import _parser
from training.recipe import RECIPES

COLOURS = ("red", "green", "blue")


def test_job_and_train_job_run_one_command_that_exists() -> None:
    job = one(build("training/job"), "Job", "palisade-train")["spec"]
    train_job = one(build("training/trainjob"), "TrainJob", "palisade-train")["spec"]["trainer"]
    container = job["template"]["spec"]["containers"][0]
    start = container["args"].index("-m")
    assert container["command"] == train_job["command"] == ["torchrun"]
    assert container["args"][start:] == train_job["args"]
    assert train_job["args"][:3] == ["-m", "--", "training.cli"]
    options = _parser().parse_args(train_job["args"][3:])
    assert f"--nnodes={job['completions']}" in container["args"]
    assert job["completions"] == job["parallelism"] == train_job["numNodes"]
    service = one(build("training/job"), "Service", "palisade-train")
    assert f"--master-addr=palisade-train-0.{service['metadata']['name']}" in container["args"]
    assert job["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= job["template"]["metadata"]["labels"].items()
    for name in TRAINING:
        ((_, pod),) = pods(build(name))
        (claim,) = [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
        shared = one(build(name), "PersistentVolumeClaim", claim["persistentVolumeClaim"]["claimName"])
        assert shared["spec"]["accessModes"] == ["ReadWriteMany"]
        (mount,) = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == claim["name"]]
        for path in (options.run, options.out):
            assert path.is_relative_to(mount["mountPath"])


def untrained(path: Path) -> Path:
    """Write a checkpoint of the architecture that ``SETTINGS`` and the colours ask for."""
    recipe = RECIPES["compact"].with_setting("architecture.width=4").with_setting("architecture.gate_width=4")
    architecture = recipe.for_data(len(COLOURS), 8, 8).architecture
    save_checkpoint(path, Mixture(architecture).eval(), Header(architecture, COLOURS, weights_sha256=""))
    return path


@pytest.fixture
def master_port() -> Iterator[int]:
    with held_port() as port:
        yield port


def test_the_workers_reach_each_other_and_names_and_nothing_else() -> None:
    """The Job's pods have the labels of its template; a TrainJob's have its own name from the JobSet that is made of it."""
    job = one(build("training/job"), "Job", "palisade-train")["spec"]["template"]["metadata"]["labels"]
    train_job = one(build("training/trainjob"), "TrainJob", "palisade-train")["metadata"]["name"]
    for name, labels in (("training/job", job), ("training/trainjob", {"jobset.sigs.k8s.io/jobset-name": train_job})):
        policy = one(build(name), "NetworkPolicy", "palisade-train")["spec"]
        selector = policy["podSelector"]["matchLabels"]
        assert selector
        assert selector.items() <= labels.items()
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        each_other = {"podSelector": {"matchLabels": selector}}
        assert policy["ingress"] == [{"from": [each_other]}]
        others, names = policy["egress"]
        assert others == {"to": [each_other]}
        assert {port["port"] for port in names["ports"]} == {53}


def test_the_jobs_pods_train_together(colour_file: Path, tmp_path: Path, master_port: int) -> None:
    job = one(build("training/job"), "Job", "palisade-train")["spec"]
    here = {
        "--master-addr": "127.0.0.1",
        "--master-port": str(master_port),
        "--recipe": "compact",
        "--data": str(colour_file),
        "--run": str(tmp_path / "run"),
        "--out": str(tmp_path / "made.safetensors"),
        "--device": "cpu",
    }
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    settings += ["--init", str(untrained(tmp_path / "init.safetensors")), "--n", "6"]  # experts come one by one: minutes
    nodes = []
    for index in range(job["completions"]):
        arguments = []
        for argument in job["template"]["spec"]["containers"][0]["args"]:
            option, equals, value = argument.partition("=")
            value = here.pop(option, value) if index else here.get(option, value)
            arguments.append(option + equals + value.replace("$(JOB_COMPLETION_INDEX)", str(index)))
        arguments.remove("--compile")  # minutes on a CPU
        command = [sys.executable, "-m", "torch.distributed.run", *arguments, *settings]
        nodes.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    assert here == {}  # every option was there to be replaced
    try:
        said = [node.communicate(timeout=PATIENCE_S)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    header = read_header(tmp_path / "made.safetensors")
    assert header.class_names == COLOURS
    assert header.recipe["joint_training_steps"] == 2
