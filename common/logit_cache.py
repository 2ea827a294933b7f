"""Logits kept on disk, in chunks: what was computed once is not computed again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.checkpoint import atomic_write
from common.roles import NonFiniteError

CHUNK = 1024
_FORMAT = 1
_LOWEST = -60000.0  # float16 ends at 65504
_logger = logging.getLogger(__name__)


def hash_weights(state: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names, types, shapes and values of a state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        whole = value.detach().cpu().contiguous().reshape(-1)
        digest.update(whole.view(torch.uint8).numpy().data)
    return digest.hexdigest()


class LogitCache:
    """One model's logits on one list of samples: a folder with a file for every chunk of them.

    Logits are kept as float16, less the largest of each sample. That changes no probability, keeps
    the largest and those near it exact to 1e-3 of their distance, and never makes ties.

    Args:
        root: Holds the caches of all models; this one's folder is named after the key.
        key: Plain values that decide the logits: weights, data, view, precision.
        name: Of the model, for messages.
        count: Samples.
        classes: Logits of each.
    """

    def __init__(
        self, root: Path, key: Mapping[str, Any], name: str, count: int, classes: int
    ) -> None:
        told = json.dumps({"format": _FORMAT, "count": count, **key}, sort_keys=True)
        self.folder = Path(root) / hashlib.sha256(told.encode()).hexdigest()[:24]
        self.told = told
        self.name = name
        self.count = count
        self.classes = classes
        self._told_bad: set[int] = set()

    @property
    def chunks(self) -> int:
        """How many there are when it is complete."""
        return -(-self.count // CHUNK)

    def samples(self, chunk: int) -> range:
        """Return which samples a chunk holds."""
        return range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.count))

    def missing(self) -> list[int]:
        """List the chunks that are not there, or are broken; each of these is told once.

        Reads all that is there, to compare checksums.
        """
        return [chunk for chunk in range(self.chunks) if not self._is_good(chunk)]

    def _path(self, chunk: int) -> Path:
        return self.folder / f"chunk-{chunk:05d}.safetensors"

    def _is_good(self, chunk: int) -> bool:
        path = self._path(chunk)
        if not path.exists():
            return False
        fault = self._fault(chunk)
        if fault and chunk not in self._told_bad:
            _logger.warning("%s: broken (%s); computed again", path, fault)
            self._told_bad.add(chunk)
        return not fault

    def _fault(self, chunk: int) -> str:
        """Say what is wrong with a chunk's file; empty: nothing."""
        try:
            with safe_open(self._path(chunk), framework="pt") as file:
                kept = (file.metadata() or {}).get("sum")
                kinds = list(file.keys())
                content = {what: file.get_tensor(what) for what in kinds}
        except (SafetensorError, OSError) as error:
            return str(error)
        if kept is None:
            return "it has no checksum, as those of older versions"
        if kept != hash_weights(content):
            return "its checksum is wrong"
        shape, expected = list(content["logits"].shape), [len(self.samples(chunk)), self.classes]
        return "" if shape == expected else f"logits {shape}, expected {expected}"

    def write(self, chunk: int, logits: Tensor, labels: Tensor, **tables: Tensor) -> None:
        """Keep a chunk, whole or not at all.

        Args:
            chunk: Its number.
            logits: [b, C] of all its samples.
            labels: [b] int.
            tables: What else is known of its samples [b, ...], kept as it is.

        Raises:
            NonFiniteError: Logits that are not finite.
            ValueError: Another number of samples or classes.
        """
        samples = self.samples(chunk)
        if logits.shape != (len(samples), self.classes) or len(labels) != len(samples):
            raise ValueError(
                f"{self.name}: chunk {chunk} has logits {list(logits.shape)}, expected "
                f"{[len(samples), self.classes]}"
            )
        logits = logits.float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError(
                f"{self.name}: its logits are not finite in samples {samples.start} to "
                f"{samples.stop - 1}; try --amp-dtype bfloat16, or no --amp"
            )
        relative = (logits - logits.amax(dim=1, keepdim=True)).clamp(min=_LOWEST)
        content = {"logits": relative.half(), "labels": labels.long().cpu().contiguous()}
        content |= {what: table.cpu().contiguous() for what, table in tables.items()}
        told = {"name": self.name, "key": self.told, "sum": hash_weights(content)}
        atomic_write(self._path(chunk), lambda to: save_file(content, str(to), told))

    def read(self, start: int, stop: int) -> Tensor:
        """Return logits [stop - start, C] float32, less the largest of each sample."""
        return self._read("logits", start, stop).float()

    def labels(self) -> Tensor:
        """Return the labels [n]."""
        return self.table("labels")

    def table(self, what: str) -> Tensor:
        """Return one of the tables that were written beside the logits [n, ...]."""
        return self._read(what, 0, self.count)

    def _read(self, what: str, start: int, stop: int) -> Tensor:
        parts = []
        for chunk in range(start // CHUNK, -(-stop // CHUNK)):
            first = self.samples(chunk).start
            with safe_open(self._path(chunk), framework="pt") as file:
                whole = file.get_slice(what)
                parts.append(whole[max(start - first, 0) : stop - first])
        return torch.cat(parts)


class CachedLogits:
    """The complete caches of M models on the same samples, as ``common.survey`` reads them.

    Samples with the label -1, whose files are broken, are left out.

    Args:
        caches: Complete.
        known: Which samples to take [n], bool; None: all.

    Attributes:
        where: The numbers of those that are not [n].

    Raises:
        ValueError: Caches of different samples or classes, or none.
    """

    def __init__(self, caches: Sequence[LogitCache], known: Tensor | None = None) -> None:
        if len({(cache.count, cache.classes) for cache in caches}) != 1:
            told = ", ".join(f"{c.name}: {c.count} x {c.classes}" for c in caches)
            raise ValueError(f"expected logits of one shape, got {told or 'none'}")
        self.caches = list(caches)
        self.names = [cache.name for cache in caches]
        self.classes = caches[0].classes
        self._labels = caches[0].labels()
        taken = self._labels >= 0
        self.where = (taken if known is None else taken & known).nonzero().flatten()
        self.count = len(self.where)

    def read(self, model: int, start: int, stop: int) -> Tensor:
        """Return one model's logits of the samples from start to stop, [b, C] float32."""
        where = self.where[start:stop]
        first, last = int(where[0]), int(where[-1])
        whole = self.caches[model].read(first, last + 1)
        return whole if len(whole) == len(where) else whole[where - first]

    def labels(self) -> Tensor:
        """Return the labels [n]."""
        return self._labels[self.where]


class ChunkWriter:
    """Cuts what batches give into a cache's chunks, and writes those that it lacks.

    Args:
        cache: Where they go.
        chunks: The chunks whose samples come, in order; more may come than it lacks.
    """

    def __init__(self, cache: LogitCache, chunks: Iterable[int]) -> None:
        self.cache = cache
        self._lacks = set(cache.missing())
        self._next = list(chunks)[::-1]
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._held = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take the next batch: logits [B, C] and labels [B]."""
        self._rows.append((logits.cpu(), labels.cpu()))
        self._held += len(labels)
        while self._next and self._held >= len(self.cache.samples(self._next[-1])):
            self._cut(self._next.pop())

    def _cut(self, chunk: int) -> None:
        size = len(self.cache.samples(chunk))
        logits, labels = (torch.cat(part) for part in zip(*self._rows, strict=True))
        if chunk in self._lacks:
            self.cache.write(chunk, logits[:size], labels[:size])
        self._rows, self._held = [(logits[size:], labels[size:])], self._held - size
