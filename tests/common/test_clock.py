"""The share of a loop that waits for its data, by a clock that the test turns."""

import pytest

from common import clock
from common.outputs import progress_bars
from tests.common.toy import ToyLoader, make_trainer


@pytest.fixture
def now(monkeypatch):
    hand = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: hand[0])
    return hand


def test_the_loops_time_is_split_into_waiting_and_the_rest(now):
    def slow():
        for i in range(3):
            now[0] += 2.0
            yield i

    loop, seen = clock.LoopClock(), []
    for batch in loop.around(slow()):
        now[0] += 6.0
        loop.saw(4)
        seen.append(batch)
        if batch == 1:
            pace = loop.read()
            assert (pace.seconds, pace.waited, pace.samples) == (16.0, 4.0, 8)
            assert pace.data_share == 0.25 and pace.samples_per_second == 0.5
            assert pace.batches == 2 and pace.seconds_of(3) == 24.0
    assert seen == [0, 1, 2]
    assert loop.read() == clock.Pace(8.0, 2.0, 4, 1)
    assert loop.look().seconds_of(3) == 0
    assert loop.read().data_share == 0 and loop.read().samples_per_second == 0


def test_what_is_waited_for_data_is_logged_and_written(now, tmp_path, caplog):
    class Slow(ToyLoader):
        def __iter__(self):
            for batch in super().__iter__():
                now[0] += 1.0
                yield batch

    trainer, rows = make_trainer(tmp_path, loader=Slow(), epochs=1), []
    step = trainer.engine.step

    def turned(*args, **rest):
        now[0] += 3.0
        return step(*args, **rest)

    trainer.engine.step = turned
    trainer.writers = [lambda scalars, step: rows.append(dict(scalars))]
    with caplog.at_level("INFO"):
        trainer.fit()
    training = [row for row in rows if "data_share" in row]
    assert [row["data_share"] for row in training] == [0.25] * 3
    assert [row["samples_per_second"] for row in training] == [4.0] * 3
    told = [message for message in caplog.messages if "waited for data 25.0%" in message]
    # four seconds a batch; of the six there are four, two and none left
    assert [message.rpartition("eta ")[2] for message in told] == ["0:00:16", "0:00:08", "0:00:00"]


def test_a_log_tells_the_phases_before_the_first_losses(now, tmp_path, caplog):
    trainer = make_trainer(tmp_path, epochs=1, log_every=1000)
    with caplog.at_level("INFO"):
        trainer.fit()
    phases = [x for x in caplog.messages if not x.startswith("epoch")]
    assert phases[:3] == [
        "evaluating the start",
        "training: 1 epoch of 6 optimizer steps; losses come every 1000",
        "first step after 0.0 s, of which 0.0 waited for data",
    ]
    assert phases[3] == "evaluating epoch 1" and "loss" not in "".join(phases[3:])


def test_what_a_bar_would_show_is_a_line_twice_a_minute(now, caplog, monkeypatch):
    def slow(count):
        for i in range(count):
            now[0] += 20.0
            yield i

    with caplog.at_level("INFO"):
        assert list(clock.with_lines(slow(4), "looking")) == [0, 1, 2, 3]
    assert caplog.messages == ["looking: 2, 20.00 s each", "looking: 4, 20.00 s each"]
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    caplog.clear()
    with caplog.at_level("INFO"):
        for _ in progress_bars(True)([7, 8], "reading"):
            now[0] += 31.0
        assert list(progress_bars(True, lines=False)([7], "x")) == [7]
    assert caplog.messages == ["reading: 1 of 2, 31.00 s each", "reading: 2 of 2, 31.00 s each"]
