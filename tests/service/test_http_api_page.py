"""docs/http-api.md says what the OpenAPI document says, which the running service is held to."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import pytest

from service import examples, openapi
from service.openapi import ProblemView
from service.quota import Level, rate_limit_headers
from service.settings import Settings
from tests.service.conftest import ROOT, SharedEngine, serve_in_process

PAGE = (ROOT / "docs/http-api.md").read_text()
VERSIONED = "/versions/{version}"
ADMIN = {ROOT / "service/admin.py", ROOT / "service/reload.py"}  # what they refuse is told on the admin socket alone


@pytest.fixture
async def document(engine: SharedEngine) -> dict[str, Any]:
    async with serve_in_process(engine) as served, served.client() as client:
        found: dict[str, Any] = (await client.get("/openapi.json")).json()
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its own heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


async def test_the_page_lists_every_route_with_its_statuses(document: dict[str, Any]) -> None:
    listed = {route.strip("`"): statuses.split() for route, statuses, _ in rows("Routes")}
    assert listed.pop("GET /") == ["200", "304"]  # the page for people, which the document leaves out
    described = {name: list(operation["responses"]) for name, operation in operations(document)}
    for name in [name for name in described if VERSIONED in name]:
        assert described.pop(name) == listed[name.replace(VERSIONED, "")]
    assert {name: sorted(statuses) for name, statuses in described.items()} == listed


async def test_the_page_lists_every_header(document: dict[str, Any]) -> None:
    listed = {name for names, *_ in rows("Headers") for name in re.findall(r"`([^`]+)`", names)}
    sent = {one["name"] for _, operation in operations(document) for one in operation["parameters"] if one["in"] == "header"}
    told = {
        name for _, operation in operations(document) for reply in operation["responses"].values() for name in reply["headers"]
    }
    assert listed == sent | told | {"Authorization", "X-API-Key", "Accept-Encoding", "Allow"}


def test_the_page_lists_every_reason_with_its_status() -> None:
    listed = {(int(status), reason) for status, reasons, _ in rows("Errors") for reason in re.findall(r"`([^`]+)`", reasons)}
    made: set[tuple[Any, ...]] = set()
    for file in set((ROOT / "service").rglob("*.py")) - ADMIN:
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Problem":
                made.add(tuple(each.value for each in (*call.args[:1], *call.args[2:3]) if isinstance(each, ast.Constant)))
    assert len(made) >= 14
    assert listed == {each for each in made if len(each) == 2} | {(404, "http-404"), (405, "http-405")}


def test_the_answers_on_the_page_are_those_of_the_document() -> None:
    blocks = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)]
    problem = examples.PROBLEMS[415][1]
    assert blocks[:2] == [examples.ANSWER, examples.MODEL]
    assert blocks[2]["outputs"][0]["data"] == list(examples.SCORES)
    assert blocks[3:5] == [problem.view(), {"error": problem.detail}]


def test_the_examples_quota_is_the_default_one() -> None:
    windows = Settings().policies()["anonymous"].windows
    shown = [(each["window"], each["limit"]) for each in examples.MODEL["quota"]]
    assert shown == [(window.name, window.quota) for window in windows]
    headers = rate_limit_headers([Level(window, window.quota - 1, float(window.seconds or 0)) for window in windows])
    assert {name: openapi.QUOTA[name]["example"] for name in headers} == headers


def test_examples_of_problems_are_complete() -> None:
    for status, (meaning, problem) in examples.PROBLEMS.items():
        view = ProblemView.model_validate(problem.view())
        assert (view.status, view.title) == (status, HTTPStatus(status).phrase)
        assert meaning.endswith(".")
