"""The config keys of the original Mask2Former, so that one config file serves both."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_mask2former_config(cfg: CfgNode) -> None:
    """Add Mask2Former's keys, with the original's defaults but for one.

    SOLVER.OPTIMIZER is SGD here, so that the configs of Detectron2's own zoo keep their meaning;
    the original's configs name AdamW themselves.

    Source: the keys that the configs of https://github.com/facebookresearch/Mask2Former set.
    """
    _add(cfg.INPUT, DATASET_MAPPER_NAME="mask_former_semantic", COLOR_AUG_SSD=False)
    _add(cfg.INPUT, SIZE_DIVISIBILITY=-1, IMAGE_SIZE=1024, MIN_SCALE=0.1, MAX_SCALE=2.0)
    _add(cfg.INPUT.CROP, SINGLE_CATEGORY_MAX_AREA=1.0)
    _add(cfg.SOLVER, OPTIMIZER="SGD", WEIGHT_DECAY_EMBED=0.0, BACKBONE_MULTIPLIER=0.1)
    _add(
        cfg.MODEL.SEM_SEG_HEAD,
        MASK_DIM=256,
        TRANSFORMER_ENC_LAYERS=0,
        PIXEL_DECODER_NAME="BasePixelDecoder",
        DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES=["res3", "res4", "res5"],
        DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS=4,
        DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS=8,
    )
    cfg.MODEL.MASK_FORMER = CfgNode()
    _add(
        cfg.MODEL.MASK_FORMER,
        TRANSFORMER_DECODER_NAME="MultiScaleMaskedTransformerDecoder",
        TRANSFORMER_IN_FEATURE="res5",
        NUM_OBJECT_QUERIES=100,
        HIDDEN_DIM=256,
        NHEADS=8,
        DIM_FEEDFORWARD=2048,
        DROPOUT=0.1,
        ENC_LAYERS=0,
        DEC_LAYERS=6,
        PRE_NORM=False,
        ENFORCE_INPUT_PROJ=False,
        SIZE_DIVISIBILITY=32,
        DEEP_SUPERVISION=True,
        NO_OBJECT_WEIGHT=0.1,
        CLASS_WEIGHT=1.0,
        MASK_WEIGHT=20.0,
        DICE_WEIGHT=1.0,
        TRAIN_NUM_POINTS=112 * 112,
        OVERSAMPLE_RATIO=3.0,
        IMPORTANCE_SAMPLE_RATIO=0.75,
    )
    cfg.MODEL.MASK_FORMER.TEST = CfgNode()
    _add(
        cfg.MODEL.MASK_FORMER.TEST,
        SEMANTIC_ON=True,
        INSTANCE_ON=False,
        PANOPTIC_ON=False,
        OBJECT_MASK_THRESHOLD=0.0,
        OVERLAP_THRESHOLD=0.0,
        SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE=False,
    )
    cfg.MODEL.SWIN = CfgNode()
    _add(
        cfg.MODEL.SWIN,
        PRETRAIN_IMG_SIZE=224,
        PATCH_SIZE=4,
        EMBED_DIM=96,
        DEPTHS=[2, 2, 6, 2],
        NUM_HEADS=[3, 6, 12, 24],
        WINDOW_SIZE=7,
        MLP_RATIO=4.0,
        QKV_BIAS=True,
        QK_SCALE=None,
        DROP_RATE=0.0,
        ATTN_DROP_RATE=0.0,
        DROP_PATH_RATE=0.3,
        APE=False,
        PATCH_NORM=True,
        OUT_FEATURES=["res2", "res3", "res4", "res5"],
        USE_CHECKPOINT=False,
    )


def _add(node: CfgNode, **values: object) -> None:
    for key, value in values.items():
        node[key] = value
