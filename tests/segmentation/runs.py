"""Runs of tiny segmentors on a few scenes, as files on disk."""

import yaml

from segmentation.scenes import write_scenes
from tests.segmentation.toy import ARCHITECTURES, RESNET

SHARED = {
    "DATASETS": {"TRAIN": ["scenes_train"], "TEST": ["scenes_val"]},
    "INPUT": {
        "MIN_SIZE_TRAIN": [64, 80],
        "MIN_SIZE_TRAIN_SAMPLING": "choice",
        "MAX_SIZE_TRAIN": 128,
        "MIN_SIZE_TEST": 64,
        "MAX_SIZE_TEST": 128,
        "CROP": {"ENABLED": True, "TYPE": "absolute", "SIZE": [64, 64]},
        "COLOR_AUG_SSD": True,
    },
    "DATALOADER": {"NUM_WORKERS": 0},
    "SOLVER": {"IMS_PER_BATCH": 2, "MAX_ITER": 6, "CHECKPOINT_PERIOD": 2, "BASE_LR": 0.01},
    "TEST": {"EVAL_PERIOD": 3},
    "SEED": 1,
}


def nested(options):
    tree = {}
    for key, value in zip(options[::2], options[1::2], strict=True):
        node = tree
        *path, last = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def write_peer(folder, kind, *options):
    """Write ``KIND.yaml``, the config of one tiny segmentor for the scenes' 6 classes."""
    content = nested(
        [
            *RESNET,
            *ARCHITECTURES[kind],
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
            6,
            "VERSION",
            2,
            *options,
        ]
    )
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def write_run(folder, kinds=("fpn", "deeplab"), output="out", **transfer):
    """Write the configs of some peers, and a run file that names them."""
    peers = [{"NAME": kind, "CONFIG": write_peer(folder, kind).name} for kind in kinds]
    path = folder / "run.yaml"
    content = {
        **SHARED,
        "TRANSFER": {**transfer, "PEERS": peers},
        "OUTPUT_DIR": str(folder / output),
    }
    path.write_text(yaml.safe_dump(content))
    return path


def make_scenes(root):
    write_scenes(root / "scenes", "train", 10)
    write_scenes(root / "scenes", "val", 3, held_out=True)
    return root
