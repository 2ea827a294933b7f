"""HTML: the small parts of a self-contained page."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.checkpoint import atomic_write
from common.report.numbers import as_setting

_CSS = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6570; --line: #d9dde2;
  --paper: #ffffff; --card: #f5f7f9; --accent: #0b5c8e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a3adb7; --line: #3a424a;
  --paper: #171b1f; --card: #20262b; --accent: #7fc0ea; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line); color: var(--accent); }
p, li { max-width: 46rem; }
.lead { font-size: 1.06rem; }
.caution { background: var(--card); border-left: 4px solid #e69f00; padding: .6rem .9rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; min-width: min(24rem, 100%);
  font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem;
  max-width: min(46rem, 92vw); }
th, td { padding: .32rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th.label { text-align: left; }
th:first-child { padding-left: 0; }
tbody th { font-weight: 600; }
table.words td, table.words th { text-align: left; white-space: normal; vertical-align: top; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
  gap: 1.2rem; align-items: start; }
figure { margin: 0; }
figure img { display: block; width: 100%; max-width: 40rem; height: auto; background: #ffffff;
  border: 1px solid var(--line); border-radius: 6px; padding: .4rem; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .35rem; max-width: 40rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb;
  --paper: #fff; --card: #fff; --accent: #000; } body { max-width: none; padding: 0; }
  figure, tr, .caution { break-inside: avoid; } h2 { break-after: avoid; }
  .scroll { overflow: visible; } }
"""


def settings_table(settings: Mapping[str, Any]) -> Html:
    """Show plain settings."""
    rows = [[name, as_setting(value)] for name, value in settings.items()]
    return data_table("As the run was started.", ["Setting", "Value"], rows, words=True)


class Html(str):
    """Text that is HTML already; every other string is escaped when it becomes a child."""

    __slots__ = ()


def tag(element: str, *children: object, **attributes: object) -> Html:
    """Build an element; ``class_`` gives ``class``."""
    opened = "".join(
        f' {name.rstrip("_")}="{html.escape(str(value))}"' for name, value in attributes.items()
    )
    return Html(f"<{element}{opened}>{_inside(children)}</{element}>")


def _inside(children: Iterable[object]) -> str:
    return "".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children)


def section(title: str, *parts: Html) -> Html:
    """Make a headed section."""
    return tag("section", tag("h2", title), *parts)


def paragraphs(sentences: Iterable[str]) -> list[Html]:
    """Make a paragraph of each sentence."""
    return [tag("p", sentence) for sentence in sentences]


def bullets(sentences: Iterable[str]) -> Html:
    """Make a list of the sentences."""
    return tag("ul", *(tag("li", sentence) for sentence in sentences))


def data_table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    labels: int = 1,
    words: bool = False,
) -> Html:
    """Lay out a table whose first ``labels`` columns name the rows; ``words``: cells hold text."""
    top = tag("tr", *(_column_head(i, cell, labels) for i, cell in enumerate(head)))
    body = [tag("tr", *(_cell(i, c, labels) for i, c in enumerate(row))) for row in rows]
    table = tag(
        "table",
        tag("caption", caption),
        tag("thead", top),
        tag("tbody", *body),
        class_="words" if words else "numbers",
    )
    return tag("div", table, class_="scroll")


def _column_head(i: int, cell: object, labels: int) -> Html:
    return tag("th", cell, scope="col", class_="label" if i < labels else "value")


def _cell(i: int, cell: object, labels: int) -> Html:
    if i < labels:
        return tag("th", cell, scope="row", class_="label")
    return tag("td", cell)


def figure_tag(image: bytes, alt: str, caption: str, kind: str = "svg+xml") -> Html:
    """Embed an image with its alternative text and caption."""
    source = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    picture = Html(f'<img src="{source}" alt="{html.escape(alt)}">')
    return tag("figure", picture, tag("figcaption", caption))


def picture_section(pictures: Sequence[tuple[bytes, str]]) -> list[Html]:
    """Show PNGs with their captions, one below the other; nothing where there are none."""
    if not pictures:
        return []
    shown = [figure_tag(image, caption, caption, kind="png") for image, caption in pictures]
    return [section("Examples", *shown)]


def figure_grid(figures: Iterable[Html]) -> Html:
    """Lay figures out side by side where there is room."""
    return tag("div", *figures, class_="figures")


def write_page(path: Path | str, title: str, body: Iterable[Html]) -> Path:
    """Write one self-contained HTML document, atomically."""
    head = tag(
        "head",
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Html(_CSS)),
    )
    main = tag("body", tag("main", tag("h1", title), *body))
    page = f"<!DOCTYPE html>\n{tag('html', head, main, lang='en')}\n"
    path = Path(path)
    atomic_write(path, lambda to: to.write_text(page, encoding="utf-8"))
    return path
