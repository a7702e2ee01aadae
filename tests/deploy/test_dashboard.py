"""The dashboard is one that Grafana understands, as far as its schema tells: no field, value or unit that it does not know."""

from __future__ import annotations

import copy
import enum
import json
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.deploy.manifests import K8S

DASHBOARD: dict[str, Any] = json.loads((K8S / "components/monitoring/dashboard.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
NOT_IN_THE_SCHEMA = {"annotations.list.0.titleFormat"}
"""What Grafana's data source for Prometheus reads and its schema of dashboards leaves to data sources."""


@pytest.fixture(scope="module")
def understood() -> Callable[[dict[str, Any]], Any]:
    """Reads a dashboard with the classes that Grafana generates from its schema."""
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    pytest.importorskip("grafana_foundation_sdk.cog.plugins").register_default_plugins()
    read: Callable[[dict[str, Any]], Any] = models.Dashboard.from_json
    return read


def passed_over(given: Any, kept: Any, where: str = "") -> Iterator[str]:
    """Yield the places of what is missing or different in what was made of it."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from passed_over(value, kept.get(key), f"{where}.{key}".lstrip("."))
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for index, (value, other) in enumerate(zip(given, kept, strict=True)):
            yield from passed_over(value, other, f"{where}.{index}")
    elif given != kept:
        yield where


def misfits(value: Any, hint: Any, where: str = "") -> Iterator[str]:
    """Yield the places of values that are not of the type that the schema has there."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if all(list(misfits(value, each)) for each in arguments):
            yield f"{where} is {value!r}, none of {arguments}"
    elif origin in (list, dict) and isinstance(value, origin):
        for key, each in value.items() if origin is dict else enumerate(value):
            yield from misfits(each, arguments[-1], f"{where}.{key}")
    elif hasattr(value, "from_json") and (hint in (object, Any) or isinstance(value, hint)):
        for name, part in typing.get_type_hints(type(value)).items():
            yield from misfits(getattr(value, name), part, f"{where}.{name}".lstrip("."))
    elif not fits(value, hint):
        yield f"{where} is {value!r}, no {hint}"


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value without parts is of a type."""
    if hint in (object, Any):
        return True
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [each.value for each in hint]
    return type(value) in ((int, float) if hint is float else (hint,))


def as_json(model: Any) -> Any:
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    return json.loads(encoder.JSONEncoder().encode(model))


def test_grafana_has_every_field_and_every_value_is_one_that_it_knows(understood: Callable[[dict[str, Any]], Any]) -> None:
    model = understood(DASHBOARD)
    assert set(passed_over(DASHBOARD, as_json(model))) == NOT_IN_THE_SCHEMA
    assert list(misfits(model, object)) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("graphTooltip",), 7),
        (("panels", 6, "gridPos", "h"), "8"),
        (("panels", 6, "options", "legend", "placement"), "botom"),
        (("panels", 6, "options", "tooltip", "mode"), "mlti"),
        (("panels", 6, "fieldConfig", "defaults", "custom", "showPoints"), "nevr"),
        (("templating", "list", 0, "type"), "datasorce"),
        (("panels", 6, "fieldConfig", "defaults", "custom", "showPoint"), "never"),
        (("panels", 6, "targets", 0, "exprr"), "up"),
    ],
    ids=str,
)
def test_a_mistake_would_be_noticed(
    understood: Callable[[dict[str, Any]], Any], place: tuple[str | int, ...], value: object
) -> None:
    changed: Any = copy.deepcopy(DASHBOARD)
    inside = changed
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    model = understood(changed)
    assert list(misfits(model, object)) or set(passed_over(changed, as_json(model))) != NOT_IN_THE_SCHEMA


def test_units_and_kinds_of_panels_are_grafanas() -> None:
    units = pytest.importorskip("grafana_foundation_sdk.models.units")
    names = {value for value in vars(units).values() if isinstance(value, str)}
    for panel in PANELS:
        assert panel["type"] in {"stat", "table", "timeseries", "heatmap"}, panel["title"]
        changes = [change for rule in panel["fieldConfig"]["overrides"] for change in rule["properties"]]
        used = {panel["fieldConfig"]["defaults"]["unit"], *(each["value"] for each in changes if each["id"] == "unit")}
        assert used <= names, panel["title"]


def test_everything_asks_the_data_source_that_was_chosen() -> None:
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    asking = [*PANELS, *DASHBOARD["annotations"]["list"], *(each for each in variables.values() if each["type"] == "query")]
    asking += [target for panel in PANELS for target in panel["targets"]]
    for each in asking:
        assert each["datasource"] == SOURCE
    order = list(variables)
    assert order.index("datasource") < order.index("namespace") < order.index("job"), "each is asked for by the ones before"


def test_a_panel_says_what_it_shows_and_names_each_of_its_queries_once() -> None:
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)
    for panel in PANELS:
        names = [target["refId"] for target in panel["targets"]]
        assert names == sorted(set(names)), panel["title"]
        for target in panel["targets"]:
            assert 'namespace=~"$namespace", job=~"$job"' in target["expr"], "another service's series are none of its business"


def test_no_identity_of_one_grafana_is_left_in_it() -> None:
    """An `id` is a row of one database: importing it elsewhere fails or overwrites another dashboard."""
    assert DASHBOARD.get("id") is None
    assert DASHBOARD["uid"] == "palisade"
    assert DASHBOARD["schemaVersion"] >= 36, "data sources are named by type and uid since then"


def test_rows_follow_each_other_with_their_panels_below_them() -> None:
    """Grafana puts a panel into the row above it in the list, whatever its position says."""
    corners = [(panel["gridPos"]["y"], panel["gridPos"]["x"]) for panel in DASHBOARD["panels"]]
    assert corners == sorted(corners)
    assert all(panel["panels"] == [] for panel in DASHBOARD["panels"] if panel["type"] == "row" and not panel["collapsed"])
