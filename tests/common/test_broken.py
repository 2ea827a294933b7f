"""Broken files: replaced by position alone, counted once, refused by name where there are many."""

import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from common.broken import (
    BadSample,
    BadSampleError,
    BadSamples,
    Counted,
    Replaced,
    WorkerDiedError,
    other_index,
    read_or_replace,
    sound,
    worker_deaths_told,
)
from common.checkpoint import list_runs, load_run
from tests.common.toy import ToyLoader, make_trainer
from tests.launch import launch

BROKEN = {3: "cut off", 7: "empty"}


class Numbers(Dataset):
    """Twenty numbers, of which some are broken."""

    def __init__(self, most, broken=BROKEN):
        self.most, self.broken = most, broken

    def __len__(self):
        return 20

    def read(self, index):
        if index in self.broken:
            raise OSError(f"{index}.png: {self.broken[index]}")
        return index

    def __getitem__(self, index):
        return read_or_replace(
            self.read, index, lambda k: other_index(20, 5, index, k), (OSError,), self.most
        )


def join(samples):
    found, bad = sound(samples)
    return torch.tensor(found) if len(found) == len(samples) else None, bad


def batches_of(bad, workers=0, broken=BROKEN, evaluating=False):
    loader = DataLoader(
        Numbers(bad.most, broken), 4, num_workers=workers, collate_fn=join, pin_memory=False
    )
    return [batch.tolist() for batch in Counted(loader, bad, evaluating)]


def test_others_take_the_place_of_broken_ones_whoever_reads(caplog):
    bad = BadSamples(2)
    one, two = batches_of(bad), batches_of(BadSamples(2), workers=2)
    assert one == two
    assert [x for batch in one for x in batch if x not in (3, 7)] != list(range(20))
    kept = [x == k for k, x in enumerate(x for batch in one for x in batch)]
    assert kept == [k not in BROKEN for k in range(20)]
    assert bad.found == {"3.png": "cut off", "7.png": "empty"}
    batches_of(bad)
    assert len(bad.found) == 2 and caplog.text.count("3.png: cut off") == 2  # of two counts
    assert "replaced by others: 7.png: empty (2 of 2)" in caplog.text
    assert bad.summary() == "2 broken files were done without: 3.png: cut off; 7.png: empty."


@pytest.mark.parametrize("workers", [0, 2])
def test_one_more_than_allowed_stops_and_names_them(workers):
    with pytest.raises(BadSampleError, match=r"^3\.png: cut off; mend or remove it, or allow"):
        batches_of(BadSamples(), workers)
    told = r"^2 broken files, 1 are allowed \(--max-bad-samples\): 3\.png: cut off; 7\.png: empty; "
    with pytest.raises(BadSampleError, match=told):
        batches_of(BadSamples(1), workers)
    many = {k: "gone" for k in range(10)}
    with pytest.raises(BadSampleError, match=r"4\.png: gone; and \d+ more; mend"):
        batches_of(BadSamples(7), workers, many)


def test_who_does_not_tell_counts_all_the_same(caplog):
    bad = BadSamples(2)
    bad.tells = False
    batches_of(bad)
    assert len(bad.found) == 2 and not caplog.text


def test_where_nothing_can_replace_it_the_run_stops():
    with pytest.raises(BadSampleError, match=r"\.png: gone; no sound sample is found"):
        batches_of(BadSamples(50), broken={k: "gone" for k in range(20)})


def test_what_evaluations_leave_out_is_told_apart(caplog):
    bad = BadSamples(3)
    bad.add([BadSample("a", "x")])
    bad.add([BadSample("a", "x"), BadSample("b", "y")], evaluating=True)
    bad.add([BadSample("b", "y")], evaluating=True)
    assert caplog.text.count("left out of evaluations") == 2
    assert "Evaluations left out 2 of them, for all peers alike" in bad.summary()
    bad.tell_evaluation(2, 10)
    assert "evaluated without 2 of 10 samples" in caplog.text


def test_a_message_without_a_file_is_its_own_name():
    assert BadSample.of(ValueError("a: b: c")) == ("a", "b: c")
    assert BadSample.of(ValueError("all")) == ("all", "ValueError")
    assert sound([1, Replaced(2, [BadSample("a", "x")])]) == ([1, 2], [("a", "x")])


class Meeting(ToyLoader):
    """Meets a broken file in the second batch of every epoch, another in the second epoch."""

    bad = None

    def __iter__(self):
        for k, batch in enumerate(super().__iter__(), self.start):
            if k == 1:
                self.bad.add([BadSample("a.png", "cut off")])
                self.bad.add([BadSample("b.png", "empty")] if self.epoch == 1 else [])
            yield batch


def meeting(folder, most, **plan):
    trainer = make_trainer(folder, loader=Meeting(), keep=99, **plan)
    trainer.bad = trainer.loader.bad = BadSamples(most)
    return trainer


def test_the_count_survives_a_resume(tmp_path):
    trainer = meeting(tmp_path, 2)
    trainer.fit()
    assert trainer.notes() == [trainer.bad.summary()] and "2 broken files" in trainer.notes()[0]
    again = meeting(tmp_path / "again", 2)
    again.resume(load_run(list_runs(tmp_path)[-1]), source=tmp_path)
    assert again.bad.found == {"a.png": "cut off", "b.png": "empty"}
    stricter = meeting(tmp_path / "stricter", 1)
    stricter.resume(load_run(list_runs(tmp_path)[0]), source=tmp_path)
    with pytest.raises(BadSampleError, match="2 broken files, 1 are allowed"):
        stricter.fit()
    assert not list_runs(tmp_path / "stricter")


def test_ranks_count_together(tmp_path):
    launch(_each_its_own, 2, tmp_path)
    told = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert all("2 broken files, 1 are allowed" in line for line in told)


def _each_its_own(world, folder):
    bad = BadSamples(1)
    bad.add([BadSample("same.png" if world.rank else "other.png", "empty")])
    told = ""
    try:
        bad.share()
    except BadSampleError as error:
        told = str(error)
    (folder / str(world.rank)).write_text(told)


class Dying(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_worker_that_is_killed_is_told_with_the_way_out():
    with pytest.raises(WorkerDiedError) as told, worker_deaths_told():
        list(DataLoader(Dying(), num_workers=1))
    assert "a process that reads data" in str(told.value) and "--workers" in str(told.value)
    assert "for want of memory" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(("name", "cause"), [("Bus error", "/dev/shm"), ("Killed", "memory")])
def test_the_signal_is_found_behind_torchs_second_error(name, cause):
    def die():
        try:
            raise RuntimeError(f"DataLoader worker (pid 7) is killed by signal: {name}. ")
        except RuntimeError as error:
            raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly") from error

    told = f"by the signal '{name}', most .*{cause}"
    with pytest.raises(WorkerDiedError, match=told), worker_deaths_told():
        die()


@pytest.mark.parametrize("lost", [ConnectionResetError, EOFError, FileNotFoundError])
def test_a_connection_that_breaks_on_the_way_is_one_too(lost):
    fetch = "def fetch(): raise lost('gone')"
    told = "exited unexpectedly, most .* memory"
    sender = {"__name__": "multiprocessing.resource_sharer", "lost": lost}
    exec(fetch, sender)
    with pytest.raises(WorkerDiedError, match=told), worker_deaths_told():
        sender["fetch"]()
    other = {"__name__": "my.module", "lost": lost}
    exec(fetch, other)
    with pytest.raises(lost), worker_deaths_told():
        other["fetch"]()


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="mine"), worker_deaths_told():
        raise RuntimeError("mine")
