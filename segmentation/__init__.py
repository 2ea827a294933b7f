"""Semantic segmentors that teach each other, on Detectron2."""

from segmentation import compat

compat.mend()
