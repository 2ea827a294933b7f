"""Train on UCF-Sports: N video saliency models that teach each other (``saliency/train.py``)."""

import sys

from saliency.train import main

if __name__ == "__main__":
    sys.exit(main("ucf_sports", "train_ucf_sports"))
