"""Knowledge transfer between image classifiers, on timm."""
