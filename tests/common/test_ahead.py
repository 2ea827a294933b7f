"""Reading across the end of an epoch: the same batches in the same order, and no further ahead."""

import os
import threading
import time

import pytest
import torch
from torch.utils.data import Dataset

from common.ahead import ReadAhead, Received

COUNT, SIZE, SAMPLES = 4, 3, 11


def draws(epoch, start):
    generator = torch.Generator().manual_seed(epoch)
    order = torch.randperm(SAMPLES, generator=generator).tolist()
    return ((epoch, index) for index in order[start:])


class Asked(Dataset):
    """Gives back what it is asked for; writes down what was."""

    def __init__(self, folder=None, broken=None):
        self.folder, self.broken = folder, broken

    def __getitem__(self, draw):
        if self.folder is not None:
            (self.folder / "-".join(map(str, draw))).touch()
        if draw == self.broken:
            raise ValueError(f"{draw} cannot be read")
        return draw


def reader(workers=0, **data):
    return ReadAhead(
        Asked(**data), draws, SIZE, COUNT, seed=0, workers=workers, collate_fn=lambda found: found
    )


def naive(epoch, start=0):
    order = list(draws(epoch, 0))
    return [order[k : k + SIZE] for k in range(0, SAMPLES, SIZE)][start:COUNT]


def epoch_of(loader, epoch, start=0):
    loader.set_epoch(epoch, start)
    return list(loader)


def settled(folder, count):
    """Wait until so many samples were read, and then some time for one too many."""
    ends = time.monotonic() + 60
    while len(list(folder.iterdir())) < count and time.monotonic() < ends:
        time.sleep(0.01)
    time.sleep(0.2)
    return {tuple(map(int, path.name.split("-"))) for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_epochs_follow_repeat_and_begin_in_their_middle(workers):
    loader = reader(workers)
    assert len(loader) == COUNT
    for epoch in (0, 1, 2, 2, 7, 0):
        assert epoch_of(loader, epoch) == naive(epoch)
    assert epoch_of(loader, 3, start=2) == naive(3, start=2)
    assert epoch_of(loader, 4) == naive(4)
    assert epoch_of(loader, 4, start=COUNT) == []
    assert epoch_of(loader, 5) == naive(5)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_was_left_goes_on_or_begins_anew(workers):
    loader = reader(workers)
    loader.set_epoch(6)
    batches = iter(loader)
    assert [next(batches), next(batches)] == naive(6)[:2]
    assert epoch_of(loader, 6, start=2) == naive(6, start=2)
    loader.set_epoch(7)
    next(iter(loader))
    assert epoch_of(loader, 7) == naive(7)
    loader.set_epoch(8)
    next(iter(loader))
    assert epoch_of(loader, 9, start=1) == naive(9, start=1)


def test_the_next_epoch_is_read_while_nobody_asks_and_no_further(tmp_path):
    loader = reader(1, folder=tmp_path)
    window = 2 + 1  # batches that torch's loader has under way for a process, and the received one
    loader.set_epoch(0)
    first = {draw for batch in naive(0)[:window] for draw in batch}
    assert settled(tmp_path, len(first)) == first
    assert list(loader) == naive(0)
    ahead = {draw for batch in naive(1)[:window] for draw in batch}
    assert settled(tmp_path, SAMPLES + len(ahead)) == {draw for draw in draws(0, 0)} | ahead


def test_a_batch_is_received_while_nobody_asks_for_it_and_its_fault_told_in_its_turn():
    received = threading.Semaphore(0)

    def batches():
        for number in range(3):
            received.release()
            yield number
        received.release()
        raise ValueError("the fourth cannot be read")

    found = Received(batches())
    assert received.acquire(timeout=60)
    for number in range(3):
        assert next(found) == number
        assert received.acquire(timeout=60)
    with pytest.raises(ValueError, match="the fourth"):
        next(found)


def test_the_same_processes_read_all_epochs():
    class Where(Dataset):
        def __getitem__(self, draw):
            return os.getpid()

    loader = ReadAhead(Where(), draws, SIZE, COUNT, seed=0, workers=2)
    found = {int(pid) for epoch in (0, 1, 5) for x in epoch_of(loader, epoch) for pid in x}
    assert len(found) == 2 and os.getpid() not in found


def test_no_generator_of_the_process_is_touched():
    before = torch.get_rng_state()
    epoch_of(reader(1), 0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_is_told_where_its_batch_is_asked_for(workers):
    loader = reader(workers, broken=naive(1)[0][0])
    assert epoch_of(loader, 0) == naive(0)  # though it was met by then
    loader.set_epoch(1)
    batches = iter(loader)
    with pytest.raises(ValueError, match="cannot be read"):
        next(batches)
    assert epoch_of(loader, 1, start=1) == naive(1, start=1)
