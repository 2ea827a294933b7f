import os
import pickle
import struct
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
import torchvision

pytest.importorskip("detectron2", reason="Detectron2 is not installed: make setup-segmentation")

from common.checkpoint import CheckpointError
from segmentation.weights import load_peer_weights, read_segmentor
from tests.segmentation.test_mask2former import build


def write_pickle(path, model, **rest):
    arrays = {name: x.numpy() for name, x in model.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": arrays, **rest}))
    return path


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors"])
def test_whole_models_load_from_every_kind_of_file(tmp_path, suffix):
    from safetensors.torch import save_file

    model, path = build("swin"), tmp_path / f"model{suffix}"
    if suffix == ".pkl":
        write_pickle(path, model, __author__="third party")
    elif suffix == ".pth":
        torch.save({"model": model.state_dict(), "iteration": 3}, path)
    else:
        save_file({name: x.clone() for name, x in model.state_dict().items()}, path)
    other = build("swin", seed=4)
    load_peer_weights(other, str(path), "x")
    assert all(torch.equal(x, other.state_dict()[k]) for k, x in model.state_dict().items())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("core", [b"numpy._core.", b"numpy.core."], ids=["numpy 2", "numpy 1"])
def test_pickles_of_old_and_new_numpy(tmp_path, protocol, core):
    arrays = {
        "a": np.arange(3.0),
        "turned": np.asfortranarray(np.arange(6, dtype="i4").reshape(2, 3)),
        "transposed": np.arange(24, dtype="f4").reshape(2, 3, 4).transpose(1, 0, 2),
        "strided": np.arange(8, dtype="u1")[::2],
        "big-endian": np.arange(3, dtype=">f4"),
        "half": np.ones((2, 1), "f2"),
        "bool": np.array([True, False]),
        "none": np.zeros((0, 2), "f4"),
        "one": np.array(5),
    }
    arrays["tied"] = arrays["a"]
    rest = {"lr": np.float32(0.1), "names": np.array(["x"]), "raw": b"\xff", "set": {1}}
    rest["order"] = OrderedDict(a=1)
    content = pickle.dumps({**rest, "model": arrays}, protocol=protocol)
    for module in (b"multiarray", b"numeric"):
        here, there = ((b"\x8c%c" % len(x) if protocol > 3 else b"c") + x
                       for x in (b"numpy._core." + module, core + module))  # fmt: skip
        content = content.replace(here, there)
    if protocol > 3:  # where the length of the whole is written before it
        content = content[:3] + struct.pack("<Q", len(content) - 11) + content[11:]
    (tmp_path / "old.pkl").write_bytes(content)
    read = read_segmentor(tmp_path / "old.pkl")
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert read[name].numpy().dtype == array.dtype.newbyteorder("=")
        assert read[name].shape == array.shape and (read[name].numpy() == array).all(), name


def test_a_pickle_of_python_2(tmp_path):
    path, raw = tmp_path / "old.pkl", np.arange(3.0).tobytes()
    path.write_bytes(
        b"\x80\x02}q\x01U\x05modelq\x02}q\x03U\x01aq\x04cnumpy.core.multiarray\n_reconstruct\n"
        b"q\x05cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07(K\x01K\x03\x85cnumpy\ndtype\n"
        b"U\x02f8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"U\x18" + raw + b"tbss."
    )
    assert read_segmentor(path)["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.array([None, {}]), "holds no arrays of weights"),
        (np.array(["text"]), "holds no arrays of weights"),
        (np.zeros(2, [("a", "f4")]), "refused, or no pickle: numpy.dtype of "),
    ],
)
def test_arrays_of_no_numbers_are_refused(tmp_path, array, says):
    path = tmp_path / "odd.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": array}}, 2))
    with pytest.raises(CheckpointError, match=rf"odd\.pkl: {says}"):
        read_segmentor(path)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path):
    path, proof = tmp_path / "bad.pkl", tmp_path / "proof"
    path.write_bytes(pickle.dumps({"model": {"a": np.zeros(2)}, "x": Payload(proof)}))
    with pytest.raises(CheckpointError, match=r"bad\.pkl: refused.*mkdir.*never execute code"):
        read_segmentor(path)
    assert not proof.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1]), pickle.dumps({"a": 1})])
def test_broken_pickles_are_refused(tmp_path, content):
    path = tmp_path / "broken.pkl"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"broken\.pkl"):
        read_segmentor(path)


def test_a_truncated_pickle_is_refused(tmp_path):
    path = write_pickle(tmp_path / "cut.pkl", build("swin"))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"cut\.pkl"):
        read_segmentor(path)


def test_another_models_file_is_refused(tmp_path):
    path = write_pickle(tmp_path / "swin.pkl", build("swin"))
    with pytest.raises(CheckpointError, match=r"'x'.*swin\.pkl.*missing"):
        load_peer_weights(build("mask2former"), str(path), "peer 'x'")
    more = build("swin", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7)
    with pytest.raises(CheckpointError, match=r"class_embed\.weight \[5, 32\] \(model: \[8,"):
        load_peer_weights(more, str(path), "peer 'x'")


def test_torchvisions_resnet_starts_the_backbone(tmp_path):
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    for kind in ("mask2former", "fpn"):
        model = build(kind)
        load_peer_weights(model, str(tmp_path / "resnet18.pth"), "x")
        bottom = model.backbone.bottom_up if kind == "fpn" else model.backbone
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            expected = theirs.eval().layer4(
                theirs.layer3(
                    theirs.layer2(
                        theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x)))))
                    )
                )
            )
            found = bottom.eval()(x)["res5"]
        torch.testing.assert_close(found, expected)


def caffe2_names(model):
    """A ResNet's arrays as Caffe2 calls them: no running statistics, classifier, momentum."""
    named = {}
    for name, x in model.backbone.bottom_up.state_dict().items():
        *path, what = name.split(".")
        if what.startswith("running") or what.startswith("num_"):
            continue
        norm = path[-1] == "norm"
        path = path[:-1] if norm else path
        if path[0] == "stem":
            base = "res_conv1_bn" if norm else "conv1"
        else:
            branch = {"shortcut": "1", "conv1": "2a", "conv2": "2b", "conv3": "2c"}[path[2]]
            base = f"{path[0]}_{path[1]}_branch{branch}" + "_bn" * norm
        named[f"{base}_{'b' if what == 'bias' else 's' if norm else 'w'}"] = x.numpy()
    return {**named, "fc1000_w": np.zeros((3, 3)), "conv1_w_momentum": np.zeros(3)}


@pytest.mark.parametrize("wrap", [lambda arrays: arrays, lambda arrays: {"blobs": arrays}])
def test_caffe2s_resnet_starts_the_backbone(tmp_path, wrap):
    """As the zoo's detectron2://ImageNetPretrained/MSRA/R-50.pkl is."""
    options = ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.NORM", "FrozenBN"]
    theirs, ours = build("fpn", *options, seed=1), build("fpn", *options)
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(wrap(caffe2_names(theirs))))
    load_peer_weights(ours, str(path), "x")
    given = theirs.backbone.bottom_up.state_dict()
    for name, x in ours.backbone.bottom_up.state_dict().items():
        assert torch.equal(x, given[name]), name
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        load_peer_weights(build("swin"), str(path), "x")


def test_normalisation_saved_by_older_versions_is_left_out(tmp_path):
    model, path = build("fpn"), tmp_path / "old.pth"
    extra = {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    torch.save({"model": model.state_dict() | extra}, path)
    other = build("fpn", seed=4)
    load_peer_weights(other, str(path), "x")
    assert all(torch.equal(x, other.state_dict()[k]) for k, x in model.state_dict().items())
    assert float(other.pixel_mean.sum()) > 0


def test_names_that_fit_in_several_places_are_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(64, 64, 3, 3)}, tmp_path / "some.pth")
    with pytest.raises(CheckpointError, match=r"some\.pth: neither .*multiple keys"):
        load_peer_weights(build("fpn"), str(tmp_path / "some.pth"), "x")


def small_swin():
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        embed_dim=16,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 4, 8),
        img_size=64,
        strict_img_size=False,
    )


def test_timms_swin_starts_the_backbone(tmp_path):
    theirs = small_swin()
    torch.save(theirs.state_dict(), tmp_path / "swin.pth")
    model = build("swin")
    load_peer_weights(model, str(tmp_path / "swin.pth"), "x")
    own = model.state_dict()
    given = theirs.state_dict()
    for ours, name in (
        ("backbone.layers.0.downsample.reduction.weight", "layers.1.downsample.reduction.weight"),
        ("backbone.layers.3.blocks.0.attn.qkv.weight", "layers.3.blocks.0.attn.qkv.weight"),
        ("backbone.patch_embed.proj.weight", "patch_embed.proj.weight"),
    ):
        assert torch.equal(own[ours], given[name])


def test_a_file_of_something_else_starts_no_backbone(tmp_path):
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="neither a checkpoint of this Mask2Former"):
        load_peer_weights(build("mask2former"), str(tmp_path / "other.pth"), "x")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.pkl", "none.pkl: no such file in the working folder or beside the run file"),
        ("hf:facebook/none", "hf:facebook/none: .*give a local folder: hf:FOLDER"),
        ("timm:resnet18.none", "timm:resnet18.none: .*give the path of a local file"),
        ("detectron2://none.pkl", "cannot be fetched"),
    ],
)
def test_sources_that_are_not_there(source, message):
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        load_peer_weights(build("swin"), source, "x")
