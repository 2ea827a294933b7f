"""Hugging Face's classifiers: folders, heads, views, and code that is not trusted."""

import copy
import json
import sys

import huggingface_hub
import pytest
import timm
import torch

from classification.huggingface import _view
from classification.models import ModelError, create_classifier, head_of
from common.checkpoint import CheckpointError, save_weights

transformers = pytest.importorskip("transformers")

PROCESSOR = {
    "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.1, 0.2, 0.3],
    "resample": 2,
    "size": {"height": 32, "width": 32},
}
REMOTE = """
import os
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

open(os.environ["PROOF"], "w").close()

class Config(PretrainedConfig):
    model_type = "remote_tiny"

    def __init__(self, num_classes=4, **kwargs):
        super().__init__(**kwargs)
        self.num_classes = num_classes

class Classifier(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        head = nn.Linear(96, config.num_classes)
        self.model = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.Flatten(), head)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, x):
        return {"logits": self.model(x)}
"""


def vit(folder):
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return model


def resnet(folder):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5, layer_type="basic"
    )
    model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("make", "head"), [(vit, "classifier."), (resnet, "classifier.1.")])
def test_a_folder_gives_a_module_from_images_to_logits(tmp_path, make, head):
    model = make(tmp_path).eval()
    module = create_classifier(f"hf:{tmp_path}")
    images = torch.randn(2, 3, 32, 32)
    assert module.training and module.num_classes == 5 and head_of(module) == (head,)
    assert module.transfer_name == f"hf:{tmp_path}"
    with torch.no_grad():
        logits = module.eval()(images)
        assert torch.equal(logits, model(images).logits)
        assert torch.equal(logits, copy.deepcopy(module)(images))
    module.train()(images).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_the_view_is_that_of_the_image_processor(tmp_path):
    vit(tmp_path)
    view = timm.data.resolve_model_data_config(create_classifier(f"hf:{tmp_path}"))
    assert view["input_size"] == (3, 32, 32) and view["interpolation"] == "bilinear"
    assert view["mean"] == pytest.approx((0.4, 0.5, 0.6)) and view["crop_pct"] == 1
    assert view["std"] == pytest.approx((0.1, 0.2, 0.3)) and view["crop_mode"] == "squash"


@pytest.mark.parametrize(
    ("processor", "size", "crop_pct", "crop_mode"),
    [
        ({"size": 224}, 224, 1.0, "squash"),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, 224, 0.875, "center"),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, 384, 1.0, "squash"),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224},
            224,
            0.875,
            "center",
        ),
        (
            {
                "size": {"height": 256, "width": 256},
                "do_center_crop": True,
                "crop_size": {"height": 224, "width": 224},
            },
            224,
            0.875,
            "squash",
        ),
        ({}, 224, 0.875, "squash"),
    ],
)
def test_sizes_and_crops_are_put_into_timms_words(processor, size, crop_pct, crop_mode):
    view = _view(processor, transformers.ResNetConfig())
    assert view["input_size"] == (3, size, size)
    assert view["crop_pct"] == pytest.approx(crop_pct)
    assert view["crop_mode"] == crop_mode or not processor


def test_other_scalings_are_folded_into_mean_and_std():
    """x * factor - 1, then (y - mean) / std, is (x / 255 - mean') / std'."""
    pixel, factor = 200.0, 1 / 127.5
    processor = {
        "rescale_factor": factor,
        "rescale_offset": True,
        "image_mean": [0.1] * 3,
        "image_std": [0.5] * 3,
    }
    view = _view(processor, transformers.ResNetConfig())
    expected = (pixel * factor - 1 - 0.1) / 0.5
    assert (pixel / 255 - view["mean"][0]) / view["std"][0] == pytest.approx(expected)
    raw = _view({"do_rescale": False, "do_normalize": False}, transformers.ResNetConfig())
    assert (pixel / 255 - raw["mean"][0]) / raw["std"][0] == pytest.approx(pixel)


def test_all_that_learns_gets_a_gradient_as_data_parallelism_wants_it(tmp_path):
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    transformers.Dinov2ForImageClassification(config).save_pretrained(tmp_path)
    module = create_classifier(f"hf:{tmp_path}")
    assert "dinov2.embeddings.mask_token" in module.state_dict()
    module(torch.rand(2, 3, 32, 32)).sum().backward()
    learning = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert len(learning) > 10 and all(p.grad is not None for p in learning.values())


def test_another_class_count_gets_a_new_head(tmp_path, caplog):
    model = vit(tmp_path)
    module = create_classifier(f"hf:{tmp_path}", num_classes=7)
    assert module.num_classes == 7 and module(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    trunk = {n: x for n, x in model.state_dict().items() if not n.startswith(head_of(module))}
    assert all(torch.equal(x, module.state_dict()[n]) for n, x in trunk.items())
    assert "new head for 7 classes" in caplog.text


def test_an_export_comes_back_here_and_in_plain_transformers(tmp_path):
    vit(tmp_path)
    trained = create_classifier(f"hf:{tmp_path}", num_classes=3)
    save_weights(tmp_path / "peer.safetensors", trained.state_dict())
    again = create_classifier(f"hf:{tmp_path}", tmp_path / "peer.safetensors")
    trained.save_pretrained(tmp_path / "plain")
    plain = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = trained.eval()(images)
        assert torch.equal(again.eval()(images), expected)
        assert torch.equal(plain.eval()(images).logits, expected)
    plain.load_state_dict(trained.state_dict(), strict=True)
    with pytest.raises(CheckpointError, match="left over"):
        save_weights(tmp_path / "bad.pth", {**trained.state_dict(), "x": torch.zeros(1)})
        create_classifier(f"hf:{tmp_path}", tmp_path / "bad.pth")


def test_a_backbone_without_a_classifier_needs_a_class_count(tmp_path):
    vit(tmp_path).vit.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no weights for classifier.*give num_classes"):
        create_classifier(f"hf:{tmp_path}")
    assert create_classifier(f"hf:{tmp_path}", num_classes=3).num_classes == 3


def test_pickled_weights_and_broken_files_are_refused(tmp_path):
    model = vit(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:999])
    with pytest.raises(ModelError, match=r"broken safetensors file|cannot be loaded"):
        create_classifier(f"hf:{tmp_path}")
    weights.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no .safetensors file.*save_pretrained"):
        create_classifier(f"hf:{tmp_path}")


def test_sizes_channels_and_options_that_do_not_fit_are_named(tmp_path):
    vit(tmp_path / "vit")
    resnet(tmp_path / "resnet")
    with pytest.raises(ModelError, match=r"takes no images of 64 x 64.*its own is 32 x 32"):
        create_classifier(f"hf:{tmp_path}/vit", img_size=64)
    module = create_classifier(f"hf:{tmp_path}/resnet", img_size=(64, 96))
    assert module.pretrained_cfg["input_size"] == (3, 64, 96) and module.training
    with pytest.raises(ModelError, match="takes 3 channels, not 1"):
        create_classifier(f"hf:{tmp_path}/resnet", in_chans=1)
    with pytest.raises(ModelError, match="no nonsense"):
        create_classifier(f"hf:{tmp_path}/vit", nonsense=1)
    with pytest.raises(ModelError, match="no such folder"):
        create_classifier(f"hf:{tmp_path}/none")


def test_a_missing_transformers_is_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r'pip install "peer-transfer\[huggingface\]"'):
        create_classifier(f"hf:{tmp_path}")


def test_without_the_hub_a_folder_is_asked_for_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"hub is not reachable.*hf:/path/to/folder"):
        create_classifier("hf:nobody/no-such-model")


def remote(folder, monkeypatch):
    config = {
        "model_type": "remote_tiny",
        "auto_map": {
            "AutoConfig": "remote_tiny.Config",
            "AutoModelForImageClassification": "remote_tiny.Classifier",
        },
        "num_classes": 4,
        "image_size": 16,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "remote_tiny.py").write_text(REMOTE)
    shapes = {"0.weight": (6, 3, 4, 4), "0.bias": (6,), "2.weight": (4, 96), "2.bias": (4,)}
    weights = {f"model.{name}": torch.randn(shape) for name, shape in shapes.items()}
    save_weights(folder / "model.safetensors", weights, {"format": "pt"})
    monkeypatch.setenv("PROOF", str(folder / "executed"))


def test_code_of_a_repository_runs_only_when_trusted(tmp_path, monkeypatch):
    remote(tmp_path, monkeypatch)
    with pytest.raises(ModelError, match=r"brings its own Python code.*trust_remote_code=True"):
        create_classifier(f"hf:{tmp_path}")
    assert not (tmp_path / "executed").exists()
    module = create_classifier(f"hf:{tmp_path}", trust_remote_code=True)
    assert (tmp_path / "executed").exists()
    assert module(torch.zeros(2, 3, 16, 16)).shape == (2, 4)
    assert module.num_classes == 4 and head_of(module) == ("model.2.",)
    assert module.pretrained_cfg["input_size"] == (3, 16, 16)
    assert (
        create_classifier(f"hf:{tmp_path}", trust_remote_code=True, num_classes=3).num_classes == 3
    )
