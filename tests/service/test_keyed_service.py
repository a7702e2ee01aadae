"""API keys end to end: what each protocol does for whom, and that nobody sees a key again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.keys import KeyTier, create_key, revoke_key
from tests.service.conftest import PATIENCE_S, RunningServer, eventually
from tests.service.pictures import base64_text, encode, noise

PNG = encode(noise(3))
ENTRY = {"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [base64_text(PNG)]}
INFER = "/v2/models/palisade/infer"
KEYED = ["/v1/model", "/v2/models/palisade", "/v2/models/palisade/config", "/v2/models/palisade/stats"]
OPEN = ["/healthz", "/readyz", "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models", "/v2/models/palisade/ready"]


@dataclass(frozen=True)
class Guarded:
    """A server that serves nobody without a key, and the file of its keys."""

    server: RunningServer
    file: Path
    unused: dict[KeyTier, list[tuple[str, str]]]

    def key(self, tier: KeyTier) -> tuple[str, str]:
        """The id and the text of a key that no other test uses."""
        return self.unused[tier].pop()

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        return httpx.get(f"{self.server.url}{path}", headers={"X-API-Key": key} if key else {}, timeout=PATIENCE_S)

    def ask(self, path: str, **headers: str) -> httpx.Response:
        body: dict[str, Any] = {"json": {"inputs": [ENTRY]}} if path == INFER else {"json": {"images": [base64_text(PNG)]}}
        return httpx.post(f"{self.server.url}{path}", headers=headers, timeout=PATIENCE_S, **body)


@pytest.fixture(scope="module")
def guarded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    unused: dict[KeyTier, list[tuple[str, str]]] = {"standard": [], "trusted": []}
    for tier in (*["standard"] * 3, *["trusted"] * 3):
        key, text = create_key(file, "test", tier, None, datetime.now(UTC))
        unused[tier].append((key.id, text))
    with RunningServer(
        tmp_path_factory.mktemp("guarded"),
        checkpoint=str(checkpoint),
        keys_file=str(file),
        anonymous="off",
        log_level="debug",
        tier_standard_limits="3/day",
        tier_standard_decimals="1",
        tier_trusted_limits="",
        tier_trusted_decimals="4",
        tier_trusted_top_n="2",
    ) as running:
        yield Guarded(running, file, unused)


def test_without_a_key_nothing_is_told_or_classified(guarded: Guarded) -> None:
    refusals = [guarded.get(path) for path in KEYED] + [guarded.ask("/v1/classify"), guarded.ask(INFER)]
    for reply in refusals:
        assert reply.status_code == 401
        assert reply.headers["WWW-Authenticate"].startswith("Bearer")
    assert [guarded.get(path).status_code for path in OPEN] == [200] * len(OPEN)


def test_each_tier_has_its_policy_in_every_protocol(guarded: Guarded) -> None:
    (_, standard), (_, trusted) = guarded.key("standard"), guarded.key("trusted")
    shown: dict[str, list[list[float]]] = {}
    for tier, text in (("standard", standard), ("trusted", trusted)):
        assert guarded.get("/v1/model", text).json()["policy"]["tier"] == tier
        (prediction,) = guarded.ask("/v1/classify", Authorization=f"Bearer {text}").json()["predictions"]
        (probabilities, _) = guarded.ask(INFER, **{"X-API-Key": text}).json()["outputs"]
        shown[tier] = [sorted(filter(None, scores)) for scores in (prediction["scores"].values(), probabilities["data"])]
        assert shown[tier][0] == shown[tier][1]
    assert all(score == round(score, 1) for score in shown["standard"][0])
    assert len(shown["trusted"][0]) == 2
    assert any(score != round(score, 2) for score in shown["trusted"][0])


def test_a_key_has_one_quota_for_both_protocols_and_no_other_keys(guarded: Guarded) -> None:
    (_, text), (_, other) = guarded.key("standard"), guarded.key("standard")
    for path, remaining in ((INFER, 2), ("/v1/classify", 1), (INFER, 0)):
        assert f'"day";r={remaining};' in guarded.ask(path, **{"X-API-Key": text}).headers["RateLimit"]
    assert [guarded.ask(path, **{"X-API-Key": text}).status_code for path in (INFER, "/v1/classify")] == [429, 429]
    assert guarded.ask(INFER, **{"X-API-Key": other}).status_code == 200


def test_a_revoked_key_is_refused_by_every_route(guarded: Guarded) -> None:
    key_id, text = guarded.key("trusted")
    revoke_key(guarded.file, key_id, datetime.now(UTC))
    eventually(lambda: guarded.get("/v1/model", text).status_code == 403, "revoked")
    refusals = [guarded.get(path, text) for path in KEYED]
    refusals += [guarded.ask(path, **{"X-API-Key": text}) for path in ("/v1/classify", INFER)]
    assert [reply.status_code for reply in refusals] == [403] * len(refusals)
    assert all("revoked" in reply.text for reply in refusals)


def test_no_key_is_logged_counted_or_repeated(guarded: Guarded) -> None:
    _, text = guarded.key("trusted")
    slip, secret = text[:-1] + ("a" if text[-1] != "a" else "b"), text.rpartition("_")[2]
    replies = [guarded.ask(path, **headers) for path in ("/v1/classify", INFER) for headers in (
        {"X-API-Key": text}, {"Authorization": f"Bearer {text}"}, {"X-API-Key": slip}, {"Authorization": f"Bearer {slip}"},
        {"Authorization": f"Basic {text}"}, {"Authorization": text}, {"X-API-Key": text, "Authorization": f"Bearer {slip}"},
    )]  # fmt: skip
    assert [reply.status_code for reply in replies] == [200, 200, 401, 401, 401, 401, 400] * 2
    replies += [guarded.get("/v1/model", text), guarded.get("/v2/models/palisade/stats", text), guarded.get("/openapi.json")]
    ended = replies[0].headers["X-Request-ID"]
    eventually(lambda: ended in guarded.server.log_text(), "the request is logged")
    places = [guarded.server.log_text(), guarded.server.scrape(), *(f"{reply.headers}{reply.text}" for reply in replies)]
    for place in places:
        assert secret[:20] not in place
