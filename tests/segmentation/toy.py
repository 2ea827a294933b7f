"""Small segmentors of several architectures, and samples that need no files."""

import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances

from segmentation.config import base_config
from segmentation.peer import SegmentorPeer

CLASSES = 4
RESNET = [
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.DEVICE", "cpu"),
    *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", CLASSES, "MODEL.WEIGHTS", ""),
]
FPN = [
    *("MODEL.META_ARCHITECTURE", "SemanticSegmentor"),
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
    *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 32),
    *("MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32),
    *("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
]
POINT_REND = [  # a config has POINT_HEAD.NUM_CLASSES beside SEM_SEG_HEAD's
    *FPN,
    *("MODEL.SEM_SEG_HEAD.NAME", "PointRendSemSegHead", "MODEL.POINT_HEAD.NUM_CLASSES", CLASSES),
    *("MODEL.POINT_HEAD.FC_DIM", 32, "MODEL.POINT_HEAD.NUM_FC", 1),
    *("MODEL.POINT_HEAD.TRAIN_NUM_POINTS", 64),
]
DEEPLAB = [
    *("MODEL.META_ARCHITECTURE", "SemanticSegmentor"),
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res5"]),
    *("MODEL.SEM_SEG_HEAD.NAME", "DeepLabV3PlusHead"),
    *("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2", "res5"]),
    *("MODEL.SEM_SEG_HEAD.PROJECT_FEATURES", ["res2"]),
    *("MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS", [16], "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", 32),
    *("MODEL.SEM_SEG_HEAD.ASPP_DILATIONS", [1, 2, 3], "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32),
    *("MODEL.SEM_SEG_HEAD.NORM", "BN", "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 4),
    *(
        "MODEL.SEM_SEG_HEAD.LOSS_TYPE",
        "cross_entropy",
        "MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV",
        True,
    ),
    *("INPUT.CROP.ENABLED", False, "INPUT.FORMAT", "RGB"),
]
DEEPLAB_V3 = [
    *DEEPLAB,
    *("MODEL.SEM_SEG_HEAD.NAME", "DeepLabV3Head", "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res5"]),
    *("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 32),
]
MASK2FORMER = [
    *("MODEL.META_ARCHITECTURE", "Mask2Former"),
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
    *("MODEL.RESNETS.STEM_TYPE", "basic", "MODEL.SEM_SEG_HEAD.NAME", "MaskFormerHead"),
    *("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
    *("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "MSDeformAttnPixelDecoder"),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.SEM_SEG_HEAD.MASK_DIM", 32),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 1, "MODEL.SEM_SEG_HEAD.NORM", "GN"),
    *("MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "multi_scale_pixel_decoder"),
    *("MODEL.MASK_FORMER.HIDDEN_DIM", 32, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 8),
    *("MODEL.MASK_FORMER.NHEADS", 2, "MODEL.MASK_FORMER.DIM_FEEDFORWARD", 64),
    *("MODEL.MASK_FORMER.DEC_LAYERS", 3, "MODEL.MASK_FORMER.DROPOUT", 0.0),
    *("MODEL.MASK_FORMER.CLASS_WEIGHT", 2.0, "MODEL.MASK_FORMER.MASK_WEIGHT", 5.0),
    *("MODEL.MASK_FORMER.DICE_WEIGHT", 5.0, "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 64),
    *("INPUT.FORMAT", "RGB"),
]
SWIN = [
    *MASK2FORMER,
    *("MODEL.BACKBONE.NAME", "D2SwinTransformer", "MODEL.SWIN.EMBED_DIM", 16),
    *("MODEL.SWIN.DEPTHS", [1, 1, 2, 1], "MODEL.SWIN.NUM_HEADS", [1, 2, 4, 8]),
    *("MODEL.SWIN.WINDOW_SIZE", 7, "MODEL.SWIN.DROP_PATH_RATE", 0.0),
]
ARCHITECTURES = {
    "fpn": FPN,
    "point_rend": POINT_REND,
    "deeplab": DEEPLAB,
    "deeplab_v3": DEEPLAB_V3,
    "mask2former": MASK2FORMER,
    "swin": SWIN,
}


def make_cfg(kind, *options):
    cfg = base_config()
    cfg.merge_from_list([*RESNET, *ARCHITECTURES[kind], *options])
    return cfg


def make_peer(kind, *options, seed=0, name=None, frozen=False, **rest):
    torch.manual_seed(seed)
    cfg = make_cfg(kind, *options)
    module = build_model(cfg)
    if not frozen:
        rest["optimizer"] = torch.optim.SGD(module.parameters(), lr=0.01)
    return SegmentorPeer(name or kind, module, cfg, frozen=frozen, **rest)


def make_samples(sizes=((48, 64), (40, 64)), seed=0, ignore=255):
    """Samples as the mapper gives them; a band of each is to be ignored."""
    draw = torch.Generator().manual_seed(seed)
    samples = []
    for height, width in sizes:
        cells = torch.randint(CLASSES, (-(-height // 8), -(-width // 8)), generator=draw)
        labels = cells.repeat_interleave(8, 0).repeat_interleave(8, 1)[:height, :width].clone()
        image = (labels * 60 + torch.randint(20, labels.shape, generator=draw)).to(torch.uint8)
        labels[:, :8] = ignore
        present = [c for c in labels.unique().tolist() if c != ignore]
        instances = Instances((height, width))
        instances.gt_classes = torch.tensor(present)
        instances.gt_masks = torch.stack([labels == c for c in present])
        samples.append(
            {
                "image": torch.stack([image, image // 2, 255 - image]),
                "sem_seg": labels,
                "instances": instances,
                "height": height,
                "width": width,
            }
        )
    return samples
