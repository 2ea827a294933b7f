import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from common import peers
from common.distributed import World
from common.options import OptionError
from common.transfer import KnowledgeTransfer
from saliency import losses
from saliency.clips import VIEWS
from saliency.data import ClipBatch
from saliency.models import ModelError, create_model
from saliency.options import build_parser, parse, read_peers
from saliency.peer import (
    SaliencyPeer,
    StepSchedule,
    build_modules,
    build_peers,
    check_view,
    log_map,
    sample_loss,
)
from tests.launch import launch
from tests.saliency.toy import Deep, Flat


def options_of(*peers, rest=()):
    asked = [word for peer in peers for word in ("--peer", peer)]
    alone = ["--rule", "none"] if len(peers) == 1 else []
    return parse("dhf1k", "train_dhf1k", ["--data-root", "/data", *asked, *alone, *rest])


def batch_for(views, batch=3, map_size=(24, 32), seed=0, fixations=False):
    draw = torch.Generator().manual_seed(seed)
    frames, rows = {}, {}
    for view in views:
        count = batch * view.frames
        if view.size not in frames:
            frames[view.size] = torch.randint(
                256, (count, *view.size, 3), generator=draw, dtype=torch.uint8
            )
        rows[view] = torch.arange(count).view(batch, view.frames) % len(frames[view.size])
    maps = torch.rand(batch, *map_size, generator=draw) ** 4
    points = (torch.rand(batch, *map_size, generator=draw) > 0.95).float() if fixations else None
    numbers = torch.arange(batch)
    return ClipBatch(frames, rows, maps, points, numbers, numbers)


def peer_of(module, name="one", seed=0, loss=None, score="loss", **rest):
    loss = loss or (lambda pred, target, points: losses.saliency_loss(pred, target, points))
    if not rest.get("frozen"):
        rest.setdefault("optimizer", torch.optim.SGD(module.parameters(), lr=0.1))
    return SaliencyPeer(name, module, module.view, loss, score, **rest)


def seeded(kind, seed, **options):
    torch.manual_seed(seed)
    return kind(**options)


@pytest.fixture
def three():
    modules = [seeded(Deep, 0), seeded(Flat, 1), seeded(Deep, 2, frames=4, before=1)]
    return [peer_of(module, f"p{i}") for i, module in enumerate(modules)]


def test_the_output_is_what_the_method_takes(three):
    batch = batch_for([peer.view for peer in three])
    for peer in three:
        output = peer.forward(batch)
        assert output.logits.shape == (3, 24 * 32) and output.score.shape == (3,)
        assert output.logits.requires_grad and not output.score.requires_grad
        maps = output.logits.softmax(dim=1).view(3, 24, 32)
        raw = peer.model(batch.clips(peer.view))
        if raw.shape == maps.shape:
            torch.testing.assert_close(maps, raw / raw.sum(dim=(1, 2), keepdim=True))
        expected = losses.kldiv(maps, batch.maps) - losses.cc(maps, batch.maps)
        torch.testing.assert_close(-output.score, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.task_loss, -output.score.mean())


def test_the_transfer_is_the_kl_between_the_maps(three):
    batch = batch_for([peer.view for peer in three])
    outputs = [peer.forward(batch) for peer in three]
    result = KnowledgeTransfer("best", names=[peer.name for peer in three])(outputs)
    maps = [output.logits.exp().view(3, 24, 32) for output in outputs]
    expected = torch.zeros(())
    for sample in range(3):
        best = int(torch.stack([output.score[sample] for output in outputs]).argmax())
        for student in range(3):
            if student != best:
                kl = losses.kldiv(maps[student], maps[best])[sample]
                expected = expected + kl / 3
    torch.testing.assert_close(result.transfer_loss.sum(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_every_order_of_the_peers_gives_the_same_losses(three, count):
    batch = batch_for([peer.view for peer in three])
    found = []
    for order in itertools.permutations(range(count)):
        peers = [three[i] for i in order]
        result = KnowledgeTransfer("best", names=[peer.name for peer in peers])(
            [peer.forward(batch) for peer in peers]
        )
        parts = torch.stack([result.task_loss, result.transfer_loss])
        found.append(
            torch.cat(
                [result.total.detach()[None], parts[:, torch.tensor(order).argsort()].flatten()]
            )
        )
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_gradient_in_every_student_and_none_in_a_detached_teacher(three):
    batch = batch_for([peer.view for peer in three])
    outputs = [peer.forward(batch) for peer in three]
    result = KnowledgeTransfer("one_way:p1", names=[p.name for p in three])(outputs)
    (result.total - sum(output.task_loss for output in outputs)).backward()
    moved = [
        any(p.grad is not None and p.grad.abs().sum() > 0 for p in peer.module.parameters())
        for peer in three
    ]
    assert moved == [True, False, True]


def test_a_teacher_is_pulled_where_it_is_not_detached(three):
    batch = batch_for([peer.view for peer in three])
    outputs = [peer.forward(batch) for peer in three]
    result = KnowledgeTransfer("one_way:p1", detach_teacher=False, names=[p.name for p in three])(
        outputs
    )
    (result.total - sum(output.task_loss for output in outputs)).backward()
    assert any(p.grad.abs().sum() > 0 for p in three[1].module.parameters())


def test_equal_peers_and_empty_maps_transfer_nothing():
    one, two = (peer_of(seeded(Deep, 0), name) for name in ("a", "b"))
    other = peer_of(seeded(Flat, 1), "c")
    batch = batch_for([one.view, other.view])
    transfer = KnowledgeTransfer("best", names=["a", "b"])
    assert transfer([one.forward(batch), two.forward(batch)]).transfer_loss.sum() == 0
    batch.maps.zero_()
    result = KnowledgeTransfer("best", names=["a", "c"])([one.forward(batch), other.forward(batch)])
    assert result.total == 0 and result.roles.sum() == 0


def test_constant_and_empty_maps_give_finite_losses_and_gradients():
    peer = peer_of(seeded(Deep, 0))
    batch = batch_for([peer.view])
    batch.maps[0], batch.maps[1] = 0, 1
    nn.init.zeros_(peer.module.head.weight)
    output = peer.forward(batch)
    output.task_loss.backward()
    assert output.score.isfinite().all() and output.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in peer.module.parameters())


def test_a_map_of_zeros_has_a_finite_logarithm():
    maps = torch.tensor([[[0.0, 0.5]]], requires_grad=True)
    log_map(maps).sum().backward()
    assert log_map(maps).isfinite().all() and maps.grad.tolist() == [[[0.0, 2.0]]]


def test_the_loss_has_the_terms_that_are_asked_for():
    options, _ = options_of("vinet_s", rest=["--nss", "-0.5", "--l1", "2", "--cc", "0"])
    batch = batch_for([Deep().view], fixations=True)
    pred = torch.rand(3, 24, 32)
    found = sample_loss(options)(pred, batch.maps, batch.fixations)
    expected = (
        losses.kldiv(pred, batch.maps)
        - 0.5 * losses.nss(pred, batch.fixations)
        + 2 * losses.l1(pred, batch.maps)
    )
    torch.testing.assert_close(found, expected)


def test_autocast_keeps_losses_and_logits_in_float32():
    peer = peer_of(seeded(Deep, 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = peer.forward(batch_for([peer.view]))
    assert output.logits.dtype == output.score.dtype == output.task_loss.dtype == torch.float32


def test_confidence_needs_no_ground_truth():
    batch = batch_for([Deep().view])
    scores = []
    for maps in (batch.maps, torch.rand(3, 24, 32)):
        batch.maps = maps
        scores.append(peer_of(seeded(Deep, 0), score="confidence").forward(batch).score)
    assert torch.equal(*scores)


def test_peers_are_built_as_asked():
    toy = "tests.saliency.toy"
    run, specs = options_of(
        f"{toy}:Deep,lr=1e-3,model_ema,size=16+24,stride=2,before=4,clip_grad=1",
        f"{toy}:Deep,opt=sgd,kwargs.width=6",
        f"{toy}:Flat,frozen,name=still",
        rest=["--warmup-steps", "3", "--sched", "cosine", "--grad-accum-steps", "2"],
    )
    assert [spec.name for spec in specs] == ["Deep", "Deep-2", "still"]
    modules, views = build_modules(specs)
    assert (views[0].size, views[0].stride, views[0].before) == ((16, 24), 2, 4)
    assert views[1] == modules[1].view and modules[1].head.in_channels == 6
    world = World(0, 1, 0, torch.device("cpu"))
    one, two, still = build_peers(specs, modules, views, run, world, 10)
    assert type(one.optimizer) is torch.optim.Adam and type(two.optimizer) is torch.optim.SGD
    assert one.optimizer.defaults["lr"] == 1e-3 and two.optimizer.defaults["lr"] == 1e-6
    assert one.average is not None and two.average is None
    assert one.clip is not None and two.clip is None
    assert still.frozen and still.optimizer is None and still.schedule is None
    assert one.lr == pytest.approx(1e-3 / 4)


def test_the_published_defaults():
    options, (spec,) = options_of("vinet_a")
    names = "opt lr weight_decay batch_size epochs kl cc nss similarity l1 temperature"
    assert [getattr(options, name) for name in names.split()] == (
        ["adam", 1e-6, 1e-5, 4, 100, 1.0, -1.0, 0.0, 0.0, 0.0, 1.0]
    )
    assert options.detach_teacher and not spec.frozen


def test_the_rate_is_a_function_of_the_position():
    module = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=2.0)
    schedule = StepSchedule(optimizer, lambda done: 1 / (done + 1))
    assert optimizer.param_groups[0]["lr"] == 2.0
    schedule.step_update(3)
    schedule.step(1)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_an_average_reaches_back_over_a_share_of_the_run():
    run, specs = options_of(
        "tests.saliency.toy:Flat,model_ema,name=whole",
        "tests.saliency.toy:Flat,model_ema,model-ema-span=0.5,name=own",
        "tests.saliency.toy:Flat,model_ema,model_ema_decay=0.9,name=decay",
        "tests.saliency.toy:Flat,name=none",
    )
    modules, views = build_modules(specs)
    peers = build_peers(specs, modules, views, run, World(0, 1, 0, torch.device("cpu")), 40)
    decays = [None if peer.average is None else peer.average.decay for peer in peers]
    assert decays == [0.9, 0.95, 0.9, None]  # over 10 steps of 40, over 20, as given
    with pytest.raises(OptionError, match=r"model-ema-span is 1\.5; expected a share"):
        options_of("tests.saliency.toy:Flat,model-ema-span=1.5")


def test_a_peers_own_span_goes_before_the_runs_decay():
    rest = ("--model-ema", "--model-ema-decay", "0.7")
    run, specs = options_of("tests.saliency.toy:Flat,model-ema-span=0.5", rest=rest)
    modules, views = build_modules(specs)
    (peer,) = build_peers(specs, modules, views, run, World(0, 1, 0, torch.device("cpu")), 40)
    assert peer.average.decay == 0.95


def build_synchronised(world):
    peers.DistributedDataParallel = lambda module, **rest: module  # torch's refuses it on a CPU
    world = replace(world, replicas=torch.distributed.new_group([0, 1]))
    deep = "tests.saliency.toy:Deep"
    run, specs = options_of(deep, deep + ",name=two", rest=("--sync-bn", "--model-ema"))
    modules, views = build_modules(specs)
    one, _ = build_peers(specs, modules, views, run, world, 40)
    assert one.module.body[1].process_group is world.replicas
    assert isinstance(one.average.module.body[1], nn.SyncBatchNorm)


def test_synchronised_batch_norm_among_replicas_is_averaged_too():
    launch(build_synchronised, 2)


def test_a_recipe_averages_and_lets_the_averages_teach():
    flat = "tests.saliency.toy:Flat"
    run, specs = options_of(flat, flat, rest=("--recipe", "best-known"))
    assert (run.rule, run.teachers, run.temperature) == ("mixture", "ema+own", 2.0)
    assert specs[0].options.model_ema and specs[0].options.model_ema_span == 0.25


def test_a_decay_out_of_range_is_refused():
    run, specs = options_of("tests.saliency.toy:Flat,model_ema,model_ema_decay=1.0")
    modules, views = build_modules(specs)
    with pytest.raises(OptionError, match="peer 'Flat': --model-ema-decay: decay is 1"):
        build_peers(specs, modules, views, run, World(0, 1, 0, torch.device("cpu")), 10)


@pytest.mark.parametrize(
    ("peer", "says"),
    [
        ("vinet", "model 'vinet', expected one of vinet_s, vinet_a, tmfi_net"),
        ("out/best.pth", "is a file; give it to its model: --peer MODEL,checkpoint="),
        ("tests.saliency.toy:Nobody", "cannot be imported"),
        ("tests.nowhere:Deep", "cannot be imported"),
        ("tests.saliency.toy:no_view", "without a ClipView"),
        ("tests.saliency.toy:TwoMaps", r"expected one map a clip, \[1, height, width\]"),
        ("tests.saliency.toy:Deep,kwargs.depth=3", "fails: TypeError"),
        ("tests.saliency.toy:Negative", "expected none below 0"),
        ("tests.saliency.toy:Pair", "its model gave tuple"),
        ("tests.saliency.toy:Failing", "AssertionError: not today"),
        ("tests.saliency.toy:no_file", "fails: FileNotFoundError"),
        ("tests.saliency.toy:Deep,backbone=x.pth", "takes no backbone"),
        ("tests.saliency.toy:Deep,grad_checkpointing", "has no gradient checkpointing"),
        ("tests.saliency.toy:Deep,checkpoint=/nowhere.pth", "/nowhere.pth"),
        ("vinet_s,size=60+96", "multiples of 32"),
        ("tests.saliency.toy:Deep,stride=0", "stride is 0"),
    ],
)
def test_models_that_cannot_be_built_are_named(peer, says):
    from common.checkpoint import CheckpointError

    _, specs = options_of(peer)
    with pytest.raises((ModelError, OptionError, CheckpointError), match=says):
        build_modules(specs)


def test_a_view_is_tried_without_computing():
    model = create_model("vinet_a")
    check_view(model, VIEWS["vinet_a"], "a")
    assert next(model.parameters()).device.type == "cpu" and model.training


def test_named_views_choose_frames_and_leave_the_size():
    _, specs = options_of("vinet_a,view=vinet_a_original,size=64+104")
    _, (view,) = build_modules(specs)
    assert (view.before, view.stride, view.size) == (31, 2, (64, 104))
    assert view.mean == VIEWS["vinet_a"].mean


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--peer", "vinet_s"], "no data"),
        (["--data-root", "/d"], "no peers: give --peer"),
        (["--data-root", "/d", "--peer", "vinet_s,lrr=1"], "unknown key 'lrr'; did you mean lr"),
        (["--data-root", "/d", "--peer", "vinet_s,lr"], "'lr' is not key=value"),
        (["--data-root", "/d", "--peer", "vinet_s,size=64"], "size"),
        (["--data-root", "/d", "--peer", "vinet_s,frozen=maybe"], "expected true or false"),
        (["--data-root", "/d", "--peer", "a,name=x", "--peer", "b,name=x"], "two peers are named"),
        (["--data-root", "/d", "--peer", "vinet_s", "--rule", "bets"], "bets"),
        (["--data-root", "/d", "--peer", "vinet_s", "--batch-size", "0"], "--batch-size is 0"),
        (["--data-root", "/d", "--peer", "vinet_s", "--blur", "4"], "--blur is 4"),
        (["--data-root", "/d", "--peer", "vinet_s", "--kl", "0", "--cc", "0"], "every weight"),
        (
            ["--data-root", "/d", "--peer", "vinet_s", "--metrics", "cc", "--eval-metric", "nss"],
            "nss",
        ),
        (["--data-root", "/d", "-c", "/nowhere.yaml"], "no such config file"),
    ],
)
def test_wrong_arguments_are_named(arguments, says):
    with pytest.raises(OptionError, match=says):
        parse("dhf1k", "train_dhf1k", arguments)


def test_yaml_under_flags(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "data-root: /d\nlr: 1e-3\nmodel_ema: true\npeers:\n- {model: vinet_s, frozen: true}\n"
        "- tmfi_net,lr=0.5\n"
    )
    options, specs = parse("dhf1k", "train_dhf1k", ["-c", str(path), "--lr", "0.1"])
    assert (options.lr, options.model_ema, specs[0].frozen) == (0.1, True, True)
    assert [spec.options.lr for spec in specs] == [0.1, 0.5]
    path.write_text("epoch: 3\n")
    with pytest.raises(OptionError, match="unknown option 'epoch'; did you mean epochs"):
        parse("dhf1k", "train_dhf1k", ["-c", str(path)])


def test_the_other_scripts_have_their_data_set():
    parser = build_parser(None, "train")
    options = parser.parse_args(["--dataset", "ucf_sports", "--data-root", "/d", "--peer", "a"])
    assert options.dataset == "ucf_sports" and len(read_peers(parser, options)) == 1
