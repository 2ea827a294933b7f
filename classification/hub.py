"""Weights from the network: asked for once, refused quickly, with a way to go on without it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError

from classification.heads import ModelError

# The hub's client has changed its transport (requests, httpx, ...); its own error derives from the
# transport's. OSError covers the rest: no such file, no connection, no such host.
NETWORK_ERRORS = (OSError, *HfHubHTTPError.__bases__, huggingface_hub.errors.EntryNotFoundError)


def is_hub_reachable(timeout: float = 5.0) -> bool:
    """Ask the Hugging Face hub once; its own client would retry for half a minute a file.

    Args:
        timeout: Seconds.
    """
    try:
        huggingface_hub.utils.get_session().head(
            huggingface_hub.constants.ENDPOINT, timeout=timeout
        )
    except NETWORK_ERRORS:
        return False
    return True


def find_cached(repository: str, *files: str) -> str | None:
    """Find the first of some files of a repository that an earlier run has fetched."""
    found = (huggingface_hub.try_to_load_from_cache(repository, file) for file in files)
    return next((path for path in found if isinstance(path, str)), None)


def fetch(url: str, name: str, files: str, md5: str = "") -> Path:
    """Download a file once, to torch's own cache.

    Args:
        url: Where it is published.
        name: The model, for messages.
        files: What to give as ``checkpoint=`` instead, for messages.
        md5: What the file's MD5 starts with; guards against a broken download, not against malice.

    Raises:
        ModelError: Not reachable, or not the published file.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            raise ModelError(
                f"{name}: cannot fetch {url} ({error}); fetch it elsewhere and give "
                f"--peer {name},checkpoint={files}"
            ) from error
    if md5 and not hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest().startswith(
        md5
    ):
        raise ModelError(f"{path}: not the file published at {url}; delete it and fetch it again")
    return path
