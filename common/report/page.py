"""HTML: the small parts of a self-contained page that needs no network and runs no script."""

from __future__ import annotations

import base64
import html
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.checkpoint import atomic_write
from common.report.numbers import as_setting
from common.report.style import CSS

# more rows than this are folded away, one tap from being seen
LONG_TABLE = 16
# a browser that reads this loads nothing from anywhere, whatever a name in the page may hold
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Text that is HTML already; every other string is escaped when it becomes a child."""

    __slots__ = ()


@dataclass(frozen=True)
class Section:
    """A headed part of a page."""

    title: str
    parts: Sequence[Html]


@dataclass(frozen=True)
class Panel:
    """A plot.

    Attributes:
        plot: SVG from ``common.report.plots.draw``.
        alt: What it shows, for those who cannot see it.
        title: Above it; empty for a figure of one plot.
    """

    plot: str
    alt: str
    title: str = ""


@dataclass(frozen=True)
class Summary:
    """What a reader meets first.

    Attributes:
        kind: Of report, in a word or two.
        verdict: What came out, in words; the first sentence is set in large type.
        points: What that sentence counts or names, one a line below it.
        facts: A few numbers, by what they are.
        cautions: What keeps the verdict from being more than it is.
        about: How it came about.
    """

    kind: str
    verdict: Sequence[str]
    points: Sequence[str] = ()
    facts: Mapping[str, object] = field(default_factory=dict)
    cautions: Sequence[str] = ()
    about: str = ""


def tag(element: str, *children: object, **attributes: object) -> Html:
    """Build an element; ``class_`` gives ``class``, ``aria_label`` gives ``aria-label``."""
    opened = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
    )
    return Html(f"<{element}{opened}>{_inside(children)}</{element}>")


def _inside(children: Iterable[object]) -> str:
    return "".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children)


def section(title: str, *parts: Html) -> Section:
    """Make a headed section."""
    return Section(title, parts)


def paragraphs(sentences: Iterable[str]) -> list[Html]:
    """Make a paragraph of each sentence."""
    return [tag("p", sentence) for sentence in sentences]


def bullets(sentences: Iterable[str]) -> Html:
    """Make a list of the sentences."""
    return tag("ul", *(tag("li", sentence) for sentence in sentences))


def folded(title: str, *parts: Html) -> Html:
    """Hide parts behind their title until it is tapped."""
    return tag("details", tag("summary", title), *parts)


def data_table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    labels: int = 1,
    words: bool = False,
) -> Html:
    """Lay out a table whose first ``labels`` columns name the rows; ``words``: cells hold text."""
    top = tag("tr", *(_column_head(i, cell, labels) for i, cell in enumerate(head)))
    table = tag(
        "table",
        tag("caption", caption),
        tag("thead", top),
        tag("tbody", *_body_rows(rows, labels)),
        class_="words" if words else "numbers",
    )
    about = caption.split(". ")[0].rstrip(".")
    return tag("div", table, class_="scroll", role="region", aria_label=about, tabindex=0)


def _column_head(i: int, cell: object, labels: int) -> Html:
    return tag("th", cell, scope="col", class_="label" if i < labels else "value")


def _body_rows(rows: Iterable[Sequence[object]], labels: int) -> list[Html]:
    """Make the rows; where several in turn have the same first label, the later ones are muted."""
    body, last = [], None
    for row in rows:
        again = labels > 1 and row[0] == last
        last = row[0]
        body.append(tag("tr", *(_cell(i, cell, labels, again) for i, cell in enumerate(row))))
    return body


def _cell(i: int, cell: object, labels: int, again: bool) -> Html:
    if i < labels:
        kind = "label again" if again and i == 0 else "label"
        return tag("th", tag("span", cell), scope="row", class_=kind)
    return tag("td", cell)


def long_table(
    title: str, caption: str, head: Sequence[str], rows: Sequence[Any], **how: Any
) -> Html:
    """Lay out a table, folded where it is long."""
    table = data_table(caption, head, rows, **how)
    return folded(f"{title} ({len(rows)} rows)", table) if len(rows) > LONG_TABLE else table


def settings_section(settings: Mapping[str, Any]) -> Section:
    """Show plain settings."""
    rows = [[name, as_setting(value)] for name, value in settings.items()]
    table = data_table("As the run was started.", ["Setting", "Value"], rows, words=True)
    return section("Settings", folded("All settings", table) if len(rows) > LONG_TABLE else table)


def commands(lines: Iterable[str]) -> list[Html]:
    """Show command lines to copy."""
    return [tag("pre", line) for line in lines]


def figure_tag(panels: Sequence[Panel], caption: str) -> Html:
    """Show plots that belong together, under one caption."""
    shown = []
    for panel in panels:
        title = [tag("p", panel.title, class_="title")] if panel.title else []
        label = html.escape(panel.alt)
        plot = Html(panel.plot.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))
        shown.append(tag("div", *title, tag("div", plot, class_="plot"), class_="panel"))
    kind = {1: "one", 4: "wide four"}.get(len(panels), "wide")
    return tag(
        "figure",
        tag("div", *shown, class_="panels"),
        tag("figcaption", caption),
        class_=kind,
    )


def picture_tag(image: bytes, caption: str) -> Html:
    """Embed a PNG under its caption."""
    source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    picture = Html(f'<img src="{source}" alt="{html.escape(caption)}">')
    return tag("figure", picture, tag("figcaption", caption), class_="picture")


def picture_section(pictures: Sequence[tuple[bytes, str]]) -> list[Section]:
    """Show PNGs with their captions, one below the other; nothing where there are none."""
    if not pictures:
        return []
    return [section("Examples", *(picture_tag(image, caption) for image, caption in pictures))]


def figure_grid(figures: Iterable[Html]) -> Html:
    """Lay figures out side by side where there is room."""
    return tag("div", *figures, class_="figures")


def write_page(path: Path | str, title: str, summary: Summary, sections: Iterable[Section]) -> Path:
    """Write one self-contained HTML document, atomically."""
    head = tag(
        "head",
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        tag("title", title),
        tag("style", Html(CSS)),
    )
    sections = list(sections)
    anchors = _anchors(sections)
    links = [
        tag("a", part.title, href=f"#{anchor}")
        for part, anchor in zip(sections, anchors, strict=True)
    ]
    placed = [
        tag("section", tag("h2", part.title), *part.parts, id=anchor)
        for part, anchor in zip(sections, anchors, strict=True)
    ]
    contents = tag("nav", *links, aria_label="Contents")
    main = tag("main", _header(title, summary), contents, *placed)
    page = _with_own_ids(f"<!DOCTYPE html>\n{tag('html', head, tag('body', main), lang='en')}\n")
    path = Path(path)
    atomic_write(path, lambda to: to.write_text(page, encoding="utf-8"))
    return path


def _with_own_ids(page: str) -> str:
    """Number the plots, and with it what they refer to inside: two may be alike."""
    number = itertools.count(1)

    def numbered(plot: re.Match[str]) -> str:
        return re.sub(r'( id="|url\(#|href="#)', rf"\1plot{next(number)}-", plot[0])

    return re.sub(r"<svg .*?</svg>", numbered, page, flags=re.DOTALL)


def _header(title: str, summary: Summary) -> Html:
    """Say what came out before anything else."""
    first, *others = summary.verdict
    facts = [tag("div", tag("dt", name), tag("dd", told)) for name, told in summary.facts.items()]
    return tag(
        "header",
        tag("p", summary.kind, class_="kind"),
        tag("h1", title),
        tag(
            "div",
            tag("p", first, class_="verdict"),
            *([bullets(summary.points)] if summary.points else []),
            *paragraphs(others),
            class_="outcome",
        ),
        *(tag("p", sentence, class_="caution") for sentence in summary.cautions),
        *([tag("dl", *facts)] if facts else []),
        *([tag("p", summary.about, class_="about")] if summary.about else []),
    )


def _anchors(sections: Iterable[Section]) -> list[str]:
    """Name each section for links, no two alike."""
    found: list[str] = []
    for part in sections:
        name = re.sub(r"[^a-z0-9]+", "-", part.title.lower()).strip("-") or "part"
        found.append(f"{name}-{len(found)}" if name in found else name)
    return found
