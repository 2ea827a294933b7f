"""Classifier peers: losses, scores, optimizers, learning rates."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn

from classification.evaluation import brought_to
from classification.losses import sample_loss
from classification.models import create_classifier
from classification.options import parse
from classification.outputs import metadata
from classification.peer import (
    SCHEDULES,
    ClassifierPeer,
    build_modules,
    build_peers,
    classify,
    scaled_lr,
)
from common import peers
from common.distributed import World
from common.options import OptionError
from common.peers import PeerGroup, share_statistics
from common.transfer import confidence
from tests.launch import launch

HERE = World(0, 1, 0, torch.device("cpu"))
TINY = "test_vit,img_size=32"


def options_of(*more):
    return parse(["/data", "--peer", "a", "--peer", "b", *more])[0]


def peers_of(*more, first=TINY, second="test_convnext,img_size=32"):
    run, specs = parse(
        ["/data", "--peer", first, "--peer", second, "--no-pretrained", "--num-classes", "5", *more]
    )
    modules, views = build_modules(specs, run)
    return build_peers(specs, modules, views, run, HERE, 10)[0]


LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
HARD = torch.tensor([0, 4, 2, 2, 1, 3])
SOFT = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)).softmax(1)


@pytest.mark.parametrize(
    ("more", "target", "theirs"),
    [
        (["--smoothing", "0.1"], HARD, LabelSmoothingCrossEntropy(0.1)),
        (["--mixup", "0.1"], SOFT, SoftTargetCrossEntropy()),
        (["--bce-loss", "--smoothing", "0.1"], HARD, BinaryCrossEntropy(0.1)),
        (
            ["--bce-loss", "--bce-sum", "--bce-target-thresh", "0.2", "--cutmix", "1"],
            SOFT,
            BinaryCrossEntropy(0.0, target_threshold=0.2, sum_classes=True),
        ),
    ],
    ids=["smoothing", "mixup", "bce", "bce-sum-threshold"],
)
def test_the_mean_of_the_sample_losses_is_timms_loss(more, target, theirs):
    loss = sample_loss(options_of(*more))(LOGITS, target)
    assert loss.shape == (6,)
    torch.testing.assert_close(loss.mean(), theirs(LOGITS, target))


def test_scores():
    loss = sample_loss(options_of("--smoothing", "0"))
    output = classify(LOGITS, HARD, loss, "loss")
    torch.testing.assert_close(output.score, -F.cross_entropy(LOGITS, HARD, reduction="none"))
    torch.testing.assert_close(classify(LOGITS, HARD, loss, "confidence").score, confidence(LOGITS))
    assert output.correct.tolist() == (LOGITS.argmax(1) == HARD).tolist()
    soft = classify(LOGITS, F.one_hot(HARD, 5).float() * 0.9 + 0.02, loss, "loss")
    assert torch.equal(soft.correct, output.correct)
    half = classify(LOGITS.half(), HARD, loss, "loss")
    assert half.logits.dtype == half.score.dtype == torch.float32


def test_each_peer_has_its_own_optimizer_rate_and_schedule():
    a, b = peers_of(
        "--opt", "adamw", "--lr", "1e-3", "--warmup-epochs", "0",
        first=TINY + ",name=a", second=TINY + ",name=b,opt=sgd,lr=0.5,weight_decay=0,sched=none",
    )  # fmt: skip
    assert isinstance(a.optimizer, torch.optim.AdamW) and isinstance(b.optimizer, torch.optim.SGD)
    assert (a.lr, b.lr) == (1e-3, 0.5)
    assert a.schedule is not None and b.schedule is None
    assert a.optimizer.defaults["fused"]
    decays = {group["weight_decay"] for group in a.optimizer.param_groups}
    assert decays == {0.0, 2e-5}


def test_warm_up_starts_at_the_warm_up_rate():
    (a, _) = peers_of("--opt", "adamw", "--lr", "1e-3", "--warmup-lr", "1e-6")
    assert a.lr == 1e-6


@pytest.mark.parametrize("sched", [name for name in SCHEDULES if name != "rsqrt"])  # warms up
def test_without_warm_up_a_run_starts_at_its_rate_and_resumes_where_it_was(sched):
    asked = ["--opt", "sgd", "--lr", "1e-2", "--warmup-epochs", "0", "--sched", sched]
    asked += ["--epochs", "9", "--decay-epochs", "2", "--patience-epochs", "0"]
    (whole, _), (again, _) = peers_of(*asked), peers_of(*asked)
    assert whole.lr == pytest.approx(1e-2)
    if sched == "none":
        return
    for epoch in (1, 2, 3):
        whole.schedule.step(epoch, 50.0)
    again.optimizer.load_state_dict(whole.optimizer.state_dict())
    again.schedule.load_state_dict(whole.schedule.state_dict())
    again.schedule.step(3)
    for epoch in (4, 5):
        assert again.lr == whole.lr
        whole.schedule.step(epoch, 60.0 - epoch)
        again.schedule.step(epoch, 60.0 - epoch)


def test_a_resumed_schedule_follows_its_own_run():
    asked = ["--opt", "sgd", "--lr", "1e-2", "--warmup-epochs", "0"]
    (short, _), (long, _) = peers_of(*asked, "--epochs", "2"), peers_of(*asked, "--epochs", "4")
    short.schedule.step(2, None)
    long.load_state_dict(short.state_dict())
    long.schedule.step(2)
    assert short.lr == 0 and long.lr == pytest.approx(5e-3)


@pytest.mark.parametrize(
    "more", [("--sched", "cosin"), ("--sched", "plateau", "--sched-on-updates")]
)
def test_a_schedule_that_cannot_be_is_named(more):
    with pytest.raises(OptionError, match=rf"schedule '{more[1]}': .*Choose from cosine, tanh"):
        peers_of(*more)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], 0.1 * 512 / 256),
        (["--opt", "adamw"], 0.1 * math.sqrt(2)),
        (["--opt", "adamw", "--lr-base-scale", "linear", "--lr-base", "0.01"], 0.02),
        (["--opt", "lamb", "--lr-base-size", "128"], 0.1 * 2),
    ],
)
def test_learning_rates_scale_with_the_batch_as_in_timm(more, expected):
    assert scaled_lr(options_of(*more), 512) == pytest.approx(expected)


def test_unscaled_rates_follow_the_global_batch():
    (a, _) = peers_of("-b", "64", "--grad-accum-steps", "4", "--warmup-epochs", "0")
    assert a.lr == pytest.approx(0.1)


def test_clipping_and_average_and_frozen():
    a, b = peers_of(
        "--clip-grad", "0.1", "--clip-mode", "agc", "--model-ema",
        second="test_convnext,img_size=32,frozen=true",
    )  # fmt: skip
    assert a.clip is not None and a.average is not None
    assert b.optimizer is None and b.average is None and b.clip is None
    assert not any(p.requires_grad for p in b.module.parameters())
    assert a.best_module is a.average.module


def test_an_average_reaches_back_over_a_share_of_the_run():
    a, b = peers_of(
        "--epochs", "20", "--warmup-epochs", "0", "--cooldown-epochs", "0", "--model-ema",
        first=f"{TINY},model-ema-span=0.25",
    )  # fmt: skip
    assert a.average.decay == pytest.approx(0.98)  # 50 of 200 steps
    assert b.average.decay == 0.9998
    a, _ = peers_of("--model-ema", "--model-ema-decay", "0.9", "--model-ema-span", "0.25")
    assert a.average.decay == 0.9  # what is given counts


def test_model_dtype_and_memory_format_and_checkpointing():
    a, b = peers_of(
        first=TINY + ",model_dtype=bfloat16,grad_checkpointing=true",
        second="test_convnext,img_size=32,channels_last=true",
    )
    batch = (torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    output = a.forward(batch)
    assert output.logits.dtype == torch.float32
    assert next(a.module.parameters()).dtype == torch.bfloat16 and a.module.grad_checkpointing
    weight = b.module.stages[1].downsample[1].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    output.task_loss.backward()


def test_head_initialisation():
    a, b = peers_of("--head-init-scale", "0.0", "--head-init-bias", "-3")
    assert not a.module.head.weight.any() and (b.module.head.fc.bias == -3).all()


def test_both_heads_of_a_distilled_model_are_initialised():
    (a, _) = peers_of(
        "--head-init-scale", "0", first="deit_tiny_distilled_patch16_224,img_size=32,kwargs.depth=1"
    )
    assert not a.module.head.weight.any() and not a.module.head_dist.weight.any()


def test_an_export_tells_the_epsilon_that_it_was_trained_with():
    run, specs = parse(["/data", "--peer", "test_efficientnet,bn_eps=0.5", "--peer", TINY])
    for spec in specs:
        spec.options.pretrained = False
    modules, views = build_modules(specs, run)
    told = metadata(specs[0], modules[0], views[0])
    again = create_classifier("test_efficientnet", **json.loads(told["model_args"]))
    assert again.bn1.eps == modules[0].bn1.eps == 0.5


def test_wrong_options_of_a_model_or_optimizer_are_named():
    with pytest.raises(OptionError, match="optimizer 'adumw'"):
        peers_of("--opt", "adumw")
    with pytest.raises(OptionError, match="optimizer 'sgd'"):
        peers_of("--opt-kwargs", "nonsense=1")


def test_synchronised_batch_norm_keeps_its_activation(monkeypatch):
    monkeypatch.setattr(ClassifierPeer, "distribute", lambda *rest, **more: None)
    asked = ["--peer", "test_efficientnet,img_size=32", "--peer", TINY, "--num-classes", "5"]
    run, specs = parse(["/data", *asked, "--no-pretrained", "--sync-bn"])
    modules, views = build_modules(specs, run)
    images = torch.ones(2, 3, 32, 32)
    with torch.no_grad():
        expected = modules[0].eval()(images)
        peers, _ = build_peers(specs, modules, views, run, replace(HERE, size=2), 10)
        assert isinstance(peers[0].module.bn1, nn.SyncBatchNorm)
        torch.testing.assert_close(peers[0].module.eval()(images), expected)


def build_synchronised(world):
    peers.DistributedDataParallel = lambda module, **rest: module  # torch's refuses it on a CPU
    world = replace(world, replicas=torch.distributed.new_group([0, 1]))
    asked = ["--peer", "test_efficientnet,img_size=32", "--peer", TINY, "--num-classes", "5"]
    run, specs = parse(["/data", *asked, "--no-pretrained", "--sync-bn", "--model-ema"])
    modules, views = build_modules(specs, run)
    (one, _), _ = build_peers(specs, modules, views, run, world, 10)
    assert one.module.bn1.process_group is world.replicas
    assert isinstance(one.average.module.bn1, nn.SyncBatchNorm)


def test_synchronised_batch_norm_among_replicas_is_averaged_too():
    launch(build_synchronised, 2)


def test_modules_kept_elsewhere_come_and_go_back():
    class Kept(nn.Linear):
        def to(self, device):
            places.append(str(device))

    places = []
    with brought_to(torch.device("meta"), Kept(1, 1), nn.Linear(1, 1, device="meta")):
        assert places == ["meta"]
    assert places == ["meta", "cpu"]


def averaged_buffers(world, folder):
    torch.manual_seed(0)
    module = nn.BatchNorm1d(2)
    average = ModelEmaV3(module, decay=0.5)
    module.running_mean.fill_(world.rank)
    average.module.running_mean.fill_(2 + world.rank)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    peer = ClassifierPeer("a", module, None, None, optimizer=optimizer, average=average)
    share_statistics(PeerGroup([peer]), world)
    found = [module.running_mean[0].item(), average.module.running_mean[0].item()]
    (folder / str(world.rank)).write_text(str(found))


def test_ranks_evaluate_the_same_statistics_of_weights_and_average(tmp_path):
    launch(averaged_buffers, 2, tmp_path)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["[0.5, 2.5]"] * 2


def test_an_unknown_compiler_is_named():
    with pytest.raises(OptionError, match="compile=nonsense: Invalid backend"):
        peers_of(first=TINY + ",compile=nonsense")
