"""Two gloo processes equal one: losses, gradients, weights, ledger, resume."""

import copy
import os
import signal
import socket
import time

import pytest
import torch

from common import distributed
from common.checkpoint import CheckpointError, load_run
from common.engine import ENGINES, JointEngine
from common.peers import UnreachedError
from common.ranks import refuse_other_moments
from common.transfer import KnowledgeTransfer
from tests.children import in_a_child
from tests.common.toy import HERE, ToyLoader, make_batch, make_peers, make_trainer
from tests.launch import launch


class ShardedLoader(ToyLoader):
    """Rank r sees every size-th sample of the common batch."""

    def __init__(self, world, batches=4, size=16):
        super().__init__(batches, size)
        self.world = world

    def __iter__(self):
        for x, y in super().__iter__():
            part = slice(self.world.shard, None, self.world.shards)
            yield x[part], y[part]


def steps(world, path, rule):
    peers = make_peers(3, frozen=("p2",))
    for peer in peers:
        peer.distribute(world)
    engine = JointEngine(
        peers, KnowledgeTransfer(rule, names=peers.names, frozen=["p2"]), HERE.device
    )
    x, y = make_batch(16)
    mine = x[world.rank :: world.size], y[world.rank :: world.size]
    half = len(mine[0]) // 2
    first = engine.step(tuple(t[:half] for t in mine), step=0, share=0.5, update=False)
    second = engine.step(tuple(t[half:] for t in mine), step=0, share=0.5)
    losses = torch.stack([first.total, second.total])
    distributed.sum_over_ranks(losses)
    for peer in peers[:2]:
        peer.optimizer.zero_grad()
    result = engine.transfer([peer.forward(mine) for peer in peers])
    result.total.backward()
    grads = [p.grad for peer in peers[:2] for p in peer.module.parameters()]
    if world.is_main:
        weights = [p.detach() for peer in peers for p in peer.module.parameters()]
        torch.save({"loss": losses / world.size, "grads": grads, "weights": weights}, path)


@pytest.mark.parametrize("rule", ["best", "mutual"])
def test_two_processes_equal_one_in_loss_and_gradients(tmp_path, rule):
    steps(HERE, tmp_path / "one.pt", rule)
    launch(steps, 2, tmp_path / "two.pt", rule)
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    torch.testing.assert_close(one["loss"].sum(), two["loss"].sum())
    assert any(g.abs().sum() > 0.01 for g in one["grads"])
    torch.testing.assert_close(one["grads"], two["grads"])
    torch.testing.assert_close(one["weights"], two["weights"])


def idle_step(world, path, engine):
    peers = make_peers(2)
    peers[1].module.register_parameter("extra", torch.nn.Parameter(torch.zeros(2)))
    for peer in peers:
        peer.distribute(world)
    with pytest.raises(UnreachedError, match="peer 'p1': no gradient reaches extra, which"):
        ENGINES[engine](peers, KnowledgeTransfer("mutual"), HERE.device).step(make_batch(4), step=0)
    (path / str(world.rank)).touch()


@pytest.mark.parametrize("engine", ["joint", "two-pass"])
def test_parameters_that_no_gradient_reaches_are_named_in_the_first_step(tmp_path, engine):
    launch(idle_step, 2, tmp_path, engine)
    assert len([*tmp_path.iterdir()]) == 2


def test_one_process_needs_no_gradient_of_every_parameter():
    peers = make_peers(2)
    peers[1].module.register_parameter("extra", torch.nn.Parameter(torch.zeros(2)))
    JointEngine(peers, KnowledgeTransfer("mutual"), HERE.device).step(make_batch(4), step=0)


def train(world, folder, epochs, resume):
    torch.manual_seed(world.rank)
    peers = make_peers(3, dropout=0.3 if folder.name.startswith("dropout") else 0.0)
    for peer in peers:
        peer.distribute(world)
    trainer = make_trainer(
        folder, peers=peers, loader=ShardedLoader(world), world=world, epochs=epochs, save_every=2
    )
    if resume:
        trainer.resume(load_run(resume))
    trainer.fit()


def test_a_run_of_two_processes_equals_a_run_of_one(tmp_path):
    train(HERE, tmp_path / "one", 2, None)
    launch(train, 2, tmp_path / "two", 2, None)
    one, two = load_run(tmp_path / "one"), load_run(tmp_path / "two")
    for name in one["peers"]:
        torch.testing.assert_close(one["peers"][name]["module"], two["peers"][name]["module"])
    assert one["progress"]["lessons"][0].keys() == two["progress"]["lessons"][0].keys()
    for key, value in one["progress"]["lessons"][0].items():
        assert two["progress"]["lessons"][0][key] == pytest.approx(value, rel=1e-4, abs=1e-6)
    assert len(two["ranks"]) == 2


def test_two_processes_resume_bit_for_bit(tmp_path):
    launch(train, 2, tmp_path / "dropout", 2, None)
    middle = tmp_path / "dropout" / "run-00001-00000002.pt"
    assert middle.exists()
    launch(train, 2, tmp_path / "dropout-again", 2, middle)
    whole, again = load_run(tmp_path / "dropout"), load_run(tmp_path / "dropout-again")
    for name in whole["peers"]:
        for key, value in whole["peers"][name]["module"].items():
            assert torch.equal(value, again["peers"][name]["module"][key])


class Average:
    """An average of weights and running statistics."""

    def __init__(self, module):
        self.module = copy.deepcopy(module)

    def update(self, model, step=None):
        with torch.no_grad():
            for mine, new in zip(
                self.module.state_dict().values(), model.state_dict().values(), strict=True
            ):
                if mine.is_floating_point():
                    mine.lerp_(new, 0.2)


def batch_norm(world, folder, resume, broadcast, engine):
    from torch import nn

    from common.peers import PeerGroup
    from tests.common.toy import CLASSES, FEATURES, ToyPeer

    peers = []
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        module = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, CLASSES))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        peers.append(ToyPeer(name, module, optimizer=optimizer, average=Average(module)))
        peers[-1].distribute(world, broadcast_buffers=broadcast)
    trainer = make_trainer(
        folder,
        peers=PeerGroup(peers),
        loader=ShardedLoader(world),
        world=world,
        epochs=2,
        save_every=2,
        keep=9,
    )
    trainer.engine = ENGINES[engine](trainer.peers, trainer.transfer, HERE.device)
    if resume:
        trainer.resume(load_run(resume))
    trainer.fit()
    states = [m.state_dict() for p in peers for m in (p.module, p.average.module)]
    torch.save(states, folder / f"rank-{world.rank}.pt")


def same_states(folder, other):
    for rank in range(2):
        one, two = (torch.load(f / f"rank-{rank}.pt") for f in (folder, other))
        for a, b in zip(one, two, strict=True):
            assert all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("broadcast", [True, False])
def test_buffers_of_every_rank_resume(tmp_path, broadcast):
    launch(batch_norm, 2, tmp_path / "whole", None, broadcast, "joint")
    for at in ("00000-00000004", "00001-00000002"):  # after an epoch's last batch; in its middle
        launch(batch_norm, 2, tmp_path / at, tmp_path / f"whole/run-{at}.pt", broadcast, "joint")
        same_states(tmp_path / "whole", tmp_path / at)
    first = torch.load(tmp_path / "whole" / "rank-0.pt")[0]["0.running_mean"]
    assert not torch.equal(first, torch.load(tmp_path / "whole" / "rank-1.pt")[0]["0.running_mean"])


def test_two_pass_shares_buffers_as_joint_does(tmp_path):
    for engine in ("joint", "two-pass"):
        launch(batch_norm, 2, tmp_path / engine, None, True, engine)
    for rank in range(2):
        one, two = (torch.load(tmp_path / e / f"rank-{rank}.pt") for e in ("joint", "two-pass"))
        torch.testing.assert_close(one, two)


def other_moments(world, moments):
    with pytest.raises(
        CheckpointError, match=r"process 1 would start the run anew, process 0 go on"
    ):
        refuse_other_moments(*moments[world.rank])
    refuse_other_moments(3, 20)


def test_ranks_that_would_not_go_on_from_one_moment_are_refused():
    launch(other_moments, 2, [(3, 20), ()])


def test_one_device_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert str(distributed.start("cuda:3").device) == "cuda:3"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes of this machine; give --device cuda,"):
        distributed.start("cuda:0")


def _ask(world, folder):
    first = distributed.first_to("tell")
    (folder / str(world.rank)).write_text(f"{first:d}{distributed.first_to('tell'):d}")


def test_one_rank_is_the_first(tmp_path):
    launch(_ask, 3, tmp_path)
    told = sorted((tmp_path / str(rank)).read_text() for rank in range(3))
    assert told == ["00", "00", "10"]
    assert distributed.first_to("tell") and distributed.first_to("tell")  # alone


def test_a_process_whose_torchrun_is_gone_before_it_begins_is_refused(monkeypatch):
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConnectionError, match=f"127.0.0.1:{port}.* the torchrun .* is gone"):
            distributed.start("cpu")


@pytest.mark.parametrize("torchrun", [True, False])
def test_a_process_ends_with_the_torchrun_that_is_killed(torchrun):
    def launcher():
        if not os.fork():
            if torchrun:
                os.environ["TORCHELASTIC_RUN_ID"] = "none"
            distributed.end_with_torchrun(0.01)
            os.write(told, b"x")
            time.sleep(1)
            os.write(told, b"y")
            os._exit(0)
        os.read(begun, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    begun, told = os.pipe()
    assert in_a_child(launcher) == -signal.SIGKILL
    os.close(told)
    assert os.read(begun, 1) == (b"" if torchrun else b"y")  # the end of the last that writes
    os.close(begun)
