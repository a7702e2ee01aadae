"""The demo page, in a real browser against a real server. Every scenario leaves a screenshot in build/screenshots."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.keys import create_key
from tests.service.conftest import PATIENCE_S, ROOT, RunningServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SHOTS = ROOT / "build/screenshots"
IMAGES = ROOT / "service/page/images"
EXAMPLES = json.loads((IMAGES / "examples.json").read_text())
CAT, SHIP, FROG = (ROOT / f"docs/samples/{name}.png" for name in ("cat", "ship", "frog"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}
WATCH = "addEventListener('securitypolicyviolation', (e) => console.error('refused by policy: ' + e.violatedDirective))"
DROP = """([selector, kind, base64]) => {
  const transfer = new DataTransfer();
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  transfer.items.add(new File([bytes], "brought.png", { type: "image/png" }));
  const given = kind === "paste" ? { clipboardData: transfer } : { dataTransfer: transfer };
  const Kind = kind === "paste" ? ClipboardEvent : DragEvent;
  document.querySelector(selector).dispatchEvent(new Kind(kind, { ...given, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need the package playwright")
    if CHROMIUM is None:
        pytest.skip("the page's tests need Chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(
            executable_path=CHROMIUM, args=[*QUIET.split(), "--disable-sync"], timeout=1000 * PATIENCE_S
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server as a newcomer starts it, but with a limit on bodies that a test can reach."""
    with RunningServer(tmp_path_factory.mktemp("demo"), max_body_bytes="1000000") as running:
        yield running


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A key file and the text of its one key."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    return path, create_key(path, "visitor", "trusted", None, datetime.now(UTC))[1]


@pytest.fixture(scope="module")
def strict(checkpoint: Path, key: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that shows strangers labels only, of four images a day, and trusts who has the key."""
    with RunningServer(
        tmp_path_factory.mktemp("strict"),
        checkpoint=str(checkpoint),
        keys_file=str(key[0]),
        tier_anonymous_limits="4/day",
        tier_anonymous_label_only="true",
    ) as running:
        yield running


Visit = Callable[..., "Page"]


@pytest.fixture
def visit(browser: Browser, tmp_path: Path) -> Iterator[Visit]:
    """Open a server's page; afterwards nothing may have failed in it, broken its policy or gone to another place."""
    contexts, troubles, places, servers = [], [], set(), set()

    def open_page(server: RunningServer, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": DESKTOP, "permissions": ["clipboard-read", "clipboard-write"], **options})
        context.set_default_timeout(1000 * PATIENCE_S)
        context.add_init_script(WATCH)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda said: troubles.append(said.text) if said.type in ("error", "warning") else None)
        page.on("request", lambda request: places.add(httpx.URL(request.url).copy_with(path="/", query=None)))
        page.goto(server.url)
        page.locator("#samples button").last.wait_for()
        page.locator(".pick label").last.wait_for()
        contexts.append(context)
        servers.add(httpx.URL(server.url + "/"))
        return page

    yield open_page
    for context in contexts:
        context.close()
    # Chromium itself reports every answer of 400 and more, and connections that fail.
    assert [text for text in troubles if not text.startswith("Failed to load resource: ")] == []
    assert {place for place in places if place.scheme not in ("blob", "data")} == servers


def shoot(page: Page, name: str, full: bool = False) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=full)


def labels_of(server: RunningServer, *files: Path) -> list[str]:
    """What the API says of files."""
    parts = [("file", (file.name, file.read_bytes())) for file in files]
    with server.client("127.0.0.9") as client:  # another caller, so that the page's quota is its own
        return [prediction["label"] for prediction in client.post("/v1/classify", files=parts).json()["predictions"]]


def scores_by_v2(server: RunningServer, file: Path) -> dict[str, float]:
    """What the other protocol says of a file, by label."""
    entry = {"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(file.read_bytes()).decode()]}
    with server.client("127.0.0.9") as client:
        labels = client.get("/v1/model").json()["labels"]
        (probabilities, _) = client.post("/v2/models/palisade/infer", json={"inputs": [entry]}).json()["outputs"]
    return dict(zip(labels, probabilities["data"], strict=True))


def choose(page: Page, *files: Path | dict[str, Any]) -> None:
    page.locator("#files").set_input_files(list(files))  # type: ignore[arg-type]


def run_shown(page: Page, panel: str, folder: Path, **environment: str) -> Any:
    """Run the shell commands that a panel shows."""
    commands = page.locator(f"{panel} .curl code").inner_text()
    ran = subprocess.run(["bash", "-ec", commands], cwd=folder, env=environment, capture_output=True, check=True)
    return json.loads(ran.stdout)


def test_a_chosen_file_is_answered_with_bars_time_quota_and_the_same_in_curl(
    visit: Visit, demo: RunningServer, tmp_path: Path
) -> None:
    page = visit(demo)
    before = int(re.match(r"\d+", page.locator(".count").first.inner_text())[0])  # type: ignore[index]
    picture = tmp_path / 'it\'s my; "cat".png'
    shutil.copy(CAT, picture)
    choose(page, picture)
    page.locator("#answer .card").wait_for()
    reply = run_shown(page, "#answer", tmp_path)
    (prediction,) = reply["predictions"]
    assert page.locator("#answer .label").inner_text() == prediction["label"]
    rows = page.locator("#answer .scores tr").all_inner_texts()
    assert [re.sub(r"\s+", " ", row) for row in rows] == [
        f"{label} {100 * score:.0f}%" for label, score in list(prediction["scores"].items())[:5]
    ]
    assert scores_by_v2(demo, CAT) == prediction["scores"]
    best = page.locator("#answer .bar span").first
    share = best.bounding_box()["width"] / page.locator("#answer .bar").first.bounding_box()["width"]  # type: ignore[index]
    assert share == pytest.approx(prediction["confidence"], abs=0.02)
    assert re.fullmatch(r"1 image in \d+ ms, measured in this browser", page.locator("#answer .facts").inner_text())
    assert page.locator(".count").first.inner_text() == f"{before - 1} of 60 per minute"
    assert page.locator("#answer [role=status]").text_content() == f"Answer: {prediction['label']} {rows[0].split()[-1]}"
    page.locator("#answer .curl button").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#answer .curl code").inner_text()
    shoot(page, "upload")


def test_the_apis_documentation_shows_every_route_and_asks_nobody_else(browser: Browser, demo: RunningServer) -> None:
    context = browser.new_context(viewport=DESKTOP)
    context.set_default_timeout(1000 * PATIENCE_S)
    page, asked, troubles = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto(f"{demo.url}/docs")
    routes = httpx.get(f"{demo.url}/openapi.json", timeout=PATIENCE_S).json()["paths"]
    page.locator(".opblock").nth(sum(map(len, routes.values())) - 1).wait_for()
    page.get_by_text("/v1/classify", exact=True).click()
    page.locator(".opblock-body .example").first.wait_for()
    shoot(page, "docs")
    context.close()
    assert [url for url in asked if not url.startswith((f"{demo.url}/", "data:", "blob:"))] == []
    assert troubles == []


def test_a_sample_is_answered_and_judged(visit: Visit, demo: RunningServer, tmp_path: Path) -> None:
    page = visit(demo)
    assert page.locator("#samples button").all_inner_texts() == [sample["label"] for sample in EXAMPLES["samples"]]
    for name in ("automobile", "frog"):
        (label,) = labels_of(demo, IMAGES / f"{name}.png")
        page.get_by_role("button", name=name, exact=True).click()
        page.locator(f"#answer .label:text-is('{label}')").wait_for()
        verdict = "right" if label == name else f"wrong: CIFAR-10 calls it {name}"
        page.locator(f"#answer .truth:text-is('{verdict}')").wait_for()
    page.get_by_role("button", name="automobile", exact=True).click()
    page.get_by_role("img", name="sample picture, automobile", exact=True).wait_for()
    assert run_shown(page, "#answer", tmp_path)["predictions"][0]["label"] == labels_of(demo, IMAGES / "automobile.png")[0]
    shoot(page, "sample")


def test_several_pictures_are_answered_in_order_and_any_can_be_given_noise(visit: Visit, demo: RunningServer) -> None:
    page = visit(demo)
    choose(page, CAT, SHIP, FROG)
    page.locator("#answer .card").nth(2).wait_for()
    assert page.locator("#answer .label").all_inner_texts() == labels_of(demo, CAT, SHIP, FROG)
    shoot(page, "several")
    page.get_by_role("button", name="Add noise to this one").nth(1).click()
    page.get_by_role("img", name="ship.png, at the model's size").wait_for()
    assert page.evaluate("document.activeElement.id") == "epsilon"


@pytest.mark.parametrize(("kind", "alt"), [("drop", "brought.png"), ("paste", "pasted picture")])
def test_pictures_can_be_dropped_and_pasted(visit: Visit, demo: RunningServer, kind: str, alt: str) -> None:
    page = visit(demo)
    page.evaluate(DROP, ["main", kind, base64.b64encode(SHIP.read_bytes()).decode()])
    page.get_by_role("img", name=alt, exact=True).wait_for()
    assert page.locator("#answer .label").all_inner_texts() == labels_of(demo, SHIP)


def test_what_cannot_be_classified_is_explained(visit: Visit, demo: RunningServer, tmp_path: Path) -> None:
    page = visit(demo)
    (tmp_path / "notes.txt").write_text("to do: everything")
    choose(page, CAT, tmp_path / "notes.txt")
    page.get_by_role("alert").wait_for()
    refused = httpx.post(
        f"{demo.url}/v1/classify", files=[("file", CAT.read_bytes()), ("file", b"to do: everything")], timeout=PATIENCE_S
    )
    said = page.locator("#answer .detail").inner_text()
    assert refused.json()["detail"] in said[0].lower() + said[1:]
    assert not page.get_by_role("button", name="Try again").is_visible()  # it would only fail again
    shoot(page, "error")
    choose(page, {"name": "large.png", "mimeType": "image/png", "buffer": bytes(1_200_000)})
    page.get_by_role("heading", name="Too large").wait_for()
    choose(page, CAT)
    page.locator("#answer .card").wait_for()
    assert page.get_by_role("alert").count() == 0


def test_strangers_see_labels_only_until_their_quota_is_used_up_and_a_key_goes_on(
    visit: Visit, strict: RunningServer, key: tuple[Path, str], tmp_path: Path
) -> None:
    page = visit(strict)
    choose(page, CAT, SHIP, FROG)
    page.locator("#answer .card").nth(2).wait_for()
    labels = labels_of(strict, CAT, SHIP, FROG)
    assert page.locator("#answer .label").all_inner_texts() == labels
    assert page.locator("#answer .scores:visible, #answer .sure:not(:empty)").count() == 0
    assert page.locator("text=Your tier is shown labels only.").count() == 3
    assert page.locator(".count").inner_text() == "1 of 4 per day"
    choose(page, CAT, SHIP)
    page.get_by_role("alert").wait_for()
    assert page.locator("#answer h3").inner_text() == "Not enough images left"
    assert page.locator("#answer .when").inner_text().startswith("Try again on ")
    shoot(page, "quota")

    page.get_by_text("Use an API key").click()
    page.get_by_label("API key").fill("palisade_mistyped")
    page.get_by_label("API key").press("Tab")
    page.locator("#quota p:has-text('key')").wait_for()
    page.get_by_label("API key").fill(key[1])
    page.get_by_label("API key").press("Tab")
    page.locator("#quota:has-text('no limit')").wait_for()
    page.get_by_role("button", name="Try again").click()
    page.locator("#answer .card").nth(1).wait_for()
    assert page.locator("#answer .scores:visible").count() == 2
    assert key[1] not in page.content()
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    for picture in (CAT, SHIP):
        shutil.copy(picture, tmp_path)
    reply = run_shown(page, "#answer", tmp_path, PALISADE_API_KEY=key[1])
    assert [prediction["label"] for prediction in reply["predictions"]] == labels[:2]
    assert len(reply["predictions"][0]["scores"]) == 10


def test_when_nobody_answers_the_visitor_can_try_again(visit: Visit, demo: RunningServer) -> None:
    page = visit(demo)
    page.context.set_offline(True)
    choose(page, CAT)
    page.get_by_role("heading", name="No answer").wait_for()
    shoot(page, "offline")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    page.locator("#answer .card").wait_for()


def test_noise_is_uniform_within_its_bound_and_asked_about_on_release(
    visit: Visit, demo: RunningServer, tmp_path: Path
) -> None:
    page = visit(demo)
    choose(page, CAT)
    page.get_by_role("img", name="cat.png, at the model's size").wait_for()
    slider = page.get_by_role("slider")
    slider.focus()
    slider.press("PageUp")  # some steps
    slider.press("ArrowRight")
    page.locator(".shake .card").wait_for()
    epsilon = int(slider.input_value())
    assert epsilon > 1
    page.locator(f".shake .save:has-text('cat-noise-{epsilon}.png')").wait_for()
    assert page.locator("#epsilon-shown").inner_text() == f"± {epsilon}/255"
    with page.expect_download() as saving:
        page.get_by_role("link", name=f"Save cat-noise-{epsilon}.png").click()
    saved = tmp_path / saving.value.suggested_filename
    saving.value.save_as(saved)
    with Image.open(saved) as noisy, Image.open(CAT) as clean:
        moved = np.asarray(noisy.convert("RGB")).astype(int) - np.asarray(clean.convert("RGB"))
    assert np.abs(moved).max() == epsilon
    assert np.abs(moved).mean() == pytest.approx(epsilon / 2, rel=0.15)
    assert moved.mean() == pytest.approx(0, abs=epsilon / 10)
    (label,) = labels_of(demo, saved)
    assert page.locator(".shake .label").inner_text() == label
    (before,) = labels_of(demo, CAT)
    assert page.locator(".verdict").inner_text() == (f"Still {before}" if label == before else f"No longer {before}")
    assert run_shown(page, ".shake", tmp_path)["predictions"][0]["label"] == label
    shoot(page, "noise", full=True)


def test_attacked_pictures_are_shown_beside_what_both_networks_say(visit: Visit, demo: RunningServer, tmp_path: Path) -> None:
    page = visit(demo)
    example = EXAMPLES["examples"][1]
    page.get_by_role("radio", name=example["label"]).check(force=True)
    page.get_by_role("button", name="Ask Palisade about all three").click()
    page.locator("#attack-panel .record").wait_for()
    said = page.locator(".undefended").all_inner_texts()
    ours = page.locator(".palisade").all_inner_texts()
    live = labels_of(demo, *(IMAGES / file for file in example["files"].values()))
    for index, kind in enumerate(("clean", "transfer", "white-box")):
        theirs = example["undefended"][kind]
        assert said[index].startswith(f"{theirs['label']} {100 * theirs['confidence']:.1f}".removesuffix(".0"))
        assert said[index].endswith("right" if theirs["label"] == example["label"] else "wrong")
        assert ours[index].startswith(f"{live[index]} ")
        assert ours[index].endswith("right" if live[index] == example["label"] else "wrong")
    assert live[0] == example["label"] != live[2]  # the embedded checkpoint is right, until it is attacked itself
    shown = page.locator("#versions canvas").nth(2).evaluate("c => [...c.getContext('2d').getImageData(0, 0, 32, 32).data]")
    clean, attacked = (np.asarray(Image.open(IMAGES / example["files"][kind])).astype(int) for kind in ("clean", "white-box"))
    assert (np.array(shown).reshape(32, 32, 4)[..., :3] == 128 + 15 * (attacked - clean)).all()
    answers = run_shown(page, "#attack-panel", tmp_path)
    assert [prediction["label"] for prediction in answers["predictions"]] == live
    assert "here it is only passed on" not in page.locator("#shares").inner_text()
    page.locator("#attacks").scroll_into_view_if_needed()
    shoot(page, "attacks", full=True)


def test_a_server_of_other_weights_says_that_the_attack_did_not_know_them(visit: Visit, strict: RunningServer) -> None:
    shares = visit(strict).locator("#shares")
    shares.get_by_text("here it is only passed on").wait_for()
    assert EXAMPLES["palisade"]["weights_sha256"][:12] in shares.inner_text()


def test_everything_can_be_reached_and_used_from_the_keyboard(visit: Visit, demo: RunningServer) -> None:
    page = visit(demo)
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate("(e => e.id || e.name || e.textContent.trim())(document.activeElement)")
        outlined = (
            "e => [e, e.nextElementSibling, e.parentElement].some((x) => x && getComputedStyle(x).outlineStyle === 'solid')"
        )
        assert page.evaluate(f"({outlined})(document.activeElement)"), f"{name} does not show that it has the focus"
        reached.append(name)
        if name == "dog":
            page.keyboard.press("Enter")
            page.locator("#answer .card").wait_for()
        if name == "attack-ask":
            page.keyboard.press("Space")
            page.locator("#attack-panel .record").wait_for()
            break
    samples = [sample["label"] for sample in EXAMPLES["samples"]]
    assert reached[:4] == ["Skip to the page's content", "Noise", "Attacks", "API"]
    wanted = ["files", *samples, "Copy", "The reply as it came", "Use an API key", "epsilon", "again", "example", "attack-ask"]
    assert [name for name in reached if name in wanted] == wanted
    shoot(page, "keyboard")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(visit: Visit, demo: RunningServer, scheme: str) -> None:
    page = visit(demo, viewport=PHONE, color_scheme=scheme, reduced_motion="reduce", device_scale_factor=2)
    choose(page, CAT, FROG)
    page.locator("#answer .card").nth(1).wait_for()
    page.get_by_role("slider").press("End")
    page.locator(".shake .card").wait_for()
    page.get_by_role("button", name="Ask Palisade about all three").click()
    page.locator("#attack-panel .record").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (max(paper) < 50) if scheme == "dark" else (min(paper) > 200)
    shoot(page, f"phone-{scheme}", full=True)


def test_the_desktop_has_a_dark_side(visit: Visit, demo: RunningServer) -> None:
    page = visit(demo, color_scheme="dark")
    page.get_by_role("button", name="horse", exact=True).click()
    page.locator("#answer .card").wait_for()
    shoot(page, "dark")


def test_files_come_with_their_type_a_strict_policy_and_a_tag(demo: RunningServer) -> None:
    for path, kind in {
        "/": "text/html; charset=utf-8",
        "/page/style.css": "text/css; charset=utf-8",
        "/page/app.js": "text/javascript; charset=utf-8",
        "/page/images/examples.json": "application/json",
        "/page/images/cat.png": "image/png",
        "/page/images/mark.svg": "image/svg+xml",
    }.items():
        answer = httpx.get(demo.url + path, timeout=PATIENCE_S)
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        again = httpx.get(
            demo.url + path, headers={"If-None-Match": f'"other", W/{answer.headers["etag"]}'}, timeout=PATIENCE_S
        )
        assert (again.status_code, again.content) == (304, b"")
        assert httpx.get(demo.url + path, headers={"If-None-Match": '"other"'}, timeout=PATIENCE_S).content == answer.content


@pytest.mark.parametrize("path", ["", "__init__.py", "index.html/", "../app.py", "..%2fapp.py", "%2e%2e/settings.py", "images"])
def test_nothing_but_the_pages_files_is_served(demo: RunningServer, path: str) -> None:
    answer = httpx.get(httpx.URL(demo.url, raw_path=f"/page/{path}".encode()), timeout=PATIENCE_S)
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")


def test_bundled_attacks_stay_within_their_bound_and_do_what_is_said_of_them() -> None:
    import torch

    from model import load_checkpoint, read_header

    assert read_header("compact").weights_sha256 == EXAMPLES["palisade"]["weights_sha256"]
    palisade, names = load_checkpoint("compact"), read_header("compact").class_names
    assert len(EXAMPLES["examples"]) >= 4
    for example in EXAMPLES["examples"]:
        pixels = [np.asarray(Image.open(IMAGES / example["files"][kind])) for kind in ("clean", "transfer", "white-box")]
        for attacked in pixels[1:]:
            assert 0 < np.abs(attacked.astype(int) - pixels[0]).max() <= 8
        with torch.no_grad():
            answers = palisade(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255).argmax(dim=1)
        assert names[answers[0]] == example["label"] != names[answers[2]]
        said = {kind: answer["label"] for kind, answer in example["undefended"].items()}
        assert said["clean"] == example["label"] != said["transfer"]


def test_the_page_is_small() -> None:
    assert sum(path.stat().st_size for path in IMAGES.parent.rglob("*") if path.is_file()) < 300_000
