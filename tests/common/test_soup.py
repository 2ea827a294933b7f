"""Soups: averages by hand, batch norm, who chooses, resume, processes."""

import json
import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from common import distributed
from common.checkpoint import CheckpointError, load_run, read_metadata, read_weights
from common.engine import build_engine
from common.outputs import finish
from common.peers import PeerGroup
from common.soup import ALPHAS, Soup, average_weights, estimate_statistics
from tests.common.test_distributed import ShardedLoader
from tests.common.test_guard import Average
from tests.common.test_peer_parallel import Seated, seated_group
from tests.common.test_trainer import assert_same
from tests.common.toy import CLASSES, FEATURES, HERE, ToyPeer, make_batch, make_peers, make_trainer
from tests.launch import launch


def test_an_average_by_hand_is_exact_at_its_ends_and_takes_integers_from_the_best():
    start = {"w": torch.tensor([0.0, 0.1, 3.0]), "n": torch.tensor(3)}
    best = {"w": torch.tensor([4.0, 0.3, -1.0]), "n": torch.tensor(7)}
    found = average_weights(start, best, 0.25)
    torch.testing.assert_close(found["w"], torch.tensor([1.0, 0.15, 2.0]))
    assert found["n"] == 7
    for alpha, end in ((0.0, start), (1.0, best)):
        assert torch.equal(average_weights(start, best, alpha)["w"], end["w"])
    halves = [{"w": torch.tensor([x], dtype=torch.float16)} for x in (1.0, 1.001)]
    assert average_weights(*halves, 0.5)["w"].dtype == torch.float16


@pytest.mark.parametrize(
    ("chosen", "lower", "alpha"),
    [
        ([1, 2, 3, 2, 1], False, 0.5),
        ([1, 2, 3, 2, 1], True, 1.0),
        ([3, 2, 3, 2, 3], False, 1.0),
        ([math.nan, math.nan, 1, 0, math.nan], False, 0.5),
        ([9, math.nan, 1, 0, 2], False, 0.0),
    ],
)
def test_one_half_chooses_and_the_other_is_not_asked(chosen, lower, alpha):
    soup = Soup("p", "m")
    for share, value in zip(ALPHAS, chosen, strict=True):
        soup.add(share, ({"p/m": value}, {"p/m": 100 * share}), lower)
    assert soup.alpha == alpha and soup.measured_at(alpha) == 100 * alpha


def normed_peers(count=2):
    peers = []
    for i in range(count):
        torch.manual_seed(i)
        module = nn.Sequential(
            nn.Linear(FEATURES, 8),
            nn.BatchNorm1d(8, momentum=0.3),
            nn.ReLU(),
            nn.Linear(8, CLASSES),
        )
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        peers.append(ToyPeer(f"p{i}", module, optimizer=optimizer))
    return peers


def test_statistics_are_those_that_torch_estimates():
    (peer,) = normed_peers(1)
    expected = normed_peers(1)[0].module
    batches = [make_batch(16, seed) for seed in range(5)]
    peer.forward(batches[0])
    expected(batches[0][0])
    counted = int(peer.module[1].num_batches_tracked)
    estimate_statistics([peer], HERE, lambda: iter(batches))
    update_bn([x for x, _ in batches], expected)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(peer.module[1], name), getattr(expected[1], name))
    assert (peer.module[1].momentum, int(peer.module[1].num_batches_tracked)) == (0.3, counted)


def test_without_batch_norm_no_batch_is_read():
    def batches():
        raise AssertionError("read")

    estimate_statistics(make_peers(2), HERE, batches)


def halves(peers):
    """Measure the peers that are here on two sets of points."""
    found = []
    for seed in (98, 99):
        x, y = make_batch(100, seed)
        with torch.no_grad():
            modules = {peer.name: peer.best_module.eval() for peer in peers.here}
            right = {name: (module(x).argmax(1) == y) for name, module in modules.items()}
        found.append({f"{n}/top1": 100 * r.float().mean().item() for n, r in right.items()})
    return tuple(found)


def soup_trainer(folder, peers=None, **plan):
    trainer = make_trainer(folder, peers=peers or make_peers(3, frozen=("p1",)), **plan)
    trainer.halves = halves
    return trainer


@pytest.mark.parametrize("averages", [False, True])
def test_a_run_leaves_the_average_that_one_half_chose(tmp_path, averages):
    peers = make_peers(3, frozen=("p1",))
    for peer in peers if averages else ():
        peer.average = None if peer.frozen else Average(peer.module)
    trainer = soup_trainer(tmp_path, peers)
    trainer.fit()
    assert [soup.peer for soup in trainer.soups] == ["p0", "p2"]
    for soup in trainer.soups:
        files = {w: tmp_path / soup.peer / f"{w}.safetensors" for w in ("start", "best", "soup")}
        start, best, own = map(read_weights, files.values())
        assert_same(own, average_weights(start, best, soup.alpha))
        assert soup.alphas == list(ALPHAS)
        assert soup.alpha == max(zip(soup.chosen_by, soup.alphas, strict=True))[1]
        peer = peers[peers.names.index(soup.peer)]
        last = read_weights(tmp_path / soup.peer / "last.safetensors")
        assert_same(peer.best_module.state_dict(), last)  # left as it was
        peer.average = None
        peer.module.load_state_dict(own, strict=True)
        assert [half[f"{soup.peer}/top1"] for half in halves(peers)] == [
            soup.chosen_by[ALPHAS.index(soup.alpha)],
            soup.measured_at(soup.alpha),
        ]
        told = json.loads((tmp_path / soup.peer / "soup.json").read_text())
        assert told["alpha"] == soup.alpha and told["measured"] == soup.measured
        assert json.loads(read_metadata(files["soup"])["soup_alpha"]) == soup.alpha
    assert not (tmp_path / "p1" / "soup.safetensors").exists()
    page = finish(trainer, {}).read_text()
    assert "<h2>Soup" in page and "half that chose" in page


def test_a_resumed_run_has_its_start_at_hand(tmp_path):
    whole = soup_trainer(tmp_path / "whole", keep=9)
    whole.fit()
    again = soup_trainer(tmp_path / "again", make_peers(3, seed=7, frozen=("p1",)))
    again.resume(load_run(tmp_path / "whole" / "run-00001-00000000.pt"), source=tmp_path / "whole")
    again.fit()
    assert again.soups == whole.soups
    (tmp_path / "whole" / "p2" / "start.safetensors").unlink()
    late = soup_trainer(tmp_path / "late")
    with pytest.raises(CheckpointError, match=r"p2/start.safetensors: .*--soup"):
        late.resume(load_run(tmp_path / "whole"), source=tmp_path / "whole")


def cook(world, folder, engine):
    if engine == "peer-parallel":
        world = distributed.seat_peers(world, 2)
    peers = seated_group(world, PeerGroup(normed_peers()))
    for peer in peers.here:
        peer.distribute(world, broadcast_buffers=False)
    loader = ShardedLoader(world)
    trainer = make_trainer(folder, peers=peers, loader=loader, world=world, epochs=2)
    trainer.engine = build_engine(engine, peers, trainer.transfer, world)
    trainer.evaluator = Seated(world)
    trainer.halves = lambda peers: tuple(
        distributed.merge_over_seats(half, world) for half in halves(peers)
    )
    trainer.fit()


def test_each_process_of_a_peer_makes_its_soup(tmp_path):
    cook(HERE, tmp_path / "one", "joint")
    launch(cook, 2, tmp_path / "seated", "peer-parallel")
    for name in ("p0", "p1"):
        one, seated = (
            read_weights(tmp_path / f / name / "soup.safetensors") for f in ("one", "seated")
        )
        torch.testing.assert_close(seated, one)
        soups = [
            json.loads((tmp_path / f / name / "soup.json").read_text()) for f in ("one", "seated")
        ]
        assert soups[1] == soups[0]


def statistics(world, folder):
    (peer,) = normed_peers(1)
    peer.distribute(world)
    estimate_statistics([peer], world, lambda: iter([make_batch(16, world.rank)]))
    torch.save(peer.module[1].running_mean, folder / f"{world.rank}.pt")


def test_ranks_take_the_mean_of_their_statistics(tmp_path):
    launch(statistics, 2, tmp_path)
    (alone,) = normed_peers(1)
    estimate_statistics([alone], HERE, lambda: iter([make_batch(16, 0), make_batch(16, 1)]))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, alone.module[1].running_mean)
