"""Train on DHF1K: N video saliency models that teach each other (``saliency/train.py``)."""

import sys
from pathlib import Path

from saliency.train import main

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # see saliency/train.py
    sys.exit(main("dhf1k", "train_dhf1k"))
