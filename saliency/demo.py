"""The method on composed videos: every arm from the same checkpoints, over seeds, in two reports.

    make demo TASK=saliency           3 seeds, a few minutes on two cores: proves nothing
    make demo TASK=saliency FULL=1    10 seeds, and longer fine-tuning

Each seed pretrains small stand-ins for the published models, each on videos of other motions, then
fine-tunes two of them, and all three, under every rule, through ``saliency/train.py``'s own code.
"""

from __future__ import annotations

import io
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.demo import once, outcome, own_cache, parser, side_by_side, write_json
from common.disk import OutputError
from common.outputs import run_command
from common.report import comparison_text, write_comparison
from common.statistics import compared
from saliency.pictures import teaching_pictures
from saliency.scenes import contact_sheet, write_videos
from saliency.train import run

HERE = Path(__file__).parent
OWN_MOTIONS = {
    "recent": ("slide", "circle"),
    "around": ("grow", "shake"),
    "pair": ("slide", "shake"),
}
GROUPS = {"two": ("recent", "around"), "three": ("recent", "around", "pair")}
ARMS = {
    "none": "the control: fine-tuned side by side, nothing transferred",
    "best": "on every clip, who predicts its map best teaches the others (the method)",
    "mutual": "each teaches the others on every clip (deep mutual learning)",
    "random": "a teacher drawn by lot for every clip: does the choice matter?",
}
QUICK, FULL = (3, 20), (10, 40)  # seeds, and epochs of fine-tuning
VIDEOS = {"pretrain": 120, "tune": 12, "val": 24}
PRETRAINING: dict[str, Any] = {"epochs": 30, "lr": 3e-3}
TUNING = {"lr": 1e-3}
BATCH = 8
METRIC = "cc"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and say where its reports are."""
    about = __doc__.splitlines()[0]
    asked = parser(about, QUICK[0], FULL[0], "demo_report/saliency").parse_args(arguments)
    seeds, epochs = FULL if asked.full else QUICK
    seeds = asked.seeds or seeds
    begun = time.monotonic()
    folder = own_cache(asked.cache, HERE).resolve()
    for seed in range(seeds):
        write_splits(folder / f"seed-{seed}", seed)
    results = run_all(folder, seeds, epochs, max(1, min(asked.jobs or 1, 8 * seeds)))
    for group, names in GROUPS.items():
        report = write_report(asked.output, folder, group, results[group], epochs)
        summary = compared(results[group], list(names), "none", arms=list(ARMS), metric=METRIC)
        sys.stdout.write(f"{comparison_text(summary)}\n\nReport: {report}\n\n")
    sys.stdout.write(f"{(time.monotonic() - begun) / 60:.1f} minutes.\n")
    return 0


def write_splits(place: Path, seed: int, videos: Mapping[str, int] = VIDEOS) -> None:
    """Write a seed's videos, each split with other draws; those of ``val`` of held-out digits.

    Args:
        place: The folder.
        seed: Of the draws.
        videos: How many to pretrain on, to fine-tune on, and to measure on.
    """
    for i, (name, motions) in enumerate(OWN_MOTIONS.items()):
        root = place / f"pretrain-{name}"
        write_videos(root / "annotation", videos["pretrain"], 10 * seed + i, motions)
        write_videos(root / "val", 4, 10 * seed + i, motions, True, 601)
    write_videos(place / "tune" / "annotation", videos["tune"], 10 * seed + 9)
    write_videos(place / "tune" / "val", videos["val"], 10 * seed + 9, held_out=True, first=601)


def run_all(folder: Path, seeds: int, epochs: int, jobs: int) -> dict[str, list[dict[str, Any]]]:
    """Pretrain and fine-tune every seed, several runs side by side, each on one core."""
    pairs = [(seed, name) for seed in range(seeds) for name in OWN_MOTIONS]
    order = [
        (group, seed, arm) for group in reversed(GROUPS) for seed in range(seeds) for arm in ARMS
    ]
    with side_by_side(jobs, len(pairs) + len(order)) as workers:
        workers.run("pretraining", pretrain, {pair: (folder, *pair) for pair in pairs})
        found = workers.run("fine-tuning", finetune, {key: (folder, *key, epochs) for key in order})
    return {group: [found[key] for key in order if key[0] == group] for group in GROUPS}


def pretrain(
    folder: Path, seed: int, name: str, epochs: int = PRETRAINING["epochs"], workers: int = 1
) -> float:
    """Train one peer alone on its own videos; return its CC there. Done once a seed."""
    place = folder / f"seed-{seed}"

    def make() -> float:
        shutil.rmtree(place / f"{name}-run", ignore_errors=True)
        asked = ["--peer", f"saliency.standins:{name}", "--rule", "none"]
        asked += ["--lr", str(PRETRAINING["lr"]), "--workers", str(workers)]
        trainer = train(place, f"pretrain-{name}", f"{name}-run", seed, epochs, asked)
        return trainer.progress.history[-1][f"{name}/{METRIC}"]

    return once(place / f"{name}.json", make)


def finetune(folder: Path, group: str, seed: int, arm: str, epochs: int) -> dict[str, Any]:
    """Fine-tune a group under one rule; return what the report needs of the last epoch."""
    place = folder / f"seed-{seed}"
    title = f"{group}-{arm}-{epochs}"

    def make() -> dict[str, Any]:
        shutil.rmtree(place / title, ignore_errors=True)
        trainer = train(place, "tune", title, seed, epochs, tuning(place, group, arm))
        picture, caption = teaching_pictures(trainer.peers, trainer.evaluator.videos, trainer.world)
        (place / f"{title}.png").write_bytes(picture)
        progress = trainer.progress
        names = GROUPS[group]
        told = outcome(arm, seed, names, METRIC, progress.history, progress.lessons)
        return {**told, "caption": caption}

    return once(place / f"{title}.json", make)


def tuning(place: Path, group: str, arm: str) -> list[str]:
    """Return what fine-tunes a group of a seed, of ``train``'s arguments."""
    asked = ["--rule", arm, "--lr", str(TUNING["lr"])]
    for name in GROUPS[group]:
        weights = place / f"{name}-run" / name / "last.pth"
        asked += ["--peer", f"saliency.standins:{name},checkpoint={weights}"]
    return asked


def train(place: Path, split: str, title: str, seed: int, epochs: int, asked: Sequence[str]) -> Any:
    """Run ``saliency/train.py`` on a split of a seed."""
    return run(
        "dhf1k",
        "train_dhf1k",
        [
            *("--data-root", str(place / split), "--output", str(place), "--experiment", title),
            *("--epochs", str(epochs), "--val-interval", str(epochs), "--eval-metric", METRIC),
            *("--batch-size", str(BATCH), "--val-batch-size", str(BATCH), "--val-stride", "3"),
            *("--metrics", "cc", "nss", "auc_judd", "--blur", "0", "--workers", "1"),
            *("--check-depth", "listing", "--seed", str(seed), "--clips-per-video", "2"),
            *("--checkpoint-hist", "1", "--device", "cpu", *asked),
        ],
        bars=False,
    )


def write_report(
    output: Path,
    folder: Path,
    group: str,
    results: Sequence[Mapping[str, Any]],
    epochs: int,
) -> Path:
    """Write ``GROUP_peers.html`` and the raw ``GROUP_peers.json``."""
    write_json(output / f"{group}_peers.json", list(results))
    place = folder / "seed-0"
    sheet = io.BytesIO()
    contact_sheet(place / "tune" / "annotation").save(sheet, "PNG")
    shown = [result for result in results if result["seed"] == 0 and result["arm"] != "random"]
    return write_comparison(
        output / f"{group}_peers.html",
        title=f"{group.capitalize()} video saliency models teach each other: composed videos",
        names=list(GROUPS[group]),
        arms=list(ARMS),
        results=list(results),
        control="none",
        metric=METRIC,
        descriptions=ARMS,
        settings={
            "pretraining": f"{PRETRAINING['epochs']} epochs, learning rate {PRETRAINING['lr']}",
            "epochs of fine-tuning": epochs,
            "learning rate of fine-tuning": TUNING["lr"],
            "batch": BATCH,
        },
        notes=NOTES,
        data_examples=(sheet.getvalue(), "The data: frames of three videos above their maps."),
        pictures=[
            (
                (place / f"{group}-{result['arm']}-{epochs}.png").read_bytes(),
                f"After fine-tuning, arm {result['arm']}, seed 0. {result['caption']}",
            )
            for result in shown
        ],
    )


NOTES = (
    "The videos are composed: real handwritten digits (MNIST) move before crops of two real "
    "photographs. Where people would look is made up from the motion; nobody's gaze was recorded.",
    "The models are small stand-ins, each with another clip of the video, in the place of ViNet-S, "
    "ViNet-A and TMFI-Net, which are too slow for this on two cores. Each was pretrained alone on "
    "videos of other motions, a stand-in for checkpoints with different pretraining; then all were "
    f"fine-tuned on {VIDEOS['tune']} videos of all motions.",
    "Within a seed all arms share the videos, the checkpoints and the order of the clips; only the "
    f"rule differs. CC is that of the last epoch, on {VIDEOS['val']} videos of digits and parts of "
    "the photographs that no training video shows; no checkpoint was selected.",
    "What happens with the published models on DHF1K, Hollywood-2 or UCF-Sports was not measured "
    "here.",
)


if __name__ == "__main__":
    sys.exit(run_command(main, (OutputError,)))
