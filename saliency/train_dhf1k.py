"""Fine-tune N video saliency models that teach each other on DHF1K; see ``saliency/train.py``."""

import sys

from saliency.train import main

if __name__ == "__main__":
    sys.exit(main("dhf1k", "train_dhf1k"))
