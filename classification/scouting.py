"""Classifiers to choose from, and their logits on a split, computed once."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import random_seed
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from classification.data import View
from classification.evaluation import PeerEvaluator
from classification.held_out import Part
from classification.models import ModelError
from classification.options import PeerSpec, from_export
from classification.outputs import metadata
from classification.peer import build_modules
from common.broken import BadSamples
from common.checkpoint import CheckpointError
from common.distributed import World
from common.logit_cache import CachedLogits, ChunkWriter, LogitCache, hash_weights
from common.options import OptionError
from common.scouting import refuse_unfit

_logger = logging.getLogger("scout")

# What decides which pixels a model sees, beside its own view.
_READ = ("input_img_mode", "input_key", "target_key", "class_map")
UNFIT = (ModelError, CheckpointError, OptionError)
Watch = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Candidate:
    """A model that can be scouted.

    Attributes:
        spec: As asked for.
        view: Its own.
        classes: How many it tells.
        parameters: How many it has.
        weights: Hash of them.
        told: What else decides its logits.
    """

    spec: PeerSpec
    view: View
    classes: int
    parameters: int
    weights: str
    told: dict[str, str]

    @property
    def identity(self) -> str:
        """The same of two that answer alike, whatever they are called."""
        return repr((self.weights, sorted(self.told.items())))


def inspect(
    specs: Sequence[PeerSpec],
    options: argparse.Namespace,
    classes: int | None,
    skip: bool,
    watch: Watch,
) -> list[Candidate]:
    """Build every model once, for its view and the hash of its weights.

    Args:
        specs: As asked for.
        options: The run's.
        classes: What all must tell; None: what most tell.
        skip: Go on without those that cannot be had or tell other classes, and say which.
        watch: Wraps the models, for instance in a progress bar.

    Returns:
        Those that can be scouted.

    Raises:
        OptionError: Some cannot, and ``skip`` is not set (names all of them, with the way out); or
            fewer than two can.
    """
    found, unfit = [], {}
    for spec in watch(specs, "looking at models"):
        try:
            found.append(_inspect(spec, options))
        except UNFIT as error:
            unfit[spec.name] = str(error)
    expected = classes or _most_common([candidate.classes for candidate in found])
    whose = "the data have" if classes else "most others tell"
    for candidate in [c for c in found if c.classes != expected]:
        unfit[candidate.spec.name] = f"tells {candidate.classes} classes, {whose} {expected}"
        found.remove(candidate)
    refuse_unfit(unfit, len(specs), skip)
    return found


def _most_common(values: Sequence[int]) -> int:
    return max(values, key=lambda value: (list(values).count(value), value), default=0)


def _inspect(spec: PeerSpec, options: argparse.Namespace) -> Candidate:
    spec = from_export(spec)
    if spec.checkpoint is None and spec.options.pretrained is False:
        raise OptionError(
            f"has no weights (--no-pretrained); give a file: --model {spec.model},checkpoint=FILE"
        )
    module, view = build(spec, options)
    if options.num_classes not in (None, module.num_classes):
        raise OptionError(
            f"knows {module.num_classes} classes, not the {options.num_classes} of --num-classes; "
            "a new head tells nothing before it is trained"
        )
    return Candidate(
        spec=spec,
        view=view,
        classes=module.num_classes,
        parameters=sum(p.numel() for p in module.parameters()),
        weights=hash_weights(module.state_dict()),
        told={
            **metadata(spec, module, view),
            "dtype": str(spec.options.model_dtype),
            "amp": options.amp_dtype if options.amp else "",
        },
    )


def build(spec: PeerSpec, options: argparse.Namespace) -> tuple[nn.Module, View]:
    """Build one model with the classes that it knows, the same at every call."""
    random_seed(options.seed, 0)
    own_classes = argparse.Namespace(**{**vars(options), "num_classes": None})
    modules, views = build_modules([spec], own_classes)
    return modules[0], views[0]


@dataclass(frozen=True)
class Split:
    """The samples that are scouted on.

    Attributes:
        dataset: From ``open_dataset``.
        indices: Which of its samples.
        key: What decides which samples these are.
    """

    dataset: Dataset
    indices: list[int]
    key: str


def choose_samples(dataset: Dataset, options: argparse.Namespace, most: int | None) -> Split:
    """Take all samples of a split, or a random part of them, and name it by its content.

    Args:
        dataset: From ``open_dataset``, or the part of it that is held out.
        options: The run's; its seed draws the part.
        most: Samples at most; None: all.

    Raises:
        OptionError: A stream, which cannot be read by index.
    """
    if isinstance(dataset, IterableDataset):
        raise OptionError(
            f"--dataset {options.dataset}: a stream cannot be scouted, for it cannot be read by "
            "index; unpack a few thousand images into a folder"
        )
    count = len(dataset)
    indices = list(range(count))
    if most is not None and most < count:
        generator = torch.Generator().manual_seed(options.seed)
        indices = sorted(torch.randperm(count, generator=generator)[:most].tolist())
    if isinstance(dataset, Part):
        indices = [int(dataset.indices[i]) for i in indices]
        dataset = dataset.dataset
    return Split(dataset, indices, _fingerprint(dataset, indices, options))


def _fingerprint(dataset: Dataset, indices: Sequence[int], options: argparse.Namespace) -> str:
    """Hash names, sizes, times of change and labels of the files, and how they are read.

    Where there are no files, the split's name.
    """
    how = {name: getattr(options, name) for name in _READ}
    digest = hashlib.sha256(repr(how).encode())
    samples = getattr(getattr(dataset, "reader", None), "samples", None)
    if samples is None:
        _logger.warning("cached logits trust the name of this data, for its files are not known")
        split = options.train_split if options.held_out else options.val_split
        told = [options.dataset, os.path.abspath(options.data), split, len(dataset)]
        digest.update(repr([told, list(indices)]).encode())
        return digest.hexdigest()
    root = dataset.reader.root
    for path, label in (samples[i] for i in indices):
        file = os.stat(path)
        told = os.path.relpath(path, root), file.st_size, file.st_mtime_ns, label
        digest.update(f"{told}\n".encode())
    return digest.hexdigest()


def cached_logits(
    candidates: Sequence[Candidate],
    split: Split,
    options: argparse.Namespace,
    root: Path,
    world: World,
    at_once: int,
    watch: Watch,
) -> CachedLogits:
    """Return every model's logits on a split, computing those that no earlier call has.

    Models of one geometry share one decoding of the images, up to ``at_once`` of them. A call that
    was cut off goes on after its last whole chunk.

    Args:
        candidates: The models.
        split: The samples.
        options: The run's.
        root: Of all caches.
        world: Where this process stands.
        at_once: Models in memory at the same time.
        watch: Wraps the batches, for instance in a progress bar.
    """
    caches = [
        LogitCache(
            root,
            {**candidate.told, "weights": candidate.weights, "data": split.key},
            candidate.spec.name,
            len(split.indices),
            candidate.classes,
        )
        for candidate in candidates
    ]
    lacking = [k for k, cache in enumerate(caches) if cache.missing()]
    groups: dict[Any, list[int]] = {}
    for k in lacking:
        groups.setdefault(candidates[k].view.geometry, []).append(k)
    bad = BadSamples(options.max_bad_samples)
    done = len(caches) - len(lacking)
    _logger.info("logits of %d models known, of %d to be computed", done, len(lacking))
    for members in groups.values():
        for start in range(0, len(members), at_once):
            some = members[start : start + at_once]
            _compute(
                [candidates[k] for k in some],
                [caches[k] for k in some],
                split,
                options,
                world,
                bad,
                watch,
            )
    logits = CachedLogits(caches)
    if logits.count < len(split.indices):
        told = len(split.indices) - logits.count, len(split.indices)
        _logger.warning("scouted without %d of %d samples, whose files are broken", *told)
    return logits


def _compute(
    candidates: Sequence[Candidate],
    caches: Sequence[LogitCache],
    split: Split,
    options: argparse.Namespace,
    world: World,
    bad: BadSamples,
    watch: Watch,
) -> None:
    names = ", ".join(candidate.spec.name for candidate in candidates)
    _logger.info("%s: %s", names, candidates[0].view)
    modules = [_rebuild(candidate, options).to(world.device) for candidate in candidates]
    for candidate, module in zip(candidates, modules, strict=True):
        module.to(dtype=getattr(torch, candidate.spec.options.model_dtype or "float32"))
    chunks = sorted({chunk for cache in caches for chunk in cache.missing()})
    samples = itertools.chain.from_iterable(caches[0].samples(chunk) for chunk in chunks)
    evaluator = PeerEvaluator(
        Part(split.dataset, [split.indices[i] for i in samples]),
        [candidate.view for candidate in candidates],
        options,
        world,
        getattr(torch, options.amp_dtype) if options.amp else None,
        channels_last=[candidate.spec.options.channels_last for candidate in candidates],
        dtypes=[next(module.parameters()).dtype for module in modules],
        watch=lambda batches, _: watch(batches, names[:40]),
        bad=bad,
    )
    writers = [ChunkWriter(cache, chunks) for cache in caches]
    for _, _, logits, target in evaluator.forward(modules):
        for i, z in logits:
            writers[i].add(z, target)


def _rebuild(candidate: Candidate, options: argparse.Namespace) -> nn.Module:
    module, _ = build(candidate.spec, options)
    if hash_weights(module.state_dict()) != candidate.weights:
        raise OptionError(
            f"{candidate.spec.name}: its weights changed while it was scouted; run it again"
        )
    return module
