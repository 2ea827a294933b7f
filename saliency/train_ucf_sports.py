"""Train on UCF-Sports: N video saliency models that teach each other (``saliency/train.py``)."""

import sys
from pathlib import Path

from saliency.train import main

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # see saliency/train.py
    sys.exit(main("ucf_sports", "train_ucf_sports"))
