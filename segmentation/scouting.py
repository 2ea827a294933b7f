"""The command line of ``segmentation/scout.py``: answers, teams, report.

Every model answers the images once, in its own test geometry, and what it says of a few pixels of
each is kept. From that, teams are ranked by what their members may gain from one another.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from common.disk import write_csv, write_text
from common.finished import refuse_other_data, shared_models
from common.logit_cache import CachedLogits
from common.options import OptionError, check_least
from common.outputs import log_table, make_writable, progress_bars, run_command
from common.realised import Realised
from common.report.numbers import as_percent
from common.report.page import Html, Section, data_table, section
from common.report.scouting import scout_cautions, scout_lead, write_scout_report
from common.scout_check import (
    add_realised_option,
    check_runs,
    gains_of,
    refuse_skipping,
    refuse_unlabelled,
    write_check,
)
from common.scout_outcome import (
    describe_outcome,
    require_team,
    teams_by_size,
    teams_to_train,
    write_outcome,
)
from common.scout_starts import unlike_starts
from common.scouting import (
    PREDICTORS,
    Judge,
    Team,
    check_request,
    default_predictor,
    judged_by,
    rank_teams,
    team_sizes,
    without_repeats,
)
from common.survey import Survey, describe_models, random_half, survey
from common.team_costs import TeamCosts, add_cost_options, shown_costs
from segmentation.answers import (
    Candidate,
    Pixels,
    Watch,
    cached_answers,
    draw_pixels,
    draw_unlabelled,
    inspect,
    list_unlabelled,
)
from segmentation.classwise import (
    class_iou,
    class_rows,
    ensemble_answers,
    flips_by_class,
    mean_iou,
    oracle_answers,
)
from segmentation.config import RunConfig, load_run
from segmentation.data import allowed, check_classes, classes_of
from segmentation.errors import FAULTS
from segmentation.held_out import hold_out
from segmentation.realised import evaluated_on, read_run, read_starts, run_of
from segmentation.scout_costs import SegmentorCosts
from segmentation.trainer import METRIC, current_world

_logger = logging.getLogger("scout")

_COMMANDS = 3
ACCURACY = "pACC"  # of mIoU a few pixels tell too little
_CLASSES_SHOWN = 40
_HERE = Path("output/scout")
CAUTION = (
    "A prediction, not a result: nothing was trained. What teams are ranked by is a hypothesis "
    "about who gains from whom, and it says nothing of how large a gain will be; test it with "
    "scout.py --realised RUN... on finished runs. On small segmentors it did not order teams by "
    "their mean gain, nor did it on classifiers."
)


def parser() -> argparse.ArgumentParser:
    """Build the parser."""
    built = argparse.ArgumentParser(
        prog="segmentation/scout.py",
        description="Choose, before any training, which of several segmentors should teach each "
        "other. Each answers the images of the first of DATASETS.TEST once (or, with "
        "TRANSFER.HELD_OUT, those held out of the training data); rule, score and granularity are "
        "TRANSFER's.",
        allow_abbrev=False,
    )
    add = built.add_argument
    add(
        "--config-file",
        action="append",
        default=[],
        metavar="FILE",
        help="a run file with TRANSFER.PEERS; or, repeated, the config of each model",
    )
    add("--for", dest="student", metavar="NAME", help="rank by what this model may gain")
    add("--team-size", nargs="+", default=["2"], metavar="N", help="2, or 2..4, or 2 4")
    add("--predictor", choices=tuple(PREDICTORS), help="what to rank by; the report explains them")
    add("--images", type=int, help="scout on so many images, drawn at random")
    add("--pixels", type=int, default=64, help="of each image, drawn at random; a power of two")
    add("--seed", type=int, default=0, help="of the draws")
    add(
        "--unlabelled",
        type=Path,
        metavar="DIR",
        help="judge teams on these images, which have no labels, by confidences that are "
        "calibrated on DATASETS.TEST (where that is empty, by how much models differ)",
    )
    add_realised_option(add)
    add_cost_options(add)
    add("--top", type=int, default=20, help="teams of each size to show")
    add("--most-teams", type=int, default=20000, help="of a size; where there are more, search")
    add("--skip-unfit", action="store_true", help="go on without models that cannot be scouted")
    add("--cache", type=Path, default=_HERE / "cache", help="of what models answered")
    add("--output", type=Path, help="folder of the report")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="as of train_net.py")
    return built


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; bad input ends in one line, not in a traceback."""
    return run_command(lambda: require_team(scout(arguments)), (OptionError, *FAULTS))


def scout(arguments: Sequence[str] | None = None, bars: bool = True) -> dict[str, Any]:
    """Scout as the arguments say.

    Args:
        arguments: As on the command line; None: those of the process.
        bars: Show progress bars where the output is a terminal.

    Returns:
        What ``scout.json`` holds.

    Raises:
        OptionError, ConfigError, DataError, CheckpointError, SegmentorError: Bad input.
    """
    asked = parser().parse_args(arguments)
    check_least(asked, {"images": 1, "top": 1, "most_teams": 1, "seed": 0})
    if asked.realised:
        return check_predictions(asked, progress_bars(bars))
    sizes = team_sizes(asked.team_size)
    whole = load_run(asked.config_file, asked.opts)
    cfgs = {peer.name: peer.cfg for peer in whole.peers}
    check_classes(cfgs, tested=asked.unlabelled is None)
    run, watch = hold_out(whole), progress_bars(bars)
    if asked.unlabelled is not None:
        list_unlabelled(asked.unlabelled)  # before models answer what has labels
    folder = _choose_folder(asked)
    candidates = inspect(run, asked.skip_unfit, watch)
    candidates = without_repeats(candidates, [candidate.config.name for candidate in candidates])
    names = [candidate.config.name for candidate in candidates]
    student = _student(asked.student, names)
    check_request(
        names,
        sizes,
        run.transfer.RULE,
        asked.predictor,
        labelled=asked.unlabelled is None,
        calibrated=bool(run.cfg.DATASETS.TEST),
    )
    view = _ask(candidates, run, asked, watch)
    costs = None
    if asked.costs or asked.budget_gpu_mem:
        costs = SegmentorCosts(candidates, run, asked.budget_gpu_mem, watch)
    outcome = _outcome(view, run, asked, sizes, student, costs)
    for fact, candidate in zip(outcome["models"], candidates, strict=True):
        fact["parameters"] = candidate.parameters
        fact["weights"] = candidate.config.cfg.MODEL.WEIGHTS
    outcome["commands"] = write_commands(folder, whole, teams_to_train(outcome, _COMMANDS))
    outcome["settings"] = _settings(asked, run)
    write_outcome(folder, outcome)
    if outcome["labelled"]:
        _write_classes(folder, outcome)
    report = write_scout_report(folder / "report.html", outcome, asked.top, _sections(outcome))
    _tell(outcome, asked.top)
    _logger.info("report: %s", report)
    return outcome


def check_predictions(asked: argparse.Namespace, watch: Watch) -> dict[str, Any]:
    """Scout the models of finished runs, and compare predictions with what the runs gained.

    Args:
        asked: With ``realised``, the runs' folders.
        watch: Wraps models and images, for instance in a progress bar.

    Returns:
        What ``scout.json`` holds.

    Raises:
        OptionError, ConfigError, DataError, CheckpointError, SegmentorError: Bad input.
    """
    if asked.config_file:
        raise OptionError("--realised takes the models of its runs; leave --config-file out")
    refuse_unlabelled(asked.unlabelled)
    refuse_skipping(asked.skip_unfit)
    runs = [read_run(folder) for folder in map(Path, asked.realised)]
    peers, names, finished = shared_models(runs)
    gained = gains_of(finished, names)
    run = run_of(runs[0], peers, names, asked.opts)
    data = [", ".join(one.started.cfg.DATASETS.TEST) for one in runs]
    refuse_other_data(", ".join(run.cfg.DATASETS.TEST), data, "DATASETS.TEST")
    check_classes({peer.name: peer.cfg for peer in run.peers})
    run, folder = hold_out(run), _choose_folder(asked)
    view = _ask(inspect(run, asked.skip_unfit, watch), run, asked, watch)

    def judge(one: Realised) -> Judge:
        return view.judge(one.rule, one.score, one.margin, one.grouped)

    outcome = {
        **check_runs(gained, judge, view.over_members, asked.predictor),
        "samples": view.answers.count,
        "unit": f"pixels of {view.images} images",
        "metric": METRIC,
        "same_data": evaluated_on(run)[0] in [x for one in runs for x in evaluated_on(one.started)],
        "starts": unlike_starts(
            *(finished, names, ACCURACY, 100 * view.accuracy(), [False] * len(runs)),
            before=[read_starts(run, ACCURACY) for run in runs],
        ),
        "models": [asdict(fact) for fact in describe_models(view.found)],
        "settings": _settings(asked, run),
    }
    return write_check(folder, outcome)


def _choose_folder(asked: argparse.Namespace) -> Path:
    folder = asked.output or _HERE / f"{datetime.now():%Y%m%d-%H%M%S}"
    make_writable(folder, keep=False)
    make_writable(asked.cache, "--cache", keep=False)
    return folder


def _ask(
    candidates: Sequence[Candidate], run: RunConfig, asked: argparse.Namespace, watch: Watch
) -> Answered:
    """Let every model answer, and compare what they say.

    With ``--unlabelled`` the labelled data, if any, only give each model's temperature.
    """
    bad = allowed(run.transfer.MAX_BAD_SAMPLES)
    how = asked.pixels, asked.images, asked.seed, watch, bad
    world, temperature = current_world(run.cfg.MODEL.DEVICE), run.transfer.TEMPERATURE
    view = calibration = None
    if run.cfg.DATASETS.TEST:
        pixels = draw_pixels(run.cfg.DATASETS.TEST[0], *how)
        answers = cached_answers(candidates, pixels, asked.cache, world, watch)
        view = Answered(answers, pixels, temperature, asked.seed)
        calibration = view.found.temperature
    if asked.unlabelled is not None:
        classes = classes_of(run.cfg.DATASETS.TRAIN[0])[0]
        pixels = draw_unlabelled(asked.unlabelled, classes, *how)
        answers = cached_answers(candidates, pixels, asked.cache, world, watch)
        view = Answered(answers, pixels, temperature, asked.seed, calibration)
    assert view is not None  # without both, the classes are refused
    return view


class Answered:
    """What all models said, compared.

    Args:
        answers: From ``cached_answers``.
        pixels: What they were asked.
        temperature: Of the KL.
        seed: Of the half of the images that confidences are calibrated on.
        calibration: Of pixels without labels, the models' temperatures [M]; None: not known.

    Attributes:
        found: The survey; its samples are pixels.
        truth: Class of each pixel [n]; without labels all 0.
        image: Which image each is of [n].
        weight: For how many pixels each stands [n].
        iou: Each model's by class [C]; none without labels.
    """

    def __init__(
        self,
        answers: CachedLogits,
        pixels: Pixels,
        temperature: float,
        seed: int,
        calibration: Tensor | None = None,
    ) -> None:
        self.answers, self.classes = answers, pixels.classes
        self.truth = answers.labels()
        self.image = answers.where // pixels.each
        self.weight = pixels.weight[self.image]
        half = random_half(len(pixels.records), seed)[self.image]  # no image is on both sides
        self.found: Survey = survey(
            answers,
            self.truth if pixels.labelled else None,
            temperature=temperature,
            calibration=calibration,
            seed=seed,
            fit_on=half,
        )
        told = self.found.prediction if pixels.labelled else ()
        self.iou = [self.iou_of(answer) for answer in told]

    def iou_of(self, answer: Tensor) -> Tensor:
        """Estimate the IoU of every class [C] of one answer to each pixel [n]."""
        return class_iou(answer, self.truth, self.weight, len(self.classes))

    @property
    def images(self) -> int:
        """How many there are."""
        return int((torch.bincount(self.image) > 0).sum())

    def judge(self, rule: str, score: str, margin: float | None, granularity: str) -> Judge:
        """Judge by a rule, with one teacher an ``image`` or a ``pixel``.

        Raises:
            ValueError: A rule or score that does not exist here.
        """
        if self.found.labelled and score == "confidence":
            score = "raw confidence"  # as training compares them, for it calibrates none
        groups = self.image if granularity == "image" else None
        return Judge(self.found, rule, score, margin, groups)

    def accuracy(self) -> Tensor:
        """Estimate every model's pixel accuracy by image [M, images], by the images' sizes."""
        assert self.found.correct is not None
        weighted = self.found.correct.double() * self.weight / self.weight.double().mean()
        sums = torch.zeros(len(weighted), int(self.image.max()) + 1, dtype=torch.float64)
        sums.index_add_(1, self.image, weighted)
        count = torch.bincount(self.image)
        return sums[:, count > 0] / (len(self.image) / self.images)

    def over_members(self, teams: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], list[float]]:
        """Measure by how much a team's mean is right on more pixels than each member."""
        assert self.found.correct is not None
        alone = self.found.correct.double().mean(dim=1).tolist()
        found = {}
        for team in teams:
            together = ensemble_answers(self.answers, team) == self.truth
            found[team] = [float(together.double().mean()) - alone[i] for i in team]
        return found


def _outcome(
    view: Answered,
    run: RunConfig,
    asked: argparse.Namespace,
    sizes: Sequence[int],
    student: int | None,
    costs: TeamCosts | None,
) -> dict[str, Any]:
    node, found = run.transfer, view.found
    rule, score, margin = judged_by(found, node.RULE, node.SCORE, node.MARGIN or None)
    predictor = asked.predictor or default_predictor(found, rule)
    try:
        judges = {kind: view.judge(rule, score, margin, kind) for kind in ("image", "pixel")}
        ranking = rank_teams(
            judges[node.GRANULARITY],
            sizes,
            predictor,
            student=student,
            most=asked.most_teams,
            fits=costs or (lambda team: True),
        )
    except ValueError as error:
        raise OptionError(str(error)) from error
    shown = ranking.best(asked.top)
    more = [_measured(view, team) if found.labelled else {} for team in shown]
    outcome = describe_outcome(judges[node.GRANULARITY], ranking, predictor, student, asked.top)
    rows = itertools.chain.from_iterable(teams_by_size(outcome, asked.top))
    for fact, of_class in zip(outcome["models"], view.iou, strict=found.labelled):
        fact["miou"] = mean_iou(of_class)
    for told, team, measured in zip(rows, shown, more, strict=True):
        told |= measured
        told["taught_by"] = {
            kind: dict(zip(told["members"], judge.judge(team.members).taught, strict=True))
            for kind, judge in judges.items()
        }
    outcome |= {
        "unit": f"pixels of {view.images} images",
        "caution": CAUTION,
        "granularity": node.GRANULARITY,
        "chosen_on_test": asked.unlabelled is None and not node.HELD_OUT,
    }
    return outcome | _by_class(view, shown) if found.labelled else outcome


def _measured(view: Answered, team: Team) -> dict[str, Any]:
    """Say of a team what pixels alone do not: its members' IoU, and that of all together."""
    names = [view.found.names[i] for i in team.members]
    answer = ensemble_answers(view.answers, team.members)
    oracle = oracle_answers(view.found, team.members, answer, view.truth)
    team.ensemble = float((answer == view.truth).double().mean())
    return {
        "miou": dict(zip(names, (mean_iou(view.iou[i]) for i in team.members), strict=True)),
        "ensemble_miou": mean_iou(view.iou_of(answer)),
        "oracle_miou": mean_iou(view.iou_of(oracle)),
    }


def _by_class(view: Answered, shown: Sequence[Team]) -> dict[str, Any]:
    """Say who knows which class, and what the first team may learn of each."""
    by_class = flips_by_class(view.found, view.truth, len(view.classes))
    told = view.found, view.truth, view.weight, view.classes
    rows = class_rows(*told, shown[0].members, view.iou) if shown else []
    return {
        "classes": view.classes,
        "iou": [of_class.tolist() for of_class in view.iou],
        "flips_by_class": by_class.tolist(),
        "best_by_class": rows,
    }


def write_commands(folder: Path, run: RunConfig, teams: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write a run file for each team, and each member's whole config; return the commands."""
    commands = []
    configs = {peer.name: peer for peer in run.peers}
    for k, team in enumerate(teams, 1):
        specs = []
        for name in team["members"]:
            path = folder / "configs" / f"{name}.yaml"
            write_text(path, configs[name].cfg.dump())
            specs.append(
                {
                    "NAME": name,
                    "CONFIG": str(path),
                    "FROZEN": configs[name].frozen,
                    "LAYOUT": configs[name].layout,
                }
            )
        transfer = yaml.safe_load(run.transfer.dump()) | {"PEERS": specs}
        transfer["ENGINE"] = team["engine"] or transfer["ENGINE"]
        content = {"TRANSFER": transfer, "OUTPUT_DIR": f"output/{'_'.join(team['members'])}"}
        file = folder / f"team-{k}.yaml"
        write_text(file, yaml.safe_dump(content, sort_keys=False))
        commands.append(
            shlex.join(["python", "segmentation/train_net.py", "--config-file", str(file)])
        )
    return commands


def _student(asked: str | None, names: Sequence[str]) -> int | None:
    if asked is None:
        return None
    if asked not in names:
        raise OptionError(f"--for {asked}: no such model; there are {', '.join(names)}")
    return list(names).index(asked)


def _settings(asked: argparse.Namespace, run: RunConfig) -> dict[str, Any]:
    keys = ("RULE", "SCORE", "GRANULARITY", "TEMPERATURE", "MARGIN")
    return {
        "data": ", ".join(run.cfg.DATASETS.TEST[:1]),
        "unlabelled": None if asked.unlabelled is None else str(asked.unlabelled),
        **{key: getattr(asked, key) for key in ("images", "pixels", "seed", "team_size")},
        "engine": run.transfer.ENGINE,
        "budget_gpu_mem": asked.budget_gpu_mem,
        "for": asked.student,
        **{key.lower(): run.transfer[key] for key in keys},
        "cache": str(asked.cache),
    }


def _write_classes(folder: Path, outcome: Mapping[str, Any]) -> None:
    """Write ``classes.csv`` and ``pairs_by_class.csv``."""
    names, classes = outcome["names"], outcome["classes"]
    iou = [
        {"class": kind, **{name: outcome["iou"][i][k] for i, name in enumerate(names)}}
        for k, kind in enumerate(classes)
    ]
    flips = [
        {"teacher": t, "student": s, "class": kind, "flips": outcome["flips_by_class"][i][j][k]}
        for i, t in enumerate(names)
        for j, s in enumerate(names)
        if i != j
        for k, kind in enumerate(classes)
    ]
    write_csv(folder / "classes.csv", iou)
    write_csv(folder / "pairs_by_class.csv", flips)


def _sections(outcome: Mapping[str, Any]) -> list[Section]:
    shown = [team for team in outcome["teams"] if "taught_by" in team]
    if not shown:
        return []
    labelled = outcome["labelled"]
    head = ["Team", "Taught, by image", "Taught, by pixel"]
    head += ["mIoU", "Ensemble", "Oracle"] * labelled
    rows = [
        [
            ", ".join(team["members"]),
            *(_listed(team["taught_by"][kind]) for kind in ("image", "pixel")),
            *(_iou_cells(team) if labelled else ()),
        ]
        for team in shown
    ]
    told = (
        "; and mean intersection over union, estimated from the pixels drawn. Oracle: the truth "
        "wherever at least one member tells it"
    )
    caption = (
        "Expected share of pixels on which each member is taught, in the order of the names, with "
        f"one teacher an image and one a pixel{told * labelled}. The ranking is by "
        f"{outcome['granularity']}."
    )
    found = [section("By image and by pixel", data_table(caption, head, rows))]
    if labelled:
        found.append(section("Classes of the first team", _class_table(outcome, shown[0])))
    return found


def _iou_cells(team: Mapping[str, Any]) -> tuple[str, str, str]:
    together = as_percent(team["ensemble_miou"]), as_percent(team["oracle_miou"])
    return _listed(team["miou"], 1), *together


def _class_table(outcome: Mapping[str, Any], team: Mapping[str, Any]) -> Html:
    members = team["members"]
    head = ["Class", "Pixels", *(f"{name}: IoU" for name in members)]
    head += [f"{name}: may learn" for name in members]
    rows = [
        [
            row["class"],
            as_percent(row["share"]),
            *(as_percent(row["iou"][name]) for name in members),
            *(as_percent(row["learns"][name]) for name in members),
        ]
        for row in outcome["best_by_class"][:_CLASSES_SHOWN]
    ]
    left = max(0, len(outcome["best_by_class"]) - _CLASSES_SHOWN)
    caption = (
        "By frequency. May learn: of the class's pixels, those on which the member is wrong and "
        "another right." + f" {left} rarer classes are in classes.csv." * bool(left)
    )
    return data_table(caption, head, rows)


def _listed(by_member: Mapping[str, float], digits: int = 0) -> str:
    return " / ".join(f"{100 * value:.{digits}f}" for value in by_member.values()) + " %"


def _tell(outcome: Mapping[str, Any], top: int) -> None:
    """Log the best teams, and how to train them."""
    _logger.info("%s", scout_lead(outcome))
    for teams in teams_by_size(outcome, top):
        rows = [
            {
                "team": ", ".join(team["members"]),
                outcome["predictor"]: f"{team['value']:.4f}",
                "by image": _listed(team["taught_by"]["image"]),
                "by pixel": _listed(team["taught_by"]["pixel"]),
                **(_told_iou(team) if outcome["labelled"] else {}),
                **shown_costs(team),
            }
            for team in teams
        ]
        log_table(rows)
    for caution in scout_cautions(outcome):
        _logger.info("%s", caution)
    for command in outcome["commands"]:
        _logger.info("  %s", command)


def _told_iou(team: Mapping[str, Any]) -> dict[str, str]:
    return dict(zip(("mIoU", "ensemble", "oracle"), _iou_cells(team), strict=True))
