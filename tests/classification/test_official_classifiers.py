"""DINOv2 with its linear head and MAE fine-tuned, against the official code's numbers."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from classification.dinov2 import BACKBONE_FILE, HEAD_FILE, resample_position_table
from classification.models import ModelError, create_classifier, head_of
from common.checkpoint import CheckpointError, load_weights, read_weights, save_weights

SPEC = Path(__file__).parents[2].parent / "shared" / "spec" / "classification"
DINOV2, MAE = "dinov2_vits14_lc", "mae_vit_base_ft"

needs_spec = pytest.mark.skipif(not SPEC.is_dir(), reason="goldens lie outside the repository")


def formula():
    spec = importlib.util.spec_from_file_location("fill", SPEC / "golden_fill_cls.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def official_weights(name):
    manifest = json.loads((SPEC / "manifests" / f"{name}.json").read_text())
    return formula().make_state_dict(manifest["keys"])


def golden(name, case, key="logits"):
    return torch.from_numpy(np.load(SPEC / "golden" / f"{name}_{case}.npz")[key])


def split(weights):
    parts = ({}, {})
    for name, x in weights.items():
        prefix, rest = name.split(".", 1)
        parts[prefix == "linear_head"][rest] = x
    return parts


def write_official_dinov2(folder, weights):
    files = [folder / BACKBONE_FILE, folder / HEAD_FILE]
    for file, part in zip(files, split(weights), strict=True):
        torch.save(part, file)
    return files


@pytest.fixture(scope="module")
def dinov2_files(tmp_path_factory):
    if not SPEC.is_dir():
        pytest.skip("goldens lie outside the repository")
    return write_official_dinov2(tmp_path_factory.mktemp("dinov2"), official_weights(DINOV2))


@pytest.fixture(scope="module")
def mae_file(tmp_path_factory):
    if not SPEC.is_dir():
        pytest.skip("goldens lie outside the repository")
    file = tmp_path_factory.mktemp("mae") / "mae_finetuned_vit_base.pth"
    torch.save({"model": official_weights(MAE), "epoch": 99}, file)
    return file


@pytest.fixture(scope="module")
def random_dinov2():
    return create_classifier(DINOV2, num_classes=3)


@pytest.mark.parametrize("height, width", [(224, 224), (280, 280), (196, 308), (518, 518)])
def test_dinov2_gives_the_official_logits_at_every_size(dinov2_files, height, width):
    module = create_classifier(DINOV2, dinov2_files, img_size=(height, width)).eval()
    case = str(height) if height == width else f"{height}x{width}"
    expected = golden(DINOV2, case)
    images = formula().make_input2d((len(expected), 3, height, width))
    with torch.no_grad():
        features = module.forward_features(images)
        logits = module(images)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(features, golden(DINOV2, case, "head_input"), atol=1e-5, rtol=0)
    assert torch.equal(module.forward_head(features), logits)
    if (height, width) != (518, 518):
        used = golden(DINOV2, case, "pos_embed_used")
        table = module.backbone.pos_embed[..., ::16]
        torch.testing.assert_close(table.reshape(used.shape), used, atol=1e-6, rtol=0)


def test_mae_gives_the_official_logits(mae_file):
    module = create_classifier(MAE, mae_file, img_size=224).eval()
    images = formula().make_input2d((2, 3, 224, 224))
    seen = []
    module.head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        torch.testing.assert_close(module(images), golden(MAE, "224"), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0], golden(MAE, "224", "head_input"), atol=1e-5, rtol=0)


@needs_spec
@pytest.mark.parametrize("name", [DINOV2, MAE])
def test_every_layer_norm_has_the_official_epsilon(name):
    norms = [m for m in create_classifier(name).modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 25 and {norm.eps for norm in norms} == {1e-6}


@pytest.mark.parametrize(
    ("name", "head"), [(DINOV2, ("linear_head.",)), (MAE, ("head.",))], ids=[DINOV2, MAE]
)
def test_the_view_is_that_of_the_official_evaluation(name, head):
    module = create_classifier(name, img_size=224)
    view = timm.data.resolve_model_data_config(module)
    assert view["input_size"] == (3, 224, 224) and view["crop_pct"] == 0.875
    assert view["mean"] == (0.485, 0.456, 0.406) and view["std"] == (0.229, 0.224, 0.225)
    assert view["interpolation"] == "bicubic" and view["crop_mode"] == "center"
    assert head_of(module) == head and module.num_classes == 1000 and module.transfer_name == name


def cubic(distance):
    """The kernel of bicubic interpolation with a = -0.75."""
    x = abs(distance)
    if x <= 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def test_a_table_is_sampled_where_the_official_scale_factor_says():
    table = torch.randn(1, 1 + 37 * 37, 2)
    assert resample_position_table(table, (37, 37)) is table
    rows = torch.randn(37, dtype=torch.float64)
    grid = rows.float().reshape(37, 1, 1).expand(37, 37, 2).reshape(1, -1, 2)
    resampled = resample_position_table(torch.cat([table[:, :1], grid], dim=1), (16, 22))
    assert resampled.shape == (1, 1 + 16 * 22, 2) and torch.equal(resampled[:, 0], table[:, 0])
    for target in range(16):
        at = (target + 0.5) * 37 / 16.1 - 0.5
        taps = [(rows[min(max(i, 0), 36)].item(), cubic(at - i)) for i in range(-3, 40)]
        expected = sum(value * weight for value, weight in taps)
        found = resampled[0, 1:].reshape(16, 22, 2)[target]
        assert found.flatten().tolist() == pytest.approx([expected] * 44, abs=1e-4)


def test_an_export_comes_back_at_its_size_untouched(tmp_path, random_dinov2):
    file = tmp_path / "peer.safetensors"
    save_weights(file, random_dinov2.state_dict())
    again = create_classifier(DINOV2, file, img_size=224)
    assert again.num_classes == 3
    load_weights(random_dinov2, again.state_dict(), file)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in read_weights(file).items())
    with pytest.raises(CheckpointError, match=r"peer.safetensors: position table for 256 patches"):
        create_classifier(DINOV2, file, img_size=280)


def test_the_official_wrappers_own_state_dict_is_read(tmp_path, dinov2_files):
    weights = official_weights(DINOV2)
    torch.save(weights, tmp_path / "wrapper.pth")
    one = create_classifier(DINOV2, tmp_path / "wrapper.pth").state_dict()
    two = create_classifier(DINOV2, dinov2_files).state_dict()
    assert all(torch.equal(x, two[name]) for name, x in one.items())
    assert set(weights) - set(one) == {"backbone.mask_token"}


def test_files_in_the_wrong_order_or_with_another_head_are_named(tmp_path, random_dinov2):
    backbone, head = write_official_dinov2(tmp_path, random_dinov2.state_dict())
    assert create_classifier(DINOV2, [backbone, head]).num_classes == 3
    with pytest.raises(CheckpointError, match="a head, where the backbone is expected"):
        create_classifier(DINOV2, [head, backbone])
    with pytest.raises(CheckpointError, match=f"{BACKBONE_FILE}: no linear head"):
        create_classifier(DINOV2, [backbone, backbone])
    with pytest.raises(CheckpointError, match="3 files"):
        create_classifier(DINOV2, [backbone, head, head])
    other = tmp_path / "dinov2_vits14_linear_head.pth"
    torch.save({"weight": torch.zeros(1000, 768), "bias": torch.zeros(1000)}, other)
    with pytest.raises(CheckpointError, match=r"\[1000, 768\].*take dinov2_vits14_linear4_head"):
        create_classifier(DINOV2, [backbone, other])
    registers = tmp_path / "reg.pth"
    torch.save({**torch.load(backbone), "register_tokens": torch.zeros(1, 4, 384)}, registers)
    with pytest.raises(CheckpointError, match=r"reg.pth: the variant with register tokens"):
        create_classifier(DINOV2, [registers, head])


def test_a_new_head_goes_on_the_backbone_alone_or_in_place_of_the_old_one(tmp_path, random_dinov2):
    backbone, head = write_official_dinov2(tmp_path, random_dinov2.state_dict())
    with pytest.raises(CheckpointError, match="holds no classifier; give num_classes"):
        create_classifier(DINOV2, backbone)
    for files in (backbone, [backbone, head]):
        module = create_classifier(DINOV2, files, num_classes=5)
        assert module.linear_head.weight.shape == (5, 1920)
        assert torch.equal(module.backbone.norm.weight, random_dinov2.backbone.norm.weight)
        assert torch.equal(module.backbone.cls_token, random_dinov2.backbone.cls_token)


def test_the_head_can_be_reset_and_the_gradient_reaches_every_parameter():
    module = create_classifier(DINOV2, img_size=56)
    module.reset_classifier(4)
    assert module.num_classes == 4
    logits = module(torch.randn(2, 3, 56, 56))
    logits.square().sum().backward()
    assert logits.shape == (2, 4)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("size", [225, (224, 230), 0])
def test_a_size_that_is_no_multiple_of_a_patch_is_refused(size):
    with pytest.raises(ModelError, match="multiple of 14"):
        create_classifier(DINOV2, img_size=size)


def test_mae_takes_224_alone():
    with pytest.raises(ModelError, match=r"img_size 256.*224 alone"):
        create_classifier(MAE, img_size=256)


def test_options_that_the_constructor_refuses_are_named():
    for name in (DINOV2, MAE):
        with pytest.raises(ModelError, match=f"{name}.*nonsense"):
            create_classifier(name, nonsense=1)


def test_an_export_of_mae_comes_back_here_and_in_plain_timm(tmp_path):
    options = {"num_classes": 3, "depth": 2}
    module = create_classifier(MAE, **options)
    file = tmp_path / "peer.safetensors"
    save_weights(file, module.state_dict())
    plain = timm.create_model(
        "vit_base_patch16_224", global_pool="avg", checkpoint_path=str(file), **options
    )
    again = create_classifier(MAE, file, depth=2)
    for other in (plain, again):
        assert all(torch.equal(x, other.state_dict()[k]) for k, x in module.state_dict().items())
    stock = timm.create_model("vit_base_patch16_224", **options)
    save_weights(tmp_path / "token.pth", stock.state_dict())
    with pytest.raises(CheckpointError, match=r"missing: fc_norm.weight.*left over: norm.weight"):
        create_classifier(MAE, tmp_path / "token.pth", depth=2)


def test_official_files_are_fetched_once_and_read_like_local_ones(
    monkeypatch, tmp_path, random_dinov2
):
    fetched = []
    parts = dict(zip((BACKBONE_FILE, HEAD_FILE), split(random_dinov2.state_dict()), strict=True))

    def download(url, to, *args, **kwargs):
        fetched.append(url)
        torch.save(parts.get(Path(to).name, {}), to)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        module = create_classifier(DINOV2, pretrained=True)
        assert torch.equal(module.linear_head.weight, random_dinov2.linear_head.weight)
    assert fetched == [
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_linear4_head.pth",
    ]
    with pytest.raises(ModelError, match="not the file published"):
        create_classifier(MAE, pretrained=True)


@pytest.mark.parametrize("name", [DINOV2, MAE])
def test_without_a_network_the_urls_and_the_way_out_are_named(monkeypatch, tmp_path, name):
    def refuse(url, *args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(ModelError, match=rf"cannot fetch https://dl.*--peer {name},checkpoint="):
        create_classifier(name, pretrained=True)
