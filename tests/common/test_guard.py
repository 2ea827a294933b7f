"""The guard: when it acts, what a rollback leaves, in every engine and after a resume."""

import copy
import csv
import math

import pytest
import torch
import torch.nn.functional as F

from common import distributed
from common.checkpoint import list_runs, load_run, read_weights
from common.engine import build_engine
from common.guard import STOPPED, UNTAUGHT, WARNED, Bounds, Guard
from common.outputs import finish
from common.transfer import KnowledgeTransfer
from tests.common.test_distributed import ShardedLoader
from tests.common.test_peer_parallel import Seated, seated_group
from tests.common.test_trainer import assert_same, final
from tests.common.toy import (
    CLASSES,
    HERE,
    ToyEvaluator,
    ToyLoader,
    make_batch,
    make_peers,
    make_trainer,
)
from tests.launch import launch

ROLLBACK = Bounds("rollback", 10.0, patience=1)


def guard_of(bounds, lower_is_better=False, peers=None):
    peers = peers or make_peers(2)
    return Guard(peers, KnowledgeTransfer(names=peers.names), bounds, "m", lower_is_better)


def looks(guard, values, other=60.0):
    """Show the guard a start of 60 and then values of p0; return its marks and the events."""
    rows = [{"p0/m": x, "p1/m": other, "p0/negative_flips": 3.0} for x in (60.0, *values)]
    found = [guard.look(i, row, rows[0]) for i, row in enumerate(rows) if i]
    return [marks.get("p0/beyond", 0) for marks in found], guard.events


def test_it_acts_after_so_many_evaluations_in_a_row_beyond_the_bound():
    marks, events = looks(guard_of(Bounds("warn", 1.0, patience=2)), [58, 59, 58.9, 58, 57, 61, 50])
    assert marks == [1, 0, 1, 2, 3, 0, 1]
    assert [(e["peer"], e["epoch"], e["action"]) for e in events] == [("p0", 5, WARNED)]
    assert (events[0]["start"], events[0]["now"], events[0]["evaluations"]) == (60.0, 57.0, 3)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_several_ranks_tells_what_all_find(monkeypatch, caplog, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    assert looks(guard_of(Bounds("warn", 1.0, patience=1)), [50])[0] == [1]
    assert caplog.text.count("p0 got worse") == 1 - rank


def test_lower_may_be_better_and_no_number_is_worse():
    assert looks(guard_of(Bounds("warn", 1.0), True), [61, 61.1, 50])[0] == [0, 1, 0]
    assert looks(guard_of(Bounds("warn", 1.0)), [math.nan, 60])[0] == [1, 0]


def test_flips_count_where_they_are_bounded():
    assert looks(guard_of(Bounds("warn", 1.0, flips=3.0)), [60])[0] == [0]
    marks, events = looks(guard_of(Bounds("warn", 1.0, flips=2.9, patience=1)), [65])
    assert (marks, events[-1]["metric"], events[-1]["now"]) == ([1], "negative_flips", 3.0)


def test_nobody_is_watched_where_it_is_off_nor_a_frozen_peer():
    assert looks(guard_of(Bounds()), [0, 0, 0]) == ([0, 0, 0], [])
    frozen = guard_of(Bounds("warn"), peers=make_peers(2, frozen=("p0",)))
    assert looks(frozen, [0, 0, 0]) == ([0, 0, 0], [])


@pytest.mark.parametrize(
    "wrong",
    [{"policy": "stop"}, {"drop": 0}, {"drop": math.nan}, {"patience": 0}, {"flips": -1.0}],
)
def test_bounds_out_of_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        Bounds(**wrong)


class Spoilt(ToyLoader):
    """Right labels for one epoch, wrong ones from then on: every peer gets worse."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield x, (y + (self.epoch > 0)) % CLASSES


class Average:
    """An average of weights that lags behind."""

    def __init__(self, module):
        self.module = copy.deepcopy(module)

    @torch.no_grad()
    def update(self, model, step=None):
        for mine, new in zip(self.module.parameters(), model.parameters(), strict=True):
            mine.lerp_(new, 0.5)


def trained(peers):
    """Let peers know the task, so that wrong labels make them worse than their start."""
    for peer in peers:
        optimizer = torch.optim.SGD(peer.module.parameters(), lr=0.1, momentum=0.9)
        for seed in range(60):
            x, y = make_batch(32, seed=500 + seed)
            F.cross_entropy(peer.module(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return peers


def averaged(peers):
    for peer in peers:
        peer.average = Average(peer.module)
    return peers


def spoilt_trainer(folder, peers=None, engine="joint", **plan):
    peers = peers or trained(make_peers(3, dropout=0.3))
    plan = {"guard": ROLLBACK, "epochs": 9, "loader": Spoilt(batches=12), **plan}
    trainer = make_trainer(folder, peers=peers, **plan)
    trainer.engine = build_engine(engine, peers, trainer.transfer, HERE)
    return trainer


@pytest.mark.parametrize("engine", ["joint", "two-pass"])
@pytest.mark.parametrize("averages", [False, True])
def test_a_peer_goes_back_to_its_best_is_taught_no_more_and_then_frozen(tmp_path, engine, averages):
    peers = trained(make_peers(3))
    peers = averaged(peers) if averages else peers
    trainer = spoilt_trainer(tmp_path, peers, engine, loader=Spoilt(batches=24))
    seen = []
    step = trainer.engine.step
    trainer.engine.step = lambda *a, **k: seen.append(step(*a, **k)) or seen[-1]
    progress = trainer.fit()
    actions = [(e["peer"], e["epoch"], e["action"]) for e in trainer.guard.events]
    assert actions == [(n, 2, UNTAUGHT) for n in peers.names] + [
        (n, 3, STOPPED) for n in peers.names
    ]
    assert progress.epoch == 3  # nobody was left to learn
    taught = [bool(result.roles.any()) for result in seen]
    assert any(taught[:48]) and not any(taught[48:])
    for peer in peers:
        best = read_weights(tmp_path / peer.name / "best.safetensors")
        assert_same(read_weights(tmp_path / peer.name / "last.safetensors"), best)
        assert peer.frozen and not peer.module.training and peer.average is None
        assert progress.history[-1][f"{peer.name}/top1"] == progress.best[peer.name].value
    epochs = [row["epoch"] for row in progress.history]
    assert epochs == [0, 1, 2, 2, 3, 3]  # measured once more after going back
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [row["p1/beyond"] for row in rows] == ["", "", "1", "", "1", ""]


class Sinking(ToyEvaluator):
    """Shows p0 far below its start once after epoch 2 and once after epoch 4."""

    def __init__(self, trainer):
        self.trainer = trainer

    def evaluate(self, peers):
        found = super().evaluate(peers)
        seen = {2: 0, 4: 1}.get(self.trainer.progress.epoch)
        if seen == len(self.trainer.guard.events):
            found["p0/top1"] -= 50.0
        return found


def copies_trainer(folder, engine="joint", teachers="ema+own", seed=0):
    peers = averaged(trained(make_peers(3, seed=seed)))
    trainer = make_trainer(
        folder, peers, "mutual", guard=ROLLBACK, epochs=5, save_every=4, keep=100
    )
    trainer.transfer.teachers = teachers
    trainer.engine = build_engine(engine, peers, trainer.transfer, HERE)
    trainer.evaluator = Sinking(trainer)
    return trainer


@pytest.mark.parametrize("engine", ["joint", "two-pass"])
@pytest.mark.parametrize("teachers", ["ema", "ema+own"])
def test_a_copy_that_teaches_goes_back_with_its_peer(tmp_path, engine, teachers):
    trainer = copies_trainer(tmp_path, engine, teachers)
    peer, kept, steps = trainer.peers[0], [], []
    step, roll_back = trainer.engine.step, trainer.guard.roll_back

    def taken_back():
        best = copy.deepcopy(trainer.guard.kept("p0").get("best"))
        if roll_back():
            kept.append(best["average"])
            average = peer.module if peer.average is None else peer.average.module
            assert_same(average.state_dict(), best["average"])
            if peer.average is not None:
                assert_same(peer.module.state_dict(), best["module"])

    def watched(batch, **rest):
        steps.append((trainer.progress.epoch, batch, step(batch, **rest)))
        return steps[-1][2]

    trainer.guard.roll_back, trainer.engine.step = taken_back, watched
    trainer.fit()
    assert [e["action"] for e in trainer.guard.events] == [UNTAUGHT, STOPPED]
    for epoch, _, result in steps:
        assert result.roles[0, 1].all() and result.roles[2, 1].all()  # it still teaches
        assert result.roles[1, 0].all() == (epoch < 2)
        assert result.roles[0, 0].all() == (epoch < 2 and teachers == "ema+own")
        assert epoch < 2 or not result.roles[:, 0].any()
    for weights, epoch in zip(kept, (2, 4), strict=True):
        first = next(k for k, (at, _, _) in enumerate(steps) if at == epoch)
        last = len(steps) if epoch == 4 else first + 1  # a peer that is frozen stays so
        copied = copy.deepcopy(peer.module)
        copied.load_state_dict(weights)
        for _, (x, y), result in steps[first:last]:
            expected = -F.cross_entropy(copied(x), y, reduction="none")
            torch.testing.assert_close(result.score[0], expected)


def test_and_a_resume_from_every_run_file_is_the_same(tmp_path):
    whole = copies_trainer(tmp_path / "whole")
    whole.fit()
    for run in list_runs(tmp_path / "whole"):
        again = copies_trainer(tmp_path / "again", seed=7)
        again.resume(load_run(run), source=tmp_path / "whole")
        again.fit()
        assert_same(final(again), final(whole))
        assert again.guard.events == whole.guard.events


def test_a_peer_that_is_not_taught_still_teaches_and_learns(tmp_path):
    peers = make_peers(2)
    transfer = KnowledgeTransfer("mutual", names=peers.names)
    transfer.untaught.append(0)
    engine = build_engine("joint", peers, transfer, HERE)
    alone = make_peers(2)
    none = build_engine("joint", alone, KnowledgeTransfer("none", names=alone.names), HERE)
    for step in range(3):
        result = engine.step(make_batch(16, step), step=step)
        none.step(make_batch(16, step), step=step)
        assert not result.roles[:, 0].any() and result.roles[0, 1].all()
    assert_same(peers[0].module.state_dict(), alone[0].module.state_dict())
    assert not torch.equal(peers[1].module[0].weight, alone[1].module[0].weight)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad])
def test_going_back_begins_the_optimizer_anew_at_its_rate(optimizer):
    def fresh():
        peer = make_peers(1)[0]
        made = optimizer(peer.module.parameters(), lr=0.1)
        return type(peer)("p0", peer.module, optimizer=made)

    peer, other = fresh(), fresh()
    start = peer.snapshot()
    for seed in range(4):
        peer.forward(make_batch(16, seed)).task_loss.backward()
        peer.optimizer.step()
        peer.optimizer.zero_grad()
    peer.optimizer.param_groups[0]["lr"] = other.optimizer.param_groups[0]["lr"] = 0.01
    for _ in range(2):  # what is kept stays as it is
        peer.go_back(start)
        assert_same(peer.module.state_dict(), start["module"])
    for each in (peer, other):
        each.forward(make_batch(16, 9)).task_loss.backward()
        each.optimizer.step()
    assert_same(peer.module.state_dict(), other.module.state_dict())


@pytest.mark.parametrize("averages", [False, True])
def test_a_resume_from_every_run_file_equals_the_uninterrupted_run(tmp_path, averages):
    def trainer(folder, seed=0):
        peers = trained(make_peers(3, seed=seed, dropout=0.3))
        peers = averaged(peers) if averages else peers
        return spoilt_trainer(folder, peers, save_every=6, keep=100)

    torch.manual_seed(0)
    whole = trainer(tmp_path / "whole")
    whole.fit()
    assert len(whole.guard.events) == 6
    for run in list_runs(tmp_path / "whole"):
        torch.manual_seed(12345)
        again = trainer(tmp_path / "again", seed=7)
        again.resume(load_run(run), source=tmp_path / "whole")
        again.fit()
        assert_same(final(again), final(whole))
        assert again.guard.events == whole.guard.events
        for name in ("p0", "p1", "p2"):
            files = [tmp_path / f / name / "last.safetensors" for f in ("whole", "again")]
            assert_same(*map(read_weights, files))


def test_a_run_that_kept_nothing_takes_the_best_file(tmp_path):
    spoilt_trainer(tmp_path, guard=Bounds(), epochs=1).fit()
    trainer = spoilt_trainer(tmp_path)
    trainer.resume(load_run(tmp_path))
    trainer.fit()
    best = read_weights(tmp_path / "p0" / "best.safetensors")
    assert_same(trainer.peers[0].module.state_dict(), best)
    assert trainer.guard.events[0]["action"] == UNTAUGHT


class SpoiltShares(ShardedLoader):
    def __iter__(self):
        for x, y in super().__iter__():
            yield x, (y + (self.epoch > 0)) % CLASSES


def spoilt_run(world, folder, engine, resume=None):
    torch.manual_seed(world.rank)
    peers = seated_group(world, trained(make_peers(2)))
    for peer in peers.here:
        peer.distribute(world)
    trainer = make_trainer(
        folder, peers=peers, loader=SpoiltShares(world, batches=12), world=world, epochs=9,
        guard=ROLLBACK, save_every=6, keep=9,
    )  # fmt: skip
    trainer.engine = build_engine(engine, peers, trainer.transfer, world)
    trainer.evaluator = Seated(world)
    if resume:
        trainer.resume(load_run(resume), source=resume.parent)
    trainer.fit()
    assert [e["action"] for e in trainer.guard.events] == [UNTAUGHT] * 2 + [STOPPED] * 2


def spoilt_runs(world, folder, engine):
    if engine == "peer-parallel":
        world = distributed.seat_peers(world, 2)
    spoilt_run(world, folder / "many", engine)
    spoilt_run(world, folder / "again", engine, folder / "many" / "run-00002-00000006.pt")


@pytest.mark.parametrize("engine", ["joint", "peer-parallel"])
def test_several_processes_roll_back_as_one_does_and_resume(tmp_path, engine):
    spoilt_run(HERE, tmp_path / "one", "joint")
    launch(spoilt_runs, 2, tmp_path, engine)
    for name in ("p0", "p1"):
        last = [
            read_weights(tmp_path / which / name / "last.safetensors")
            for which in ("one", "many", "again")
        ]
        torch.testing.assert_close(last[1], last[0])
        assert_same(last[2], last[1])


def test_the_report_tells_of_it(tmp_path, caplog):
    trainer = spoilt_trainer(tmp_path, guard=Bounds("warn", patience=2), epochs=4)
    trainer.fit()
    assert "epoch 3: p0 got worse: top1" in caplog.text
    page = finish(trainer, {}).read_text()
    assert "<h2>Guard" in page and "warned" in page
    assert not any(peer.frozen for peer in trainer.peers)
