"""Model cards: what a file of weights is, how it was made, and what that is known to be worth."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.disk import write_text
from common.options import OptionError
from common.outputs import run_command
from common.soup import Soup

CARD, README = "card.json", "README.md"
CAVEAT = (
    "A gain over the start is no proof that the peers taught anything: training on for as long "
    "without them may gain as much. Only an experiment with controls, over seeds, can tell the "
    "two apart."
)
_NO_SUM = "no sum: these data are no list of files"
NO_EXPERIMENT = "No such experiment was given for this file."


class Files(NamedTuple):
    """The files that a data set consists of.

    Attributes:
        paths: In any order; one that is there twice counts once.
        root: The folder to which their names are told; None: the deepest that holds them all.
    """

    paths: Sequence[str]
    root: str | None = None


@dataclass(frozen=True)
class Evidence:
    """What one file of a peer's weights did on the held-out data.

    Attributes:
        about: How these weights came to be, in a sentence.
        measured_on: Which data.
        before: The start's metrics, by name with unit.
        after: These weights' metrics, by the same names.
        counts: What else was counted against the start, for instance samples fixed and broken.
        teachers: Share of the samples on which each peer taught this one, in [0, 1].
    """

    about: str
    measured_on: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    counts: Mapping[str, int] = field(default_factory=dict)
    teachers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """All that a model card tells, as plain data.

    Attributes:
        peer: The model's name in its run.
        model: Its architecture, as its host calls it.
        about: What it is, in a sentence.
        front: The hub's metadata, in order; entries that are None are left out.
        made: Settings of the run that made it.
        evidence: By the name of the file: ``best``, ``last``, ``soup``.
        lineage: From what it was made: data, files with their sums.
        versions: Of the software, and the day.
        loading: Code that loads a file; ``{file}`` stands for its name.
        loading_hub: Code that loads it from the hub; ``{repo}`` stands for the repository.
        labels: Names of the classes, by number; empty where they are not known.
    """

    peer: str
    model: str
    about: str
    front: Mapping[str, Any]
    made: Mapping[str, str]
    evidence: Mapping[str, Evidence]
    lineage: Mapping[str, str]
    versions: Mapping[str, str]
    loading: str
    loading_hub: str
    labels: Sequence[str] = field(default_factory=list)


def to_json(card: Card) -> str:
    """Write a card as JSON, from which other files of the same peer get theirs."""
    return json.dumps(asdict(card), indent=1)


def from_json(text: str, source: Path | str) -> Card:
    """Read what ``to_json`` wrote.

    Raises:
        OptionError: Not that; names the source.
    """
    try:
        content = json.loads(text)
        evidence = {which: Evidence(**told) for which, told in content.pop("evidence").items()}
        return Card(**content, evidence=evidence)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OptionError(
            f"{source}: no model card of a run ({error!r}); resume the run: its end writes it"
        ) from error


def card_text(
    card: Card,
    which: str,
    file: str,
    sha256: str,
    *,
    repo: str = "",
    analysis: Mapping[str, Any] | None = None,
) -> str:
    """Write the card of one file in Markdown, with the front matter that the hub reads.

    Args:
        card: What is told.
        which: Of ``card.evidence``.
        file: The file's name.
        sha256: Of the file.
        repo: Where on the hub it will be; empty: nowhere.
        analysis: An experiment's ``analysis.json``, of peers of the same names.

    Raises:
        OptionError: No such weights, or an experiment that does not know the peer.
    """
    if which not in card.evidence:
        raise OptionError(
            f"peer {card.peer!r} has no {which!r} weights; it has {', '.join(card.evidence)}"
        )
    told = card.evidence[which]
    parts = [
        front_matter(card.front),
        f"# {card.peer}: {card.model}",
        card.about,
        "## How it was made",
        told.about,
        _taught(told.teachers),
        markdown_table(("setting", "value"), card.made.items()),
        "## Evidence",
        f"Measured on {told.measured_on}.",
        markdown_table(("", "start", "this file", "change"), _changes(told)),
        _counted(told.counts),
        CAVEAT,
        _effects(analysis, card.peer) if analysis is not None else NO_EXPERIMENT,
        "## Lineage",
        markdown_table(("what", "which"), [(f"`{file}`", _sum(sha256)), *card.lineage.items()]),
        markdown_table(("software", "version"), card.versions.items()),
        "## How to load it",
        _code(card.loading.replace("{file}", file)),
        _code(card.loading_hub.replace("{repo}", repo)) if repo else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_card(folder: Path, card: Card, best: str) -> None:
    """Write ``card.json``, and ``README.md`` of the best weights.

    Args:
        folder: Of the peer.
        card: What is told.
        best: Name of the file of its best weights.
    """
    write_text(folder / CARD, to_json(card))
    write_text(folder / README, card_text(card, "best", best, file_sum(folder / best)))


def write_each(
    trainer: Any, specs: Iterable[Any], describe: Callable[[Any], Card], best: str
) -> None:
    """Write the card of every learning peer that this process leads.

    Args:
        trainer: A task's, after training: with ``world``, ``peers`` and ``folder``.
        specs: All peers as asked for, with ``name`` and ``frozen``.
        describe: Collects what one peer's card tells.
        best: Name of the file of best weights.
    """
    here = {peer.name for peer in trainer.peers.here} if trainer.world.leads else set()
    for spec in specs:
        if spec.name in here and not spec.frozen:
            write_card(trainer.folder / spec.name, describe(spec), best)


def rewrite_card(folder: Path, which: str, file: str, analysis: Path | None = None) -> Path:
    """Write a peer's card for another of its files, or with what an experiment showed.

    Args:
        folder: Of the peer, with ``card.json``.
        which: Of the card's evidence.
        file: Name of these weights' file.
        analysis: An experiment's ``analysis.json``.

    Returns:
        The card.

    Raises:
        OptionError: Files that are missing or not what they should be.
    """
    for path in (folder / CARD, folder / file, *([analysis] if analysis else [])):
        if not path.is_file():
            raise OptionError(f"{path}: no such file")
    card = from_json((folder / CARD).read_text(encoding="utf-8"), folder / CARD)
    known: dict[str, Any] | None = None
    if analysis is not None:
        try:
            known = json.loads(analysis.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OptionError(f"{analysis}: cannot be read as JSON ({error})") from error
    text = card_text(card, which, file, file_sum(folder / file), analysis=known)
    write_text(folder / README, text)
    return folder / README


def rewrite_main(
    prog: str, folder: str, files: Mapping[str, str], arguments: Sequence[str] | None
) -> int:
    """Run the command line that writes a card anew; bad input ends in one line.

    Args:
        prog: How it is called.
        folder: How a peer's folder looks, for the help.
        files: Names of the files of weights, by the card's evidence.
        arguments: As on the command line; None: those of the process.
    """
    parser = argparse.ArgumentParser(prog=prog, description="Write the model card of a peer anew.")
    parser.add_argument("folder", type=Path, help=f"{folder} of a finished run")
    parser.add_argument("--which", choices=tuple(files), default="best", help="which file")
    parser.add_argument("--analysis", type=Path, help="analysis.json of an experiment")
    asked = parser.parse_args(arguments)

    def write() -> Any:
        card = rewrite_card(asked.folder, asked.which, files[asked.which], asked.analysis)
        return sys.stdout.write(f"{card}\n")

    return run_command(write, (OptionError,))


def start_title(name: str, model: str, frozen: bool, student: str) -> str:
    """Say in a lineage whose start it is: the student's own, or another peer's."""
    if name == student:
        return "its start"
    return f"peer `{name}` ({model}{', frozen' if frozen else ''}), start"


def kind_of(trainer: Any, name: str) -> str:
    """Say what a peer's files hold: its weights, or where it has an average that."""
    peer = next(peer for peer in trainer.peers.here if peer.name == name)
    return "weights" if peer.average is None else "average of the weights"


def chosen_row(
    history: Sequence[Mapping[str, float]], unit: str, when: float, metric: str, value: float
) -> Mapping[str, float]:
    """Return the evaluation of that epoch or iteration (``unit``) that chose the best weights."""
    rows = [row for row in history if row[unit] == when]
    return next((row for row in rows if row[metric] == value), rows[0])  # it may be NaN


def shares_taught(
    lessons: Sequence[Mapping[str, float]], names: Sequence[str], student: str
) -> dict[str, float]:
    """Average over the ledger's rows on what share of the samples each peer taught a student."""
    return {
        teacher: sum(row[f"transfer/{teacher}->{student}/share"] for row in lessons) / len(lessons)
        for teacher in names
        if teacher != student and lessons
    }


def soup_evidence(soup: Soup, title: str, where: str, best: Evidence) -> Evidence:
    """Tell of an average of weights.

    Args:
        soup: The average.
        title: Of its metric, with the unit.
        where: What it was measured on.
        best: Of the weights that are part of it.
    """
    return Evidence(
        f"An average of {100 * soup.alpha:g} % of the best weights and the rest of the start's.",
        where,
        before={title: soup.measured_at(0.0)},
        after={title: soup.measured_at(soup.alpha)},
        teachers=best.teachers,
    )


def versions(**hosts: str) -> dict[str, str]:
    """Tell the versions of the software, hosts among it, and the day."""
    try:
        own = version("peer-transfer")
    except PackageNotFoundError:
        own = "not installed, run from its sources"
    return {
        "peer-transfer": own,
        "torch": str(torch.__version__),
        **hosts,
        "numpy": np.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def front_matter(front: Mapping[str, Any]) -> str:
    """Write metadata as YAML, every value quoted as JSON does, which YAML reads too."""
    lines = []
    for key, value in front.items():
        if isinstance(value, (list, tuple)):
            lines += [f"{key}:", *(f"- {json.dumps(item)}" for item in value)]
        elif value is not None:
            lines.append(f"{key}: {json.dumps(value)}")
    return "\n".join(["---", *lines, "---"])


def _taught(teachers: Mapping[str, float]) -> str:
    shares = [f"{name} on {100 * share:.1f} %" for name, share in teachers.items() if share > 0]
    if not shares:
        return "No peer taught it up to these weights."
    return f"Taught by: {', '.join(shares)} of the training samples."


def _changes(told: Evidence) -> list[tuple[str, str, str, str]]:
    return [
        (name, f"{told.before[name]:.4g}", f"{value:.4g}", f"{value - told.before[name]:+.3g}")
        for name, value in told.after.items()
    ]


def _counted(counts: Mapping[str, int]) -> str:
    told = ", ".join(f"{name}: {count}" for name, count in counts.items())
    return f"Against the start, {told}." if told else ""


def _effects(analysis: Mapping[str, Any], peer: str) -> str:
    """Tell an experiment's differences to its control, whatever they show."""
    try:
        test = analysis["test"]
        rows = [
            _effect(arm, effects[peer])
            for arm, effects in test["peer_gains"].items()
            if effects.get(peer) is not None
        ]
        names, metric, control = list(test["names"]), test["metric"], test["control"]
        interval = f"{100 * test['level']:g} % interval"
        first = _primary(analysis["together"], test)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise OptionError(
            f"the analysis is not that of an experiment ({error!r}); give the analysis.json that "
            "experiment.py wrote"
        ) from error
    if not rows:
        raise OptionError(
            f"the experiment knows no peer {peer!r}, only {', '.join(names)}; give the analysis of "
            "an experiment with the same names"
        )
    told = "peers named " + ", ".join(f"`{name}`" for name in names)
    head = ("arm", f"gain in {metric} over `{control}`", interval, "seeds", "p (Holm)", "")
    return (
        f"An experiment with controls trained {told}, over seeds, and measured them on a test set. "
        f"What it found for the one of this name (positive is better); whether this file is of one "
        f"of its runs was not looked at. {first}\n\n{markdown_table(head, rows)}"
    )


def _primary(together: bool, test: Mapping[str, Any]) -> str:
    """Say what the primary target shows, so that one peer's row is not read as the result."""
    if together:
        return "All targets were corrected together."
    shown = [
        f"{arm} {mean['mean']:+.3g}"
        for arm, effects in test["gains"].items()
        if (mean := effects["mean"]) is not None and mean["shown"]
    ]
    return (
        "Its primary target is the mean of the peers, where "
        f"{'shown is: ' + ', '.join(shown) if shown else 'nothing is shown'}. A single peer's "
        "rows are secondary, corrected over the arms alone."
    )


def _effect(arm: str, effect: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = effect["low"], effect["high"]
    told = "not known" if low is None or high is None else f"{low:+.3g} to {high:+.3g}"
    shown = "shown" if effect["shown"] else "not shown"
    gain, p = f"{effect['mean']:+.3g}", f"{effect['p_holm']:.3g}"
    return arm, gain, told, str(effect["count"]), p, shown


def markdown_table(head: Sequence[str], rows: Any) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _sum(sha256: str) -> str:
    return f"sha256 `{sha256}`"


def file_sum(path: Path) -> str:
    """Compute the SHA-256 of a file, as ``sha256sum`` does."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def told_sum(path: Path) -> str:
    """Name a file with its sum; of its path only the last folder, which tells no one's home."""
    return f"`{Path(path.parent.name, path.name)}`, {_sum(file_sum(path))}"


def data_rows(trained: Files | None, measured: Files | None) -> dict[str, str]:
    """Tell in a lineage the files that a run was trained and measured on; see ``told_files``."""
    return {"files trained on": told_files(trained), "files measured on": told_files(measured)}


def told_files(files: Files | None) -> str:
    """Tell the sum of a data set's names and sizes, as the files are now; reads none of them.

    It is the same on every machine and in any order, and another one where a file is added,
    removed, renamed or of another size. A content that changes and keeps its size is not seen.
    With GNU tools, in the root, of all that lies there:
    ``find -L . -type f -printf '%s %P\\0' | LC_ALL=C sort -z | sha256sum``.

    A file that is not there has the size ``?``: a run may do without some, and what it has reached
    is not lost for a card.

    Args:
        files: None, or none: the data are a stream, or no files of their own.
    """
    if files is None or not files.paths:
        return _NO_SUM
    return f"{names_sum(files)} at the run's end; their content was not read"


def names_sum(files: Files | None) -> str:
    """Tell the sum of names and sizes alone; see ``told_files``."""
    if files is None or not files.paths:
        return _NO_SUM
    lines, size, lost = [], 0, 0
    for path, name in _named(files).items():
        try:
            own = os.stat(path).st_size
        except OSError:
            lost += 1
            lines.append(f"? {name}\0".encode("utf-8", "surrogateescape"))
        else:
            size += own
            lines.append(f"{own} {name}\0".encode("utf-8", "surrogateescape"))
    digest = hashlib.sha256(b"".join(sorted(lines))).hexdigest()
    missing = f", {lost} of them not found" if lost else ""
    return f"sum of names and sizes {_sum(digest)}: {len(lines)} files{missing}, {size} bytes"


def _named(files: Files) -> dict[str, str]:
    """Return each path once, with its name below the root, with ``/`` on every machine."""
    paths, root = dict.fromkeys(files.paths), files.root
    if root is None:
        paths = dict.fromkeys(map(os.path.abspath, paths))
        # what the first and the last share in the order of letters, all between them share
        root = os.path.commonpath([os.path.dirname(end) for end in (min(paths), max(paths))])
    start = os.path.join(root, "")
    # taking the start off is far faster than relpath, which a million files would feel
    names = (
        path[len(start) :] if path.startswith(start) else os.path.relpath(path, root)
        for path in paths
    )
    return {path: name.replace(os.sep, "/") for path, name in zip(paths, names, strict=True)}
