"""The page, the table and the plots of what benchmarks.poisoning has recorded."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import poisoning_plots
from benchmarks.poisoning_arms import ARMS
from benchmarks.poisoning_plots import Pictures, Row, mean
from benchmarks.poisons import POISONS, Poison
from training.evaluation.certified import MEANING, SURROGATE
from training.evaluation.markup import document, figure, paragraph, section, table

HEAD = ("arm", "seeds", "right", "lost to the attack", "right under PGD-10", "attack succeeds", "poison caught",
        "clean images quarantined", "minutes, training", "minutes, screening")  # fmt: skip
SCREENED = ", screened"
CHANCE = 0.05
"""What the patch does in two networks that never saw it may differ by so much: in mixtures of three seeds, by 3.7 points."""
CHOSEN_ON = 0
"""The seed of the flips on which it was chosen how the detectors share the false positives (docs/experiments.md)."""
STORIES = {
    "none": "Nothing is touched: what every arm is worth when nobody attacks, and what a defence costs then.",
    "random flips": "Careless or hostile labelling: a share of the images, of any class, gets another label at random.",
    "pair flips": "A fifth of every class gets the label of the next class, always the same one, so the errors agree.",
    "patch": "A backdoor (BadNets): one image in a hundred gets a small patch and the target's label. The attacker later "
    "shows the patch to have anything taken for the target.",
    "clean label": "A backdoor that no label betrays: a share of the target class's own images (half of them unless said) are "
    "made hard to recognise by changes of at most 16 levels of 255, and get the patch. Their labels stay right, so no reviewer "
    "of labels finds them.",
}
"""By a poison's kind, for a reader who has not seen the code."""
WAYS = {
    "plain network": "One ResNet-18, trained on the images as they are.",
    "adversarially trained network": "The same, trained on images that are perturbed to be misclassified (PGD).",
    "mixture": "Nine experts, eight of them trained so (N-FGSM, PGD), then with a gate that weighs them: what Palisade serves.",
    "mixture, screened": "The same, after screening has set suspicious images aside; as many steps of training.",
    "partitions, vote": "Nine experts, each on its own ninth of the images; they vote, and no image can reach many of them.",
    "mixture, bags of a half": "The mixture, whose experts each see a random half of the images before joint training.",
    "mixture, a fifth trimmed": "The mixture, of which the fifth of every batch that fits worst teaches nothing.",
    "mixture, mixup": "The mixture, trained on blends of two images and of their labels.",
}
"""By an arm's name, for a reader who has not seen the code."""
GLOSSARY = (
    ("right", "share of test images that are classified rightly, %"),
    ("lost to the attack", "how many points fewer than the same arm, unscreened, with the same seed on clean data"),
    ("right under PGD-10", "the same with every test image perturbed by up to 8/255 to be misclassified"),
    (
        "attack succeeds",
        "of a backdoor (and on clean data, for comparison): share of test images of other classes that are taken for the "
        "target class once they carry the patch; of pair flips: share of test images taken for the class that follows theirs",
    ),
    ("poison caught", "share of the touched training images that screening put into quarantine"),
    ("clean images quarantined", "share of the untouched ones that it put there as well"),
    ("minutes", "of one processor; - where a stopped run went on, and nobody knows"),
)


def write(rows: list[Row], settings: dict[str, Any], pictures: Pictures, out: Path) -> None:
    """Write `report.html`, `table.md` and the plots into a folder, and print the table.

    Args:
        rows: The finished cells.
        settings: Those of all of them.
        pictures: Of each attack.
        out: The folder.

    Raises:
        SystemExit: Screened cells differ in how.
    """
    rows = [row for row in rows if row["attack"] in {poison.name for poison in POISONS}]
    _check_screeners(rows)
    plots = poisoning_plots.draw(rows, pictures, out)
    poisoning_plots.replace_file(out / "report.html", page(rows, settings, plots).encode())
    text = markdown(rows)
    poisoning_plots.replace_file(out / "table.md", f"{text}\n".encode())
    print(text)


def _check_screeners(rows: list[Row]) -> None:
    """Refuse cells that were screened in different ways: their mean would be of nothing."""
    ways = [{**row["screeners"], "seed": None} for row in rows if "screeners" in row]
    for way in ways[1:]:
        if way != ways[0]:
            raise SystemExit(
                f"cells were screened with {way} and with {ways[0]}: remove the older ones from cells/ and screenings/, or use "
                "another --out"
            )


def page(rows: list[Row], settings: dict[str, Any], plots: dict[str, bytes]) -> str:
    """Return the page, which loads nothing."""
    size = settings["size"]
    parts = [
        section(
            "What this is",
            paragraph(
                "Somebody can touch part of the data that a classifier is trained on. Here "
                f"{size['images']:,} photos of CIFAR-10 are poisoned in several ways, networks are trained on them, and test "
                "images that nobody touched say what came of it. "
                f"All networks are small (width {size['width']}) and trained briefly, so that all of it can be repeated on a "
                "desk; what counts are the differences."
            ),
            table("An arm is a way to train", ("arm", "what it is"), [(arm.name, WAYS[arm.name]) for arm in ARMS], "prose"),
        ),
        section("What it shows", *[paragraph(verdict) for verdict in [*verdicts(rows), *_uncertainty(rows)]]),
        section("The poisons", figure(plots, "pictures", "training images before and after each kind of attack")),
        *[_section(poison, rows) for poison in POISONS],
        _detectors(rows),
        section("Flipped labels and accuracy", figure(plots, "flips", "accuracy against the share of flipped labels"))
        if "flips" in plots
        else "",
        section("Backdoors", figure(plots, "backdoors", "how often a patch decides")) if "backdoors" in plots else "",
        section(
            "What is certain",
            paragraph(f"Nine experts that each saw a ninth of the data, and vote. {MEANING}"),
            figure(plots, "certified", "certified accuracy against the number of parts of the data that are changed"),
        )
        if "certified" in plots
        else "",
        section("What the columns mean", table("Columns", ("column", "meaning"), GLOSSARY, kind="prose")),
        section("How", table("Settings", ("setting", "value"), _how(rows, settings), "prose")),
    ]
    return document("Poisoned training data: what it does, and what stops it", "\n".join(part for part in parts if part))


def verdicts(rows: list[Row]) -> list[str]:
    """Return sentences that answer the questions that the benchmark was made for, as far as there are figures."""
    said = []
    clean, flipped = (_by_seed(rows, *cell) for cell in (("mixture", "clean"), ("mixture, screened", "flips 20 %")))
    both = sorted(clean.keys() & flipped.keys())
    if both:
        before, after = (100 * statistics.mean(cells[seed]["clean"] for seed in both) for cells in (clean, flipped))
        lost = f"loses {before - after:.1f} points" if after < before else "loses nothing"
        single = ", ".join(f"{100 * (clean[seed]['clean'] - flipped[seed]['clean']):.1f}" for seed in both)
        said.append(
            f"With a fifth of the labels flipped at random, the screened mixture has {after:.1f} % of the test images right; "
            f"the mixture on clean data {before:.1f} %: it {lost} (aim: at most 2; by seed: {single})."
        )
    for chosen_on in (False, True):
        found = [row for seed, row in flipped.items() if (seed == CHOSEN_ON) == chosen_on]
        cells = [row for row in found if row.get("caught") is not None]
        if cells:
            share, price = (100 * statistics.mean(row[key] for row in cells) for key in ("caught", "clean_quarantined"))
            which = (
                f"seed {CHOSEN_ON}, on which the detectors' shares were chosen"
                if chosen_on
                else "seeds that nothing was chosen on"
            )
            said.append(
                f"Screening caught {share:.1f} % of those flips (aim: at least 85) and put {price:.1f} % of the clean images "
                f"aside (aim: at most 5) with {which}."
            )
    aims = {"BadNets 1 %": " Aim: above 80 % in the mixture, or the attack is too weak to count, and below 10 % once screened."}
    for attack in ("BadNets 1 %", "clean-label backdoor"):
        found = [(arm.name, mean(rows, arm.name, attack, "backdoor")) for arm in ARMS]
        known = [f"{name} {100 * value:.1f} %" for name, value in found if value is not None]
        if known:
            said.append(f"{attack}: the patch decides in: {'; '.join(known)}.{aims.get(attack, '')}")
    said += _clean_label(rows)
    certified = [row["certified"] for row in rows if row["attack"] == "clean" and row.get("certified")]
    if certified:
        shares = ", ".join(f"{100 * statistics.mean(each):.1f}" for each in zip(*certified, strict=True))
        said.append(
            f"Nine experts on a ninth of the clean data each have {shares} % right for certain with 0, 1, 2, ... of the nine "
            "parts changed in any way."
        )
    collapsed = [f"{row['arm']}, {row['attack']}, seed {row['seed']}" for row in rows if row.get("rolled_back")]
    if collapsed:
        said.append(f"A stage of training collapsed, and was rolled back to its best weights, in: {'; '.join(collapsed)}.")
    return said or ["Nothing has been measured yet."]


def _by_seed(rows: list[Row], arm: str, attack: str) -> dict[int, Row]:
    return {row["seed"]: row for row in rows if (row["arm"], row["attack"]) == (arm, attack)}


def _clean_label(rows: list[Row]) -> list[str]:
    """Say whether adversarial training makes clean-label backdoors worse, beyond what the patch does without poison."""
    plain, adversarial = (
        {row["attack"]: row["backdoor"] for row in rows if (row["arm"], row["seed"]) == (arm, 0)}
        for arm in ("plain network", "adversarially trained network")
    )
    told, worse, informative = [], False, False
    for poison in POISONS:
        both = [found.get(poison.name) for found in (adversarial, plain)]
        if poison.kind in ("none", "clean label") and None not in both:
            told.append(f"{100 * both[0]:.1f} and {100 * both[1]:.1f} % ({poison.name})")
        if poison.kind != "clean label" or None in both or not plain.keys() & adversarial.keys() & {"clean"}:
            continue
        gained = both[0] - adversarial["clean"], both[1] - plain["clean"]
        if max(gained) > CHANCE and min(both) < 1 - CHANCE:
            informative, worse = True, worse or gained[0] - gained[1] > CHANCE
    if not any("clean-label" in each for each in told) or "clean" not in plain or "clean" not in adversarial:
        return []
    what = "here it does" if worse else "here it does not"
    if not informative:
        what = "these cells can't tell, as the patch decides nearly always or nearly never in both"
    return [
        f"It is known that adversarial training can make clean-label backdoors succeed more often; {what}. The patch decides, "
        f"in the adversarially trained and in the plain network: {', '.join(told)}."
    ]


def _uncertainty(rows: list[Row]) -> list[str]:
    """Say how sure the figures are."""
    if not rows:
        return []
    images = rows[0]["images"]
    spans = {key: 196 * math.sqrt(0.25 / images[key]) for key in ("clean", "robust")}
    return [
        f"How sure: a share of {images['clean']:,} test images is known to {spans['clean']:.1f} points either way or better "
        f"(95 %), one of the {images['robust']:,} under PGD-10 to {spans['robust']:.1f}. That is the chance of the test images "
        "alone; where there are several seeds, their range, which has training's chance in it, stands beside the mean. PGD-10 "
        "takes ten steps of 2/255 within 8/255, in float32.",
        *([f"Of partitions: {SURROGATE}"] if any(row.get("certified") for row in rows) else []),
    ]


def _how(rows: list[Row], settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the settings, those of the screenings, and which code made how many cells."""
    found = [(key, str(value)) for key, value in _flat(settings)]
    screened = [row["screeners"] for row in rows if "screeners" in row]
    found += [(f"screening: {key}", str(value)) for key, value in (screened[0] if screened else {}).items() if key != "seed"]
    made = Counter(row.get("git_revision", "unknown") for row in rows)
    return [*found, ("git revision: cells", ", ".join(f"{revision}: {count}" for revision, count in made.items()))]


def _section(poison: Poison, rows: list[Row]) -> str:
    lines = _lines(poison, rows)
    if not lines:
        return ""
    return section(poison.name, paragraph(STORIES[poison.kind]), table(f"{poison.name}: every arm", HEAD, lines))


def _detectors(rows: list[Row]) -> str:
    """Return the section on what each of screening's detectors found, of the first seed of every attack."""
    found = [row for row in rows if row.get("detectors") and row["seed"] == 0]
    if not found:
        return ""
    names = list(found[0]["detectors"])
    lines = []
    for poison in POISONS:
        for row in found:
            if row["attack"] == poison.name:
                pairs = [row["detectors"][name] for name in names]
                cells = [f"{_percent(_known(pair['caught']))} / {_percent([pair['clean_quarantined']])}" for pair in pairs]
                lines.append([poison.name, *cells])
    text = "Each detector's share of the poison caught and of clean images set aside, %; seed 0."
    return section("What found the poison", paragraph(text), table("Detectors", ("attack", *names), lines))


def _known(share: float | None) -> list[float]:
    return [] if share is None else [share]


def markdown(rows: list[Row]) -> str:
    """Return the table of all attacks as Markdown."""
    lines = [f"| attack | {' | '.join(HEAD)} |", "|---" * (len(HEAD) + 1) + "|"]
    for poison in POISONS:
        lines += [f"| {poison.name} | {' | '.join(line)} |" for line in _lines(poison, rows)]
    return "\n".join(lines)


def _lines(poison: Poison, rows: list[Row]) -> list[list[str]]:
    """Return a poison's lines of the table: means over seeds, with the range where there are several."""
    success = {"pair flips": "pair", "random flips": None}.get(poison.kind, "backdoor")
    lines = []
    for arm in ARMS:
        own = [row for row in rows if (row["arm"], row["attack"]) == (arm.name, poison.name)]
        if not own:
            continue
        without = arm.name.removesuffix(SCREENED)
        before = _by_seed(rows, without, "clean")
        paired = [row for row in own if row["seed"] in before and (arm.screened or poison.kind != "none")]
        lost = [before[row["seed"]]["clean"] - row["clean"] for row in paired]
        cells = [_percent([row["clean"] for row in own]), _percent(lost), _percent([row["robust"] for row in own])]
        cells.append(_percent([row[success] for row in own]) if success else "-")
        cells += [_percent([row[key] for row in own if row.get(key) is not None]) for key in ("caught", "clean_quarantined")]
        for key in ("training", "screening"):
            times = [row["minutes"][key] for row in own if row["minutes"][key] is not None]
            cells.append(f"{statistics.mean(times):.1f}" if times else "-")
        lines.append([arm.name, str(len(own)), *cells])
    return lines


def _percent(shares: Sequence[float]) -> str:
    if not shares:
        return "-"
    spread = f" ({100 * min(shares):.1f} to {100 * max(shares):.1f})" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.1f}{spread}"


def _flat(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    return [pair for key, value in settings.items() for pair in (value.items() if isinstance(value, dict) else [(key, value)])]
