"""Video saliency models that teach each other: data, models, losses, metrics, training."""
