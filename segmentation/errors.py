"""What is wrong with a run: each says the value, and the way out."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from common.broken import WorkerDiedError
from common.checkpoint import CheckpointError
from common.disk import OutputError
from common.peers import UnreachedError
from common.roles import NonFiniteError


class ConfigError(ValueError):
    """A run file, a config or an option that cannot be used; names the value and the choices."""


class DataError(ValueError):
    """Data that is missing, broken or of other classes; names the file or the value."""


class SegmentorError(ValueError):
    """A model that is no semantic segmentor of a known kind."""


# What ends a run in one line, not in a traceback.
FAULTS = (
    ConfigError,
    DataError,
    SegmentorError,
    CheckpointError,
    NonFiniteError,
    OutputError,
    UnreachedError,
    WorkerDiedError,
)


@contextmanager
def told_of(who: str) -> Iterator[None]:
    """Turn what a host makes of a wrong setting into an error that says where it is.

    Args:
        who: Whose setting: a peer, or a node of the config.

    Raises:
        ConfigError: In place of the host's KeyError, ValueError or AssertionError; errors of this
            project keep their kind.
    """
    try:
        yield
    except FAULTS as error:
        raise type(error)(f"{who}: {error}") from error
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(f"{who}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return an error's message, and the line that failed where none was written for it."""
    message = str(error.args[0]) if error.args else ""
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    if message and line.startswith("raise"):
        return message
    return f"{type(error).__name__}{': ' if message else ''}{message} in Detectron2 at: {line}"
