"""Mends for the versions of Detectron2 that are about: each behind a probe, each from outside."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from common.quiet import hush_imports

HOW_TO_GET_IT = (
    "segmentation needs Detectron2, and it is not installed. Either, from PyPI alone:\n"
    "    make setup-segmentation\n"
    "or, with access to GitHub and a compiler:\n"
    "    pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2'"
)


class MissingDetectron2Error(ImportError):
    """Detectron2 is not installed; says how to get it."""


def available(module: str) -> bool:
    """Whether a top-level module can be found, without importing it."""
    return sys.modules.get(module) is not None or importlib.util.find_spec(module) is not None


def require() -> None:
    """Refuse to go on without Detectron2.

    Raises:
        MissingDetectron2Error: With the ways to get it.
    """
    if not available("detectron2"):
        raise MissingDetectron2Error(HOW_TO_GET_IT)


def mend() -> None:
    """Apply the mends that this machine needs; without Detectron2, nothing is done."""
    if not available("detectron2"):
        return
    hush_imports()
    _without_compiled_code()
    _meta_internal_cityscapes()
    _without_deformable_attention()


def _without_compiled_code() -> None:
    """Let detectron2.evaluation import where ``detectron2._C`` does not load.

    For wheels of another Python (PyPI's sal-detectron2 0.7.2): its fast COCO evaluation is imported
    without a fallback. Nothing of semantic segmentation uses it.
    """
    name = "detectron2.evaluation.fast_eval_api"
    if name in sys.modules or _imports("detectron2._C"):
        return
    from pycocotools.cocoeval import COCOeval

    stand_in = ModuleType(name, "pycocotools' own evaluation in the place of the compiled one.")
    stand_in.COCOeval_opt = COCOeval  # type: ignore[attr-defined]
    sys.modules[name] = stand_in


def _meta_internal_cityscapes() -> None:
    """Find the Cityscapes scripts where main of 2026 looks for them, in a path internal to Meta."""
    parents = ("deeplearning", "deeplearning.projects", "deeplearning.projects.cityscapesApi")
    if available(parents[0]) or not available("cityscapesscripts"):
        return
    import cityscapesscripts

    for name in parents:
        sys.modules[name] = ModuleType(name, "An alias of the public cityscapesscripts.")
        sys.modules[name].__path__ = []
    sys.modules[f"{parents[-1]}.cityscapesscripts"] = cityscapesscripts


def _without_deformable_attention() -> None:
    """Let the original mask2former import without its compiled operator.

    It then takes its own path through ``grid_sample``.
    """
    name = "MultiScaleDeformableAttention"
    if available("mask2former") and not available(name):
        sys.modules[name] = ModuleType(name, "Empty: not compiled on this machine.")


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
