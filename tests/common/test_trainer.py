"""The trainer: exact resume from any point, exports, best weights, faults."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common.termination
from common.checkpoint import CheckpointError, list_runs, load_run, read_weights
from common.roles import NonFiniteError
from common.termination import Preempted
from tests.common.toy import ToyLoader, make_peers, make_trainer
from tests.launch import launch


def final(trainer):
    return {
        "peers": {peer.name: peer.state_dict() for peer in trainer.peers},
        "history": trainer.progress.history,
        "lessons": trainer.progress.lessons,
        "rng": torch.get_rng_state(),
    }


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("rule", ["best", "random"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_resume_from_every_run_file_equals_the_uninterrupted_run(tmp_path, rule, accumulate):
    torch.manual_seed(0)
    whole = make_trainer(
        tmp_path / "whole", rule=rule, save_every=1, keep=100, accumulate=accumulate
    )
    whole.fit()
    expected = final(whole)
    runs = list_runs(tmp_path / "whole")
    assert len(runs) > 5
    for run in runs:
        torch.manual_seed(12345)
        again = make_trainer(
            tmp_path / "again",
            peers=make_peers(3, seed=7, dropout=0.3),
            rule=rule,
            accumulate=accumulate,
        )
        again.resume(load_run(run), source=tmp_path / "whole")
        again.fit()
        assert_same(final(again), expected)


def test_a_run_in_float32_goes_on_in_float16(tmp_path, caplog):
    first = make_trainer(tmp_path, epochs=1)
    first.fit()
    again = make_trainer(tmp_path, epochs=2, amp_dtype=torch.float16)
    again.resume(load_run(tmp_path))
    assert "did not scale its loss" in caplog.text
    again.fit()
    assert again.engine.scaler.is_enabled() and again.progress.epoch == 2
    back = make_trainer(tmp_path, epochs=3)
    back.resume(load_run(tmp_path))
    assert back.fit().epoch == 3


SCRIPT = """
import sys, torch
from pathlib import Path
from common.checkpoint import list_runs, load_run
from tests.common.toy import ToyLoader, make_trainer
torch.manual_seed(0)
folder = Path(sys.argv[1])
class Slow(ToyLoader):
    def __iter__(self):
        import time
        for batch in super().__iter__():
            time.sleep(float(sys.argv[2]))
            yield batch
trainer = make_trainer(folder, loader=Slow(), save_every=2, epochs=4)
if list_runs(folder):
    trainer.resume(load_run(folder))
trainer.fit()
"""


def test_kill_9_then_resume_equals_the_uninterrupted_run(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    def start(folder, delay):
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(delay)], env=env)

    assert start(tmp_path / "whole", 0).wait() == 0
    killed = start(tmp_path / "killed", 0.05)
    deadline = time.monotonic() + 120
    while len(list_runs(tmp_path / "killed")) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))  # a random step of the 24, not always the same
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "p0" / "last.safetensors").exists()
    assert start(tmp_path / "killed", 0).wait() == 0
    for name in ("p0", "p1", "p2"):
        for which in ("best", "last"):
            a = read_weights(tmp_path / "whole" / name / f"{which}.safetensors")
            b = read_weights(tmp_path / "killed" / name / f"{which}.safetensors")
            assert_same(a, b)
    whole, killed = (load_run(tmp_path / which) for which in ("whole", "killed"))
    assert_same(whole["peers"], killed["peers"])
    assert_same(whole["progress"], killed["progress"])


def test_the_rate_follows_the_position_of_the_run(tmp_path):
    make_trainer(tmp_path, epochs=2).fit()
    resumed = make_trainer(tmp_path)
    resumed.resume(load_run(tmp_path), optimizer=False)
    begun = make_trainer(tmp_path / "begun", accumulate=4)
    begun.begin_at(2)
    for trainer in (resumed, begun):
        assert [peer.lr for peer in trainer.peers] == [0.1 * 0.5**2] * 3
    assert (begun.progress.epoch, begun.progress.updates) == (2, 4)
    assert begun.fit().history[-1]["epoch"] == 3


def test_best_weights_are_those_of_the_best_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, epochs=4)
    values = iter([50.0, 60.0, 55.0, 60.0, 10.0])
    snapshots = {}

    def evaluate(peers):
        value = next(values)
        snapshots.setdefault(value, peers[0].module[0].weight.detach().clone())
        return {f"{peer.name}/top1": value for peer in peers}

    trainer.evaluator.evaluate = evaluate
    progress = trainer.fit()
    assert (progress.best["p0"].value, progress.best["p0"].epoch) == (60.0, 1)
    best = read_weights(tmp_path / "p0" / "best.safetensors")["0.weight"]
    assert torch.equal(best, snapshots[60.0])
    last = read_weights(tmp_path / "p0" / "last.safetensors")["0.weight"]
    assert torch.equal(last, snapshots[10.0])


def test_lower_can_be_better_and_evaluations_can_be_rare(tmp_path):
    trainer = make_trainer(
        tmp_path, epochs=5, evaluate_every=2, lower_is_better=True, metric="loss"
    )
    values = iter([3.0, 2.0, 4.0, 1.0])
    trainer.evaluator.evaluate = lambda peers: dict.fromkeys(
        (f"{name}/loss" for name in peers.names), next(values)
    )
    progress = trainer.fit()
    assert [row["epoch"] for row in progress.history] == [0, 2, 4, 5]
    assert progress.best["p1"].value == 1.0


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(tmp_path):
    class Broken(ToyLoader):
        def __iter__(self):
            for x, y in super().__iter__():
                yield x * float("nan") if self.epoch == 1 else x, y

    trainer = make_trainer(tmp_path, loader=Broken())
    with pytest.raises(NonFiniteError, match="p0"):
        trainer.fit()
    assert [path.name for path in list_runs(tmp_path)] == ["run-00001-00000000.pt"]


def test_a_finished_run_whose_best_file_is_gone_measures_it_anew(tmp_path):
    make_trainer(tmp_path, epochs=1).fit()
    (tmp_path / "p1" / "best.safetensors").unlink()
    again = make_trainer(tmp_path, epochs=1)
    again.resume(load_run(tmp_path))
    assert again.fit().best["p1"].epoch == 1
    assert (tmp_path / "p1" / "best.safetensors").is_file()


def test_broken_weights_do_not_take_the_place_of_sound_ones(tmp_path):
    trainer = make_trainer(tmp_path, epochs=1, keep=1)
    trainer.fit()
    with torch.no_grad():
        trainer.peers[1].module[0].weight[0, 0] = float("inf")
    trainer.progress.batch = 3
    with pytest.raises(NonFiniteError, match="weights of p1 are not finite at step 6; lower"):
        trainer.save()
    assert [path.name for path in list_runs(tmp_path)] == ["run-00001-00000000.pt"]


def test_other_peers_are_refused(tmp_path):
    make_trainer(tmp_path, epochs=1).fit()
    with pytest.raises(CheckpointError, match=r"holds the peers p0, p1, p2; this run has p0, p1"):
        make_trainer(tmp_path, peers=make_peers(2)).resume(load_run(tmp_path))


def test_other_models_and_optimizers_are_refused_by_peer(tmp_path):
    make_trainer(tmp_path, epochs=1).fit()
    state = load_run(tmp_path)
    p0, _, p2 = make_peers(3)
    with pytest.raises(CheckpointError, match=r"peer 'p2': not a checkpoint .*shape: 0.weight"):
        p2.load_state_dict(state["peers"]["p0"])
    p0.optimizer = torch.optim.AdamW(p0.module.parameters())
    with pytest.raises(CheckpointError, match=r"peer 'p0': state of SGD, not of AdamW; .*-opt"):
        p0.load_state_dict(state["peers"]["p0"])
    groups = [{"params": [p], "lr": 0.1} for p in p0.module.parameters()]
    p0.optimizer = torch.optim.SGD(groups)
    with pytest.raises(CheckpointError, match=r"different number of parameter groups"):
        p0.load_state_dict(state["peers"]["p0"])
    p0.load_state_dict(state["peers"]["p0"], optimizer=False)


def test_the_average_of_the_weights_is_what_is_evaluated_and_exported(tmp_path):
    from timm.utils import ModelEmaV3

    peers = make_peers(2)
    for peer in peers:
        peer.average = ModelEmaV3(peer.module, decay=0.9)
    trainer = make_trainer(tmp_path, peers=peers, epochs=2)
    trainer.fit()
    exported = read_weights(tmp_path / "p0" / "last.safetensors")
    assert torch.equal(exported["0.weight"], peers[0].average.module[0].weight)
    assert not torch.equal(exported["0.weight"], peers[0].module[0].weight)
    state = load_run(tmp_path)["peers"]["p0"]
    assert torch.equal(state["average"]["0.weight"], exported["0.weight"])


def test_writers_see_scalars_of_peers_and_pairs(tmp_path):
    seen = {}
    trainer = make_trainer(tmp_path, epochs=1)
    trainer.writers = [lambda scalars, step: seen.update(scalars)]
    trainer.fit()
    assert {"p0/lr", "p1/task_loss", "transfer/p0->p1/share", "eval/p2/top1"} <= seen.keys()
    assert (tmp_path / "summary.csv").read_text().startswith("epoch,p0/top1,p1/top1,p2/top1")
    assert "transfer/entropy" in (tmp_path / "ledger.csv").read_text()


def test_another_number_of_processes_starts_the_interrupted_epoch_anew(tmp_path, caplog):
    trainer = make_trainer(tmp_path, save_every=4, keep=99)
    trainer.fit()
    state = load_run(tmp_path / "run-00001-00000002.pt")
    state["ranks"] = state["ranks"] * 2
    again = make_trainer(tmp_path / "again")
    again.resume(state, source=tmp_path)
    assert (again.progress.epoch, again.progress.batch, again.progress.updates) == (1, 0, 6)
    assert "the interrupted epoch starts anew" in caplog.text
    again.fit()


@pytest.mark.parametrize(("batches", "accumulate", "updates"), [(12, 1, 12), (3, 1, 3), (6, 2, 3)])
def test_other_batches_start_the_interrupted_epoch_anew(
    tmp_path, caplog, batches, accumulate, updates
):
    trainer = make_trainer(tmp_path, save_every=4, keep=99)
    trainer.fit()
    state = load_run(tmp_path / "run-00001-00000002.pt")
    loader = ToyLoader(batches)
    again = make_trainer(tmp_path / "again", loader=loader, epochs=2, accumulate=accumulate)
    again.resume(state, source=tmp_path)
    assert (again.progress.epoch, again.progress.batch, again.progress.updates) == (1, 0, updates)
    assert "the run had 6 batches an epoch, 1 an optimizer step" in caplog.text
    again.fit()
    assert again.progress.lessons[-1]["epoch"] == 2
    assert again.progress.updates == 2 * updates


def test_sigterm_saves_and_the_resumed_run_equals_the_uninterrupted_one(tmp_path):
    whole = make_trainer(tmp_path / "whole")
    torch.manual_seed(0)
    whole.fit()

    class Terminated(ToyLoader):
        def __iter__(self):
            for k, batch in enumerate(super().__iter__()):
                if (self.epoch, k) == (1, 2):
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    cut = make_trainer(tmp_path / "cut", loader=Terminated())
    torch.manual_seed(0)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match=r"saved after 9 optimizer steps; go on with --resume"):
        cut.fit()
    assert signal.getsignal(signal.SIGTERM) is before
    again = make_trainer(tmp_path / "cut")
    again.resume(load_run(tmp_path / "cut"))
    assert (again.progress.epoch, again.progress.batch) == (1, 3)
    again.fit()
    for one, other in zip(whole.peers, again.peers, strict=True):
        for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True):
            assert torch.equal(a, b)


class Slow(ToyLoader):
    """Calls ``at(k)`` at the k-th batch of an epoch, ``at(None)`` before; each takes a while."""

    def __init__(self, batches, seconds, at):
        super().__init__(batches)
        self.seconds, self.at = seconds, at

    def set_epoch(self, *given):
        super().set_epoch(*given)
        self.at(None)

    def __iter__(self):
        for k, batch in enumerate(super().__iter__(), 1):
            self.at(k)
            time.sleep(self.seconds)
            yield batch


def _terminated(world, folder, signalled, updates):
    def at(k):
        if world.rank == 0 and k == signalled:
            trainer.termination._note(15, None)

    loader = Slow(6, 0, at)
    trainer = make_trainer(folder, world=world, epochs=2, log_every=50, loader=loader)
    with pytest.raises(Preempted):
        trainer.fit()
    assert trainer.progress.updates == updates
    assert len(trainer.progress.history) == min(updates, 1)  # the start's


@pytest.mark.parametrize(("signalled", "updates"), [(1, 1), (3, 4), (6, 6), (None, 0)])
def test_a_signal_to_one_rank_ends_all_a_step_later_or_where_they_would_evaluate(
    tmp_path, signalled, updates
):
    launch(_terminated, 2, tmp_path, signalled, updates)
    if not updates:
        assert not list_runs(tmp_path)
        return
    progress = load_run(tmp_path)["progress"]
    assert (progress["updates"], progress["epoch"]) == (updates, 0)


def _terminated_in_slow_steps(world, folder):
    def at(k):
        if world.rank == 1 and k == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    loader = Slow(20, 0.2 if world.rank else 0.0, at)  # the signalled rank is the slow one
    trainer = make_trainer(folder, world=world, epochs=1, log_every=1000, loader=loader)
    with pytest.raises(Preempted):
        trainer.fit()


def test_with_slow_steps_ranks_end_in_the_one_that_was_signalled(tmp_path, monkeypatch):
    monkeypatch.setattr(common.termination, "SLOW", 0.1)
    launch(_terminated_in_slow_steps, 2, tmp_path)
    progress = load_run(tmp_path)["progress"]
    assert (progress["epoch"], progress["updates"]) == (0, 8)
