"""Classifiers by name: timm's models, their files, their heads, and what is refused."""

import os
import time
from urllib.error import URLError

import huggingface_hub
import pytest
import timm
import torch
from timm.models import register_model
from torch import nn

from classification.models import PUBLISHED_TOP1, ModelError, create_classifier, full_name, head_of
from common.checkpoint import CheckpointError, save_weights

TINY = "test_vit"  # timm's own: 160 pixels, 0.4 M parameters


class Bomb:
    """Runs a command when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No hub (a closed port), an empty cache, no download."""

    def refuse(url, *args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def write(path, module, drop=()):
    weights = {k: v for k, v in module.state_dict().items() if not k.startswith(tuple(drop))}
    save_weights(path, weights)
    return path


def same_values(one, other, skip=()):
    mine, others = one.state_dict(), other.state_dict()
    names = [name for name in mine if not name.startswith(tuple(skip))]
    return bool(names) and all(torch.equal(mine[name], others[name]) for name in names)


@pytest.mark.parametrize(
    ("name", "head", "size", "mean"),
    [
        ("test_vit.r160_in1k", ("head.",), 160, 0.5),
        ("test_convnext", ("head.fc.",), 160, 0.5),
        ("pit_xs_224.in1k", ("head.",), 224, 0.485),
        ("deit_tiny_distilled_patch16_224", ("head.", "head_dist."), 224, 0.485),
    ],
)
def test_a_timm_model_tells_its_view_its_classes_its_head_and_its_name(name, head, size, mean):
    module = create_classifier(name)
    view = timm.data.resolve_model_data_config(module)
    assert view["input_size"] == (3, size, size) and view["mean"][0] == mean
    assert module.num_classes == 1000 and module.transfer_name == name and module.training
    assert head_of(module) == head
    assert {n.rsplit(".", 1)[0] + "." for n in module.state_dict() if n.startswith(head)} == {*head}


def test_the_gradient_reaches_every_parameter():
    module = create_classifier(TINY, num_classes=7)
    module(torch.randn(2, 3, 160, 160)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@register_model
def own_fixed_tiny(pretrained, pretrained_cfg, pretrained_cfg_overlay, cache_dir, **options):
    """A model as a user registers one: fixed size, no configured head."""

    class Tiny(nn.Sequential):
        def get_classifier(self):
            return self[1]

    if "img_size" in options:
        raise TypeError("got an unexpected keyword argument 'img_size'")
    classes = options.get("num_classes", 4)
    module = Tiny(nn.Flatten(), nn.Linear(3 * 8 * 8, classes))
    module.num_classes = classes
    module.pretrained_cfg = {
        "architecture": "own_fixed_tiny",
        "input_size": (3, 8, 8),
        "fixed_input_size": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
    return module


def test_a_model_that_a_user_has_registered_needs_no_configured_head(tmp_path):
    module = create_classifier("own_fixed_tiny")
    assert head_of(module) == ("1.",)
    file = write(tmp_path / "own.pth", module)
    assert same_values(create_classifier("own_fixed_tiny", file), module)
    assert create_classifier("own_fixed_tiny", file, num_classes=2).num_classes == 2
    module[1] = nn.Identity()
    with pytest.raises(ModelError, match="own_fixed_tiny: this model has no classifier"):
        head_of(module)


def test_a_size_is_refused_by_a_model_that_is_built_for_another():
    assert create_classifier("own_fixed_tiny", img_size=8).num_classes == 4
    with pytest.raises(ModelError, match="takes no img_size \\(16\\), only images of 8 x 8"):
        create_classifier("own_fixed_tiny", img_size=16)


@pytest.mark.parametrize("size", [96, (96, 128)])
def test_a_size_is_built_in_where_the_model_has_one_and_is_the_view_where_not(size):
    for name in (TINY, "test_resnet"):
        module = create_classifier(name, img_size=size, num_classes=3)
        shape = timm.data.resolve_model_data_config(module)["input_size"]
        assert shape == (3, *((size, size) if isinstance(size, int) else size))
        assert module.eval()(torch.zeros(1, *shape)).shape == (1, 3)
    assert create_classifier(TINY).pretrained_cfg["input_size"] == (3, 160, 160)


def test_other_channels_get_statistics_that_fit():
    module = create_classifier("test_resnet", in_chans=1)
    view = timm.data.resolve_model_data_config(module)
    assert view["input_size"][0] == 1 and len(view["mean"]) == len(view["std"]) == 1
    assert view["mean"][0] == pytest.approx(
        sum(create_classifier("test_resnet").default_cfg["mean"]) / 3
    )
    assert module.eval()(torch.zeros(1, 1, 160, 160)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("vit_smal_patch16_224", {}, ["unknown model", "vit_small_patch16_224"]),
        ("dinov2_vits14", {}, ["unknown model", "dinov2_vits14_lc", "hf:org/name"]),
        ("test_vit.in99k", {}, ["'in99k'", "its tags: r160_in1k"]),
        ("facebook/vit", {}, ["facebook/vit", "unknown model"]),
        ("test_resnet", {"nonsense": 3}, ["timm cannot build", "nonsense"]),
        ("xcit_nano_12_p16_224", {"img_size": 100}, ["timm cannot build", "'img_size': 100"]),
        (TINY, {"num_classes": 0}, ["num_classes 0"]),
        (TINY, {"trust_remote_code": True}, ["trust_remote_code is for hf:"]),
        ("vit_small_patch14_dinov2", {}, ["no classifier", "num_classes"]),
        (TINY, {"checkpoint": ["a.pth", "b.pth"]}, ["2 checkpoint files, expected one"]),
    ],
)
def test_what_does_not_exist_or_does_not_fit_is_named_with_the_way_out(name, options, parts):
    with pytest.raises(ModelError) as error:
        create_classifier(name, **options)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["test_vit", "test_vit.r160_in1k"])
def test_without_the_hub_a_local_file_is_asked_for_at_once(offline, name):
    start = time.monotonic()
    with pytest.raises(ModelError) as error:
        create_classifier(name, pretrained=True)
    assert time.monotonic() - start < 5
    for part in (name, "hub is not reachable", f"--peer {name},checkpoint=/path/to/file"):
        assert part in str(error.value)


def test_offline_mode_of_the_hub_is_heeded(offline, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="hub is not reachable"):
        create_classifier(TINY, pretrained=True)


def test_without_the_hub_its_cache_serves(offline):
    published = create_classifier(TINY)
    repository = offline / "hub" / "models--timm--test_vit.r160_in1k"
    commit = "0" * 40
    write(repository / "snapshots" / commit / "model.safetensors", published)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    module = create_classifier(TINY, pretrained=True, num_classes=5)
    assert module.num_classes == 5 and same_values(module, published, skip=head_of(module))


def test_timms_own_prefixes_are_passed_on(offline):
    with pytest.raises(ModelError, match=r"hub is not reachable.*local-dir:/path/to/folder"):
        create_classifier("hf-hub:timm/test_vit.r160_in1k", pretrained=True)
    published = create_classifier(TINY, num_classes=5)
    timm.models.save_for_hf(published, offline / "folder", safe_serialization=True)
    module = create_classifier(f"local-dir:{offline}/folder", pretrained=True)
    assert module.num_classes == 5 and same_values(module, published)


def test_a_model_without_published_weights_says_so(offline):
    with pytest.raises(ModelError, match="no weights for it; give a local file"):
        create_classifier("vit_base_patch32_plus_256", pretrained=True)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("name", [TINY, "test_resnet", "deit_tiny_distilled_patch16_224"])
def test_an_export_comes_back_here_and_in_plain_timm(tmp_path, name, suffix):
    module = create_classifier(name, num_classes=5)
    file = write(tmp_path / f"peer.{suffix}", module)
    assert same_values(create_classifier(name, file), module)
    assert same_values(timm.create_model(name, num_classes=5, checkpoint_path=str(file)), module)


def test_a_checkpoint_brings_its_own_class_count(tmp_path):
    file = write(tmp_path / "ten.pth", create_classifier(TINY, num_classes=10))
    assert create_classifier(TINY, file).num_classes == 10
    assert create_classifier(TINY, [file], num_classes=10).num_classes == 10


def test_a_training_checkpoint_of_timm_gives_its_averaged_weights(tmp_path):
    plain, averaged = (create_classifier(TINY, num_classes=4) for _ in range(2))
    file = tmp_path / "last.pth.tar"
    torch.save({"state_dict": plain.state_dict(), "state_dict_ema": averaged.state_dict()}, file)
    assert same_values(create_classifier(TINY, file), averaged)


@pytest.mark.parametrize("name", [TINY, "test_convnext", "deit_tiny_distilled_patch16_224"])
def test_another_class_count_gets_a_new_head_on_the_files_trunk(tmp_path, name, caplog):
    source = create_classifier(name, num_classes=10)
    module = create_classifier(name, write(tmp_path / "ten.pth", source), num_classes=3)
    assert module.num_classes == 3 and same_values(module, source, skip=head_of(module))
    assert "ten.pth: new head, 3 classes; its own: 10" in caplog.text


def test_a_file_without_a_head_needs_a_class_count(tmp_path):
    source = create_classifier(TINY)
    file = write(tmp_path / "trunk.pth", source, drop=["head."])
    with pytest.raises(CheckpointError, match=r"trunk.pth: holds no classifier; give num_classes"):
        create_classifier(TINY, file)
    module = create_classifier(TINY, file, num_classes=3)
    assert same_values(module, source, skip=head_of(module))


def test_a_file_for_another_size_is_translated_as_timm_does(tmp_path):
    file = write(tmp_path / "peer.pth", create_classifier(TINY))
    module = create_classifier(TINY, file, img_size=96)
    overlay = {"file": str(file)}
    theirs = timm.create_model(TINY, img_size=96, pretrained=True, pretrained_cfg_overlay=overlay)
    assert module.pos_embed.shape == theirs.pos_embed.shape and same_values(module, theirs)
    again = write(tmp_path / "again.pth", module)
    assert same_values(create_classifier(TINY, again, img_size=96), module)


def test_a_file_in_the_authors_layout_is_translated_as_timm_does(tmp_path):
    source = create_classifier("resmlp_12_224", num_classes=4)
    theirs = {
        name.replace("linear_tokens.", "attn.").replace("mlp_channels.", "mlp."): x
        for name, x in source.state_dict().items()
    }
    theirs = {name.replace("stem.", "patch_embed."): x for name, x in theirs.items()}
    save_weights(tmp_path / "authors.pth", theirs)
    overlay = {"file": str(tmp_path / "authors.pth"), "num_classes": 4}
    plain = timm.create_model(
        "resmlp_12_224", num_classes=4, pretrained=True, pretrained_cfg_overlay=overlay
    )
    assert same_values(plain, source)
    assert same_values(create_classifier("resmlp_12_224", tmp_path / "authors.pth"), source)


def test_files_that_do_not_fit_are_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"none.pth: no such file"):
        create_classifier(TINY, tmp_path / "none.pth")
    file = write(tmp_path / "other.pth", create_classifier("test_resnet"))
    for name in (TINY, "test_convnext", "test_efficientnet"):
        with pytest.raises(CheckpointError, match=r"other.pth: not a checkpoint of this"):
            create_classifier(name, file)
        with pytest.raises(CheckpointError, match=r"other.pth: not a checkpoint of this"):
            create_classifier(name, file, num_classes=3)
    with pytest.raises(CheckpointError, match=r"conv1.*\(model: \[\d+, 1, "):
        create_classifier("test_resnet", file, in_chans=1)


@pytest.mark.parametrize("name", [TINY, "dinov2_vits14_lc", "mae_vit_base_ft"])
def test_a_file_with_code_is_refused_and_runs_nothing(tmp_path, name):
    evil, proof = tmp_path / "evil.pth", tmp_path / "executed"
    torch.save({"model": {"weight": torch.zeros(1)}, "x": Bomb(f"touch {proof}")}, evil)
    with pytest.raises(CheckpointError, match=r"evil.pth: refused.*posix.system"):
        create_classifier(name, evil)
    assert not proof.exists()


def test_published_numbers_are_those_of_models_that_exist():
    for name, top1 in PUBLISHED_TOP1.items():
        assert 75 < top1 < 90
        assert name in ("dinov2_vits14_lc", "mae_vit_base_ft") or name in timm.list_pretrained()


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("pit_xs_224", "pit_xs_224.in1k"),
        ("pit_xs_224.in1k", "pit_xs_224.in1k"),
        ("mae_vit_base_ft", "mae_vit_base_ft"),
        ("hf:org/name", "hf:org/name"),
        ("vit_tiny_patch16_18", "vit_tiny_patch16_18"),
    ],
)
def test_a_name_without_a_tag_means_its_default_weights(name, full):
    assert full_name(name) == full
