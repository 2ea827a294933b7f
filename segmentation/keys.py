"""Keys of a config by their dotted names."""

from __future__ import annotations

import difflib
from typing import Any

from detectron2.config import CfgNode

from segmentation.errors import ConfigError


def value_at(cfg: CfgNode, key: str) -> Any:
    """Return what a config holds under a dotted name.

    Raises:
        ConfigError: No such key; says which there are.
    """
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, CfgNode):
            raise ConfigError(f"unknown key {key}; it holds a value")
        if part not in node:
            raise ConfigError(f"unknown key {key}; {choices(node, part)}")
        node = node[part]
    return node


def choices(node: CfgNode, key: str) -> str:
    """Say what a node holds in the place of an unknown key."""
    keys = sorted(node)
    close = difflib.get_close_matches(key, keys, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{meant}choose from {', '.join(keys)}"
