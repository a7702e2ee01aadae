"""The HTML that the evaluation's page is built from: every block escapes the text that it is given."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

Plots = Mapping[str, bytes]
"""PNG files by the names of the files, without the ending."""

LENGTHS = ("epsilon", "step_size", "noise")  # of an attack, in [0, 1] pixel units

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #57606a; --line: #d0d7de; --shade: #f6f8fa;
  --alarm: #b3261e; --fine: #0b6e4f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --soft: #9aa4af; --line: #30363d; --shade: #161b22; --alarm: #c93c34; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p { max-width: 46rem; }
.alarm, .fine, .note { max-width: none; padding: .75rem 1rem; border-radius: .4rem; }
.alarm { background: var(--alarm); color: #fff; font-weight: 600; }
.fine { background: var(--fine); color: #fff; }
.note { background: var(--shade); border: 1px solid var(--line); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .75rem; margin: 0; }
.cards div { background: var(--shade); border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem; }
.cards dt { color: var(--soft); font-size: .85rem; }
.cards dd { margin: 0; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.cards small { display: block; color: var(--soft); font-size: .8rem; font-weight: 400; }
.scroll { overflow-x: auto; margin: 1rem 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 0 2rem; }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
caption { text-align: left; color: var(--soft); font-size: .85rem; padding-bottom: .3rem; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { border-bottom-width: 2px; }
.figures td, .figures thead th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
.figures td { white-space: nowrap; }
.figures tbody th { min-width: 6rem; }
.prose td { min-width: 8rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
summary { cursor: pointer; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .75rem; }
.sample { display: flex; gap: .75rem; margin: 0; padding: .6rem; border: 1px solid var(--line); border-radius: .4rem; }
.sample img { width: 5rem; height: 5rem; object-fit: contain; flex: none; image-rendering: pixelated; }
.sample figcaption { font-size: .85rem; min-width: 0; }
.sample ul { margin: .25rem 0; padding-left: 1rem; }
.sample p { margin: .25rem 0; font-weight: 600; }
.sample small { color: var(--soft); }
"""


def document(title: str, body: str) -> str:
    """Return a whole page; ``body`` is HTML already."""
    # Whatever slips into the page, a browser runs and loads nothing.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str, anchor: str = "") -> str:
    """Return a headed section; ``parts`` are HTML already, empty ones are left out."""
    start = f'<section id="{escape(anchor)}">' if anchor else "<section>"
    return "\n".join((start, f"<h2>{escape(title)}</h2>", *filter(None, parts), "</section>"))


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "figures") -> str:
    """Return a table whose first column names its rows; a narrow screen scrolls it sideways."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0"><table class="{kind}">'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>"
    )


def figure(plots: Plots, stem: str, alt: str) -> str:
    """Return a plot as an image inside the page, or nothing when there is no such plot."""
    if stem not in plots:
        return ""
    content = base64.b64encode(plots[stem]).decode("ascii")
    return f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{content}"></figure>'


def interval(cell: Mapping[str, Any] | None) -> str:
    """Return a percentage with its interval as plain text, a dash for none."""
    return f"{cell['percent']:.1f} ({cell['low']:.1f}-{cell['high']:.1f})" if cell else "-"


def length(key: str, value: Any) -> Any:
    """Return an attack's setting; lengths in 255ths, as people give them."""
    return f"{255 * value:.4g}/255" if key in LENGTHS and isinstance(value, float) else value


def words(value: Any) -> str:
    """Return a JSON value as a person writes it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} = {words(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(words(part) for part in value)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
