"""Train on Hollywood-2: N video saliency models that teach each other (``saliency/train.py``)."""

import sys

from saliency.train import main

if __name__ == "__main__":
    sys.exit(main("hollywood2", "train_hollywood2"))
