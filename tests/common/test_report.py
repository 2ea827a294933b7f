"""What the reports say, number by number, and that each is one file that needs no other."""

import math
import re
from html.parser import HTMLParser

import matplotlib
import pytest

from common.report import (
    comparison_sentences,
    comparison_text,
    write_comparison,
    write_run_report,
)
from common.report.plots import row_labels, short_name
from common.report.style import CSS, SERIES
from common.statistics import compared

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Reads a page: its tables by caption, its text, its pictures; refuses unbalanced tags."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tables, self.images, self.words, self.tags = [], {}, [], [], set()
        self.plots = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open

    @property
    def text(self):
        return " ".join(self.words)

    def rows(self, caption):
        """Return the rows of the table whose caption starts so, as lists of cells."""
        return next(rows for title, rows in self.tables.items() if title.startswith(caption))

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "svg":
            self.plots.append(dict(attrs))
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "tr":
            self.row = []
            self.table.append(self.row)
        if tag == "table":
            self.table = []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            return
        self.words.append(data)
        if self.open[-1:] == ["caption"]:
            self.tables[data] = self.table
        if self.open[-1:] in (["td"], ["th"]) or self.open[-2:] == ["th", "span"]:
            self.row.append(data)


def history(names, epochs=2):
    """Each evaluation adds a point to the first peer and takes one from every other."""
    rows = []
    for epoch in range(epochs + 1):
        row = {"epoch": epoch, "ensemble/top1": 80 + 2 * epoch, "oracle/top1": 90.0}
        for i, name in enumerate(names):
            row[f"{name}/top1"] = 70 - i + (epoch if i == 0 else -epoch)
            if epoch:
                row |= {f"{name}/fixed": 11 * epoch, f"{name}/broken": 7 * epoch}
        rows.append(row)
    return rows


def lessons(names, epochs=2):
    """The first peer teaches a quarter of all samples in epoch 1, half in epoch 2."""
    rows = []
    for epoch in range(1, epochs + 1):
        row = {"epoch": epoch, "transfer/taught": 0.25 * epoch, "transfer/entropy": 0.0}
        for i, name in enumerate(names):
            row |= {f"{name}/task_loss": 1.0, f"{name}/transfer_loss": 0.1}
            row[f"{name}/teaches"] = float(i == 0)
            for student in names:
                if student != name:
                    prefix = f"transfer/{name}->{student}"
                    row[f"{prefix}/share"] = 0.25 * epoch * (i == 0)
                    row |= {f"{prefix}/gap": float(epoch), f"{prefix}/kl": 0.2 * (i == 0)}
        rows.append(row)
    return rows


def run(path, names=("a", "b"), **changes):
    options = {
        "names": list(names),
        "history": history(names),
        "lessons": lessons(names),
        "metric": "top1",
        "settings": {"rule": "best", "peers": list(names), "margin": None},
    }
    return Page(write_run_report(path / "run" / "report.html", **options | changes))


def results(arms, seeds, names=("a", "b")):
    """Give each arm a gain over 80, 79, ... plus a wobble that differs by seed; gains by arm."""
    rows = []
    for arm, gain in arms.items():
        for seed in range(seeds):
            wobble = 0.1 * gain * (seed % 3)
            rows.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "before": {name: 70.0 - i for i, name in enumerate(names)},
                    "after": {name: 80.0 - i + gain + wobble for i, name in enumerate(names)},
                    "fixed": {name: 20 for name in names},
                    "broken": {name: 5 for name in names},
                    "ensemble_before": 72.0,
                    "ensemble_after": 82.0 - gain - wobble,
                    "oracle_before": 90.0,
                    "oracle_after": 95.0,
                    "lessons": lessons(names) if gain else [],
                }
            )
    return rows


def compare(path, arms, seeds, names=("a", "b"), **changes):
    options = {
        "title": "Who should teach?",
        "names": list(names),
        "arms": list(arms),
        "results": results(arms, seeds, names),
        "control": "none",
        "descriptions": {"none": "No transfer."},
        "settings": {"epochs": 2},
    }
    return Page(write_comparison(path / "comparison.html", **options | changes))


def sentences(arms, seeds):
    return " ".join(comparison_sentences(compared(results(arms, seeds), ["a", "b"], "none")))


def assert_stands_alone(page):
    assert page.source.startswith("<!DOCTYPE html>")
    for mark in ("http://", "https://", "@import", "srcset", "nan", "None", "inf "):
        assert mark not in page.source.replace("info", ""), mark
    assert not re.search(r"url\((?!#)", page.source)
    assert "default-src 'none'" in page.source
    assert not page.tags & {"script", "link", "iframe", "object"}
    ids = re.findall(r' id="([^"]*)"', page.source)
    assert len(ids) == len(set(ids))
    assert page.plots
    for plot in page.plots:
        assert plot["role"] == "img" and plot["aria-label"]
    for image in page.images:
        assert image["src"].startswith("data:image/")
        assert image["alt"]


def test_run_table_has_the_numbers(tmp_path):
    page = run(tmp_path)
    assert page.rows("top1 of every peer") == [
        ["Peer", "Before", "Best", "Best at", "Last", "Change", "Fixed", "Broken"],
        ["a", "70.00", "72.00", "2", "72.00", "+2.00", "22", "14"],
        ["b", "69.00", "69.00", "0", "67.00", "-2.00", "22", "14"],
    ]


def test_run_pairs_weigh_epochs_by_what_was_taught(tmp_path):
    rows = run(tmp_path).rows("Every pair")
    # the share is the mean of 0.25 and 0.5, the gap that of 1 and 2 with these weights
    assert rows[1] == ["a → b", "37.5 %", "1.667", "0.200"]
    assert rows[2] == ["b → a", "0.0 %", "–", "–"]


def test_run_says_who_gained_and_who_lost(tmp_path):
    text = run(tmp_path).text
    assert "Better at the end than at the start: a (+2.00)." in text
    assert "Worse: b (-2.00)." in text
    assert "The strongest peer was and is a, 70.00 before and 72.00 now." in text
    assert "went from 80.00 to 84.00, 12.00 better than the strongest single peer" in text
    assert "Somebody taught on 37.5 % of the samples seen." in text
    assert "One run proves nothing" in text and "--rule none" in text and "optimistic" in text


def test_run_where_lower_is_better(tmp_path):
    page = run(tmp_path, lower_is_better=True)
    assert "Better at the end than at the start: b (-2.00)." in page.text
    assert "The strongest peer was b with 69.00 and is b" not in page.text
    assert "12.00" not in page.rows("top1 of every peer")[1]
    assert "17.00 worse than the strongest single peer" in page.text
    assert page.rows("top1 of every peer")[2][2:4] == ["67.00", "2"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_run_of_any_number_of_peers(tmp_path, count):
    names = [f"peer_{i}" for i in range(count)]
    page = run(tmp_path, names)
    assert_stands_alone(page)
    assert len(page.rows("top1 of every peer")) == 1 + count
    assert ("Who taught whom" in page.text) == (count > 1)
    if count > 1:
        assert len(page.rows("Every pair")) == 1 + count * (count - 1)


def test_run_with_the_metric_alone(tmp_path):
    rows = [{"epoch": e, "a/cc": 0.5 + 0.01 * e, "b/cc": math.nan if e else 0.4} for e in (0, 1)]
    page = run(tmp_path, history=rows, lessons=[], metric="cc")
    assert_stands_alone(page)
    assert page.rows("cc of every peer")[1:] == [
        ["a", "0.5000", "0.5100", "1", "0.5100", "+0.0100"],
        ["b", "0.4000", "0.4000", "0", "–", "–"],
    ]
    assert "nsemble" not in page.text and "Who taught whom" not in page.text


def test_run_before_training(tmp_path):
    page = run(tmp_path, history=history("ab", epochs=0), lessons=[])
    assert_stands_alone(page)
    assert "Only the start was measured." in page.text


def test_run_where_nobody_taught(tmp_path):
    silent = [
        {
            key: value if key in ("epoch", "a/task_loss", "b/task_loss") else 0.0
            for key, value in row.items()
        }
        for row in lessons("ab")
    ]
    page = run(tmp_path, lessons=silent)
    assert_stands_alone(page)
    assert "Nobody taught anybody in this run." in page.text


def test_everything_is_escaped(tmp_path):
    names = ["<b>", '_"x" & $y$']
    page = run(tmp_path, names, settings={"<i>": "<u>&"}, notes=["a < b"])
    assert_stands_alone(page)
    assert not page.tags & {"b", "i", "u"}
    assert [row[0] for row in page.rows("top1 of every peer")[1:]] == names
    assert ["<i>", "<u>&"] in page.rows("As the run was started.")
    assert "a < b" in page.text


def test_settings_and_missing_values(tmp_path):
    rows = run(tmp_path).rows("As the run was started.")
    assert rows[1:] == [["rule", "best"], ["peers", "a, b"], ["margin", "–"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": []}, "names is empty"),
        ({"history": []}, "history is empty"),
        ({"metric": "iou"}, "no finite 'a/iou'"),
    ],
)
def test_run_refuses(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes)
    assert not list(tmp_path.rglob("*.html"))


def test_reports_are_the_same_twice_and_leave_settings_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    first = run(tmp_path).source
    assert run(tmp_path).source == first
    assert dict(matplotlib.rcParams) == before


def test_comparison_tables_have_the_numbers(tmp_path):
    page = compare(tmp_path, {"none": 0, "best": 1, "random": 0.5}, 6)
    assert_stands_alone(page)
    # differences 1.0, 1.1, 1.2 twice: mean 1.1, s.e. 0.0365148, t(0.975, 5) = 2.570582
    gain = "+1.10 [+1.01, +1.19]"
    # the smallest p of 6 seeds is 1/32; over two arms 1/16, which shows nothing
    rows = page.rows("Gain over the control")
    assert rows[1] == [
        "none (control)",
        *["79.50 ± 0.00", "80.00 ± 0.00", "79.00 ± 0.00"],
        "82.00 ± 0.00",
    ]
    assert rows[2] == ["best", gain, gain, gain, "-1.10 [-1.19, -1.01]"]
    assert ["best minus none", gain, gain, "-1.10 [-1.19, -1.01]"] in page.rows(
        "top1 of best minus"
    )
    peers = page.rows("top1, mean ± standard deviation")
    assert ["best", "a", "70.00 ± 0.00", "81.10 ± 0.09", gain, "20.0", "5.0"] in peers
    assert ["none", "oracle", "90.00 ± 0.00", "95.00 ± 0.00", "–", "–", "–"] in peers
    taught = page.rows("Of all samples, how many")
    assert taught[1][:5] == ["best", "a → b", "25.0 %", "50.0 %", "37.5 %"]
    assert {row[0] for row in taught[1:]} == {"best", "random"}
    assert ["none (control)", "No transfer.", "6"] in page.rows("The arms.")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("seeds", [1, 2])
def test_comparison_of_any_size(tmp_path, count, seeds):
    names = [f"peer_{i}" for i in range(count)]
    page = compare(tmp_path, {"none": 0, "best": 1}, seeds, names)
    assert_stands_alone(page)
    assert "this is a demonstration" in page.text


def test_comparison_with_the_values_alone(tmp_path):
    keep = ("arm", "seed", "before", "after")
    arms = {"none": 0, "mutual": 1}
    bare = [{key: row[key] for key in keep} for row in results(arms, 2)]
    page = compare(tmp_path, arms, 2, results=bare)
    assert_stands_alone(page)
    assert "ensemble" not in page.text and "Who taught whom" not in page.text


def test_comparison_escapes_and_shows_examples(tmp_path):
    page = compare(
        tmp_path,
        {"none": 0, "<b>": 1},
        2,
        title="<i>",
        notes=["x & y"],
        data_examples=(b"\x89PNG", "Digits <3"),
    )
    assert not page.tags & {"b", "i"}
    assert page.images[0] == {"src": "data:image/png;base64,iVBORw==", "alt": "Digits <3"}
    assert "x & y" in page.text


def test_words_for_an_effect_that_is_shown():
    text = sentences({"none": 0, "best": 1, "random": 0.2}, 8)
    # differences 1.0, 1.1, 1.2 in turn: mean 1.0875, s.e. 0.02950, t(0.975, 7) = 2.365; the
    # smallest p of 8 seeds is 2/256, twice that over two arms
    assert (
        "best is better in top1 than none for the mean of the peers: +1.09 [+1.02, +1.16] (p "
        "0.0078, corrected 0.0156; 8 seeds)." in text
    )
    assert "Secondary: best is worse in top1 than none for the ensemble: -1.09" in text
    assert text.count("Secondary: best is better in top1 than random") == 3  # mean, a, b
    assert "So this data shows that the choice of teacher matters for the mean" in text
    assert "demonstration" not in text


def test_words_for_an_effect_that_is_not_shown():
    rows = results({"none": 0, "best": 1, "random": 1}, 8)
    for row in rows:
        if row["arm"] == "random":
            sign = (-1) ** row["seed"]
            row["after"] = {name: value + sign for name, value in row["after"].items()}
            row["ensemble_after"] += sign
    text = " ".join(comparison_sentences(compared(rows, ["a", "b"], "none")))
    assert "best against random: the mean of the peers +0.00 [" in text
    assert "this data does not show that the choice of teacher matters" in text
    assert "than random" not in text


def test_what_outlasts_no_correction_is_not_claimed():
    """Of 5 arms, 6 seeds that all agree have p 1/32 each, 5/32 together."""
    arms = {"none": 0, **{f"arm{i}": 1 for i in range(5)}}
    summary = compared(results(arms, 6), ["a", "b"], "none")
    assert summary["gains"]["arm0"]["mean"]["low"] > 0
    text = " ".join(comparison_sentences(summary))
    assert "With 6 seeds the test's smallest p-value is too large" in text
    assert "No arm is shown to be better or worse than none for the mean of the peers." in text
    assert "better in top1" not in text and "*" not in comparison_text(summary)


@pytest.mark.parametrize(
    ("seeds", "told"), [(1, "1 seed proves nothing"), (4, "4 seeds prove nothing")]
)
def test_words_for_few_seeds(seeds, told):
    text = sentences({"none": 0, "best": 1, "random": 0.2}, seeds)
    assert text.startswith(told)
    assert "No arm is shown" in text and "is better" not in text
    assert "does not show that the choice of teacher matters" in text
    assert ("mean of the peers +0.80." in text) == (seeds == 1)


def test_words_count_the_comparisons():
    # two arms over the control and best minus random: mean, ensemble and two peers each; the
    # strongest and the weakest peer are b and a for every seed, so they are told once
    text = sentences({"none": 0, "best": 1, "random": 0.2}, 8)
    assert "Secondary: 10 of 10 other comparisons are shown" in text
    assert "up to 35 in 100 experiments" in text and "7 such corrections" in text
    assert "0 of 12 comparisons are not shown" in text
    # p 1/32 of 6 seeds outlasts the correction over one pair, not that over two arms
    few = sentences({"none": 0, "best": 1, "random": 0.2}, 6)
    assert "8 of 12 comparisons are not shown" in few


def test_words_for_seeds_that_are_one_run():
    rows = results({"none": 0, "best": 1}, 6)
    for row in rows:
        row["after"] = {name: 80.0 + (row["arm"] == "best") for name in row["after"]}
        row["ensemble_after"] = 82.0
    text = " ".join(comparison_sentences(compared(rows, ["a", "b"], "none")))
    assert "Every seed gave the same difference in a comparison of best" in text
    assert "is better in" not in text


def test_no_word_on_the_choice_without_the_random_arm():
    assert "choice of teacher" not in sentences({"none": 0, "best": 1}, 6)


def test_text_is_an_aligned_table():
    text = comparison_text(compared(results({"none": 0, "best": 1}, 6), ["a", "b"], "none"))
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("Arm "))
    assert len({len(line) for line in lines[head : head + 3]}) == 1
    assert lines[head + 1].startswith("none (control)")
    assert lines[head + 2].split()[:5] == ["best", "+1.10", "[+1.01,", "+1.19]", "*"]
    assert max(map(len, lines)) <= 110
    assert "- best is better in top1 than none for the mean of the peers" in text


def test_runs_that_count_iterations(tmp_path):
    def counted(rows):
        return [{"iteration": 500 * row.pop("epoch"), **row} for row in rows]

    rows, taught = counted(history("ab")), counted(lessons("ab"))
    page = run(tmp_path, history=rows, lessons=taught, pictures=[(b"png", "A scene.")])
    assert "for 1000 iterations" in page.text and "epoch" not in page.text
    assert "Examples" in page.text and "A scene." in page.text


def test_the_verdict_rests_on_the_mean_of_the_peers_alone(tmp_path):
    text = compare(tmp_path, {"none": 0, "best": 1, "random": 0.2}, 8).text
    told = "Of 2 arms, 2 are shown to be better than none for the mean of the peers."
    assert told in text
    assert "best is better: mean of peers +1.09 [+1.02, +1.16]" in text
    assert "Secondary: 10 of 10 other comparisons are shown" in text


def test_the_verdict_where_another_target_alone_is_shown(tmp_path):
    arms = {"none": 0, "best": 1}
    rows = results(arms, 8)
    for row in rows:  # both peers win and lose in turn; the ensemble always loses
        sign = (-1) ** row["seed"] * (row["arm"] == "best")
        row["after"] = {"a": 80.0 + sign, "b": 79.0 + sign}
    text = compare(tmp_path, arms, 8, results=rows).text
    assert "No arm is shown to be better or worse than none for the mean of the peers." in text
    assert "Secondary: best is worse in top1 than none for the ensemble" in text


def test_the_verdict_where_nothing_is_shown(tmp_path):
    text = compare(tmp_path, {"none": 0, "best": 1, "random": 0.2}, 3).text
    assert "No arm is shown to be better or worse than none for the mean of the peers." in text
    assert "best is better" not in text


def test_a_run_without_transfer_has_no_plot_of_it(tmp_path):
    rows = [row | {f"{name}/transfer_loss": 0.0 for name in "ab"} for row in lessons("ab")]
    page = run(tmp_path, lessons=rows)
    assert "Task loss" in page.text and "Transfer loss" not in page.text


def test_names_that_begin_alike_stay_apart_in_figures():
    names = ["a_long_name_that_goes_on_and_ends_here", "a_long_name_that_goes_on_and_ends_there"]
    assert short_name("short", ["short", *names]) == "short"
    assert row_labels(["best - random", "short"]) == ["best - random", "short"]
    long = [f"ema_mixture - ema_{arm}" for arm in ("none", "best")]
    assert row_labels(["best - random", *long]) == [
        "best\n- random", "ema_mixture\n- ema_none", "ema_mixture\n- ema_best",
    ]  # fmt: skip
    assert all(len(label) <= 20 for label in row_labels(names))
    assert len({short_name(name, names, 20) for name in names}) == 2
    assert len({short_name(name, [*names, *names], 20) for name in names}) == 2


def test_colours_can_be_told_from_the_page_in_both_schemes():
    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark = re.findall(r"--paper: (#\w+)", CSS)[1]
    for light_color, dark_color in SERIES.items():
        assert 1.05 / (luminance(light_color) + 0.05) > 2.95
        assert (luminance(dark_color) + 0.05) / (luminance(dark) + 0.05) > 3
