"""Small real data and models for the tests."""

import gc
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from common.claimed import claims_end

# a shell's background jobs ignore it, and so would every process that a test starts and interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
cv2.setNumThreads(1)  # a process forked from one with OpenCV's threads would wait for them
# A first backward on fake tensors would start autograd's threads, after which no fork may learn.
torch.ones((), requires_grad=True).backward()


@pytest.fixture(scope="module", autouse=True)
def what_was_imported():
    """Make collecting garbage cheap: what is there now stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def claims():
    """What a test claims here, its children and the next tests may claim too."""
    with claims_end():
        yield


@pytest.fixture(autouse=True)
def freed():
    """Free a test's models: trainers and their hooks hold one another, and gigabytes add up."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """sklearn's 8x8 digits as an image folder: 40 a class to train on, 20 to validate."""
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    for label in range(10):
        chosen = images[labels == label].reshape(-1, 8, 8)
        for split, part in (("train", chosen[:40]), ("validation", chosen[40:60])):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for i, image in enumerate(part):
                pixels = np.uint8(np.clip(image * 16, 0, 255))
                Image.fromarray(pixels).resize((32, 32), Image.BILINEAR).save(folder / f"{i}.png")
    return root
