"""Choose, before any training, which of many classifiers should teach each other.

    python classification/scout.py DATA --model resnet50.a1_in1k --model 'pit_*' --for resnet50

Every model answers the validation split once, in its own view; what it answers is kept. From that,
teams are ranked by what their members may gain from one another. Takes the options of train.py.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from timm.data import get_img_extensions
from torch import Tensor
from torch.utils.data import Dataset

from classification.data import NoImagesError, classes_of, common_view, mode_of, open_dataset
from classification.held_out import split_held_out
from classification.options import PeerSpec, build_parser, parse
from classification.realised import METRIC, evaluated_on, read_run
from classification.scout_costs import ClassifierCosts
from classification.scouting import (
    Candidate,
    Watch,
    cached_logits,
    choose_samples,
    inspect,
)
from classification.train import FAULTS, start
from common.distributed import World
from common.finished import refuse_other_data, shared_models
from common.logit_cache import CachedLogits
from common.options import OptionError, actions_of, check_least
from common.outputs import log_table, make_writable, plain, progress_bars, run_command
from common.report.scouting import scout_cautions, scout_lead, write_scout_report
from common.roles import compares_scores
from common.scout_check import (
    add_realised_option,
    check_runs,
    gains_of,
    refuse_skipping,
    refuse_unlabelled,
    runs_asked,
    write_check,
)
from common.scout_commands import flags_of, train_command, with_engine
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
    Ranking,
    check_request,
    default_predictor,
    judged_by,
    rank_teams,
    team_sizes,
    without_repeats,
)
from common.survey import Survey, describe_models, ensemble_accuracy, survey
from common.team_costs import TeamCosts, add_cost_options, shown_costs

_logger = logging.getLogger("scout")

_COMMANDS = 3
_ENSEMBLES = 300  # larger teams; each costs a pass over all probabilities
_NOT_TRAINING = ("recipe", "data", "data_dir", "peers", "output", "experiment", "plan", "gpu_mem")
_HERE = Path("output/scout")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; bad input ends in one line, not in a traceback."""
    logging.getLogger("timm").setLevel(logging.WARNING)
    return run_command(lambda: require_team(scout(arguments)), FAULTS)


def add_scout_options(parser: argparse.ArgumentParser) -> None:
    """Add what scouting has besides the options of train.py."""
    group = parser.add_argument_group("scouting")
    add = group.add_argument
    add(
        "--model",
        action="append",
        dest="peers",
        metavar="MODEL[,key=value...]",
        help="the same as --peer; * and ? stand for timm's models with published weights "
        "('pit_*'), or for exported files ('runs/*/*/best.safetensors'); repeat",
    )
    add("--for", dest="student", metavar="MODEL", help="rank by what this model may gain")
    add("--team-size", nargs="+", default=["2"], metavar="N", help="2, or 2..4, or 2 4")
    add("--predictor", choices=tuple(PREDICTORS), help="what to rank by; the report explains them")
    add_realised_option(add)
    add("--samples", type=int, help="scout on so many images, drawn at random")
    add("--unlabelled", metavar="DIR", help="judge teams on these images, which have no labels")
    add_cost_options(add)
    add("--top", type=int, default=20, help="teams of each size to show")
    add("--most-teams", type=int, default=20000, help="of a size; where there are more, search")
    add("--models-at-once", type=int, default=8, help="in memory, of those of one geometry")
    add("--skip-unfit", action="store_true", help="go on without models that cannot be scouted")
    add("--cache", default=str(_HERE / "cache"), metavar="DIR", help="of logits")


def scout(arguments: Sequence[str] | None = None, bars: bool = True) -> dict[str, Any]:
    """Scout as the arguments say.

    Args:
        arguments: As on the command line; None: ``sys.argv``.
        bars: Show progress bars where the output is a terminal.

    Returns:
        What ``scout.json`` holds.

    Raises:
        OptionError, ModelError, CheckpointError, NonFiniteError: Bad input.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if runs_asked(given):
        return check_predictions(given, bars)
    options, specs = parse(given, "scout", add_scout_options)
    sizes = team_sizes(options.team_size)
    check_least(options, {"samples": 2, "top": 1, "most_teams": 1, "models_at_once": 1})
    world = _start_alone(options)
    folder = _choose_folder(options)
    watch = progress_bars(bars)
    unlabelled = _open_unlabelled(options)
    candidates = find_candidates(specs, options, watch)
    asked_names = [candidate.spec.name for candidate in candidates]
    candidates = without_repeats(candidates, asked_names)
    student = student_of(options.student, candidates)
    check_request(
        [candidate.spec.name for candidate in candidates],
        sizes,
        options.rule,
        options.predictor,
        labelled=not options.unlabelled,
        calibrated=is_labelled(options),
    )
    logits, found = ask(candidates, options, world, watch, unlabelled)
    judge = judge_of(found, options)
    predictor = options.predictor or default_predictor(found, judge.rule)
    costs = None
    if options.costs or options.budget_gpu_mem:
        costs = ClassifierCosts(candidates, options, world, watch)
    ranking = _rank(judge, sizes, predictor, student, options, costs, watch)
    _measure_ensembles(ranking, options.top, found, logits)
    outcome = describe_outcome(judge, ranking, predictor, student, options.top)
    for fact, candidate in zip(outcome["models"], candidates, strict=True):
        fact |= {"model": candidate.spec.model, "view": str(candidate.view)}
        fact |= {"file": _file(candidate.spec), "parameters": candidate.parameters}
    asked = {spec.name: peer for spec, peer in zip(specs, options.peers, strict=True)}
    outcome["commands"] = [
        command_of(
            [asked[name] for name in team["members"]],
            with_engine(options, team),
            folder / f"team-{k + 1}.yaml",
        )
        for k, team in enumerate(teams_to_train(outcome, _COMMANDS))
    ]
    outcome["chosen_on_test"] = not (options.held_out or options.unlabelled)
    outcome["settings"] = _settings(options)
    write_outcome(folder, outcome)
    report = write_scout_report(folder / "report.html", outcome, options.top)
    _tell(outcome, options.top)
    for fact in outcome["models"]:
        if fact["name"] not in str(asked[fact["name"]]):  # a number was added: nobody knows it yet
            _logger.info("%s is %s", fact["name"], fact["file"] or fact["model"])
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
        OptionError, ModelError, CheckpointError: Bad input.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--output", default="")
    early.add_argument("--experiment", default="")
    known = early.parse_known_args(given)[0]
    runs = [read_run(Path(folder)) for folder in runs_asked(given)]
    specs, names, finished = shared_models(runs)
    gained = gains_of(finished, names)
    options, _ = parse(
        ["-c", str(runs[0].folder / "args.yaml"), *given], "scout", add_scout_options
    )
    options.output, options.experiment = known.output, known.experiment
    refuse_unlabelled(options.unlabelled)
    refuse_skipping(options.skip_unfit)
    refuse_other_data(str(options.data), [str(run.started.data) for run in runs], "DATA")
    world, folder, watch = _start_alone(options), _choose_folder(options), progress_bars(bars)
    specs = [replace(spec, name=name) for spec, name in zip(specs, names, strict=True)]
    candidates = find_candidates(specs, options, watch)
    logits, found = ask(candidates, options, world, watch)

    def ensembles(teams: list[tuple[int, ...]]) -> dict[tuple[int, ...], list[float]]:
        alone = found.correct.double().mean(dim=1).tolist()
        together = ensemble_accuracy(logits, logits.labels(), teams)
        return {
            team: [whole - alone[i] for i in team]
            for team, whole in zip(teams, together, strict=True)
        }

    asked = evaluated_on(options)
    same = [asked == evaluated_on(run.started) for run in runs]
    whole = not (options.samples or options.held_out)
    assert found.correct is not None
    outcome = {
        **check_runs(
            gained,
            lambda one: Judge(found, one.rule, one.score, one.margin),
            ensembles,
            options.predictor,
        ),
        "samples": logits.count,
        "unit": "images",
        "metric": METRIC,
        "same_data": any(same),
        "starts": unlike_starts(
            finished, names, METRIC, 100 * found.correct, [whole and one for one in same]
        ),
        "models": [asdict(fact) for fact in describe_models(found)],
        "settings": _settings(options),
    }
    return write_check(folder, outcome)


def _start_alone(options: argparse.Namespace) -> World:
    world = start(options)
    if world.size > 1:
        raise OptionError(f"scouting runs in one process, not in {world.size}; leave torchrun out")
    return world


def _choose_folder(options: argparse.Namespace) -> Path:
    name = options.experiment or f"{datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(options.output or _HERE) / name
    make_writable(folder, keep=False)
    make_writable(Path(options.cache), "--cache", keep=False)
    return folder


def find_candidates(
    specs: Sequence[PeerSpec], options: argparse.Namespace, watch: Watch
) -> list[Candidate]:
    """Inspect the models asked for, against the classes of the labelled data if there are any.

    Raises:
        OptionError: See ``inspect``; models of different channels.
    """
    classes = classes_of(_open_split(options, 3)) if is_labelled(options) else None
    count = len(classes) if classes else None
    candidates = inspect(specs, options, count, options.skip_unfit, watch)
    common_view([candidate.view for candidate in candidates])
    return candidates


def _open_split(options: argparse.Namespace, channels: int) -> Dataset:
    """Open what is scouted on: what a run would be evaluated on, with ``--held-out`` that part."""
    if not options.held_out:
        return open_dataset(options, False, channels)
    whole = open_dataset(options, True, channels)
    return split_held_out(whole, options.held_out, options.seed)[1]


def is_labelled(options: argparse.Namespace) -> bool:
    """Whether labelled data were given."""
    return options.data != options.unlabelled


def student_of(asked: str | None, candidates: Sequence[Candidate]) -> int | None:
    """Find whom the ranking is for, by its name, model or file.

    Raises:
        OptionError: No such model, or several.
    """
    if asked is None:
        return None
    specs = [candidate.spec for candidate in candidates]
    found = [i for i, spec in enumerate(specs) if asked in (spec.model, spec.checkpoint)]
    found = [i for i, spec in enumerate(specs) if spec.name == asked] or found
    if len(found) != 1:
        told = ", ".join(spec.name for spec in specs)
        raise OptionError(f"--for {asked}: {len(found)} models are called so; there are {told}")
    return found[0]


def ask(
    candidates: Sequence[Candidate],
    options: argparse.Namespace,
    world: World,
    watch: Watch,
    unlabelled: Dataset | None = None,
) -> tuple[CachedLogits, Survey]:
    """Let every model answer, and compare what they say.

    Args:
        candidates: The models.
        options: The run's.
        world: Where this process stands.
        watch: Wraps the batches, for instance in a progress bar.
        unlabelled: The images of ``--unlabelled``; with them the labelled data, if any, only give
            each model's temperature.

    Returns:
        The logits that teams are judged by, and their survey.
    """
    found = logits = calibration = None
    channels = candidates[0].view.size[0]
    if is_labelled(options):
        dataset = _open_split(options, channels)
        logits = _answers(candidates, dataset, options, world, watch)
        found = _survey(logits, logits.labels(), options, watch)
        calibration = found.temperature
    if unlabelled is not None:
        unlabelled.input_img_mode = mode_of(options, channels)  # unknown when they were listed
        logits = _answers(candidates, unlabelled, _as_unlabelled(options), world, watch)
        found = _survey(logits, None, options, watch, calibration)
    assert logits is not None and found is not None
    return logits, found


def _as_unlabelled(options: argparse.Namespace) -> argparse.Namespace:
    """Let the images without labels be all the data there are."""
    other = {"data": options.unlabelled, "dataset": "", "class_map": "", "held_out": 0.0}
    return argparse.Namespace(**{**vars(options), **other})


def _open_unlabelled(options: argparse.Namespace) -> Dataset | None:
    """List the images without labels, if any, before models answer those with labels."""
    if not options.unlabelled:
        return None
    try:
        return _open_split(_as_unlabelled(options), 3)
    except NoImagesError as error:
        raise OptionError(
            f"--unlabelled {options.unlabelled}: no image there, at any depth; give a folder with "
            f"{', '.join(get_img_extensions())} files"
        ) from error
    except OptionError as error:
        raise OptionError(f"--unlabelled {error}") from error


def _answers(
    candidates: Sequence[Candidate],
    dataset: Dataset,
    options: argparse.Namespace,
    world: World,
    watch: Watch,
) -> CachedLogits:
    split = choose_samples(dataset, options, options.samples)
    cache, at_once = Path(options.cache), options.models_at_once
    return cached_logits(candidates, split, options, cache, world, at_once, watch)


def _survey(
    logits: CachedLogits,
    labels: Tensor | None,
    options: argparse.Namespace,
    watch: Watch,
    calibration: Tensor | None = None,
) -> Survey:
    try:
        return survey(
            logits,
            labels,
            temperature=options.temperature,
            calibration=calibration,
            seed=options.seed,
            watch=lambda parts: watch(parts, "comparing"),
        )
    except ValueError as error:
        raise OptionError(f"{options.data}: {error}") from error


def judge_of(found: Survey, options: argparse.Namespace) -> Judge:
    """Judge by the rule asked for; without labels by what can be compared without them.

    Raises:
        OptionError: A rule or margin that does not exist.
    """
    rule, score, margin = judged_by(found, options.rule, options.score, options.margin)
    if found.labelled and score == "confidence" and options.bce_loss:
        score = "raw confidence"  # as train.py compares them, for it calibrates no sigmoids
    try:
        return Judge(found, rule, score, margin)
    except ValueError as error:
        raise OptionError(str(error)) from error


def _rank(
    judge: Judge,
    sizes: Sequence[int],
    predictor: str,
    student: int | None,
    options: argparse.Namespace,
    costs: TeamCosts | None,
    watch: Watch,
) -> Ranking:
    try:
        return rank_teams(
            judge,
            sizes,
            predictor,
            student=student,
            most=options.most_teams,
            fits=costs or (lambda team: True),
            watch=lambda teams: watch(teams, "judging teams"),
        )
    except ValueError as error:
        raise OptionError(str(error)) from error


def _measure_ensembles(ranking: Ranking, top: int, found: Survey, logits: CachedLogits) -> None:
    """Tell it of every pair, and of larger teams where these are few, else of the best.

    Without labels it is not known.
    """
    if found.pair_accuracy is None:
        return
    larger = []
    for team in ranking.teams:
        if len(team.members) > 2:
            larger.append(team)
        else:
            team.ensemble = float(found.pair_accuracy[team.members])
    if len(larger) > _ENSEMBLES:
        larger = [team for team in ranking.best(top) if len(team.members) > 2]
    measured = ensemble_accuracy(logits, logits.labels(), [team.members for team in larger])
    for team, accuracy in zip(larger, measured, strict=True):
        team.ensemble = accuracy


def command_of(
    peers: Sequence[str | Mapping[str, Any]], options: argparse.Namespace, file: Path
) -> str:
    """Write the command that trains a team; see ``common.scout_commands.train_command``."""
    data = str(options.data) if is_labelled(options) else "DATA"
    flags = flags_of(_as_judged(options), actions_of(build_parser("train")), _NOT_TRAINING)
    start = ["python", "classification/train.py", data, *flags]
    return train_command(start, peers, file, functools.partial(yaml.safe_dump, sort_keys=False))


def _as_judged(options: argparse.Namespace) -> argparse.Namespace:
    """Let training compare calibrated confidences where scouting did."""
    compares = options.score == "confidence" and compares_scores(options.rule, options.margin)
    if not compares or options.bce_loss or not is_labelled(options):
        return options
    when = "start" if options.calibrate_scores == "off" else options.calibrate_scores
    return argparse.Namespace(**{**vars(options), "calibrate_scores": when})


def _file(spec: PeerSpec) -> str:
    several = isinstance(spec.checkpoint, list)
    return "+".join(spec.checkpoint) if several else spec.checkpoint or ""


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = (
        "data val_split held_out samples unlabelled rule score temperature margin student "
        "team_size predictor seed amp amp_dtype batch_size engine budget_gpu_mem cache"
    ).split()
    values = plain(options)
    return {name: values[name] for name in names}


def _tell(outcome: Mapping[str, Any], top: int) -> None:
    """Log the best teams, and how to train them."""
    _logger.info("%s", scout_lead(outcome))
    for teams in teams_by_size(outcome, top):
        rows = [
            {
                "team": ", ".join(team["members"]),
                outcome["predictor"]: f"{team['value']:.4f}",
                "taught": " ".join(f"{100 * x:.0f}%" for x in team["taught"].values()),
                "agree": f"{100 * team['agreement']:.1f}%",
                "ensemble": _percent(team["ensemble"]),
                "oracle": _percent(team["oracle"]),
                **shown_costs(team),
            }
            for team in teams
        ]
        log_table(rows)
    for caution in scout_cautions(outcome):
        _logger.info("%s", caution)
    for command in outcome["commands"]:
        _logger.info("  %s", command)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


if __name__ == "__main__":
    sys.exit(main())
