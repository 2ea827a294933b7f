"""Whether a command still describes the run that it resumes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from common.options import literal, peer_mapping, shown

# Options of every task under which a resumed run is still the same run: where it reads, writes and
# computes, how often it logs, evaluates and saves, how long it is, and what is tried after it.
FREE = frozenset(
    (
        "resume no_resume_opt allow_changed_options output experiment in_place config workers "
        "log_interval log_wandb wandb_project checkpoint_hist recovery_interval val_interval "
        "epochs device engine plan gpu_mem layouts compiled grad_checkpointing compile "
        "channels_last auto_layout on_nonfinite max_skips_in_a_row max_bad_samples soup recipe "
        "origins"
    ).split()
)
_FREE_OF_PEER = frozenset(("name", "checkpoint", "published"))  # other names are refused elsewhere


def changed_options(
    had: Mapping[str, Any],
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    free: Collection[str],
) -> list[str]:
    """Tell which options differ from those of a run, each as ``--NAME OLD -> NEW``.

    Args:
        had: The run's, as plain containers, as are the others.
        given: This command's.
        defaults: Of this version; what a run of an older one had, where it knew no such option.
        free: Names of options that are not compared, of the run and of single peers.
    """
    found: list[str] = []
    for name, value in given.items():
        old = had.get(name, defaults.get(name, value))
        if name == "peers":
            found += _changed_peers(old, value, free)
        elif name not in free and old != value:
            found.append(f"--{name.replace('_', '-')} {shown(old)} -> {shown(value)}")
    return found


def forgotten_options(
    had: Mapping[str, Any], given: Mapping[str, Any], free: Collection[str]
) -> list[str]:
    """Tell which options of an older version's run there are no more, each with its value."""
    return [f"{k} {shown(v)}" for k, v in had.items() if k not in given and k not in free]


def _changed_peers(old: Any, new: Any, free: Collection[str]) -> Iterator[str]:
    """Compare peer by peer; another number of them is refused where their weights are loaded."""
    if len(old or ()) != len(new or ()):
        return
    for number, (one, two) in enumerate(zip(old or (), new or (), strict=True), 1):
        was, now = _keys_of(one), _keys_of(two)
        told = now.get("name") or now["model"]
        for key in dict.fromkeys((*was, *now)):
            if key not in free and key not in _FREE_OF_PEER and was.get(key) != now.get(key):
                values = " -> ".join(shown(its.get(key, "not given")) for its in (was, now))
                yield f"{key} of peer {number} ({told}) {values}"


def _keys_of(asked: Any) -> dict[str, Any]:
    alone = [part.strip() for part in asked.split(",")] if isinstance(asked, str) else ()
    return {
        key.replace("-", "_"): literal(value) if isinstance(value, str) else value
        for key, value in peer_mapping(asked, alone).items()
    }
