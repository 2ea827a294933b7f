"""Train on DHF1K: N video saliency models that teach each other (``saliency/train.py``)."""

import sys

from saliency.train import main

if __name__ == "__main__":
    sys.exit(main("dhf1k", "train_dhf1k"))
