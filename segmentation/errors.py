"""What is wrong with a run: each says the value, and the way out."""

from __future__ import annotations

from common.checkpoint import CheckpointError
from common.roles import NonFiniteError


class ConfigError(ValueError):
    """A run file, a config or an option that cannot be used; names the value and the choices."""


class DataError(ValueError):
    """Data that is missing, broken or of other classes; names the file or the value."""


class SegmentorError(ValueError):
    """A model that is no semantic segmentor of a known kind."""


# What ends a run in one line, not in a traceback.
FAULTS = (ConfigError, DataError, SegmentorError, CheckpointError, NonFiniteError)
