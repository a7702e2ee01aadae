"""The manifests agree with the code, with each other, and with Kubernetes' strictest rules for pods."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath

import pytest
import yaml

from service.metrics import Metrics
from service.settings import Settings
from tests.deploy.manifests import (
    BUILDS,
    EVERYTHING,
    K8S,
    SERVING,
    Manifest,
    build,
    environment,
    of_kind,
    one,
    pods,
    service_pod,
)

MIB = 2**20
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def size(quantity: str) -> int:
    """Read a quantity of memory."""
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def settings_of(objects: tuple[Manifest, ...]) -> Settings:
    """Return the settings that the service starts with; raises for one that it would not take."""
    values = environment(objects, service_pod(objects)["containers"][0])
    values |= {"PALISADE_THREADS": "2"} if values["PALISADE_THREADS"] == "<resourceFieldRef>" else {}
    return Settings(
        **{name.removeprefix("PALISADE_").lower(): value for name, value in values.items() if name.startswith("PALISADE_")}
    )


@pytest.mark.parametrize("name", BUILDS)
def test_every_variable_is_a_setting(name: str) -> None:
    known = {f"PALISADE_{field}".upper() for field in Settings.model_fields}
    for where, pod in pods(build(name)):
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            given = {variable for variable in environment(build(name), container) if variable.startswith("PALISADE_")}
            assert given <= known, where


@pytest.mark.parametrize("name", [*SERVING, "components/kserve"])
def test_the_service_takes_the_values(name: str) -> None:
    settings = settings_of(build(name))
    assert settings.host == settings.metrics_host == "0.0.0.0"
    assert settings.limits == "on"


@pytest.mark.parametrize("name", BUILDS)
def test_pods_are_restricted(name: str) -> None:
    """What Pod Security's level `restricted` asks, and a read-only root besides."""
    for where, pod in pods(build(name)):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), where
        kinds = {kind for volume in pod.get("volumes", []) for kind in volume if kind != "name"}
        assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}, where
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            own = {**pod.get("securityContext", {}), **container["securityContext"]}
            assert own["allowPrivilegeEscalation"] is False, where
            assert own["capabilities"] == {"drop": ["ALL"]}, where
            assert own["seccompProfile"] == {"type": "RuntimeDefault"}, where
            assert own["runAsNonRoot"] is True, where
            assert own["runAsUser"] > 0, where
            assert own["readOnlyRootFilesystem"] is True, where
            assert not own.get("privileged"), where
            assert not any("hostPort" in port for port in container.get("ports", [])), where


@pytest.mark.parametrize("name", SERVING)
def test_the_namespace_refuses_other_pods(name: str) -> None:
    (namespace,) = of_kind(build(name), "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    inside = {each["metadata"].get("namespace") for each in build(name) if each["kind"] != "Namespace"}
    assert inside == {namespace["metadata"]["name"]}


@pytest.mark.parametrize("name", BUILDS)
def test_no_pod_has_a_token_of_the_api_server(name: str) -> None:
    for account in of_kind(build(name), "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    for where, pod in pods(build(name)):
        assert pod["automountServiceAccountToken"] is False, where
        assert pod["enableServiceLinks"] is False, where  # which would set PALISADE_PORT


@pytest.mark.parametrize("name", BUILDS)
def test_no_secret_is_in_the_repository(name: str) -> None:
    assert of_kind(build(name), "Secret") == []


@pytest.mark.parametrize("name", [*SERVING, "components/kserve"])
def test_a_pod_lives_until_it_has_drained(name: str) -> None:
    pod, settings = service_pod(build(name)), settings_of(build(name))
    unknown_s = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]  # what a proxy may take to learn of it
    leaving_s, draining_s = settings.drain_delay_ms / 1000, settings.drain_deadline_ms / 1000
    assert unknown_s >= 5
    assert leaving_s >= 1
    assert draining_s >= settings.request_deadline_ms / 1000
    assert pod["terminationGracePeriodSeconds"] >= unknown_s + leaving_s + draining_s + 5


@pytest.mark.parametrize("name", [*SERVING, "components/kserve"])
def test_ports_are_those_that_the_service_opens(name: str) -> None:
    objects = build(name)
    settings, container = settings_of(objects), service_pod(objects)["containers"][0]
    opened = {settings.port, settings.metrics_port}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert set(ports.values()) <= opened
    assert ports.get("metrics", settings.metrics_port) == settings.metrics_port
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        port = container[probe]["httpGet"]["port"]
        assert ports.get(port, port) == settings.port
    for service in of_kind(objects, "Service"):
        if service["spec"]["selector"] == {"app.kubernetes.io/name": "palisade"}:
            for port in service["spec"]["ports"]:
                assert port["port"] == ports[port["targetPort"]]
    for runtime in of_kind(objects, "ServingRuntime"):
        assert runtime["spec"]["annotations"]["prometheus.kserve.io/port"] == str(settings.metrics_port)


@pytest.mark.parametrize("name", SERVING)
def test_network_policies_name_ports_of_the_pods_and_keep_metrics_from_callers(name: str) -> None:
    objects = build(name)
    selected = {
        workload["spec"]["selector"]["matchLabels"]["app.kubernetes.io/name"]: {
            port["name"] for port in workload["spec"]["template"]["spec"]["containers"][0]["ports"]
        }
        for workload in (*of_kind(objects, "Deployment"), *of_kind(objects, "StatefulSet"))
    }
    policies = {
        policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/name"]: policy["spec"]
        for policy in of_kind(objects, "NetworkPolicy")
    }
    assert policies.keys() == selected.keys()
    for app, policy in policies.items():
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        for rule in policy["ingress"]:
            named = {port["port"] for port in rule["ports"]}
            assert named <= selected[app]
            assert named == {"http"} or rule["from"]
        assert all(rule["ports"] for rule in policy["egress"])


@pytest.mark.parametrize("name", SERVING)
def test_several_replicas_share_their_quotas(name: str) -> None:
    objects = build(name)
    deployment = one(objects, "Deployment")["spec"]
    scalers = of_kind(objects, "HorizontalPodAutoscaler") + of_kind(objects, "ScaledObject")
    assert len(scalers) <= 1
    store = settings_of(objects).limiter_store.get_secret_value()
    if scalers:
        assert "replicas" not in deployment  # an apply would set them back
        spec = scalers[0]["spec"]
        assert spec["scaleTargetRef"]["name"] == "palisade"
        assert spec.get("minReplicas", spec.get("minReplicaCount")) >= 2
    if scalers or deployment["replicas"] > 1:
        assert store.startswith("redis://")
    if store != "memory://":
        server = one(objects, "Service", "palisade-redis")
        host, _, port = re.sub(r".*@|/0", "", store).partition(":")
        assert (host, int(port)) == (server["metadata"]["name"], server["spec"]["ports"][0]["port"])
        assert environment(objects, service_pod(objects)["containers"][0])["PALISADE_LIMITER_SECRET"] == "<secretKeyRef>"
        assert one(objects, "StatefulSet", "palisade-redis")["spec"]["replicas"] == 1


def test_the_scaled_overlay_has_redis_and_the_autoscaler() -> None:
    objects = build("overlays/scaled")
    assert of_kind(objects, "HorizontalPodAutoscaler")
    assert settings_of(objects).limiter_store.get_secret_value() == "redis://palisade:$(REDIS_PASSWORD)@palisade-redis:6379/0"


def test_keda_takes_the_autoscalers_place() -> None:
    assert of_kind(build("components/keda"), "HorizontalPodAutoscaler") == []
    assert of_kind(build("components/keda"), "ScaledObject")


def exposed_series() -> set[str]:
    """Every name that a sample on the metrics port can have."""
    endings = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}
    return {metric.name + ending for metric in Metrics().registry.collect() for ending in endings.get(metric.type, [])}


def test_autoscalers_ask_for_series_that_exist() -> None:
    asked = [trigger["metadata"]["query"] for trigger in one(build("components/keda"), "ScaledObject")["spec"]["triggers"]]
    rules = yaml.safe_load((K8S / "overlays/scaled/adapter-rules.yaml").read_text())["rules"]["custom"]
    asked += [rule["seriesQuery"] for rule in rules]
    names = [set(re.findall(r"palisade_\w+", query)) for query in asked]
    assert len(names) == 4
    assert all(len(found) == 1 and found <= exposed_series() for found in names)
    scaler = one(build("overlays/scaled"), "HorizontalPodAutoscaler")["spec"]
    shown = {metric["pods"]["metric"]["name"] for metric in scaler["metrics"] if metric["type"] == "Pods"}
    assert shown == {rule["name"]["as"] for rule in rules}


@pytest.mark.parametrize("name", [name for name in SERVING if name != "overlays/dev"])
def test_keys_come_from_a_secret(name: str) -> None:
    pod, file = service_pod(build(name)), PurePosixPath(settings_of(build(name)).keys_file)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    (mount,) = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["mountPath"] == str(file.parent)]
    assert "subPath" not in mount  # a changed Secret would not reach the pod
    assert volumes[mount["name"]]["secret"]["secretName"] == "palisade-keys"


@pytest.mark.parametrize("name", [*SERVING, "components/kserve"])
def test_memory_holds_what_the_service_may_need(name: str) -> None:
    """550 MiB were measured under load; bodies in flight and watched callers come on top in the worst case."""
    settings, resources = settings_of(build(name)), service_pod(build(name))["containers"][0]["resources"]
    worst = 550 * MIB + settings.max_in_flight_bytes + 72_000 * settings.watch_max_callers
    assert size(resources["requests"]["memory"]) >= 550 * MIB
    assert size(resources["limits"]["memory"]) >= worst


def test_a_gpu_is_asked_for_tolerated_and_used() -> None:
    pod = service_pod(build("overlays/gpu"))
    assert settings_of(build("overlays/gpu")).device == "cuda"
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert [toleration["key"] for toleration in pod["tolerations"]] == ["nvidia.com/gpu"]
    assert pod["containers"][0]["image"] == "palisade:latest-cuda"


@pytest.mark.parametrize("name", BUILDS)
def test_every_mount_has_its_volume(name: str) -> None:
    for where, pod in pods(build(name)):
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        if where.startswith("StatefulSet"):
            claims = one(build(name), "StatefulSet", "palisade-redis")["spec"]["volumeClaimTemplates"]
            volumes |= {claim["metadata"]["name"] for claim in claims}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, where
            if container["name"] == "palisade":
                folder = PurePosixPath(environment(build(name), container)["PALISADE_ADMIN_SOCKET"]).parent
                assert str(folder) in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_ingress_lets_through_what_the_service_takes() -> None:
    objects = build("components/ingress")
    ingress, settings = one(objects, "Ingress"), settings_of(objects)
    notes = {key.rpartition("/")[2]: value for key, value in ingress["metadata"]["annotations"].items()}
    assert int(notes["proxy-body-size"].removesuffix("m")) * MIB == settings.max_body_bytes
    assert int(notes["proxy-read-timeout"]) > settings.request_deadline_ms / 1000
    backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend["port"]["name"] in {port["name"] for port in one(objects, "Service", backend["name"])["spec"]["ports"]}
    assert settings.trusted_proxies  # or all callers would share the controller's quota
    (rule,) = one(objects, "NetworkPolicy")["spec"]["ingress"]
    assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}}]


def test_prometheus_finds_the_metrics_port() -> None:
    objects = build("components/monitoring")
    monitor = one(objects, "ServiceMonitor")["spec"]
    (service,) = [
        each
        for each in of_kind(objects, "Service")
        if monitor["selector"]["matchLabels"].items() <= each["metadata"]["labels"].items()
    ]
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "palisade"
    (endpoint,) = monitor["endpoints"]
    (port,) = [port for port in service["spec"]["ports"] if port["name"] == endpoint["port"]]
    assert port["port"] == settings_of(objects).metrics_port
    assert service["spec"]["selector"].items() <= one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    rules = one(objects, "NetworkPolicy")["spec"]["ingress"]
    (rule,) = [rule for rule in rules if rule["ports"] == [{"port": "metrics"}]]
    assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]


def test_grafana_finds_the_dashboard() -> None:
    (dashboard,) = [each for each in of_kind(build("components/monitoring"), "ConfigMap") if "palisade.json" in each["data"]]
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(dashboard["data"]["palisade.json"]) == json.loads(
        (K8S / "components/monitoring/dashboard.json").read_text()
    )


def test_all_components_fit_together() -> None:
    objects = build(EVERYTHING)
    assert of_kind(objects, "ScaledObject")
    assert settings_of(objects).checkpoint == "/models/checkpoint.safetensors"
    assert settings_of(objects).trusted_proxies
