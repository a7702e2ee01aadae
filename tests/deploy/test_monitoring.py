"""Metrics, alerts and the dashboard, as a real Prometheus has them of a real service of several processes."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from benchmarks.ports import held_port
from benchmarks.running_service import RunningService, running_service
from service.gpu import READINGS
from tests.service.conftest import PATIENCE_S, eventually
from tests.service.pictures import MULTIPART, encode, multipart, noise

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "k8s/components/monitoring"
OPERATIONS = (ROOT / "docs/operations.md").read_text()
RULES = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}
STORIES = yaml.safe_load((Path(__file__).parent / "rules_test.yaml").read_text())["tests"]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
IMAGES_A_ROUND = 4


def need_prometheus() -> None:
    """Skip what can't be tested without it; Debian's package has promtool, too."""
    if shutil.which("prometheus") is None or shutil.which("promtool") is None:
        pytest.skip("prometheus is not installed")


def promtool(*arguments: str, **options: Any) -> None:
    need_prometheus()
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """A server that scrapes one service every second and evaluates our rules as often."""

    def __init__(self, folder: Path, target: str, port: int) -> None:
        (folder / "rules.yaml").write_text(yaml.safe_dump(RULES))
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "palisade", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self._log = folder / "log"
        command = ["prometheus", "--config.file=prometheus.yaml", "--storage.tsdb.path=data", "--log.level=warn"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, f"--web.listen-address=127.0.0.1:{port}"], cwd=folder, stdout=log, stderr=log
            )
        self._api = httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=PATIENCE_S)

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its HTTP API."""
        reply = self._api.get(path, params=parameters)
        assert reply.status_code == 200, reply.text
        return reply.json()["data"]

    def query(self, expression: str) -> dict[frozenset[tuple[str, str]], float]:
        """The values of an expression now, by labels."""
        result = self.get("/query", query=expression)["result"]
        return {frozenset(each["metric"].items()): float(each["value"][1]) for each in result}

    def total(self, expression: str) -> float:
        return sum(self.query(expression).values())

    def is_up(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()
        try:
            reply = self._api.get("/query", params={"query": "up"})
        except httpx.TransportError:
            return False
        return reply.status_code == 200 and [each["value"][1] for each in reply.json()["data"]["result"]] == ["1"]

    def close(self) -> None:
        self._api.close()
        self.process.terminate()
        self.process.wait(PATIENCE_S)


def send_a_round(url: str, seed: int) -> None:
    """Send what makes every series move that needs no accident: both protocols, and something that is refused."""
    pixels = np.random.default_rng(seed).integers(0, 256, 3 * 32 * 32).tolist()
    tensor = {"name": "images", "shape": [1, 3, 32, 32], "datatype": "UINT8", "data": pixels}
    pictures = multipart(*(encode(noise(10 * seed + each)) for each in range(IMAGES_A_ROUND - 1)))
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        good = client.post("/v1/classify", content=pictures, headers={"Content-Type": MULTIPART})
        assert good.status_code == 200, good.text
        assert client.post("/v2/models/palisade/infer", json={"inputs": [tensor]}).status_code == 200
        assert client.post("/v1/classify", content=b"x", headers={"Content-Type": "text/plain"}).status_code == 415


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    need_prometheus()
    with running_service(frontends=2, threads=1) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(service: RunningService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that has seen two rounds of traffic, and what came between them."""
    with held_port() as port:
        server = Prometheus(tmp_path_factory.mktemp("prometheus"), httpx.URL(service.metrics_url).netloc.decode(), port)
        try:
            eventually(server.is_up, "Prometheus scrapes the service")
            for sent in (1, 2):
                send_a_round(service.url, seed=sent)
                # The last of them: it is counted when its reply is already on its way.
                refused = 'palisade_requests_total{route="/v1/classify", code="415"}'
                eventually(lambda sent=sent, refused=refused: server.total(refused) == sent, "a round is counted")  # type: ignore[misc]
            yield server
        finally:
            server.close()


def documented() -> dict[str, tuple[set[str], str]]:
    """The labels and the type of every series in the documentation's table, but for those that only a GPU has."""
    rows = re.findall(r"^\| `((?:palisade|process)_\w+)(?:\{([\w,]+)\})?` \| (\w+) \|", OPERATIONS, re.MULTILINE)
    return {name: (set(filter(None, labels.split(","))), kind) for name, labels, kind in rows if name not in READINGS}


def test_prometheus_has_every_documented_series_with_its_labels_and_type(prometheus: Prometheus) -> None:
    series = documented()
    assert len(series) > 20
    kinds = {each["metric"]: each["type"] for each in prometheus.get("/targets/metadata")}
    for name, (labels, kind) in series.items():
        parts = [f"{name}_{part}" for part in ("bucket", "sum", "count")] if kind == "histogram" else [name]
        assert kinds.get(name, kinds.get(name.removesuffix("_total"))) == kind, name
        for part in parts:
            found = prometheus.get("/series", **{"match[]": part})
            assert found, f"{part} is documented and not there"
            expected = labels | {"__name__", "job", "instance"} | ({"le"} if part.endswith("_bucket") else set())
            assert all(set(each) == expected for each in found), f"{part}: {found[0]}"


def test_prometheus_has_nothing_of_ours_that_is_not_documented(prometheus: Prometheus) -> None:
    names = {name for name in prometheus.get("/label/__name__/values") if name.startswith(("palisade_", "process_"))}
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in names} == documented().keys()


def test_prometheus_counts_what_was_sent(prometheus: Prometheus) -> None:
    counts = {
        'palisade_requests_total{route="/v1/classify", code="200"}': 2,
        'palisade_requests_total{route="/v2/models/palisade/infer", code="200"}': 2,
        'palisade_request_duration_seconds_count{route="/v1/classify"}': 4,
        'palisade_rejected_total{reason="unsupported-type"}': 2,
        "palisade_predictions_total": 2 * IMAGES_A_ROUND,
        "palisade_batch_size_images_sum": 2 * IMAGES_A_ROUND,
        "palisade_gate_entropy_count": 2 * IMAGES_A_ROUND,
        "palisade_decode_seconds_count": 4,
        "palisade_queue_wait_seconds_count": 4,
        "palisade_queue_images": 0,
        "palisade_queue_capacity_images": 512,
        "palisade_ready": 1,
        "palisade_limiter_store_up": 1,
        "palisade_model_info": 1,
        "palisade_processes": 4,
        "palisade_engine_restarts_total": 0,
        "palisade_suspicious_total": 0,
        "palisade_quota_denied_total": 0,
        "palisade_limiter_fallback_total": 0,
    }
    eventually(lambda: {name: prometheus.total(name) for name in counts} == counts, "all of it is counted")
    assert prometheus.total("palisade_expert_weight_total") == pytest.approx(2 * IMAGES_A_ROUND, rel=0.01)
    batches = prometheus.total("palisade_batch_size_images_count")
    assert 4 <= batches <= 2 * IMAGES_A_ROUND
    assert prometheus.total("palisade_inference_seconds_count") == batches


def test_promtool_finds_nothing_wrong_with_the_metrics(service: RunningService) -> None:
    promtool("check", "metrics", input=httpx.get(service.metrics_url, timeout=PATIENCE_S).text)


def expressions() -> list[Any]:
    return [
        pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
        for panel in PANELS
        for target in panel["targets"]
    ]


def fill_in(expression: str) -> str:
    """An expression as Grafana sends it, with every namespace and job chosen."""
    return expression.replace("$namespace", ".*").replace("$job", ".*").replace("$__rate_interval", "10m")


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_of_the_dashboard_returns_data(prometheus: Prometheus, expression: str) -> None:
    assert "$" not in fill_in(expression)

    def has_data() -> bool:
        values = prometheus.query(fill_in(expression)).values()
        return bool(values) and all(math.isfinite(value) for value in values)

    if any(name in expression for name in READINGS):
        assert prometheus.query(fill_in(expression)) == {}, "the service has no GPU"
        return
    eventually(has_data, f"data of {expression}")


def test_the_dashboard_has_a_row_for_every_subject_and_no_two_panels_in_one_place() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Objectives", "Traffic", "Latency", "Batching", "Experts and gate", "Defence", "Saturation", "GPU"]
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_dashboard_marks_alerts_that_fire(prometheus: Prometheus) -> None:
    (annotation,) = DASHBOARD["annotations"]["list"]
    assert prometheus.query(annotation["expr"]) == {}, "all is well"


def test_prometheus_evaluates_every_rule_and_nothing_fires_while_all_is_well(prometheus: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in prometheus.get("/rules")["groups"] for rule in group["rules"]]

    eventually(lambda: all(rule["health"] == "ok" for rule in rules()), "every rule is evaluated")
    assert {rule["name"] for rule in rules()} >= ALERTS.keys()
    recorded = [rule["name"] for rule in rules() if rule["type"] == "recording"]
    assert len(recorded) == 14
    for name in recorded:
        eventually(lambda name=name: -1e-9 <= prometheus.total(name) <= 1, name)  # type: ignore[misc]

    def firing() -> list[str]:  # whether answers are slow is this machine's business
        return [rule["name"] for rule in rules() if rule.get("alerts") and "Latency" not in rule["name"]]

    eventually(lambda: not firing(), "nothing fires")


def test_promtool_finds_nothing_wrong_with_the_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES))
    promtool("check", "rules", "--lint-fatal", str(tmp_path / "rules.yaml"))


def test_the_alerts_fire_and_are_silent_as_their_stories_tell(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES))
    shutil.copy(Path(__file__).parent / "rules_test.yaml", tmp_path)
    promtool("test", "rules", "rules_test.yaml", cwd=tmp_path)


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_story_in_which_it_fires_and_one_in_which_it_does_not(alert: str) -> None:
    checks = [check for story in STORIES for check in story["alert_rule_test"] if check["alertname"] == alert]
    assert {bool(check["exp_alerts"]) for check in checks} == {True, False}


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_leads_to_its_runbook(alert: str) -> None:
    assert ALERTS[alert]["annotations"]["runbook"] == f"docs/operations.md#{alert.lower()}"
    assert ALERTS[alert]["labels"]["severity"] in ("critical", "warning")
    runbooks = OPERATIONS.partition("\n## Runbooks\n")[2]
    _, _, runbook = runbooks.partition(f"\n### {alert}\n")
    runbook = runbook.partition("\n### ")[0]
    for part in ("What it means", "Look at", "Do"):
        assert f"**{part}.**" in runbook, f"{alert}: {part}"
