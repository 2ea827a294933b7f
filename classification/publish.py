"""Exported classifiers in the layout that timm loads from the Hugging Face hub, and to the hub."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from timm.models import save_for_hf

from classification.cards import timm_builds
from classification.hub import NETWORK_ERRORS
from classification.options import EXPORT, PeerSpec
from classification.outputs import reload
from common.card import CARD, README, Card, card_text, file_sum, from_json
from common.checkpoint import read_metadata
from common.disk import write_text, writing_into
from common.options import OptionError

_logger = logging.getLogger("publish")

_VIEW = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
_OF_PUBLISHED = (
    "tag license description origin_url paper_name paper_ids notes label_names label_descriptions"
).split()
_AS_TEXT = ("interpolation", "crop_mode")


def check_push(options: argparse.Namespace, specs: Sequence[PeerSpec]) -> None:
    """Refuse ``--push-to-hub`` that could only fail at the run's end.

    Raises:
        OptionError: No token, a name that the hub does not take, or a model that is not timm's.
    """
    if not options.push_to_hub:
        return
    for spec in specs:
        if not spec.frozen:
            check_repo(f"{options.push_to_hub}-{spec.name}", "--push-to-hub")
            check_timms(spec.name, spec.model)
    token()


def check_repo(repo: str, option: str) -> None:
    """Refuse what cannot be the name of a repository of the hub.

    Raises:
        OptionError: Names it.
    """
    if repo.count("/") != 1:
        raise OptionError(f"{option}: {repo!r} is no name of a repository; give ORG/NAME")
    try:
        huggingface_hub.utils.validate_repo_id(repo)
    except HFValidationError as error:
        raise OptionError(
            f"{option}: the hub takes no repository {repo!r} ({error}); give another ORG/NAME, or "
            "another name to the peer"
        ) from error


def check_timms(name: str, model: str) -> None:
    """Refuse models that timm does not build: its layout is what is pushed.

    Raises:
        OptionError: Names the peer and its model.
    """
    if not timm_builds(model):
        raise OptionError(
            f"peer {name!r}: {model} is not one of timm's models, whose layout is what is pushed; "
            f"upload the run's own files: hf upload ORG/NAME RUN/{name}"
        )


def token() -> str:
    """Return the hub's token, as its own client finds it.

    Raises:
        OptionError: There is none.
    """
    found = huggingface_hub.get_token()
    if not found:
        raise OptionError(
            "no token of the Hugging Face hub; log in with `hf auth login`, set HF_TOKEN, or write "
            "the files only: classification/push.py RUN --folder OUT"
        )
    return found


def peers_of(run: Path, asked: Sequence[str] = ()) -> list[str]:
    """List the peers of a run that have a card, or those asked for.

    Raises:
        OptionError: Not the folder of a finished run, or no such peer in it.
    """
    found = sorted(path.parent.name for path in run.glob(f"*/{CARD}"))
    if not found:
        raise OptionError(
            f"{run}: not the folder of a finished run (no PEER/{CARD} in it); give "
            "output/train/RUN, or finish the run with train.py ... --resume RUN"
        )
    for name in asked:
        if name not in found:
            raise OptionError(
                f"--peer {name}: {run} has no such peer with a card; it has {', '.join(found)}"
            )
    return list(asked) or found


def write_layout(
    run: Path,
    name: str,
    folder: Path,
    which: str = "best",
    *,
    repo: str = "",
    analysis: Mapping[str, Any] | None = None,
) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``README.md``, the first two by timm.

    Args:
        run: The folder of a finished run.
        name: Of the peer.
        folder: Where they go.
        which: Of the peer's files.
        repo: Where on the hub they will be, for the card.
        analysis: Of an experiment, for the card.

    Raises:
        OptionError: No such weights, or a model that is not timm's.
        CheckpointError: A file that is broken.
        OutputError: The folder cannot be written.
    """
    source, card = run / name / f"{which}{EXPORT}", run / name / CARD
    if not source.is_file():
        way = "a run makes it with --soup" if which == "soup" else "choose another of best, last"
        raise OptionError(f"--which {which}: there is no {source}; {way}")
    described = read_metadata(source)
    model = described.get("architecture", "a model without a name")
    check_timms(name, model)
    view = {key: described[key] if key in _AS_TEXT else json.loads(described[key]) for key in _VIEW}
    module = reload(model, source, described)
    told = from_json(card.read_text(encoding="utf-8"), card)
    module.pretrained_cfg = claims_of(module.pretrained_cfg, told)
    labels = {"label_names": list(told.labels)} if told.labels else None
    with writing_into(folder):
        save_for_hf(module, folder, model_config=labels, safe_serialization=True, data_config=view)
    weights = folder / "model.safetensors"
    text = card_text(told, which, weights.name, file_sum(weights), repo=repo, analysis=analysis)
    write_text(folder / README, text)


def claims_of(config: Mapping[str, Any], card: Card) -> dict[str, Any]:
    """Leave out of timm's config of an architecture what is not so of these weights.

    Its tag, licence and origin are those of published weights; where the peer did not start from
    them, they would be a claim that nobody made. Descriptions of other classes go too.
    """
    published = card.front.get("base_model") or card.front.get("license")
    left_out = set() if published else set(_OF_PUBLISHED)
    if set(card.labels) - set(config.get("label_descriptions") or ()):
        left_out.add("label_descriptions")
    return {key: value for key, value in config.items() if key not in left_out}


def deliver(
    run: Path,
    names: Sequence[str],
    *,
    repo: str = "",
    folder: Path | None = None,
    which: str = "best",
    private: bool = False,
    analysis: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Bring peers of a run to the hub, or their layout into a folder.

    All layouts are made before anything is uploaded or copied.

    Args:
        run: The folder of a finished run.
        names: Of the peers.
        repo, folder: One of them: the repository's name or the folder, of one peer; of several,
            ``REPO-PEER`` and ``FOLDER/PEER``.
        which, analysis: See ``write_layout``.
        private: Of new repositories.

    Returns:
        Where each went, by peer.

    Raises:
        OptionError: As ``write_layout``; no token, a name or an upload that the hub refuses, or a
            folder that is not empty.
    """
    several = len(names) > 1
    if folder is not None:
        places = {name: str(folder / name if several else folder) for name in names}
        for place in places.values():
            _refuse_full(Path(place))
    else:
        places = {name: f"{repo}-{name}" if several else repo for name in names}
        for place in (repo, *places.values()):
            check_repo(place, "--repo")
        token()
    with tempfile.TemporaryDirectory() as temporary:
        for name, place in places.items():
            made, at = Path(temporary, name), "" if folder is not None else place
            write_layout(run, name, made, which, repo=at, analysis=analysis)
        for name, place in places.items():
            if folder is not None:
                with writing_into(Path(place)):
                    shutil.copytree(Path(temporary, name), place, dirs_exist_ok=True)
            else:
                _upload(Path(temporary, name), place, private, run)
            _logger.info("%s: %s is at %s", name, which, place)
    return places


def _refuse_full(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"--folder {folder}: is there already and not empty; give another one")


def _upload(folder: Path, repo: str, private: bool, run: Path) -> None:
    api = huggingface_hub.HfApi(token=token(), library_name="timm")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=str(folder), commit_message="Add a model and its card"
        )
    except NETWORK_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise OptionError(
            f"{repo}: the hub did not take it ({reason}); nothing of the run is lost, push it "
            f"later: classification/push.py {run} --repo ORG/NAME"
        ) from error
