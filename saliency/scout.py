"""Choose, before any training, which of several video saliency models should teach each other.

    python saliency/scout.py --dataset dhf1k --data-root DHF1K \\
        --model vinet_s,checkpoint=vinet_s.pt --model vinet_a,checkpoint=vinet_a.pt \\
        --model tmfi_net,checkpoint=tmfi.pth [--for vinet_s] [--team-size 2..3]

Each model runs over the split once; what it says is kept. From that follow who predicts which
frames better than whom, what teams know together, and whom the rule would let teach.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from common.distributed import World
from common.finished import refuse_other_data, shared_models
from common.options import OptionError, actions_of, check_least
from common.outputs import log_table, make_writable, progress_bars, run_command, start_world
from common.report.numbers import number
from common.report.scouting import scout_cautions, scout_lead, write_scout_report
from common.scout_check import (
    add_realised_option,
    check_runs,
    gains_of,
    refuse_skipping,
    runs_asked,
    write_check,
)
from common.scout_commands import flags_of, train_command, with_engine
from common.scout_outcome import (
    describe_ranking,
    require_team,
    teams_by_size,
    teams_to_train,
    write_outcome,
)
from common.scout_starts import unlike_starts
from common.scouting import Judge, check_request, rank_teams, team_sizes, without_repeats
from common.team_costs import TeamCosts, add_cost_options, shown_costs
from saliency.evaluation import metrics_for
from saliency.held_out import split_held_out
from saliency.layouts import SPLITS, VideoSet, open_dataset
from saliency.metrics import METRICS
from saliency.options import LOWER_IS_BETTER, build_parser, parse
from saliency.realised import evaluated_on, read_run
from saliency.scout_costs import SaliencyCosts
from saliency.scout_report import CAUTION, FRAMES
from saliency.scouting import (
    FRAME_PREDICTORS,
    Answered,
    Candidate,
    Watch,
    cached_answers,
    inspect,
    oracles,
    wins,
)
from saliency.train import FAULTS, check_videos

_logger = logging.getLogger("scout")

_COMMANDS = 3
_PARTS = 20  # of the frames, whose means tell how far chance moves their mean
_NOT_TRAINING = "recipe peers output experiment plan gpu_mem check_data".split()
_HERE = Path("output/scout")
_SCORES = {"loss": "loss", "confidence": "raw confidence"}
_COUNTED = tuple(m for m in METRICS if m not in LOWER_IS_BETTER and m != "auc_shuffled")


def add_scout_options(parser: argparse.ArgumentParser) -> None:
    """Add what scouting has besides the options of train.py."""
    add = parser.add_argument_group("scouting").add_argument
    add("--model", action="append", dest="peers", metavar="MODEL[,key=value...]", help="as --peer")
    add("--split", default="val", choices=SPLITS)
    add("--frames", type=int, metavar="N", help="scout on N frames, drawn by --seed")
    add("--for", dest="student", metavar="NAME", help="rank by what this model may gain")
    add("--team-size", nargs="+", default=["2"], metavar="N", help="2, or 2..4, or 2 4")
    add("--metric", default="cc", choices=_COUNTED, help="by which frames are won")
    add("--predictor", choices=tuple(FRAME_PREDICTORS), help="what teams are ranked by")
    add("--kept-size", type=int, nargs=2, default=[36, 64], metavar=("H", "W"), help="of kept maps")
    add("--unlabelled", metavar="DIR", help=argparse.SUPPRESS)  # of the other tasks; see _check
    add_realised_option(add)
    add_cost_options(add)
    add("--top", type=int, default=20, help="teams of each size to show")
    add("--most-teams", type=int, default=20000, help="of a size; where there are more, search")
    add("--skip-unfit", action="store_true", help="go on without models that cannot be scouted")
    add("--cache", type=Path, default=_HERE / "cache", help="of what models say")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; bad input ends in one line, not in a traceback."""
    return run_command(lambda: require_team(scout(arguments)), FAULTS)


def scout(arguments: Sequence[str] | None = None, bars: bool = True) -> dict[str, Any]:
    """Scout as the arguments say.

    Args:
        arguments: As on the command line; None: those of the process.
        bars: Show progress bars where the output is a terminal.

    Returns:
        What ``scout.json`` holds.

    Raises:
        OptionError, ModelError, DataError, CheckpointError: Bad input.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if runs_asked(given):
        return check_predictions(given, bars)
    options, specs = parse(None, "scout", given, add_scout_options)
    _check(options)
    sizes = team_sizes(options.team_size)
    videos = _open(options, bars)
    if options.check_data:
        return {}
    folder = _choose_folder(options)
    watch = progress_bars(bars)
    candidates = inspect(specs, options.peers, options.skip_unfit, watch)
    candidates = without_repeats(candidates, [candidate.spec.name for candidate in candidates])
    names = [candidate.spec.name for candidate in candidates]
    student = _student(options.student, names)
    check_request(names, sizes, options.rule, options.predictor, predictors=FRAME_PREDICTORS)
    world = start_world(options.device)
    view = _answered(candidates, videos, options, world, watch)
    costs = None
    if options.costs or options.budget_gpu_mem:
        costs = SaliencyCosts(candidates, options, world, watch)
    outcome = _outcome(view, options, sizes, student, costs)
    for fact, candidate in zip(outcome["models"], candidates, strict=True):
        fact["parameters"] = candidate.parameters
    outcome["commands"] = commands(folder, options, candidates, teams_to_train(outcome, _COMMANDS))
    outcome["chosen_on_test"] = options.split == "val" and not options.held_out
    outcome["settings"] = _settings(options, videos)
    write_outcome(folder, outcome)
    report = write_scout_report(folder / "report.html", outcome, options.top, parts=FRAMES)
    _tell(outcome, options.top)
    _logger.info("report: %s", report)
    return outcome


def check_predictions(given: Sequence[str], bars: bool = True) -> dict[str, Any]:
    """Scout the models of finished runs, and compare predictions with what the runs gained.

    Args:
        given: Arguments, ``--realised RUN...`` among them.
        bars: See ``scout``.

    Returns:
        What ``scout.json`` holds.

    Raises:
        OptionError, ModelError, DataError, CheckpointError: Bad input.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--output", "--experiment"):
        early.add_argument(name, default="")
    early.add_argument("--dataset")
    early.add_argument("--metric", default="cc")
    known = early.parse_known_args(given)[0]
    folders = [Path(folder) for folder in runs_asked(given)]
    runs = [read_run(folder, known.metric, known.dataset) for folder in folders]
    specs, names, finished = shared_models(runs)
    gained = gains_of(finished, names)
    arguments = ["-c", str(runs[0].folder / "args.yaml"), *given]
    options, _ = parse(None, "scout", arguments, add_scout_options)
    options.output, options.experiment = known.output, known.experiment
    _check(options)
    refuse_skipping(options.skip_unfit)
    roots = [str(run.started.data_root) for run in runs]
    refuse_other_data(str(options.data_root), roots, "--data-root")
    videos, watch = _open(options, bars), progress_bars(bars)
    folder, world = _choose_folder(options), start_world(options.device)
    specs = [replace(spec, name=name) for spec, name in zip(specs, names, strict=True)]
    candidates = inspect(specs, names, options.skip_unfit, watch)
    view = _answered(candidates, videos, options, world, watch)
    asked = evaluated_on(options, options.split)
    same = [asked == evaluated_on(run.started) for run in runs]
    whole = not (options.frames or options.held_out)
    parts = view.scores[options.metric].tensor_split(_PARTS, dim=1)  # neighbours are alike
    scouted = torch.stack([part.mean(dim=1) for part in parts if part.shape[1]], dim=1)
    outcome = {
        **check_runs(
            gained,
            lambda one: _judge(view, one.rule, one.score, one.margin),
            view.over_members,
            options.predictor,
            lambda judge: default_predictor(judge.rule),
        ),
        "samples": view.source.count,
        "unit": "frames",
        "metric": options.metric,
        "same_data": any(same),
        "starts": unlike_starts(
            finished, names, options.metric, scouted, [whole and one for one in same]
        ),
        "models": _models(view),
        "settings": _settings(options, videos),
    }
    return write_check(folder, outcome)


def _check(options: argparse.Namespace) -> None:
    check_least(options, {"frames": 1, "top": 1, "most_teams": 1})
    if min(options.kept_size) < 1:
        raise OptionError(f"--kept-size is {options.kept_size}; expected numbers above 0")
    if options.unlabelled:
        raise OptionError(
            f"--unlabelled {options.unlabelled}: not offered for saliency. Without maps nobody "
            "knows which model predicts a frame better, and no answer is right or wrong, by which "
            "confidences could be calibrated; scout on a split that has maps"
        )
    if options.max_bad_samples or options.packed:
        raise OptionError(
            "scout.py leaves no frame out and packs none: leave --max-bad-samples and --packed out"
        )
    if options.metrics and options.metric not in (*options.metrics, "cc"):
        raise OptionError(f"--metric {options.metric} is not among --metrics; add it")


def _open(options: argparse.Namespace, bars: bool) -> VideoSet:
    """List what is scouted on, after a look at its files: with ``--held-out`` that part.

    Raises:
        DataError, OptionError: See ``saliency.train.open_splits``.
    """
    split = "train" if options.held_out else options.split
    videos = open_dataset(options.dataset, options.data_root, split)
    check_videos(options, [videos], progress=bars and sys.stderr.isatty())
    if options.held_out:
        return split_held_out(videos, options.held_out, options.seed)[1]
    return videos


def _choose_folder(options: argparse.Namespace) -> Path:
    folder = Path(options.output or _HERE)
    if options.experiment or not options.output:
        folder /= options.experiment or f"{datetime.now():%Y%m%d-%H%M%S}"
    make_writable(folder, keep=False)
    make_writable(options.cache, "--cache", keep=False)
    return folder


def _student(asked: str | None, names: Sequence[str]) -> int | None:
    if asked is None:
        return None
    if asked not in names:
        raise OptionError(f"--for {asked}: no such model; there are {', '.join(names)}")
    return list(names).index(asked)


def _answered(
    candidates: Sequence[Candidate],
    videos: VideoSet,
    options: argparse.Namespace,
    world: World,
    watch: Watch,
) -> Answered:
    caches = cached_answers(candidates, videos, options, world, watch)
    metrics = metrics_for(videos, options.metrics)
    return Answered(caches, metrics, options.metric, options.kept_size, options.temperature)


def _judge(view: Answered, rule: str, score: str, margin: float | None) -> Judge:
    return Judge(view.found, rule, _SCORES[score], margin, predictors=FRAME_PREDICTORS)


def _outcome(
    view: Answered,
    options: argparse.Namespace,
    sizes: Sequence[int],
    student: int | None,
    costs: TeamCosts | None,
) -> dict[str, Any]:
    predictor = options.predictor or default_predictor(options.rule)
    try:
        judge = _judge(view, options.rule, options.score, options.margin)
        ranking = rank_teams(
            judge,
            sizes,
            predictor,
            student=student,
            most=options.most_teams,
            fits=costs or (lambda team: True),
        )
    except ValueError as error:
        raise OptionError(str(error)) from error
    for team in ranking.teams:
        overlap = view.overlap[list(team.members)][:, list(team.members)]
        team.agreement = float(overlap.triu(1).sum()) / (len(team.members) * (len(overlap) - 1) / 2)
    for team in ranking.best(options.top):
        team.ensemble = view.together(team.members)
    return {
        **describe_ranking(judge, ranking, predictor, student),
        "unit": "frames",
        "caution": CAUTION,
        "calibration": [],
        "metric": options.metric,
        "models": _models(view),
        "pairs": {
            "wins": wins(view.scores[options.metric]).tolist(),
            "oracle": oracles(view.scores[options.metric]).tolist(),
            "overlap": view.overlap.tolist(),
            "kl": view.found.kl.double().mean(dim=2).tolist(),
            **{
                f"wins_{name}": wins(values, name in LOWER_IS_BETTER).tolist()
                for name, values in view.scores.items()
            },
        },
    }


def default_predictor(rule: str) -> str:
    """Choose what to rank by: where all teach alike, a team's gains add up to nothing."""
    return "complementarity" if rule in ("mutual", "random") else "gain-taught"


def _models(view: Answered) -> list[dict[str, Any]]:
    """Say of every model its metrics, where it is the best, and its metric on the reduced maps."""
    values = view.scores[view.metric]
    best = torch.bincount(values.argmax(dim=0), minlength=len(values)) / values.shape[1]
    return [
        {
            "name": name,
            **{metric: float(found[i].nanmean()) for metric, found in view.scores.items()},
            "best_on": float(best[i]),
            f"{view.metric}_reduced": view.together([i]),
        }
        for i, name in enumerate(view.found.names)
    ]


def commands(
    folder: Path,
    options: argparse.Namespace,
    candidates: Sequence[Candidate],
    teams: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Write the command that trains each team, with each model as it was asked for."""
    asked = {candidate.spec.name: candidate for candidate in candidates}
    actions = actions_of(build_parser(None, "train"))
    dump = functools.partial(yaml.safe_dump, sort_keys=False)
    return [
        train_command(
            [
                *("python", "saliency/train.py"),
                *flags_of(with_engine(options, team), actions, _NOT_TRAINING),
            ],
            [_named(asked[name]) for name in team["members"]],
            folder / f"team-{k}.yaml",
            dump,
        )
        for k, team in enumerate(teams, 1)
    ]


def _named(candidate: Candidate) -> str | dict[str, Any]:
    """Return what was asked for, with the name that it has here: another team has other repeats."""
    asked, name = candidate.asked, candidate.spec.name
    if not isinstance(asked, str):
        return {**asked, "name": name}
    return asked if ",name=" in asked else f"{asked},name={name}"


def _settings(options: argparse.Namespace, videos: VideoSet) -> dict[str, Any]:
    names = (
        "rule score margin temperature metric val_stride frames blur kept_size seed engine "
        "batch_size budget_gpu_mem"
    ).split()
    shown = {name: getattr(options, name) for name in names}
    return {"data": str(videos), "for": options.student, **shown, "cache": str(options.cache)}


def _tell(outcome: Mapping[str, Any], top: int) -> None:
    """Log the best teams, and how to train them."""
    _logger.info("%s", scout_lead(outcome, FRAMES))
    for teams in teams_by_size(outcome, top):
        rows = [
            {
                "team": ", ".join(team["members"]),
                outcome["predictor"]: number(team["value"], 4),
                "taught": " / ".join(f"{100 * share:.0f}" for share in team["taught"].values())
                + " %",
                "overlap": number(team["agreement"], 3),
                "ensemble": number(team["ensemble"], 4),
                "oracle": number(team["oracle"], 4),
                **shown_costs(team),
            }
            for team in teams
        ]
        log_table(rows)
    for caution in scout_cautions(outcome):
        _logger.info("%s", caution)
    for command in outcome["commands"]:
        _logger.info("  %s", command)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # see saliency/train.py
    sys.exit(main())
