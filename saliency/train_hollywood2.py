"""Fine-tune N video saliency models that teach each other on Hollywood-2; see ``saliency/train.py``."""

import sys

from saliency.train import main

if __name__ == "__main__":
    sys.exit(main("hollywood2", "train_hollywood2"))
