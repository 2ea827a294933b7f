"""Peers in processes of their own make the joint engine's step; so do teams of replicas."""

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from common import distributed
from common.checkpoint import CheckpointError, load_run, read_weights
from common.distributed import World
from common.engine import PeerParallelEngine, build_engine
from common.peers import PeerGroup, RemotePeer
from common.ranks import SavedRanks
from common.roles import NonFiniteError
from common.transfer import KnowledgeTransfer
from tests.common.test_distributed import ShardedLoader
from tests.common.test_ema_teachers import Ema
from tests.common.toy import HERE, ToyEvaluator, make_batch, make_peers, make_trainer
from tests.launch import launch


def seated_group(world, peers):
    return PeerGroup(
        [p if world.holds(i) else RemotePeer(p.name, p.frozen) for i, p in enumerate(peers)]
    )


def steps(world, folder, count, rule, detach, frozen, accumulate, teachers="peers"):
    """Make a few steps; keep each peer's weights and what the objective said."""
    world = distributed.seat_peers(world, count) if world.size > 1 else world
    peers = seated_group(world, make_peers(count, frozen=frozen))
    for peer in peers.here:
        if teachers != "peers" and not peer.frozen:
            peer.average = Ema(peer.module)
        peer.distribute(world)
    transfer = KnowledgeTransfer(
        rule, 2.0, 0.7, detach, names=peers.names, frozen=peers.frozen, teachers=teachers,
        classes="all" if detach else "non-target",
    )  # fmt: skip
    name = "peer-parallel" if world.seats > 1 else "joint"
    engine = build_engine(name, peers, transfer, world)
    told = []
    for step in range(3):
        for part in range(accumulate):
            x, y = make_batch(16 - 4 * step, seed=10 * step + part)
            mine = x[world.shard :: world.shards], y[world.shard :: world.shards]
            result = engine.step(
                mine, step=step, share=1 / accumulate, update=part == accumulate - 1
            )
            told.append([result.total, result.task_loss, result.transfer_loss])
            if world.shards == 1:
                told[-1] += [result.roles, result.score, result.kl, result.correct]
    if world.leads:
        for peer in peers.here:
            torch.save(peer.best_module.state_dict(), folder / f"{peer.name}.pt")
        torch.save(told, folder / f"told-{world.seat}.pt")


@pytest.mark.parametrize(
    ("count", "size", "rule", "detach", "frozen", "accumulate", "teachers"),
    [
        (2, 2, "best", True, (), 1, "peers"),
        (2, 2, "mutual", False, (), 2, "peers"),
        (3, 3, "random", True, (), 1, "peers"),
        (3, 3, "better", True, ("p1",), 2, "peers"),
        (4, 4, "best", False, (), 1, "peers"),
        (2, 4, "best", True, (), 2, "peers"),
        (2, 2, "none", True, (), 1, "peers"),
        (3, 3, "mixture", True, ("p1",), 2, "ema+own"),
        (2, 4, "best", True, (), 1, "ema"),
        (2, 2, "none", True, (), 1, "ema"),
    ],
)
def test_processes_equal_the_joint_engine(
    tmp_path, count, size, rule, detach, frozen, accumulate, teachers
):
    one, many = tmp_path / "one", tmp_path / "many"
    for folder in (one, many):
        folder.mkdir()
    steps(HERE, one, count, rule, detach, frozen, accumulate, teachers)
    launch(steps, size, many, count, rule, detach, frozen, accumulate, teachers)
    moved = 0
    for i, peer in enumerate(make_peers(count, frozen=frozen)):
        joint, other = (torch.load(folder / f"p{i}.pt") for folder in (one, many))
        torch.testing.assert_close(other, joint)
        moved += not torch.equal(joint["0.weight"], peer.module.state_dict()["0.weight"])
    assert moved == count - len(frozen)
    if size == count:  # with replicas, each tells of its own share
        joint = torch.load(one / "told-0.pt")
        for seat in range(count):
            torch.testing.assert_close(torch.load(many / f"told-{seat}.pt"), joint)


class Seated(ToyEvaluator):
    """Every process measures its own peer."""

    def __init__(self, world):
        self.world = world

    def evaluate(self, peers):
        return distributed.merge_over_seats(super().evaluate(peers.here), self.world)


def train(world, folder, count, epochs, resume, dropout=0.0):
    if world.size > 1:
        world = distributed.seat_peers(world, count)
    torch.manual_seed(world.rank)
    peers = seated_group(world, make_peers(count, dropout=dropout))
    for peer in peers.here:
        peer.distribute(world)
    name = "peer-parallel" if world.seats > 1 else "joint"
    loader = ShardedLoader(world)
    trainer = make_trainer(
        folder, peers=peers, loader=loader, world=world, epochs=epochs, save_every=2, keep=9
    )
    trainer.engine = build_engine(name, peers, trainer.transfer, world)
    trainer.evaluator = Seated(world)
    written = []
    trainer.writers = [lambda scalars, step: written.append(set(scalars))]
    if resume:
        trainer.resume(load_run(resume))
    trainer.fit()
    if world.is_main:
        assert {f"p{i}/lr" for i in range(count)} <= set().union(*written)


def files_of(folder, count):
    return {
        f"p{i}/{which}": read_weights(folder / f"p{i}" / f"{which}.safetensors")
        for i in range(count)
        for which in ("best", "last")
    }


@pytest.mark.parametrize(("count", "size"), [(2, 2), (3, 3), (2, 4)])
def test_a_run_equals_the_joint_one(tmp_path, count, size):
    train(HERE, tmp_path / "one", count, 2, None)
    launch(train, size, tmp_path / "many", count, 2, None)
    one, many = load_run(tmp_path / "one"), load_run(tmp_path / "many")
    torch.testing.assert_close(
        files_of(tmp_path / "many", count), files_of(tmp_path / "one", count)
    )
    for name, state in one["peers"].items():
        torch.testing.assert_close(many["peers"][name]["module"], state["module"])
        torch.testing.assert_close(
            many["peers"][name]["optimizer"]["state"], state["optimizer"]["state"]
        )
    assert list(many["peers"]) == list(one["peers"])
    assert many["progress"]["best"] == one["progress"]["best"]
    for before, after in zip(one["progress"]["lessons"], many["progress"]["lessons"], strict=True):
        assert before.keys() == after.keys()
        assert after == pytest.approx(before, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_resumes_bit_for_bit(tmp_path, size):
    launch(train, size, tmp_path / "whole", 2, 2, None, 0.3)
    middle = tmp_path / "whole" / "run-00001-00000002.pt"
    launch(train, size, tmp_path / "again", 2, 2, middle, 0.3)
    whole, again = (files_of(tmp_path / name, 2) for name in ("whole", "again"))
    for name, weights in whole.items():
        assert all(torch.equal(x, again[name][key]) for key, x in weights.items())


def test_a_run_goes_on_under_the_other_engine(tmp_path):
    """From the middle of an epoch, both ways, without drawing: the same weights to rounding."""
    train(HERE, tmp_path / "joint", 2, 2, None)
    launch(train, 2, tmp_path / "seated", 2, 2, None)
    middle = "run-00001-00000002.pt"
    launch(train, 2, tmp_path / "to-seated", 2, 2, tmp_path / "joint" / middle)
    train(HERE, tmp_path / "to-joint", 2, 2, tmp_path / "seated" / middle)
    whole = files_of(tmp_path / "joint", 2)
    for name in ("to-seated", "to-joint"):
        torch.testing.assert_close(files_of(tmp_path / name, 2), whole)
        lessons = [load_run(tmp_path / n)["progress"]["lessons"] for n in (name, "joint")]
        for row, other in zip(*lessons, strict=True):
            assert row == pytest.approx(other, rel=1e-4, abs=1e-6)


def other_logits(world, folder):
    world = distributed.seat_peers(world, 2)
    group = make_peers(2)
    if world.seat == 1:
        module = nn.Linear(8, 7)  # classes of its own
        group[1].module = group[1].model = module
    peers = seated_group(world, group)
    engine = build_engine(
        "peer-parallel", peers, KnowledgeTransfer("best", names=peers.names), world
    )
    with pytest.raises(ValueError, match=r"p0: .*5.*p1: .*7"):
        engine.step(make_batch(4), step=0)
    (folder / str(world.rank)).touch()


def test_peers_of_other_classes_are_named_on_every_rank(tmp_path):
    launch(other_logits, 2, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def three_for_two(world, folder):
    with pytest.raises(ValueError, match="2 peers in 3 processes; expected a multiple of 2"):
        distributed.seat_peers(world, 2)
    (folder / str(world.rank)).touch()


def test_processes_must_be_a_multiple_of_the_peers(tmp_path):
    launch(three_for_two, 3, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ValueError, match="2 peers in 1 processes"):
        distributed.seat_peers(HERE, 2)


def test_an_engine_wants_one_peer_here():
    peers = make_peers(2)
    with pytest.raises(ValueError, match="2 peers in this process"):
        PeerParallelEngine(peers, KnowledgeTransfer("best", names=peers.names), HERE.device)
    remote = RemotePeer("far")
    assert not remote.frozen
    with pytest.raises(RuntimeError, match="'far' is held by another process"):
        remote.forward(None)


def broken(world, folder):
    world = distributed.seat_peers(world, 2)
    peers = seated_group(world, make_peers(2))
    trainer = make_trainer(folder, peers=peers, world=world)
    if world.seat == 1:
        with torch.no_grad():
            next(peers[1].module.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="weights of p1 are not finite"):
        trainer.save()
    (folder / f"told-{world.rank}").touch()


def test_broken_weights_end_all_ranks_and_are_not_saved(tmp_path):
    launch(broken, 2, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["told-0", "told-1"]
    with pytest.raises(CheckpointError, match="no run file"):
        load_run(tmp_path)


def scaling(*scales):
    return [{"scaler": GradScaler("cpu", init_scale=scale).state_dict()} for scale in scales]


@pytest.mark.parametrize(
    ("ranks", "seats", "world", "scale"),
    [
        (scaling(8.0, 2.0), 2, World(1, 2, 1, HERE.device, seats=2), 2.0),  # its seat's own
        (scaling(8.0, 8.0, 2.0, 2.0), 2, World(1, 2, 1, HERE.device, seats=2), 2.0),
        (scaling(8.0, 2.0), 2, HERE, 2.0),  # shared from now on: no peer overflows
        (scaling(4.0), 1, World(1, 2, 1, HERE.device, seats=2), 4.0),
        ([{}, {}], 1, World(1, 2, 1, HERE.device, seats=2), 16.0),  # of an older run file
    ],
)
def test_the_scale_to_go_on_with(ranks, seats, world, scale):
    scaler = GradScaler("cpu")
    SavedRanks(ranks, seats).load_scaler(scaler, world, scaling(16.0)[0]["scaler"])
    assert scaler.get_scale() == scale


def test_a_scale_begins_anew_where_the_run_had_none(caplog):
    for scaler in (GradScaler("cpu", init_scale=64.0), GradScaler("cpu", enabled=False)):
        SavedRanks([{"scaler": {}}]).load_scaler(scaler, HERE, {})
    assert scaler.state_dict() == {}
    (told,) = caplog.messages
    assert told.endswith("the scale begins anew at 64")
