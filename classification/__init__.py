"""Knowledge transfer between image classifiers, on timm."""

from common.quiet import hush_imports

hush_imports()
