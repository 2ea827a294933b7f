"""Knowledge transfer between video saliency models."""
