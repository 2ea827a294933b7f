"""The reports in a browser: on a telephone and at a desk, in the light and in the dark."""

import html
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.experiment.plan import read_experiment
from common.experiment.results import analyse
from common.report import write_comparison, write_experiment, write_run_report
from common.report.scouting import write_scout_report
from common.scout_outcome import describe_outcome
from common.scouting import Judge, rank_teams
from common.survey import HeldLogits, survey
from tests.common.test_report import history, lessons, results
from tests.common.toy_experiment import ToyTask

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
pytestmark = pytest.mark.skipif(
    BROWSER is None,
    reason="no browser here to look at the reports with; install chromium or Chrome",
)

AUDIT = Path(__file__).with_name("browser_audit.html")
SCHEMES = {"light": 1, "dark": 0}
UNITS = ("%", "points", "nats", "count", "epoch", "iteration", "no unit", "own scale")
LONG = [
    "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "convnextv2_huge.fcmae_ft_in22k_in1k_512",
    "hf:facebook/dinov2-base-imagenet1k-1-layer",
    "resnet50.a1_in1k",
    "levit",
]
# what must be found in it: too wide, too pale, asks the network, says so, labels one over another
BAD = """<!DOCTYPE html><body style="background: white"><p style="color: #aaa">pale</p>
<div style="width: 2000px">wide</div><img src="http://nowhere.invalid/x.png">
<script>console.error("a complaint")</script>
<figure><svg viewBox="0 0 200 50" width="200"><text x="20" y="20">one</text>
<text x="22" y="21">two</text><text x="190" y="40">beyond</text></svg></figure>"""


def write_reports(folder):
    """Write one report of each kind, with what strains it: names, arms, peers, models."""
    write_run_report(
        folder / "run.html",
        names=LONG,
        history=history(LONG, 12),
        lessons=lessons(LONG, 12),
        metric="top1",
        settings={"data": "/scratch/" + "a_long_folder_name/" * 6, "rule": "best", "peers": LONG},
        events=[
            {"peer": LONG[4], "epoch": 3, "action": "warned", "metric": "top1"}
            | {"start": 66.0, "now": 60.0, "evaluations": 2}
        ],
    )
    arms = {"none": 0, "best": 1, "random": 0.5, "mutual": -1}
    write_comparison(
        folder / "comparison.html",
        title="Who should teach?",
        names=["resnet", "levit"],
        arms=list(arms),
        results=results(arms, 6, ["resnet", "levit"]),
        control="none",
        descriptions={"none": "Nothing is transferred."},
        settings={"epochs": 2},
    )
    write_experiment(folder / "experiment.html", "Fourteen arms", fourteen_arms(folder))
    write_scout_report(folder / "scouting.html", scouted())
    (folder / "bad.html").write_text(BAD)
    return ["run.html", "comparison.html", "experiment.html", "scouting.html", "bad.html"]


def fourteen_arms(folder):
    """Analyse an experiment of eight arms that come of themselves and more, without training."""
    path, task, names = folder / "exp.yaml", ToyTask(), ["a_peer_with_quite_a_long_name", "b"]
    peers = [{"model": "toy", "name": name} for name in names]
    arms = {f"ablation_number_{i}": {} for i in range(8)}
    path.write_text(json.dumps({"peers": peers, "seeds": 6, "arms": arms}))
    experiment = read_experiment(task.read(path), path)
    rng = random.Random(0)

    def measured(base):
        metrics = {f"{name}/top1": base + rng.random() for name in names}
        metrics |= {f"{name}/ece": 9 + rng.random() for name in names}
        metrics |= {f"{name}/ece_calibrated": 3 + rng.random() for name in names}
        metrics |= {f"{name}/temperature": 1 + rng.random() for name in names}
        metrics |= {f"{name}/{flip}": 30 for name in names for flip in ("fixed", "broken")}
        kinds = {str(kind): base + 5 * rng.random() for kind in range(10)}
        return {
            "metrics": metrics | {"ensemble/top1": base + 1.5, "oracle/top1": base + 9},
            "classes": dict.fromkeys(names, kinds),
        }

    found = [
        {
            "arm": arm,
            "seed": seed,
            "epochs": dict.fromkeys(names, 3),
            "history": history(names, 12),
            "lessons": [] if arm == "none" else lessons(names, 12),
            "cost": {"updates": 100, "cpu_seconds": 60.0, "wall_seconds": 70.0},
            "start": {"test": measured(50)},
            **{which: measured(60 + (arm == "best")) for which in ("chosen", "last")},
        }
        for arm in experiment.arms
        for seed in range(6)
    ]
    return analyse(experiment, task, found)


def scouted():
    names = [f"a_model_of_some_family_{i}.in1k" for i in range(9)] + LONG[:3]
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (200,), generator=generator)
    logits = torch.randn(len(names), 200, 5, generator=generator) + F.one_hot(labels, 5)
    judge = Judge(survey(HeldLogits(names, logits), labels))
    outcome = describe_outcome(judge, rank_teams(judge, [2], "flips"), "flips", None, 8)
    outcome |= {"commands": ["python train.py --peer " + LONG[0]], "chosen_on_test": True}
    return outcome | {"settings": {"seed": 0}}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Open every report, in both schemes; return what the page itself measured, and its words."""
    folder = tmp_path_factory.mktemp("browser")
    shutil.copy(AUDIT, folder)
    pages = write_reports(folder)
    running = {scheme: open_pages(folder, pages, scheme) for scheme in SCHEMES}
    found = {}
    for scheme, process in running.items():
        page, told = process.communicate(timeout=300)
        assert process.returncode == 0, told
        left = re.search(r'<pre id="found">(.*?)</pre>', page, re.DOTALL)
        assert left, told
        complaints = [line for line in told.splitlines() if "CONSOLE" in line]
        found[scheme] = json.loads(html.unescape(left[1])), complaints
    return found


def open_pages(folder, pages, scheme):
    """Start a browser that prints what the audit left, and what any page complained of."""
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage"),
        *("--allow-file-access-from-files", "--enable-logging=stderr", "--dump-dom"),
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / scheme}",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        f"{(folder / AUDIT.name).as_uri()}?{','.join(pages)}",
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


@pytest.fixture(params=list(SCHEMES))
def views(seen, request):
    """The good pages, in one scheme, at both widths."""
    found, _ = seen[request.param]
    views = [view for view in found if view["page"] != "bad.html"]
    assert [view["width"] for view in views] == [390, 1280] * 4
    assert {view["dark"] for view in views} == {request.param == "dark"}
    return views


def test_the_audit_finds_what_is_wrong(seen):
    for found, complaints in seen.values():
        narrow = next(view for view in found if view["page"] == "bad.html")
        assert narrow["scrollWidth"] > narrow["width"]
        assert "pale" in [words for _, words in narrow["faint"]]
        assert narrow["requests"] == ["http://nowhere.invalid/x.png"]
        assert narrow["plots"][0]["overlaps"] == ["one | two"]
        assert narrow["plots"][0]["cut"] == ["beyond"]
        assert any("a complaint" in line and "bad.html" in line for line in complaints)


def test_pages_fit_and_say_the_verdict_first(views):
    for view in views:
        assert view["scrollWidth"] <= view["width"], view["page"]
        assert view["verdict"] < (600 if view["width"] == 390 else 400), view["page"]


def test_pages_ask_for_nothing_and_complain_of_nothing(seen):
    for found, complaints in seen.values():
        assert not [line for line in complaints if "bad.html" not in line]
        assert not any(view["requests"] for view in found if view["page"] != "bad.html")


def test_every_word_can_be_read(views):
    for view in views:
        assert view["faint"] == [], view["page"]
        assert view["seen"] > 60, view["page"]


def test_plots_are_whole_and_labelled(views):
    for view in views:
        assert view["figures"] == view["captions"] > 1
        assert all(alt and loaded for alt, loaded in view["pictures"])
        for plot in view["plots"]:
            where = view["page"], view["width"], plot["alt"]
            assert plot["alt"] and plot["role"] == "img", where
            assert plot["width"] > 250 and plot["height"] > 80, where
            assert plot["smallest"] >= 9, where
            assert (plot["cut"], plot["overlaps"]) == ([], []), where
            assert any(unit in word for word in plot["words"] for unit in UNITS), where
