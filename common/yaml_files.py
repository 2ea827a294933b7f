"""YAML files, read as plain data that stays small: no code, and no aliases that multiply."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from common import written_out
from common.options import OptionError

# What YAML's own constructors raise too, of dates and numbers that are none, for instance.
FAULTS = (
    yaml.YAMLError, RecursionError, ValueError, LookupError, TypeError, AttributeError,
    ArithmeticError,
)  # fmt: skip
_WAY_OUT = "write the values out in place of aliases (*), and less deep in one another"


def read_yaml(path: Path) -> Any:
    """Read a YAML file into plain containers.

    Raises:
        OptionError: Not plain YAML, or as ``refuse_large``.
    """
    try:
        text = path.read_text(encoding="utf-8")
        refuse_large(path, text)
        return yaml.safe_load(text)
    except OptionError:
        raise
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror})") from error
    except FAULTS as error:
        raise OptionError(f"{path}: not plain YAML: {fault_told(error)}") from error


def refuse_large(path: Path | str, text: str) -> yaml.Node | None:
    """Refuse YAML whose aliases make a few lines of it fill the memory, before it is made.

    Merge keys (``<<``) count as what they name. A file without aliases is never too long.

    Args:
        path: Names the file in errors.
        text: What it holds.

    Returns:
        What it is made of; None: nothing.

    Raises:
        OptionError: It would be too large or nested too deeply, or a value holds itself.
        yaml.YAMLError: It is no YAML.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    most = max(written_out.MOST, 2 * len(text))
    fault = "" if root is None else written_out.fault_of(root, _parts, _length, most)
    if fault:
        raise OptionError(f"{path}: refused, {fault}; {_WAY_OUT}")
    return root


def _parts(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _length(node: yaml.Node) -> int:
    return len(node.value) if isinstance(node, yaml.ScalarNode) else 0


def fault_told(error: Exception) -> str:
    """Say in one line why a file is not plain YAML; YAML's own errors draw over several."""
    told = " ".join(str(getattr(error, "problem", None) or error).split())
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark is not None else ""
    return f"{told}{where}; write plain text, numbers, lists and mappings alone"
