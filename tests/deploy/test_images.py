"""The Dockerfiles against the code, the manifests and the pins; `make image-check` builds and runs the service's image."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from service.settings import Settings
from tests.deploy.manifests import ROOT, build, one, service_pod
from tests.service.conftest import PATIENCE_S

DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

Instruction = tuple[str, str]


def instructions(dockerfile: Path) -> list[Instruction]:
    """Return a Dockerfile's instructions, each on one line."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    return [
        (words[0].upper(), words[1].strip())
        for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
        if len(words := line.split(maxsplit=1)) == 2
    ]


def given(dockerfile: Path, kind: str) -> list[str]:
    return [value for name, value in instructions(dockerfile) if name == kind]


def variables(dockerfile: Path) -> dict[str, str]:
    return dict(pair.split("=", 1) for line in given(dockerfile, "ENV") for pair in line.split())


def pins(name: str) -> dict[str, set[str]]:
    """Return the versions of each package in a file of requirements, every one of which has a hash."""
    found: dict[str, set[str]] = {}
    for requirement in (ROOT / "requirements" / name).read_text().replace("\\\n", "").splitlines():
        if match := re.match(r"([a-z0-9._-]+)==([^ ;]+)", requirement):
            assert "--hash=sha256:" in requirement
            found.setdefault(match[1], set()).add(match[2])
    return found


def normal(requirement: str) -> str:
    """Return the name of a package as requirement files write it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=; ]", requirement)[0]).lower()


def installed_file(dockerfile: Path) -> list[str]:
    """Return the files of requirements that a Dockerfile copies."""
    copied = [word for line in given(dockerfile, "COPY") for word in line.split() if word.endswith(".txt")]
    return [Path(word).name for word in copied]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    assert hadolint.exists(), "hadolint is not installed: `make setup` puts it into .venv"
    done = subprocess.run([hadolint, "--no-color", dockerfile], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_builds_need_no_registry_but_the_base_and_only_pinned_packages(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    assert "syntax=" not in text  # a frontend that would be pulled
    assert "<<" not in text
    assert "ARG BASE=python:3.11-slim-bookworm\n" in text
    stages = {words.split(" AS ")[1] for words in given(dockerfile, "FROM") if " AS " in words}
    origins = {words.split(" AS ")[0] for words in given(dockerfile, "FROM")}
    assert origins <= stages | {"${BASE}", "${VARIANT}"}
    steps = " ".join(given(dockerfile, "RUN"))
    for install in re.findall(r"(?:pip install|pip sync)[^&]*", steps):
        assert "--require-hashes" in install or "--no-deps" in install, install
    for name in installed_file(dockerfile):
        for variant in ("cpu", "cuda"):
            assert pins(name.replace("${VARIANT}", variant))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_labelled_and_start_without_a_shell(dockerfile: Path) -> None:
    for kind in ("ENTRYPOINT", "CMD"):
        (command,) = given(dockerfile, kind)
        assert json.loads(command)
    labels = dict(re.findall(r'org\.opencontainers\.image\.([a-z.]+)="([^"]*)"', " ".join(given(dockerfile, "LABEL"))))
    assert labels.keys() == {"title", "description", "version", "revision", "licenses", "base.name"}
    assert labels["licenses"] == PROJECT["license"]
    assert f"VERSION={PROJECT['version']}" in given(dockerfile, "ARG")


def test_the_services_user_ports_and_variables_are_those_of_the_manifests_and_the_code() -> None:
    dockerfile = DOCKER / "service.Dockerfile"
    pod = service_pod(build("overlays/cpu"))
    own = pod["securityContext"]
    assert given(dockerfile, "USER") == [f"{own['runAsUser']}:{own['runAsGroup']}"]
    ports = {port["containerPort"] for port in pod["containers"][0]["ports"]}
    assert {int(port) for port in given(dockerfile, "EXPOSE")[0].split()} == ports
    assert not {"command", "args"} & pod["containers"][0].keys()  # so the image's own are meant
    set_here = {name for name in variables(dockerfile) if name.startswith("PALISADE_")}
    assert set_here <= {f"PALISADE_{name}".upper() for name in Settings.model_fields}
    assert "PALISADE_METRICS_HOST" not in set_here  # loopback, until somebody decides otherwise
    assert variables(dockerfile)["HOME"] == "/tmp"  # the root is read-only
    image = {each["image"] for name in ("cpu", "gpu") for each in service_pod(build(f"overlays/{name}"))["containers"]}
    built = set(re.findall(r"-t (palisade\S+)", dockerfile.read_text()))
    assert image == built == {"palisade:latest", "palisade:latest-cuda"}


def test_the_training_image_is_the_one_that_the_job_names() -> None:
    dockerfile = DOCKER / "training.Dockerfile"
    pod = one(build("training/job"), "Job", "palisade-train")["spec"]["template"]["spec"]
    assert given(dockerfile, "USER") == [f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"]
    assert re.findall(r"-t (palisade\S+)", dockerfile.read_text()) == [pod["containers"][0]["image"]]
    assert "g++" in " ".join(given(dockerfile, "RUN"))  # the job's --compile
    assert "COPY service" not in dockerfile.read_text()


def test_what_the_service_image_installs_is_what_the_service_is_tested_with() -> None:
    tested, cpu, cuda = pins("service.txt"), pins("service-cpu.txt"), pins("service-cuda.txt")
    assert cpu.items() <= tested.items()
    gpu = {normal(requirement) for requirement in PROJECT["optional-dependencies"]["gpu"]}
    dev = pins("dev.txt")
    assert {name: cuda[name] for name in gpu}.items() <= dev.items()
    assert {name: pin for name, pin in cuda.items() if name not in gpu}.items() <= tested.items()
    assert {"openvino", "redis", "opentelemetry-sdk"} <= cpu.keys()
    assert {"torch", "redis", "opentelemetry-sdk"} <= cuda.keys()
    training_only = {normal(requirement) for requirement in PROJECT["optional-dependencies"]["train"]}
    compilers = {"triton", "setuptools"}
    assert not (training_only | compilers) & (cpu.keys() | cuda.keys())
    not_on_cpu = {name for name in cpu if name.startswith(("torch", "nvidia-", "cuda-"))}
    assert not not_on_cpu | (cpu.keys() & {"openvino-telemetry"})
    assert "COPY training" not in (DOCKER / "service.Dockerfile").read_text()


def test_what_the_training_image_installs_is_what_training_is_tested_with() -> None:
    assert pins("training.txt").items() <= pins("dev.txt").items()
    wanted = [*PROJECT["optional-dependencies"]["train"], *PROJECT["optional-dependencies"]["screen"]]
    assert {normal(requirement) for requirement in wanted} <= pins("training.txt").keys()
    assert pins("build.txt").items() <= pins("dev.txt").items()


def test_the_builder_is_sent_what_is_copied_and_no_more() -> None:
    first, *allowed = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in ("", "#")]
    assert first == "*"
    sent = {line.removeprefix("!") for line in allowed if line.startswith("!")}
    copied = set()
    for dockerfile in DOCKERFILES:
        for line in given(dockerfile, "COPY"):
            if "--from=" not in line:
                copied |= {word if word.startswith("docker/") else word.split("/")[0] for word in line.split()[:-1]}
    assert sent == copied
    assert all((ROOT / path).exists() for path in sent)


@contextmanager
def something_that_answers(status: int) -> Iterator[int]:
    """A server that answers every GET with one status; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def health(port: int, host: str = "0.0.0.0") -> int:
    (check,) = given(DOCKER / "service.Dockerfile", "HEALTHCHECK")
    python, *arguments, script = json.loads(check.partition(" CMD ")[2])
    copied = dict(line.split() for line in given(DOCKER / "service.Dockerfile", "COPY") if "healthcheck" in line)
    assert (python, copied["docker/healthcheck.py"]) == ("python", script)
    done = subprocess.run(
        [sys.executable, *arguments, DOCKER / "healthcheck.py"],
        env={"PALISADE_HOST": host, "PALISADE_PORT": str(port)},
        stdout=subprocess.DEVNULL,
        timeout=PATIENCE_S,
    )
    return done.returncode


def test_the_health_check_tells_a_service_that_answers_from_one_that_does_not() -> None:
    with something_that_answers(200) as port:
        assert health(port) == health(port, "127.0.0.1") == 0
    assert health(port) == 1  # nobody listens any more
    with something_that_answers(503) as port:
        assert health(port) == 1


def test_the_bill_of_materials_must_agree_with_the_pins(tmp_path: Path) -> None:
    def bill(**versions: str) -> Path:
        packages = [
            {
                "name": name,
                "versionInfo": version,
                "externalRefs": [{"referenceLocator": f"pkg:pypi/{name}@{version}"}],
            }
            for name, version in versions.items()
        ]
        debian = {"name": "pip", "versionInfo": "1", "externalRefs": [{"referenceLocator": "pkg:deb/debian/pip@1"}]}
        (tmp_path / "bill.json").write_text(json.dumps({"packages": [*packages, debian, {"name": "image"}]}))
        return tmp_path / "bill.json"

    def compare(listed: Path) -> tuple[int, str]:
        command = [sys.executable, DOCKER / "checks/bill.py", listed, pinned]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        return done.returncode, done.stdout

    pinned = tmp_path / "pins.txt"
    pinned.write_text("a-b==1.0 \\\n    --hash=sha256:00\nold==2 ; python_full_version < '3'\n    # via a-b\n")
    assert compare(bill(palisade="0.1", A_b="1.0"))[0] == 0
    assert compare(bill(palisade="0.1", A_b="1.0", old="2"))[0] == 0
    status, said = compare(bill(A_b="1.1", pip="3"))
    assert status == 1
    for difference in ("a-b 1.1 is in the image and not pinned", "pip 3 is", "a-b 1.0 is pinned and not", "palisade itself"):
        assert difference in said
