"""The timm task: a stock timm loop gets transfer by exchanging one line."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import AverageMeter, accuracy

from classification.task import PeerEnsemble, TransferTask, ensemble
from common.options import OptionError
from common.transfer import KnowledgeTransfer, PeerOutput
from tests.launch import launch


def model(seed, size=32, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=size, patch_size=8, embed_dim=24, depth=2, num_heads=2,
        num_classes=5, **kwargs,
    )  # fmt: skip


def batches(count, size=8):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        target = torch.randint(5, (size,), generator=generator)
        noise = torch.randn(size, 3, 32, 32, generator=generator)
        yield noise + target.view(-1, 1, 1, 1) / 2, target


def stock_loop(task, loader, epochs=2):
    """What a timm user has: nothing here knows of peers."""
    optimizer = create_optimizer_v2(task.trainable_module, opt="adamw", lr=3e-3)
    losses, top1 = AverageMeter(), AverageMeter()
    for _ in range(epochs):
        losses.reset()
        for input, target in loader():
            result = task(input, target)
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            losses.update(result["loss"].item(), input.size(0))
            top1.update(accuracy(result["output"], target)[0].item(), input.size(0))
    return losses.avg, top1.avg


def test_a_stock_loop_trains_one_model_or_peers():
    alone = ClassificationTask(model(0), verbose=False)
    stock_loop(alone, lambda: batches(4))
    task = TransferTask({"a": model(0), "b": model(1)}, rule="best", verbose=False)
    first, _ = stock_loop(task, lambda: batches(4), epochs=1)
    later, top1 = stock_loop(task, lambda: batches(4), epochs=6)
    assert later < first and top1 > 20


def test_without_transfer_the_first_peer_trains_as_alone():
    alone = ClassificationTask(model(0), verbose=False)
    task = TransferTask({"a": model(0), "b": model(1)}, rule="none", verbose=False)
    stock_loop(alone, lambda: batches(3))
    stock_loop(task, lambda: batches(3))
    for p, q in zip(
        alone.trainable_module.parameters(),
        task.trainable_module.peers["a"].parameters(),
        strict=True,
    ):
        torch.testing.assert_close(p, q)


def test_result_has_the_objective_and_its_parts():
    peers = {"a": model(0), "b": model(1), "c": model(2)}
    task = TransferTask(peers, rule="mutual", weight=0.5, temperature=2.0, verbose=False)
    images, target = next(batches(1))
    result = task(images, target)
    outputs = []
    for peer in peers.values():
        logits = peer(images)
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        outputs.append(PeerOutput(loss.mean(), -loss.detach(), logits))
    expected = KnowledgeTransfer("mutual", 2.0, 0.5)(outputs)
    torch.testing.assert_close(result["loss"], expected.total)
    torch.testing.assert_close(result["b/transfer_loss"], expected.transfer_loss[1])
    torch.testing.assert_close(result["output"].exp().sum(1), torch.ones(8))
    assert not result["output"].requires_grad and "c/output" in result


def test_in_evaluation_the_peers_are_one_classifier():
    together = PeerEnsemble({"a": model(0), "b": model(1)}).eval()
    images, _ = next(batches(1))
    p = sum(peer(images).softmax(1) for peer in together.peers.values()) / 2
    torch.testing.assert_close(together(images).exp(), p)
    torch.testing.assert_close(ensemble([torch.zeros(1, 4)]).exp(), torch.full((1, 4), 0.25))
    task = TransferTask({"a": model(0), "b": model(1)}, verbose=False)
    assert "peers.a.head.weight" in task.get_checkpoint_state()["state_dict"]


def test_frozen_peers_teach_in_evaluation_mode():
    peers = {"a": model(0), "old": model(0, drop_rate=0.5)}
    task = TransferTask(peers, rule="mutual", frozen=["old"], score="confidence", verbose=False)
    task.train()
    assert not peers["old"].training and peers["a"].training
    before = peers["old"].head.weight.clone()
    stock_loop(task, lambda: batches(2))
    assert torch.equal(before, peers["old"].head.weight)


def test_peers_of_other_sizes_get_their_own_view():
    large, small = model(0), model(1, size=24)
    large.pretrained_cfg = {**large.pretrained_cfg, "input_size": (3, 32, 32)}
    small.pretrained_cfg = {**small.pretrained_cfg, "input_size": (3, 24, 24), "mean": (0.1,) * 3}
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    task = TransferTask({"a": large, "b": small}, data_config=config, verbose=False)
    images, target = next(batches(1))
    assert torch.isfinite(task(images, target)["loss"])


def test_the_transfer_warms_up_over_batches_and_goes_on_from_a_checkpoint():
    def weight(task):
        result = task(*next(batches(1)))
        parts = [
            result[f"{name}/{what}"] for what in ("task_loss", "transfer_loss") for name in "ab"
        ]
        return ((result["loss"] - parts[0] - parts[1]) / (parts[2] + parts[3])).item()

    def build():
        peers = {"a": model(0), "b": model(1)}
        return TransferTask(peers, rule="random", warmup_steps=4, verbose=False)

    task, again = build(), build()
    assert [weight(task) for _ in range(3)] == pytest.approx([0, 0.25, 0.5], abs=1e-3)
    state = task.get_checkpoint_state()
    again.load_checkpoint_state(state["state_dict"], state["task_state"])
    images, target = next(batches(1))
    assert torch.equal(again(images, target)["loss"], task(images, target)["loss"])
    assert weight(task) == pytest.approx(1, abs=1e-3)


def test_the_task_evaluates_as_timms_do():
    task = TransferTask({"a": model(0), "b": model(1)}, verbose=False).eval()
    images, target = next(batches(1))
    result = task(images, target)
    assert result["output"].shape == (8, 5)
    expected = torch.nn.functional.nll_loss(result["output"], target)
    torch.testing.assert_close(result["loss"], expected)


@pytest.mark.parametrize("name", ["vit.augreg", "train"])
def test_names_that_torch_refuses_are_named(name):
    with pytest.raises(ValueError, match=f"peer '{name}': torch takes no such name"):
        TransferTask({name: model(0), "b": model(1)}, verbose=False)


def test_wrong_peers_are_named():
    with pytest.raises(OptionError, match="same classes, got a: 5, b: 1000"):
        TransferTask({"a": model(0), "b": timm.create_model("test_vit")}, verbose=False)
    with pytest.raises(ValueError, match="unknown rule 'worst'"):
        TransferTask({"a": model(0), "b": model(1)}, rule="worst", verbose=False)


def ranked(world, path):
    task = TransferTask({"a": model(0), "b": model(1)}, verbose=False)
    if world.size > 1:
        task.prepare_distributed()

    def loader():
        for images, target in batches(3):
            yield images[world.rank :: world.size], target[world.rank :: world.size]

    stock_loop(task, loader)
    if world.is_main:
        torch.save(task.get_checkpoint_state()["state_dict"], path)


def test_the_stock_loop_under_ddp_equals_one_process(tmp_path):
    from tests.common.toy import HERE

    ranked(HERE, tmp_path / "one.pt")
    launch(ranked, 2, tmp_path / "two.pt")
    torch.testing.assert_close(
        torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt"), rtol=1e-3, atol=1e-4
    )
