"""The saliency models: the originals' numbers, published weights, sizes, memory, precision."""

import copy
import json
import os
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.video import s3d, swin3d_s
from torchvision.ops import StochasticDepth

from common.checkpoint import CheckpointError, save_weights
from saliency.models import (
    MODELS,
    ModelError,
    create_model,
    load_backbone,
    load_published,
    published_state_dict,
)
from tests.saliency.filling import clip, fill, gaze

NAMES = ("vinet_s", "vinet_a", "tmfi_net")
WITH_BATCH_NORM = ("vinet_s", "vinet_a")
GOLDEN = Path(__file__).with_name("golden")
TINY = (2, 3, 32, 32, 32)


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def golden_maps(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        real = file["real"].cumsum(-2).cumsum(-1) / 2**20
        return {"small": torch.from_numpy(file["small"]), "real": torch.from_numpy(real).float()}


@pytest.fixture(scope="module", params=NAMES)
def filled(request):
    """A model with computed weights in eval mode; not to be changed."""
    return make_filled(request.param)


def make_filled(name):
    model = create_model(name)
    fill(name, model.state_dict())
    return model.eval()


def kl_minus_cc(map_, target):
    p, g = (x / x.sum((1, 2), keepdim=True) for x in (map_, target))
    kl = (g * torch.log(g / p)).sum((1, 2))
    a, b = (x - x.mean((1, 2), keepdim=True) for x in (map_, target))
    return kl - (a * b).sum((1, 2)) / (a.square().sum((1, 2)) * b.square().sum((1, 2))).sqrt()


def train_step(model, x):
    """One forward and backward; the output, all gradients, all buffers."""
    torch.manual_seed(0)
    y = model(x)
    model.zero_grad()
    y.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    return y.detach(), gradients, [b.clone() for b in model.buffers()]


def far(one, other):
    """The largest distance of two lists' tensors, relative to their lengths."""
    pairs = zip(one, other, strict=True)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


# ---- the original's numbers


def test_names_order_shapes_and_types_are_those_of_the_published_checkpoints(filled):
    own = [
        f"{name} {'x'.join(map(str, x.shape)) or 'scalar'} {str(x.dtype).removeprefix('torch.')}"
        for name, x in published_state_dict(filled).items()
    ]
    assert own == golden(filled.name)["state_dict"]


@pytest.mark.parametrize(
    ("name", "millions"), [("vinet_s", 9.500737), ("vinet_a", 38.693241), ("tmfi_net", 54.128539)]
)
def test_parameters_are_counted_and_all_trainable(name, millions):
    counts = [p.numel() for p in create_model(name).parameters() if p.requires_grad]
    assert sum(counts) == round(millions * 1e6)


@pytest.mark.parametrize("case", ["small", "real"])
def test_maps_are_the_originals(filled, case):
    x = clip(golden(filled.name)[case])
    with torch.no_grad():
        y = filled(x)
    expected = golden_maps(filled.name)[case]
    assert y.dtype == torch.float32 and y.shape == expected.shape
    assert (y - expected).abs().max() < 1e-5


def test_gradients_are_the_originals(filled):
    numbers = golden(filled.name)
    model = copy.deepcopy(filled)
    y = model(clip(numbers["small"]))
    loss = kl_minus_cc(y, gaze(y.shape))
    assert torch.allclose(loss, torch.tensor(numbers["loss"]), rtol=1e-5, atol=1e-6)
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    # In the first convolution all of the network's ReLU and max pooling come together: noise of
    # 1e-6 in the clip moves its norm by up to 3e-4, in other kernels of the CPU's too.
    # The bias that all pixels share is a small difference of large sums.
    loose = ("backbone.base1.0.conv_s.weight", "backbone.fast_conv1.weight")
    loose += ("decoder.convout.0.bias",)
    for name, norm in numbers["gradient_norms"].items():
        own = model.get_parameter(name).grad.double().norm().item()
        assert own == pytest.approx(norm, rel=1e-3 if name in loose else 1e-4), name


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_training_updates_batch_norm_as_the_original_does(name):
    numbers = golden(name)
    model = make_filled(name).train()
    y = model(clip(numbers["small"])).detach()
    buffers = dict(model.named_buffers())
    for key, expected in [
        ("output", numbers["train"]["output"]),
        *numbers["train"]["buffers"].items(),
    ]:
        own = y if key == "output" else buffers[key]
        values = own.flatten()[expected["index"]]
        assert torch.allclose(values, torch.tensor(expected["value"]), rtol=1e-4, atol=1e-5), key
        assert own.mean().item() == pytest.approx(expected["mean"], abs=1e-5), key
    counts = {int(x) for key, x in buffers.items() if key.endswith("num_batches_tracked")}
    assert counts == {1}


def test_norms_have_the_originals_constants(filled):
    batch = {(m.eps, m.momentum) for m in filled.modules() if isinstance(m, nn.BatchNorm3d)}
    layer = {m.eps for m in filled.modules() if isinstance(m, nn.LayerNorm)}
    expected = {
        "vinet_s": ({(1e-3, 1e-3)}, set()),
        "vinet_a": ({(1e-5, 0.1)}, set()),
        "tmfi_net": (set(), {1e-5}),
    }
    assert (batch, layer) == expected[filled.name]


def test_later_blocks_of_the_transformer_are_skipped_more_often():
    def rates(**options):
        model = create_model("tmfi_net", **options)
        return [m.p for m in model.modules() if isinstance(m, StochasticDepth)]

    assert rates() == pytest.approx(np.linspace(0, 0.2, 24).tolist())
    assert set(rates(drop_path=0.0)) == {0.0}


# ---- what goes in, what comes out


def test_the_view_is_the_one_of_the_published_weights():
    views = {name: MODELS[name].view for name in NAMES}
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert {view.frames for view in views.values()} == {32}
    for name in ("vinet_s", "tmfi_net"):
        assert views[name].size == (224, 384)
        assert (views[name].mean, views[name].std) == imagenet
    assert views["vinet_a"].size == (256, 456)
    assert (views["vinet_a"].mean, views["vinet_a"].std) == ((0.45,) * 3, (0.225,) * 3)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vinet_s", [(32, 32), (96, 64)]),
        ("vinet_a", [(8, 8), (72, 40), (48, 96)]),
        ("tmfi_net", [(32, 64), (96, 32)]),
    ],
)
def test_maps_have_the_size_of_their_clips(name, sizes):
    model = create_model(name).eval()
    for size in sizes:
        with torch.no_grad():
            y = model(torch.randn(1, 3, 32, *size))
        assert y.shape == (1, *size) and y.min() >= 0 and y.max() <= 1


def test_clips_of_a_batch_do_not_see_each_other(filled):
    x = clip(TINY)
    before = x.clone()
    with torch.no_grad():
        together = filled(x)
        alone = torch.cat([filled(x[:1]), filled(x[1:])])
    assert (together - alone).abs().max() < 1e-5 < (together[0] - together[1]).abs().max()
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 64, 64, 64), "clips of 64 frames, but it takes 32 alone"),
        ((2, 3, 16, 64, 64), "clips of 16 frames"),
        ((1, 32, 3, 64, 64), "expected clips \\[B, 3, T, H, W\\].*transpose\\(1, 2\\)"),
        ((3, 32, 64, 64), "expected clips"),
        ((1, 3, 32, 0, 64), "frames of 0 x 64"),
    ],
)
def test_a_clip_of_another_kind_is_refused(filled, shape, message):
    with pytest.raises(ValueError, match=f"{filled.name}: .*{message}"):
        filled(torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "size", "multiple"),
    [
        ("vinet_s", (256, 456), 32),
        ("vinet_s", (112, 112), 32),
        ("vinet_a", (253, 456), 8),
        ("tmfi_net", (224, 400), 32),
    ],
)
def test_a_size_that_does_not_fit_is_refused(name, size, multiple):
    with pytest.raises(
        ValueError, match=f"{size[0]} x {size[1]} .* multiples of {multiple}; .* at"
    ):
        create_model(name)(torch.zeros(1, 3, 32, *size))


def test_bytes_are_refused():
    with pytest.raises(ValueError, match=r"uint8, expected floats: RGB in .* mean \(0\.45"):
        create_model("vinet_a")(torch.zeros(TINY, dtype=torch.uint8))


# ---- weights


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(ModelError, match="'vinet', expected one of vinet_s, vinet_a, tmfi_net"):
        create_model("vinet")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_published_weights_go_in_and_come_out_again(filled, suffix, tmp_path):
    file = tmp_path / f"weights{suffix}"
    save_weights(file, published_state_dict(filled))
    model = create_model(filled.name, file)
    own, expected = published_state_dict(model), published_state_dict(filled)
    assert list(own) == list(expected) and same([*own.values()], [*expected.values()])


def test_the_prefix_of_data_parallel_is_removed(filled):
    model = create_model(filled.name)
    load_published(model, {f"module.{k}": v for k, v in filled.state_dict().items()})
    assert same([*model.state_dict().values()], [*filled.state_dict().values()])


def test_a_checkpoint_of_another_model_is_recognised(filled):
    for other in set(NAMES) - {filled.name}:
        model = create_model(other)
        before = [x.clone() for x in model.state_dict().values()]
        with pytest.raises(CheckpointError, match=f"file.pt: .*seems to be of {filled.name}"):
            load_published(model, filled.state_dict(), "file.pt")
        assert same(before, [*model.state_dict().values()])


def test_names_and_shapes_that_do_not_fit_are_told(filled):
    model = create_model(filled.name)
    bias = next(name for name in reversed(filled.state_dict()) if name.endswith("bias"))
    weights = {k: v for k, v in filled.state_dict().items() if k != bias}
    with pytest.raises(CheckpointError, match=f"missing: {bias}$"):
        load_published(model, weights)
    with pytest.raises(CheckpointError, match=r"left over: head\.weight$"):
        load_published(model, {**filled.state_dict(), "head.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=f"shape: {bias} \\[7\\] \\(model: "):
        load_published(model, {**weights, bias: torch.zeros(7)})
    with pytest.raises(CheckpointError, match=f"not finite in {bias}"):
        load_published(model, {**weights, bias: filled.state_dict()[bias] * float("nan")})


def test_windows_of_another_shape_are_refused():
    model = create_model("tmfi_net")
    name = "backbone.layers.1.blocks.0.attn.relative_position_index"
    weights = {**model.state_dict(), name: model.state_dict()[name].flip(0)}
    with pytest.raises(CheckpointError, match=f"{name} is not that of this model's windows"):
        load_published(model, weights)
    with pytest.raises(CheckpointError, match="is not that of this model's windows"):
        load_backbone(model, weights)


def test_a_file_that_runs_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"backbone.base1.0.conv_s.weight": Bomb()}, tmp_path / "bomb.pt")
    for option in ("checkpoint", "backbone"):
        with pytest.raises(CheckpointError, match="refused, it asks to run"):
            create_model("vinet_s", **{option: tmp_path / "bomb.pt"})
    assert not (tmp_path / "exploded").exists()


# ---- pretrained backbones


def direct(stage, *inputs):
    return stage(*inputs)


@pytest.fixture(scope="module")
def torchvision_s3d():
    torch.manual_seed(1)
    return s3d(weights=None).eval()


def test_torchvisions_s3d_becomes_the_backbone(torchvision_s3d, tmp_path):
    save_weights(tmp_path / "s3d.pth", torchvision_s3d.state_dict())
    model = create_model("vinet_s", backbone=tmp_path / "s3d.pth").eval()
    x = clip(TINY)
    with torch.no_grad():
        features = model.backbone(x, direct)
        for i, layer in enumerate(torchvision_s3d.features):
            x = layer(x)
            if i in (3, 6, 12, 15):
                assert torch.equal(features[(3, 6, 12, 15).index(i)], x)


def test_torchvisions_swin_becomes_the_backbone_without_its_patch_norm(caplog):
    theirs = swin3d_s(weights=None).eval()
    model = create_model("tmfi_net").eval()
    state = torch.get_rng_state()
    load_backbone(model, theirs.state_dict(), "swin3d_s.pth")
    assert torch.equal(state, torch.get_rng_state())
    assert "swin3d_s.pth: tmfi_net has no place for head, patch_embed.norm; dropped" in caplog.text
    theirs.patch_embed.norm = nn.Identity()
    x = clip(TINY)
    with torch.no_grad():
        features = model.backbone(x, direct)
        expected = theirs.norm(theirs.features(theirs.patch_embed(x)))
    assert torch.equal(features[3], expected.permute(0, 4, 1, 2, 3))


def test_the_backbone_of_a_published_checkpoint_is_loaded_alone(filled, tmp_path):
    save_weights(tmp_path / "whole.pt", filled.state_dict())
    torch.manual_seed(0)
    model = create_model(filled.name)
    decoder = [x.clone() for x in model.decoder.state_dict().values()]
    load_backbone(model, torch.load(tmp_path / "whole.pt", weights_only=True))
    assert same([*model.backbone.state_dict().values()], [*filled.backbone.state_dict().values()])
    assert same([*model.decoder.state_dict().values()], decoder)


def test_video_swins_own_file_is_taken():
    model, source = create_model("tmfi_net"), create_model("tmfi_net")
    weights = {f"backbone.{k}": v for k, v in source.backbone.state_dict().items()}
    weights |= {"backbone.patch_embed.norm.bias": torch.zeros(96), "cls_head.b": torch.zeros(9)}
    load_backbone(model, weights)
    assert same([*model.backbone.state_dict().values()], [*source.backbone.state_dict().values()])


def test_a_backbone_is_loaded_strictly(torchvision_s3d):
    model = create_model("vinet_s")
    weights = torchvision_s3d.state_dict()
    with pytest.raises(CheckpointError, match=r"left over: extra\.weight$"):
        load_backbone(model, {**weights, "extra.weight": torch.zeros(1)})
    del weights["features.6.branch1.1.0.0.weight"]
    with pytest.raises(CheckpointError, match=r"missing: features\.6\.branch1\.1\.0\.0\.weight$"):
        load_backbone(model, weights)
    part = {f"backbone.{k}": v for k, v in model.backbone.state_dict().items()}
    del part["backbone.base4.1.branch0.0.bn.bias"]
    with pytest.raises(CheckpointError, match=r"missing: base4\.1\.branch0\.0\.bn\.bias$"):
        load_backbone(model, part)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache and no download; the cache's folder."""

    def refuse(url, *args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize(("name", "file"), [("vinet_s", "s3d"), ("tmfi_net", "swin3d_s")])
def test_a_download_that_fails_tells_how_to_give_a_file(name, file, offline):
    with pytest.raises(ModelError, match=f"no route to host.* backbone='/path/to/{file}-.*.pth'"):
        create_model(name, backbone="kinetics")


def test_kinetics_weights_are_taken_from_torchs_cache(torchvision_s3d, offline):
    torch.save(torchvision_s3d.state_dict(), offline / "s3d-d76dad2f.pth")
    model = create_model("vinet_s", backbone="kinetics")
    own = model.backbone.base1[0].conv_s.weight
    assert torch.equal(own, torchvision_s3d.features[0][0][0].weight)


def test_vinet_a_has_no_weights_to_download(torchvision_s3d):
    with pytest.raises(ModelError, match="torchvision has no weights of this network; give"):
        create_model("vinet_a", backbone="kinetics")
    with pytest.raises(CheckpointError, match="no backbone of vinet_a; torchvision has no"):
        load_backbone(create_model("vinet_a"), torchvision_s3d.state_dict())


def test_a_checkpoint_and_a_backbone_are_one_too_many():
    with pytest.raises(ModelError, match="both given"):
        create_model("vinet_s", "one.pt", backbone="two.pt")


# ---- memory, precision, compilation


def saved_bytes(model, x):
    """Bytes kept for backward, beside the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that holds itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    del y
    return sum(size for pointer, size in kept.items() if pointer not in own)


def test_checkpointing_changes_memory_alone(filled):
    x = clip(TINY)
    plain, frugal = copy.deepcopy(filled).train(), copy.deepcopy(filled).train()
    frugal.set_grad_checkpointing()
    one, other = train_step(plain, x), train_step(frugal, x)
    assert torch.equal(one[0], other[0])
    assert far(one[1], other[1]) < 1e-5
    assert same(one[2], other[2])
    assert saved_bytes(frugal, x) < saved_bytes(plain, x) / 3
    frugal.set_grad_checkpointing(False)
    assert saved_bytes(frugal, x) == saved_bytes(plain, x)


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_checkpointing_leaves_batch_norm_alone_however_often_backward_is_asked(name):
    model = make_filled(name).train()
    constants = [(m.momentum, m.training) for m in model.modules() if isinstance(m, nn.BatchNorm3d)]
    model.set_grad_checkpointing()
    y = model(clip(TINY))
    after_forward = [b.clone() for b in model.buffers()]
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert same(after_forward, [*model.buffers()])
    assert constants == [
        (m.momentum, m.training) for m in model.modules() if isinstance(m, nn.BatchNorm3d)
    ]
    assert {int(m.num_batches_tracked) for m in model.modules() if hasattr(m, "running_var")} == {1}


def test_bfloat16_gives_float32_maps_close_to_those_of_float32(filled):
    model, x = copy.deepcopy(filled), clip(TINY)
    with torch.no_grad():
        expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.float32
    assert 0 < (y - expected).abs().max() < 0.03
    y.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())


def test_float64_stays_float64(filled):
    x = clip(TINY)
    with torch.no_grad():
        y = copy.deepcopy(filled).double()(x.double())
        assert y.dtype == torch.float64
        assert (y - filled(x)).abs().max() < 1e-5


def compiles(name, backend, checkpointing):
    """Compare a step of a compiled model with one of the plain model."""
    torch.compiler.reset()
    model = make_filled(name).train()
    compiled = copy.deepcopy(model)
    compiled.set_grad_checkpointing(checkpointing)
    x = clip(TINY)
    expected = train_step(model, x)
    own = train_step(torch.compile(compiled, backend=backend, fullgraph=True), x)
    torch.compiler.reset()
    assert torch.allclose(own[0], expected[0], atol=1e-5)
    assert far(own[1], expected[1]) < 1e-3
    for mine, other in zip(own[2], expected[2], strict=True):
        assert torch.allclose(mine, other, atol=1e-5)


def test_compilation_finds_one_graph():
    compiles("vinet_s", "eager", checkpointing=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vinet_a", "tmfi_net"])
def test_compilation_finds_one_graph_in_the_larger_models(name):
    compiles(name, "eager", checkpointing=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_checkpointing_is_compiled_too(name):
    compiles(name, "aot_eager", checkpointing=True)
